"""A step that the device has no memory for, and what an engine tells of what it found computed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.failures import KINDS
from common.models.tokenizer import Tokenizer
from tests.support.engines import Transcript, collect, engine_around, is_busy, request, run_all
from tests.support.grammars import Residues
from tests.support.tiny_model import build_tokenizer
from workers.engine.batching import BatchingEngine, Choice, Outcome
from workers.engine.grammar import GrammarError
from workers.engine.port import DeviceLostError, DeviceMemoryError
from workers.engine.scheduler import Chunk, Limits

LIMITS = Limits(max_sequences=8, cache_tokens=2000, step_tokens=64)


class SmallDevice:
    """A runner that says the next letter, and has memory for what ``does_fit``."""

    def __init__(self, does_fit: Callable[[list[Chunk]], bool]) -> None:
        self.does_fit = does_fit
        self.ran: list[list[tuple[str, int, int]]] = []

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        if not self.does_fit(chunks):
            raise DeviceMemoryError
        self.ran.append([(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks])
        return [
            [Choice(70 + len(chunk.sequence.tokens) % 20, -0.1)]
            for chunk in chunks
            if chunk.samples
        ]


def engine_on(does_fit: Callable[[list[Chunk]], bool]) -> tuple[BatchingEngine, SmallDevice]:
    device = SmallDevice(does_fit)
    return engine_around(device, Tokenizer(build_tokenizer(), {}), LIMITS), device


def tokens(chunks: list[Chunk]) -> int:
    return sum(chunk.count for chunk in chunks)


@pytest.fixture
def expected() -> dict[str, Transcript]:
    engine, _ = engine_on(lambda _: True)
    return run_all(engine, [request(id, [70] * 9, max_new_tokens=6) for id in "abcdefg"])


def test_who_never_fits_fails_alone(expected: dict[str, Transcript]) -> None:
    """With a code that says try again; the others get what they would have got."""
    engine, _ = engine_on(lambda chunks: all(chunk.sequence.id != "d" for chunk in chunks))
    with capture_logs() as lines:
        got = run_all(engine, [request(id, [70] * 9, max_new_tokens=6) for id in "abcdefg"])
    finish = got.pop("d").finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("failed", "CUDA_OOM")
    assert KINDS["CUDA_OOM"].retryable
    assert got == {id: one for id, one in expected.items() if id != "d"}
    assert [line["refused"] for line in lines] == [["d"]]


def test_who_stops_fitting_keeps_what_it_has() -> None:
    """Its log stays; the failure comes behind its last token."""
    engine, _ = engine_on(lambda chunks: all(chunk.sequence.num_generated < 3 for chunk in chunks))
    got: dict[str, Transcript] = {}
    engine.submit(request("a", [70] * 5))
    while is_busy(engine):
        collect(got, engine.step())
    assert len(got["a"].tokens) == 3
    assert got["a"].finish is not None
    assert got["a"].finish.code == "CUDA_OOM"


def test_too_many_at_once_are_computed_in_parts(expected: dict[str, Transcript]) -> None:
    engine, device = engine_on(lambda chunks: len(chunks) <= 2)
    got = run_all(engine, [request(id, [70] * 9, max_new_tokens=6) for id in "abcdefg"])
    assert got == expected
    assert max(len(step) for step in device.ran) == 2


def test_a_chunk_that_does_not_fit_is_cut(expected: dict[str, Transcript]) -> None:
    """A prompt needs more memory at once than it needs in all."""
    engine, device = engine_on(lambda chunks: tokens(chunks) <= 3)
    got = run_all(engine, [request("a", [70] * 9, max_new_tokens=6)])
    assert got["a"] == expected["a"]
    starts = [step[0][1] for step in device.ran[:4]]
    assert starts == sorted(starts)


def test_afterwards_steps_are_smaller_for_a_while() -> None:
    engine, device = engine_on(lambda chunks: tokens(chunks) <= 40)
    engine.submit(request("a", [70] * 200, max_new_tokens=1))
    while is_busy(engine):
        engine.step()
    sizes = [step[0][2] for step in device.ran]
    assert sizes[:2] == [32, 32], "the first step, in halves"
    assert sizes[2:6] == [32, 33, 34, 35]


def test_a_lost_device_is_the_engines_end() -> None:
    """The process cannot go on, so nobody is failed: another worker takes over."""
    engine, device = engine_on(lambda _: True)
    engine.submit(request("a", [70] * 9))

    def lose(chunks: list[Chunk]) -> bool:
        raise DeviceLostError

    device.does_fit = lose
    with pytest.raises(DeviceLostError):
        engine.step()


def test_it_says_how_much_of_a_prompt_it_found_computed() -> None:
    engine, _ = engine_on(lambda _: True)
    prompt = list(range(3, 60))
    engine.submit(request("first", prompt, max_new_tokens=2))
    outputs = [engine.step(), engine.step()]
    engine.submit(request("second", [*prompt, 9], max_new_tokens=2))
    outputs += [engine.step(), engine.step()]
    assert [output.cached_tokens for step in outputs for output in step] == [0, 0, 48, 48]


class StuckGrammar(SmallDevice):
    """A runner whose grammar of sequence ``d`` gives up after two tokens."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        stuck = [seq.id == "d" and seq.num_generated == 2 for seq in sampled]
        outcomes = super().run(chunks)
        return [
            GrammarError("It is too hard.") if is_stuck else outcome
            for is_stuck, outcome in zip(stuck, outcomes, strict=True)
        ]


def test_a_grammar_that_gives_up_ends_its_generation_only(expected: dict[str, Transcript]) -> None:
    engine = engine_around(StuckGrammar(lambda _: True), Tokenizer(build_tokenizer(), {}), LIMITS)
    got = run_all(engine, [request(id, [70] * 9, max_new_tokens=6) for id in "abcdefg"])
    stuck = got.pop("d")
    assert stuck.tokens == expected["d"].tokens[:2]
    assert stuck.finish is not None
    assert (stuck.finish.reason, stuck.finish.message) == ("failed", "It is too hard.")
    assert got == {id: one for id, one in expected.items() if id != "d"}


def test_a_token_or_a_log_against_its_grammar_ends_its_generation_only() -> None:
    engine, _ = engine_on(lambda _: True)
    letters = replace(request("letters", [70] * 9), matcher=Residues())
    replayed = replace(request("replayed", [70], logged=[70, 70]), matcher=Residues())
    got = run_all(engine, [letters, replayed, request("free", [70] * 9)])
    for id in ("letters", "replayed"):
        finish = got[id].finish
        assert finish is not None
        assert (finish.reason, "is not allowed here" in finish.message) == ("failed", True)
    assert len(got["free"].tokens) == 16


@pytest.mark.parametrize("fields", [{"stop_token_ids": (300,)}, {"logit_bias": {-1: 1.0}}])
def test_ids_that_do_not_exist_are_told_so(fields: dict[str, Any]) -> None:
    """They would make the device fail for everybody."""
    engine, _ = engine_on(lambda _: True)
    finish = run_all(engine, [request("g", [70], **fields)])["g"].finish
    assert finish is not None
    assert finish.code == "BAD_REQUEST"
