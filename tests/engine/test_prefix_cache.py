"""A prefix that was computed before is used again, and no answer shows it (float32)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.models.tokenizer import Tokenizer
from tests.support.engines import (
    Transcript,
    collect,
    engine_around,
    is_busy,
    request,
    run_all,
    run_one,
    tiny_engine,
    tiny_runner,
)
from workers.engine.batching import BatchingEngine
from workers.engine.port import EngineRequest
from workers.engine.scheduler import Limits
from workers.model.modules import ModulesForward

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "seed": 3}
PREAMBLE = "Below the mill the water is calm again, and the miller counts. " * 2


@pytest.fixture
def engine(tiny_model: Path) -> BatchingEngine:
    return tiny_engine(tiny_model)


def alone(tiny_model: Path, one: EngineRequest) -> Transcript:
    """What an engine answers that has never computed anything else."""
    return run_one(tiny_engine(tiny_model), one)


def assert_same(got: Transcript, expected: Transcript) -> None:
    assert (got.tokens, got.pieces, got.finish) == (
        expected.tokens,
        expected.pieces,
        expected.finish,
    )
    assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def first_output_of(engine: BatchingEngine, one: EngineRequest) -> int:
    """Submit it and return how much of its prompt was found computed."""
    engine.submit(one)
    while True:
        for output in engine.step():
            if output.id == one.id:
                return output.cached_tokens


def test_a_second_prompt_with_the_same_preamble(
    engine: BatchingEngine, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Running, so that it is copied; then ended, so that it is gone on in."""
    ids = tokenizer.encode(PREAMBLE)
    one = request("one", [*ids, *tokenizer.encode("One?")], max_new_tokens=30)
    two = request("two", [*ids, *tokenizer.encode("And two?")], max_new_tokens=30, **SAMPLED)
    engine.submit(one)
    transcripts: dict[str, Transcript] = {}
    collect(transcripts, engine.step())
    engine.submit(two)
    while is_busy(engine):
        collect(transcripts, engine.step())
    for kept in (one, two):
        assert_same(transcripts[kept.id], alone(tiny_model, kept))
        assert_same(run_one(engine, kept), alone(tiny_model, kept))
        assert first_output_of(engine, kept) >= len(kept.prompt) - 16
        engine.cancel(kept.id)


def test_the_next_turn_of_a_conversation(
    engine: BatchingEngine, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Prompt and answer of the last turn are both there."""
    prompt = tokenizer.encode(PREAMBLE)
    answer = run_one(engine, request("g", prompt, max_new_tokens=40)).tokens
    turn = request("g", [*prompt, *answer, *tokenizer.encode("Go on.")], max_new_tokens=30)
    assert first_output_of(engine, turn) >= len(prompt) + len(answer) - 16
    assert_same(run_one(engine, turn), alone(tiny_model, turn))


def test_choices_of_one_request_compute_their_prompt_once(
    tiny_model: Path, tokenizer: Tokenizer
) -> None:
    limits = Limits(max_sequences=4, cache_tokens=2000, step_tokens=64)
    engine = tiny_engine(tiny_model, limits)
    prompt = tokenizer.encode(PREAMBLE)
    requests = [
        request(str(i), prompt, max_new_tokens=20, do_sample=True, seed=i) for i in range(4)
    ]
    got = run_all(engine, requests)
    for one in requests:
        assert_same(got[one.id], alone(tiny_model, one))


def test_two_scopes_never_meet(engine: BatchingEngine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(PREAMBLE)
    plain = request("g", prompt, max_new_tokens=4)
    ours, theirs = (
        EngineRequest("g", prompt, plain.sampling, cache_scope=scope) for scope in ("us", "them")
    )
    run_one(engine, ours)
    assert first_output_of(engine, theirs) == 0
    assert first_output_of(engine, ours) >= len(prompt) - 16


def test_preempted_and_handed_over_ones_find_what_they_had(
    tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Two that share a preamble push each other out; a third brings a log from elsewhere."""
    ids = tokenizer.encode(PREAMBLE)
    limits = Limits(max_sequences=3, cache_tokens=2 * len(ids) + 40, step_tokens=48)
    engine = tiny_engine(tiny_model, limits)
    requests = [
        request(str(i), [*ids, *tokenizer.encode(f"{i}, please.")], max_new_tokens=30, **SAMPLED)
        for i in range(2)
    ]
    whole = alone(tiny_model, requests[0])
    handed = request(
        "handed", requests[0].prompt, logged=whole.tokens[:17], max_new_tokens=30, **SAMPLED
    )
    got = run_all(engine, [*requests, handed])
    for one in requests:
        assert_same(got[one.id], alone(tiny_model, one))
    assert got["handed"].tokens == whole.tokens[17:]


def test_numbers_that_are_not_finite_are_never_found(
    tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Neither the prompt that makes them, nor, once it had been used so, what it began with."""
    runner = tiny_runner(tiny_model)
    assert isinstance(runner._forward, ModulesForward)
    embedding = runner._forward._model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    good = request("good", tokenizer.encode(PREAMBLE), max_new_tokens=20)
    bad = request("bad", tokenizer.encode(f"{PREAMBLE} Z"))
    with torch.no_grad():
        embedding.weight[tokenizer.encode("Z")[0]] = float("nan")
    engine = engine_around(runner, tokenizer)
    expected = run_one(engine, good)
    for _ in range(2):
        failed = run_one(engine, bad)
        assert failed.finish is not None
        assert failed.finish.code == "NAN_LOGITS"
        assert first_output_of(engine, request("other", good.prompt)) == 0
        engine.cancel("other")
        assert_same(run_one(engine, good), expected)
