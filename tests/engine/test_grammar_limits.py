"""Grammars that are too much: refused within their budget, alone, and with a reason."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from common.failures import Failure
from common.messages import Grammar
from tests.support.matching import ids_in, matcher_of, schema_of, tiny_tokenizer
from tests.support.tiny_model import EOS_TOKEN_IDS
from tests.support.waiting import wait_until
from workers.engine.grammar import GrammarError, Matcher
from workers.grammars import Grammars

MAX_BYTES = 256 * 1024

MANY_PATTERNS = schema_of(
    {
        "allOf": [
            {"type": "string", "pattern": f"^(a|b)*a(a|b){{{length}}}$"} for length in range(8, 30)
        ]
    }
)
"""Some 500 bytes that would take minutes: whether any string matches all of them."""

AMBIGUOUS = Grammar("ebnf", 'start: a\na: a a | "x" | ""')
"""Compiles at once; each token makes it harder to say what may come next."""


@pytest.fixture
def make() -> Callable[..., Grammars]:
    def make(compile_s: float = 2.0) -> Grammars:
        tokenizer = tiny_tokenizer()
        return Grammars(
            tiny_tokenizer,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=list(EOS_TOKEN_IDS),
            max_bytes=MAX_BYTES,
            compile_s=compile_s,
        )

    return make


@pytest.fixture
async def grammars(make: Callable[..., Grammars]) -> AsyncIterator[Grammars]:
    grammars = make()
    yield grammars
    grammars.close()


async def refusal(grammars: Grammars, grammar: Grammar) -> str:
    with pytest.raises(Failure) as caught:
        await grammars.matcher(grammar)
    assert caught.value.code == "GRAMMAR_REJECTED"
    return caught.value.message


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", "(" * 300 + "a" + ")" * 300), "nest"),
        (Grammar("json_schema", "{"), "Expecting"),
        (Grammar("json_schema", "[]"), "a JSON schema is an object"),
        (schema_of({"type": "text"}), "Invalid type: text"),
        (schema_of({"type": "object", "if": {}}), "Unimplemented keys"),
        (schema_of({"$ref": "#"}), "nothing matches it"),
        (schema_of({"$ref": "https://example.org/schema"}), ""),
        (Grammar("json_schema", '{"items":' * 20_000), "nested too deeply"),
        (
            schema_of(
                {"$ref": "#/$defs/0", "$defs": {
                    str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}}
                    for i in range(3000)
                } | {"3000": {"type": "null"}}}
            ),
            "nested too deeply",
        ),
        (Grammar("ebnf", 'root ::= "a" other'), "Rule 'other' not found"),
        (Grammar("ebnf", "start: other"), 'unknown name: "other"'),
    ],
)  # fmt: skip
async def test_a_bad_grammar_is_refused_with_its_reason(
    grammars: Grammars, grammar: Grammar, reason: str
) -> None:
    message = await refusal(grammars, grammar)
    assert message.startswith("grammar is not valid: ")
    assert reason in message


async def test_a_megabyte_is_refused_unread(grammars: Grammars) -> None:
    properties = {f"k{i}": {"type": "string", "maxLength": i} for i in range(20_000)}
    grammar = schema_of({"type": "object", "properties": properties})
    assert len(grammar.value) > 900_000
    assert "262144 are allowed" in await refusal(grammars, grammar)
    assert num_trials(grammars) == 0


@pytest.mark.parametrize("multiple", [1_000_003, 2])
async def test_what_needs_too_much_memory_ends_its_trial_only(
    make: Callable[..., Grammars], multiple: int
) -> None:
    grammars = make(compile_s=20.0)  # not on a busy machine either is that over first
    grammar = schema_of({"type": "integer", "multipleOf": multiple})
    if multiple == 2:
        assert ids_in((await grammars.matcher(grammar)).mask())
    else:
        assert "too much memory" in await refusal(grammars, grammar)
    grammars.close()


async def test_a_bomb_is_refused_while_others_go_on(make: Callable[..., Grammars]) -> None:
    """The event loop turns all the time, and another grammar is ready before the bomb is out."""
    grammars = make()
    bomb = asyncio.create_task(refusal(grammars, MANY_PATTERNS))
    await wait_until(lambda: len(grammars._processes) == 1)
    [process] = grammars._processes
    process.send_signal(signal.SIGSTOP)  # it is not out before the other, whoever computes faster
    turns = 0
    matcher = asyncio.create_task(grammars.matcher(Grammar("regex", "ab")))
    while not matcher.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 100
    assert matcher.result()
    assert not bomb.done()
    process.send_signal(signal.SIGCONT)
    assert "compiling it took" in await bomb
    assert "compiling it took" in await refusal(grammars, MANY_PATTERNS)
    assert num_trials(grammars) == 2, "a refusal is remembered"
    grammars.close()


async def test_what_takes_too_long_is_refused(make: Callable[..., Grammars]) -> None:
    """Given more time, it would take too much memory."""
    grammars = make(compile_s=0.05)
    assert "over 0.05 s" in await refusal(grammars, MANY_PATTERNS)
    grammars.close()


async def test_several_who_ask_for_one_grammar_cause_one_trial(grammars: Grammars) -> None:
    """And each gets a matcher of its own."""
    grammar = Grammar("regex", "ab")
    matchers = await asyncio.gather(*(grammars.matcher(grammar) for _ in range(5)))
    assert num_trials(grammars) == 1
    a, b = (tiny_tokenizer().encode(letter)[0] for letter in "ab")
    matchers[0].accept(a)
    assert ids_in(matchers[0].mask()) == [b]
    assert ids_in(matchers[1].mask()) == [a]


async def test_who_leaves_does_not_take_the_trial_from_others(grammars: Grammars) -> None:
    grammar = Grammar("regex", "ab")
    first, second = (asyncio.create_task(grammars.matcher(grammar)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert ids_in((await second).mask())


async def test_a_worker_that_stops_ends_its_trials(make: Callable[..., Grammars]) -> None:
    grammars = make(compile_s=60)
    bomb = asyncio.create_task(grammars.matcher(MANY_PATTERNS))
    await wait_until(lambda: len(grammars._processes) == 1)
    [process] = grammars._processes
    grammars.close()
    with pytest.raises((Failure, asyncio.CancelledError)):
        await bomb
    assert await asyncio.to_thread(process.wait, 10) < 0


async def test_a_trial_that_takes_long_leaves_the_processors_to_others(
    make: Callable[..., Grammars],
) -> None:
    """The thread that compiles comes last of all on the machine; until then the trial was nice."""
    grammars = make(compile_s=60)
    bomb = asyncio.create_task(grammars.matcher(MANY_PATTERNS))
    await wait_until(lambda: len(grammars._processes) == 1)
    [process] = grammars._processes
    threads = Path(f"/proc/{process.pid}/task")
    await wait_until(
        lambda: any(os.sched_getscheduler(int(t.name)) == os.SCHED_IDLE for t in threads.iterdir())
    )
    assert os.getpriority(os.PRIO_PROCESS, process.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    grammars.close()
    with pytest.raises((Failure, asyncio.CancelledError)):
        await bomb


async def test_a_worker_that_stopped_refuses_no_grammar(grammars: Grammars) -> None:
    """Neither a new one nor one that it knows: whoever goes on with their generations tells."""
    known = Grammar("regex", "ab")
    await grammars.matcher(known)
    grammars.close()
    for grammar in (known, Grammar("regex", "ba")):
        with pytest.raises(Failure) as caught:
            await grammars.matcher(grammar)
        assert caught.value.code == "DRAINING"


def num_trials(grammars: Grammars) -> int:
    return len(grammars._trials)


def test_replaying_a_log_is_bounded_too() -> None:
    """What took too much the first time is not done again at once behind a failover."""
    x = tiny_tokenizer().encode("x")[0]
    matcher = matcher_of(AMBIGUOUS)
    with pytest.raises(GrammarError, match="too much work"):
        accept_all(matcher, [x] * 5000)


def accept_all(matcher: Matcher, tokens: list[int]) -> None:
    for token in tokens:
        matcher.accept(token)


def test_what_is_refused_at_one_size_is_json_in_another() -> None:
    """The schema of many tools, which people do send, is well within the limits."""
    tools = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f"tool_{i}"},
                "arguments": {
                    "type": "object",
                    "properties": {f"field_{j}": {"type": "string"} for j in range(20)},
                },
            },
            "required": ["name", "arguments"],
        }
        for i in range(60)
    ]
    matcher = matcher_of(schema_of({"anyOf": tools}))
    answer = json.dumps({"name": "tool_17", "arguments": {}})
    accept_all(matcher, tiny_tokenizer().encode(answer))
    assert set(ids_in(matcher.mask())) == set(EOS_TOKEN_IDS)
