"""What matchers let through matches, whatever a model wants to say; references judge it."""

import ast
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer as Backend
from tokenizers import models

from common.messages import Grammar
from common.models.tokenizer import Tokenizer
from tests.support.engines import byte_fallback_tokenizer
from tests.support.matching import (
    ids_in,
    matcher_of,
    schema_of,
    text_of,
    tiny_tokenizer,
    tiny_vocabulary,
    walk,
)
from tests.support.tiny_model import EOS_TOKEN_IDS
from workers.engine.grammar import GrammarError
from workers.guided import Vocabulary

ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 9999},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 20},
                "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            },
            "required": ["name", "code"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {"$ref": "#/$defs/line"},
        },
        "state": {"enum": ["new", "paid", None, 7]},
        "weight": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "since": {"type": "string", "format": "date"},
    },
    "required": ["id", "customer", "lines", "state", "weight"],
    "additionalProperties": False,
    "$defs": {
        "line": {
            "type": "object",
            "properties": {"sku": {"type": "string"}, "parts": {"$ref": "#/$defs/parts"}},
            "required": ["sku"],
        },
        "parts": {"type": "array", "items": {"$ref": "#/$defs/line"}, "maxItems": 2},
    },
}


def assert_valid(schema: dict[str, Any], text: str) -> None:
    Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(12))
def test_a_schema_with_all_that_people_use(seed: int) -> None:
    text = text_of(walk(matcher_of(schema_of(ORDER)), random.Random(seed)))
    assert_valid(ORDER, text)


names = st.sampled_from(["a", "bc", "né", 'q"', "x y"])
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-300, 300),
        st.integers(0, 500),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 4),
        st.integers(0, 8),
    ),
    st.sampled_from(["^a+b$", "^(x|yz){2,3}$", "^é.*$", "^[0-9]{2}:[0-9]{2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(st.sampled_from(["one", "ÿ", 2, None, True, 1.5]), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)


def structures(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 2},
        inner,
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, is_open: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[::2],
            "additionalProperties": is_open,
        },
        st.dictionaries(names, inner, max_size=3),
        st.booleans(),
    )
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda them: {"anyOf": them})
    return st.one_of(arrays, objects, unions)


@settings(max_examples=60, deadline=None)
@given(st.recursive(scalars, structures, max_leaves=6), st.integers(0, 2**32))
def test_whatever_the_schema_what_was_walked_is_valid(schema: dict[str, Any], seed: int) -> None:
    assert_valid(schema, text_of(walk(matcher_of(schema_of(schema)), random.Random(seed))))


@pytest.mark.parametrize("value", ["{}", '{"type":"object"}'])
def test_no_schema_means_any_object(value: str) -> None:
    for seed in range(5):
        tokens = walk(matcher_of(Grammar("json_schema", value)), random.Random(seed), free=10)
        assert isinstance(json.loads(text_of(tokens)), dict)


def test_blanks_between_the_parts_of_json_come_to_an_end() -> None:
    """A weak model would else say them until its length is used up."""
    matcher = matcher_of(Grammar("json_schema", "{}"))
    brace, blank = (tiny_tokenizer().encode(sign)[0] for sign in ("{", " "))
    matcher.accept(brace)
    assert 8 < matcher.count_allowed([blank] * 500) < 100


@pytest.mark.parametrize(
    "pattern",
    [
        "ab?c*",
        "(the|then|there)( end)?",
        r"^\d{3}-\d{4}$",
        "[A-Z][a-z]{2,5}(, [A-Z][a-z]{2,5}){0,2}",
        r"(\+|-)?[0-9]+(\.[0-9]+)?",
        "(?i)yes|no",
        "[😀-😎]{2,4}é+",
        "[^a-z\\n]{3,9}",
        "a/b\"c'd",
    ],
)
def test_the_whole_answer_matches_the_expression(pattern: str) -> None:
    for seed in range(8):
        text = text_of(walk(matcher_of(Grammar("regex", pattern)), random.Random(seed), free=12))
        assert re.fullmatch(pattern, text), text


ARITHMETIC = {
    "GBNF": """
root ::= expr
expr ::= term (" " [-+*] " " term)*
term ::= number | "(" expr ")"
number ::= [1-9] [0-9]*
""",
    "Lark": """
start: expr
expr: term (" " /[-+*]/ " " term)*
term: NUMBER | "(" expr ")"
NUMBER: /[1-9][0-9]*/
""",
}


