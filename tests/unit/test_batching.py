"""A step that the device has no memory for, and what an engine tells of what it found computed."""

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from common.failures import KINDS
from common.models.tokenizer import Tokenizer
from tests.support.engines import Transcript, collect, engine_around, is_busy, request, run_all
from tests.support.tiny_model import build_tokenizer
from workers.engine.batching import BatchingEngine, Choice
from workers.engine.port import DeviceLostError, DeviceMemoryError
from workers.engine.scheduler import Chunk, Limits

LIMITS = Limits(max_sequences=8, cache_tokens=2000, step_tokens=64)


class SmallDevice:
    """A runner that says the next letter, and has memory for what ``does_fit``."""

    def __init__(self, does_fit: Callable[[list[Chunk]], bool]) -> None:
        self.does_fit = does_fit
        self.ran: list[list[tuple[str, int, int]]] = []

    def run(self, chunks: list[Chunk]) -> list[list[Choice] | None]:
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
