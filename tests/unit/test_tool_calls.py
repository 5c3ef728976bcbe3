"""Tool calls in text: read alike however the text is cut, and held to their form by a grammar."""

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Grammar
from gateway.tool_calls import Call, CallReader, Tool, call_text, calls_grammar, joined, read_answer
from workers.grammar_trial import LIMITS, attempt

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city"],
    "$defs": {"Days": {"type": "integer", "title": "A ::= in a text"}},
}
WEATHER = Tool("get_weather", "The weather.", CITY)
CLOCK = Tool("now", "", {})
PARIS = call_text("get_weather", {"city": "Paris"})
TIME = call_text("now", {})


def test_text_and_calls() -> None:
    text, calls = read_answer(f"Let me look.\n{PARIS}\n{TIME}\n")
    assert text == "Let me look.\n"
    assert calls == [Call("get_weather", '{"city": "Paris"}'), Call("now", "{}")]


@pytest.mark.parametrize(
    "text",
    ["", "plain", "a < b", "<tool_call", "<tool_call> is a tag", "<tool_call></tool_call>",
     '<tool_call>\n{"name": "f", "argu', "<tool_call>\n{}\n</tool_call>"],
)  # fmt: skip
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read_answer(text) == (text, [])


def test_a_call_that_was_cut_off_keeps_what_there_is() -> None:
    cut_off = PARIS[: PARIS.index("ris")]
    assert read_answer(cut_off) == ("", [Call("get_weather", '{"city": "Pa')])


def test_signs_of_json_in_texts_are_texts() -> None:
    arguments = {"a": '}"{]\\', "b": [{"c": "<tool_call>"}, [1]], "d": "</tool_call>"}
    (call,) = read_answer(call_text("f", arguments))[1]
    assert json.loads(call.arguments) == arguments


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
calls = st.tuples(st.sampled_from(["f", "get-it_2"]), st.dictionaries(st.text(max_size=4), values))


@settings(deadline=None)
@given(st.text(alphabet="ab <_>tolc", max_size=12), st.lists(calls, max_size=3), st.data())
def test_cuts_do_not_matter(before: str, made: list[tuple[str, Any]], data: st.DataObject) -> None:
    """What is read in parts is what is read at once; and that is what was written."""
    text = before + "\n".join(call_text(name, arguments) for name, arguments in made)
    reader, parts, rest = CallReader(), [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts += reader.feed(rest[:size])
        rest = rest[size:]
    parts += reader.close()
    assert joined(parts) == read_answer(text)
    if "<" not in before:
        read = [(call.name, json.loads(call.arguments)) for call in read_answer(text)[1]]
        assert read == made


def holds(grammar: str, text: str) -> bool:
    """Whether ``text`` is an answer of ``grammar``, byte by byte."""
    definition, refusal = attempt(Grammar("ebnf", grammar))
    assert refusal == ""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, definition, limits=LIMITS)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


TOOLS = [WEATHER, CLOCK]
BAD = [
    call_text("get_weather", {"town": "Paris"}),
    call_text("get_weather", {}),
    call_text("other", {}),
    call_text("now", {"x": 1}),
    PARIS + " and more",
]


@pytest.mark.parametrize("may_talk", [True, False])
@pytest.mark.parametrize("is_parallel", [True, False])
def test_the_grammar(*, may_talk: bool, is_parallel: bool) -> None:
    grammar = calls_grammar(TOOLS, may_talk=may_talk, is_parallel=is_parallel)
    assert holds(grammar, PARIS)
    assert holds(grammar, call_text("get_weather", {"city": "Ré{}\n", "days": 2}))
    assert holds(grammar, TIME)
    assert holds(grammar, f"{PARIS}\n{TIME}") == is_parallel
    for text in ("Hello <b>.", "a <tool_cal"):
        assert holds(grammar, text) == may_talk
    assert holds(grammar, f"Wait: {PARIS}") == may_talk
    for text in BAD:
        assert not holds(grammar, text)
        assert not holds(grammar, f"Wait: {text}")


def test_an_answer_of_a_form_beside_calls() -> None:
    schema = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
    grammar = calls_grammar(TOOLS, may_talk=True, is_parallel=True, talk_schema=schema)
    assert holds(grammar, '{"a": 1}')
    assert holds(grammar, PARIS)
    assert not holds(grammar, "plain")


def test_what_a_schema_cannot_hold_is_ignored_unless_strict() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    lenient = calls_grammar([Tool("f", "", odd)], may_talk=False, is_parallel=False)
    assert holds(lenient, call_text("f", {"a": []}))
    strict = calls_grammar([Tool("f", "", odd, is_strict=True)], may_talk=False, is_parallel=False)
    assert "uniqueItems" in attempt(Grammar("ebnf", strict))[1]