@pytest.mark.parametrize("form", ARITHMETIC)
def test_an_answer_by_ebnf_is_of_its_language(form: str) -> None:
    """Sums are Python, so Python judges them; ``** `` and names, which it knows, never come."""
    for seed in range(8):
        matcher = matcher_of(Grammar("ebnf", ARITHMETIC[form]))
        rng = random.Random(seed)
        tokens = walk(matcher, rng, free=rng.randrange(1, 30)) if seed else walk(matcher, rng)
        tree = ast.parse(text_of(tokens), mode="eval")
        kinds = {type(node) for node in ast.walk(tree)}
        assert kinds <= {
            ast.Expression, ast.BinOp, ast.Constant, ast.Add, ast.Sub, ast.Mult,
        }  # fmt: skip


def test_an_answer_ends_where_its_grammar_may_and_with_any_of_the_ends() -> None:
    matcher = matcher_of(Grammar("regex", "ab?"))
    a, b = tiny_tokenizer().encode("a b")[0], tiny_tokenizer().encode("b")[0]
    assert not set(EOS_TOKEN_IDS) & set(ids_in(matcher.mask()))
    matcher.accept(a)
    assert set(ids_in(matcher.mask())) == {b, *EOS_TOKEN_IDS}
    matcher.accept(b)
    assert set(ids_in(matcher.mask())) == set(EOS_TOKEN_IDS)


def test_what_is_not_allowed_is_not_accepted() -> None:
    matcher = matcher_of(Grammar("regex", "ab"))
    with pytest.raises(GrammarError, match="grammar is not valid"):
        matcher.accept(tiny_tokenizer().encode("x")[0])


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_looking_ahead_takes_nothing(cut: int) -> None:
    """Drafts, right or wrong, leave the matcher as it was: masks are a function of the tokens."""
    answer = walk(matcher_of(schema_of(ORDER)), random.Random(3))
    looked, plain = matcher_of(schema_of(ORDER)), matcher_of(schema_of(ORDER))
    for token in answer[:cut]:
        looked.accept(token)
        plain.accept(token)
    draft = answer[cut : cut + 6]
    wrong = [*draft[:3], EOS_TOKEN_IDS[0], *draft[3:]]
    assert looked.count_allowed(draft) == len(draft)
    assert looked.count_allowed(wrong) == 3
    ahead = looked.masks(draft)
    assert looked.masks([]) == [pytest.approx(ahead[0])]
    for mask, token in zip(ahead, answer[cut:], strict=False):
        assert mask.tolist() == looked.mask().tolist() == plain.mask().tolist()
        looked.accept(token)
        plain.accept(token)


def test_a_draft_may_hold_the_end() -> None:
    matcher = matcher_of(Grammar("regex", "ab"))
    draft = [*tiny_tokenizer().encode("a"), *tiny_tokenizer().encode("b"), EOS_TOKEN_IDS[1]]
    assert matcher.count_allowed(draft) == 3
    masks = matcher.masks(draft[:2])
    assert set(ids_in(masks[2])) == set(EOS_TOKEN_IDS)
    assert len(matcher.masks(draft)) == 4
    assert matcher.mask().tolist() == masks[0].tolist()


def test_a_model_with_more_ids_than_its_tokenizer_never_chooses_those() -> None:
    tokenizer = tiny_tokenizer()
    padded = Vocabulary(tokenizer, tokenizer.vocab_size + 84, list(EOS_TOKEN_IDS))
    mask = matcher_of(Grammar("regex", r"(.|\n)*"), padded).mask()
    assert mask.shape == ((tokenizer.vocab_size + 84) // 32,)
    assert mask.flags.writeable
    assert max(ids_in(mask)) < tokenizer.vocab_size


def test_special_tokens_are_not_text() -> None:
    """A grammar that allows any text does not allow the model to open another turn."""
    mask = matcher_of(Grammar("regex", r"(.|\n)*"), tiny_vocabulary()).mask()
    special = tiny_tokenizer().special_ids
    assert special & set(ids_in(mask)) == set(EOS_TOKEN_IDS)


def test_tokens_of_single_bytes_make_characters() -> None:
    """As of the Llama 2 family, whose tokenizer falls back to bytes."""
    tokenizer = byte_fallback_tokenizer()
    eos = tokenizer.encode("</s>", add_special_tokens=False)
    matcher = matcher_of(Grammar("regex", "🦦👍"), Vocabulary(tokenizer, tokenizer.vocab_size, eos))
    taken: list[int] = []
    while (allowed := ids_in(matcher.mask())) != eos:
        taken.append(min(allowed))
        matcher.accept(taken[-1])
    assert tokenizer.decode(taken) == "🦦👍"
    assert len(taken) == 5, "four bytes and one whole token"


def test_a_tokenizer_without_bytes_has_no_grammars() -> None:
    words = Tokenizer(Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), {})
    with pytest.raises(GrammarError, match="tokenizer of this model"):
        Vocabulary(words, 2, [0])
