"""Steps that the device has no memory for, and steps that are launched before the last is known."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from common.failures import KINDS
from common.models.tokenizer import Tokenizer
from tests.support.engines import Transcript, collect, engine_around, is_busy, request, run_all
from tests.support.event_schema import captured_logs
from tests.support.grammars import Residues
from tests.support.tiny_model import build_tokenizer
from workers.engine.batching import BatchingEngine, Choice, Outcome
from workers.engine.grammar import GrammarError
from workers.engine.port import DeviceLostError, DeviceMemoryError, EngineRequest
from workers.engine.scheduler import Chunk, Limits

LIMITS = Limits(max_sequences=8, cache_tokens=2000, step_tokens=64)


class SmallDevice:
    """A runner that says the next letter, and has memory for what ``does_fit``."""

    def __init__(self, does_fit: Callable[[list[Chunk]], bool]) -> None:
        self.does_fit = does_fit
        self.ran: list[list[tuple[str, int, int]]] = []

    def compute(self, chunks: list[Chunk]) -> None:
        if not self.does_fit(chunks):
            raise DeviceMemoryError
        self.ran.append([(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks])

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        self.compute(chunks)
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
    with captured_logs() as lines:
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


class Clockwork(SmallDevice):
    """The same as a device that computes by itself, noting what is asked of it."""

    def __init__(self, does_fit: Callable[[list[Chunk]], bool] = lambda _: True) -> None:
        super().__init__(does_fit)
        self.asked: list[str] = []
        self.can_choose = True
        self.bad = ""
        """Whose logits are not finite behind two tokens."""

    def launch(self, chunks: list[Chunk]) -> "ClockworkStep":
        self.asked.append("launch")
        self.compute(chunks)
        return ClockworkStep(self, chunks)


@dataclass
class ClockworkStep:
    device: Clockwork
    chunks: list[Chunk]
    chosen: list[Outcome] = field(default_factory=list[Outcome])

    def choose(self) -> None:
        self.device.asked.append("choose")
        if not self.device.can_choose:
            raise DeviceMemoryError
        for chunk in self.chunks:
            seq = chunk.sequence
            is_bad = seq.id == self.device.bad and seq.num_generated == 2
            choice = Choice(70 + len(seq.tokens) % 20, -0.1)
            self.chosen += [None if is_bad else [choice]] if chunk.samples else []

    def follow(self, chunks: list[Chunk]) -> "ClockworkStep":
        assert all(chunk.is_foreseen for chunk in chunks)
        step = self.device.launch(chunks)
        self.device.asked[-1] = "follow"
        return step

    def outcomes(self) -> list[Outcome]:
        self.device.asked.append("outcomes")
        return self.chosen


def foreseeing(device: Clockwork) -> BatchingEngine:
    return engine_around(device, Tokenizer(build_tokenizer(), {}), LIMITS, launcher=device)


def seven(**sampling: Any) -> list[EngineRequest]:
    return [request(id, [70] * 9, max_new_tokens=6, **sampling) for id in "abcdefg"]


def test_the_next_step_is_launched_before_the_outcomes_of_the_last_are_waited_for() -> None:
    device = Clockwork()
    run_all(foreseeing(device), [request("a", [70] * 9, max_new_tokens=3)])
    steps = [["launch", "choose"], ["follow", "outcomes", "choose"], ["follow", "outcomes"]]
    assert device.asked == [what for step in steps for what in step] + ["choose", "outcomes"]
    assert device.ran == [[("a", 0, 9)], [("a", 9, 1)], [("a", 10, 1)]], "and none in vain"


@pytest.mark.parametrize("does_fit", [True, False], ids=["as it is", "never foreseen"])
@pytest.mark.parametrize("can_choose", [True, False], ids=["", "never chosen at once"])
def test_launching_ahead_changes_nothing(
    expected: dict[str, Transcript], *, does_fit: bool, can_choose: bool
) -> None:
    """Whatever the device has no memory for."""
    device = Clockwork(lambda chunks: does_fit or not any(chunk.is_foreseen for chunk in chunks))
    device.can_choose = can_choose
    assert run_all(foreseeing(device), seven()) == expected


def test_who_ends_within_a_text_takes_nothing_of_the_next_step() -> None:
    """What is computed in vain is not told, and not in the way of whoever comes next."""
    device = Clockwork()
    engine = foreseeing(device)
    plain, _ = engine_on(lambda _: True)
    letters = Tokenizer(build_tokenizer(), {}).decode([82, 83])
    asked = [request("a", [70] * 9, stop=(letters,)), request("b", [70] * 9, max_new_tokens=7)]
    got = run_all(engine, asked)
    assert got == run_all(plain, asked)
    assert got["a"].finish is not None
    assert got["a"].finish.reason == "stop_sequence"
    length = 9 + len(got["a"].tokens)
    assert [("a", length - 1, 1), ("b", length - 1, 1)] in device.ran, "in vain for one of them"
    assert engine.step() == []
    again = request("c", [70] * 9 + got["a"].tokens + [75] * 9)
    assert run_all(engine, [again]) == run_all(plain, [again])


def test_a_cancelled_generation_gets_nothing_of_the_step_under_way() -> None:
    """Nor does its namesake, which comes before that step is over."""
    device = Clockwork()
    engine = foreseeing(device)
    for one in seven():
        engine.submit(one)
    got: dict[str, Transcript] = {}
    collect(got, engine.step())
    engine.cancel("a")
    engine.cancel("b")
    engine.submit(request("b", [75] * 4, max_new_tokens=3))
    del got["a"], got["b"]
    while is_busy(engine):
        collect(got, engine.step())
    assert "a" not in got
    plain, _ = engine_on(lambda _: True)
    other = run_all(plain, [*seven()[2:], request("b", [75] * 4, max_new_tokens=3)])
    assert got == other


def test_who_fails_takes_nothing_of_the_next_step(expected: dict[str, Transcript]) -> None:
    device = Clockwork()
    device.bad = "d"
    got = run_all(foreseeing(device), seven())
    failed = got.pop("d")
    assert failed.tokens == expected["d"].tokens[:2]
    assert failed.finish is not None
    assert failed.finish.code == "NAN_LOGITS"
    assert got == {id: one for id, one in expected.items() if id != "d"}


def test_who_arrives_waits_for_one_step_more_at_most() -> None:
    device = Clockwork()
    engine = foreseeing(device)
    engine.submit(request("a", [70] * 9, max_new_tokens=50))
    for _ in range(20):
        engine.step()
    engine.submit(request("b", [70] * 3))
    assert [output.id for output in engine.step()] == ["a"]
    assert [output.id for output in engine.step()] == ["a", "b"]
    assert device.asked.count("launch") == 2
