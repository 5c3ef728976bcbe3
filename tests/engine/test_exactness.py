"""In float32 a generation is a function of its request: no neighbour or accident changes it."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from common.models.tokenizer import Tokenizer
from tests.support.engines import (
    Transcript,
    collect,
    is_busy,
    request,
    run_all,
    run_one,
    tiny_engine,
)
from workers.engine.batching import BatchingEngine
from workers.engine.port import EngineRequest
from workers.engine.scheduler import Limits

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}

TEXTS = (
    "The miller",
    "a",
    "and the water 😀 falls on and on, longer than the others by far",
    "Hello",
    "of the",
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> BatchingEngine:
    return tiny_engine(tiny_model)


@pytest.fixture(scope="module")
def requests(tokenizer: Tokenizer) -> list[EngineRequest]:
    """Everything mixed: greedy and sampled, short and long, with and without stop strings."""
    prompts = [tokenizer.encode(text) for text in TEXTS]
    return [
        request("greedy", prompts[0], max_new_tokens=30),
        request("sampled", prompts[1], max_new_tokens=40, seed=3, **SAMPLED),
        request(
            "penalized", prompts[2], max_new_tokens=25, seed=4, repetition_penalty=1.3, **SAMPLED
        ),
        request("stopped", prompts[3], max_new_tokens=60, seed=5, stop=("\ufffd",), **SAMPLED),
        request(
            "kept", prompts[4], max_new_tokens=60, seed=6, stop=("e",), keep_stop=True, **SAMPLED
        ),
    ]


@pytest.fixture(scope="module")
def expected(engine: BatchingEngine, requests: list[EngineRequest]) -> dict[str, Transcript]:
    """Each request on its own."""
    return {one.id: run_one(engine, one) for one in requests}


def assert_same(got: dict[str, Transcript], expected: dict[str, Transcript]) -> None:
    assert got.keys() == expected.keys()
    for id, transcript in got.items():
        assert transcript.tokens == expected[id].tokens, id
        assert transcript.pieces == expected[id].pieces, id
        assert transcript.finish == expected[id].finish, id
        assert transcript.logprobs == pytest.approx(expected[id].logprobs, abs=1e-4), id


def test_the_requests_end_in_every_way(expected: dict[str, Transcript]) -> None:
    """Guards the tests below against proving little."""
    reasons = {id: t.finish.reason for id, t in expected.items() if t.finish is not None}
    assert reasons["greedy"] == reasons["sampled"] == reasons["penalized"] == "length"
    assert reasons["stopped"] == reasons["kept"] == "stop_sequence"
    assert expected["kept"].text.endswith("e")
    assert "\ufffd" not in expected["stopped"].text
    assert len({tuple(t.tokens) for t in expected.values()}) == len(expected)


def test_a_batch_changes_nothing(
    engine: BatchingEngine, requests: list[EngineRequest], expected: dict[str, Transcript]
) -> None:
    assert_same(run_all(engine, requests), expected)


@pytest.mark.parametrize("step_tokens", [1, 2, 5, 16])
def test_the_size_of_chunks_changes_nothing(
    tiny_model: Path,
    requests: list[EngineRequest],
    expected: dict[str, Transcript],
    step_tokens: int,
) -> None:
    limits = Limits(max_sequences=4, cache_tokens=1024, step_tokens=step_tokens)
    assert_same(run_all(tiny_engine(tiny_model, limits), requests), expected)


def test_preemption_changes_nothing(
    tiny_model: Path, requests: list[EngineRequest], expected: dict[str, Transcript]
) -> None:
    """The cache holds far less than all need at once; the youngest is put back again and again."""
    engine = tiny_engine(tiny_model, Limits(max_sequences=5, cache_tokens=110, step_tokens=24))
    transcripts: dict[str, Transcript] = {}
    for one in requests:
        engine.submit(one)
    num_running, preempted = [engine.load().running], False
    while is_busy(engine):
        outputs = engine.step()
        collect(transcripts, outputs)
        num_running.append(engine.load().running)
        ended = sum(output.finish is not None for output in outputs)
        preempted |= num_running[-1] + ended < num_running[-2]
    assert preempted
    assert_same(transcripts, expected)


def test_arrivals_and_cancels_around_it_change_nothing(
    engine: BatchingEngine,
    tokenizer: Tokenizer,
    requests: list[EngineRequest],
    expected: dict[str, Transcript],
) -> None:
    """Slots change hands every few steps while the requests run, one after the other."""
    transcripts: dict[str, Transcript] = {}
    noise = tokenizer.encode("noise that nobody reads")
    for step in itertools.count():
        if step % 3 == 0 and step // 3 < len(requests):
            engine.submit(requests[step // 3])
        if step % 4 == 0:
            engine.cancel(f"noise-{step - 4}")
            engine.submit(request(f"noise-{step}", noise[: 1 + step % 9], max_new_tokens=99))
        collect(transcripts, [o for o in engine.step() if not o.id.startswith("noise")])
        if len(transcripts) == len(expected) and all(t.finish for t in transcripts.values()):
            engine.cancel(f"noise-{step - step % 4}")
            break
    assert not is_busy(engine)
    assert_same(transcripts, expected)


@pytest.mark.parametrize("id", ["sampled", "penalized", "stopped", "kept"])
def test_a_handover_at_any_position_changes_nothing(
    tiny_model: Path,
    requests: list[EngineRequest],
    expected: dict[str, Transcript],
    id: str,
) -> None:
    """Another engine gets prompt and log, and goes on with the very tokens and pieces."""
    original = next(one for one in requests if one.id == id)
    whole = expected[id]
    successor = tiny_engine(tiny_model)
    for cut in range(len(whole.tokens)):
        handed = EngineRequest(id, original.prompt, original.sampling, whole.tokens[:cut])
        rest = run_one(successor, handed)
        assert whole.tokens[:cut] + rest.tokens == whole.tokens
        assert rest.pieces == whole.pieces[cut:]
        assert rest.finish == whole.finish


def test_seeds_make_the_difference(engine: BatchingEngine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The")
    runs = [
        run_one(engine, request("g", prompt, seed=seed, **SAMPLED)).tokens for seed in (1, 2, 1)
    ]
    assert runs[0] == runs[2] != runs[1]


def test_the_text_is_the_decoded_tokens(
    tokenizer: Tokenizer, expected: dict[str, Transcript]
) -> None:
    for id in ("greedy", "sampled", "penalized"):
        assert expected[id].text == tokenizer.decode(expected[id].tokens)
