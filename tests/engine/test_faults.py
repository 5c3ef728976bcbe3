"""One generation's fault ends that one, with a code, and nothing else."""

from collections.abc import Sequence as Ids
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.models.tokenizer import Tokenizer
from tests.support.engines import (
    CPU,
    MAX_COST,
    byte_fallback_tokenizer,
    engine_around,
    is_busy,
    request,
    run_all,
    run_one,
    tiny_engine,
    tiny_runner,
)
from workers.engine.batching import BatchingEngine
from workers.engine.port import DeviceLostError, DeviceMemoryError, EngineLoad
from workers.engine.scheduler import Chunk, Limits
from workers.engine.sequence import Sequence, TextRules
from workers.model.kv_cache import SlotCache
from workers.model.modules import ModulesForward
from workers.model.native.adapters import StepAdapters
from workers.model.runner import ModelRunner

POISON = "Z"


@pytest.fixture
def poisoned(tiny_model: Path, tokenizer: Tokenizer) -> BatchingEngine:
    """A model that computes NaN for every sequence with the letter Z in it; two slots in all."""
    limits = Limits(max_sequences=2, cache_tokens=1024, step_tokens=80)
    runner = tiny_runner(tiny_model, limits)
    assert isinstance(runner._forward, ModulesForward)
    embedding = runner._forward._model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    embedding.weight[tokenizer.encode(POISON)[0]] = float("nan")
    return engine_around(runner, tokenizer, limits)


@pytest.fixture
def neighbour(poisoned: BatchingEngine, tokenizer: Tokenizer) -> None:
    """A long generation in the first slot. Attention reads the second slot to the same length, so
    what was left there behind the end of its owner lies in front of everybody's eyes."""
    poisoned.submit(request("neighbour", tokenizer.encode("a" * 70), max_new_tokens=100))
    poisoned.step()


def test_numbers_that_are_not_finite_end_their_generation(
    poisoned: BatchingEngine, neighbour: None, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Also its successor in the same slot is untouched by what it left in the cache."""
    innocent = request("good", tokenizer.encode("a"), max_new_tokens=40)
    bad = request("bad", tokenizer.encode("and so Z it is, much longer than the other one"))
    got = run_all(poisoned, [bad, innocent])
    assert got["bad"].finish is not None
    assert (got["bad"].finish.reason, got["bad"].finish.code) == ("failed", "NAN_LOGITS")
    assert got["bad"].tokens == []
    assert got["good"].tokens == run_one(tiny_engine(tiny_model), innocent).tokens


def test_a_cancelled_prompt_leaves_nothing_behind(
    poisoned: BatchingEngine, neighbour: None, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Cancelled between two chunks, before anybody could see that its numbers are not finite."""
    innocent = request("good", tokenizer.encode("a"), max_new_tokens=40)
    poisoned.submit(request("bad", tokenizer.encode("Z" + "more than fits a step. " * 8)))
    assert [output.id for output in poisoned.step()] == ["neighbour"]
    poisoned.cancel("bad")
    expected = run_one(tiny_engine(tiny_model), innocent)
    assert run_one(poisoned, innocent).tokens == expected.tokens


def test_too_large_a_request_is_told_so(tiny_model: Path, tokenizer: Tokenizer) -> None:
    engine = tiny_engine(tiny_model)
    prompt = tokenizer.encode("a") * 10
    too_large = request("g", prompt, max_new_tokens=MAX_COST - 9)
    finish = run_one(engine, too_large).finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("failed", "CONTEXT_LENGTH_EXCEEDED")
    just_fits = run_one(engine, request("g", prompt, max_new_tokens=MAX_COST - 10))
    assert len(just_fits.tokens) == MAX_COST - 10


def test_an_empty_prompt_is_told_so(tiny_model: Path) -> None:
    finish = run_one(tiny_engine(tiny_model), request("g", [])).finish
    assert finish is not None
    assert finish.code == "BAD_REQUEST"


@pytest.mark.parametrize(("prompt", "logged"), [([300], []), ([5], [300])])
def test_ids_outside_of_the_vocabulary_are_told_so(
    tiny_model: Path, prompt: list[int], logged: list[int]
) -> None:
    """They would make the device fail for everybody."""
    finish = run_one(tiny_engine(tiny_model), request("g", prompt, logged=logged)).finish
    assert finish is not None
    assert finish.code == "TOKENIZER_MISMATCH"


class BrokenTokenizer(Tokenizer):
    """Raises on one id, as a tokenizer with a bug may."""

    bad_id: int

    def decode(self, ids: Ids[int], *, skip_special_tokens: bool = True) -> str:
        if self.bad_id in ids:
            raise RuntimeError("Z is not for your eyes")
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.fixture
def broken_tokenizer(tiny_model: Path) -> BrokenTokenizer:
    tokenizer = BrokenTokenizer.load(tiny_model)
    assert isinstance(tokenizer, BrokenTokenizer)
    tokenizer.bad_id = tokenizer.encode(POISON)[0]
    return tokenizer


def test_an_exception_ends_its_generation_only(
    tiny_model: Path, broken_tokenizer: BrokenTokenizer
) -> None:
    """At its start or in its middle; the message tells the type and never the content."""
    engine = engine_around(tiny_runner(tiny_model), broken_tokenizer)
    good = request("good", broken_tokenizer.encode("a"))
    greedy = run_one(engine, good).tokens
    broken_tokenizer.bad_id = greedy[3]
    got = run_all(
        engine, [good, request("other", broken_tokenizer.encode("bcd"), max_new_tokens=2)]
    )
    finish = got["good"].finish
    assert finish is not None
    assert (finish.reason, finish.code, finish.message) == (
        "failed",
        "ENGINE_ERROR",
        "RuntimeError",
    )
    assert got["good"].tokens == greedy[:3]
    assert len(got["other"].tokens) == 2
    at_start = run_one(engine, request("good", [greedy[3]])).finish
    assert at_start is not None
    assert at_start.code == "ENGINE_ERROR"
    assert not is_busy(engine)


def test_cancel_frees_the_slot_before_the_next_step(tiny_model: Path, tokenizer: Tokenizer) -> None:
    limits = Limits(max_sequences=1, cache_tokens=100, step_tokens=64)
    engine = tiny_engine(tiny_model, limits)
    prompt = tokenizer.encode("abc")
    engine.submit(request("first", prompt, max_new_tokens=50))
    engine.submit(request("second", prompt, max_new_tokens=40))
    engine.step()
    assert room_of(engine) == EngineLoad(running=1, waiting=1, free_tokens=4, free_slots=0)
    engine.cancel("first")
    assert [output.id for output in engine.step()] == ["second"]
    engine.cancel("second")
    engine.cancel("nobody")
    assert room_of(engine) == EngineLoad(running=0, waiting=0, free_tokens=100, free_slots=1)
    assert engine.step() == []


def room_of(engine: BatchingEngine) -> EngineLoad:
    """Whoever came into the last step."""
    return replace(engine.load(), joined=())


def test_a_known_id_is_replaced(tiny_model: Path, tokenizer: Tokenizer) -> None:
    """The old attempt is forgotten; the new one starts at its own log."""
    engine = tiny_engine(tiny_model)
    prompt = tokenizer.encode("abc")
    whole = run_one(engine, request("g", prompt))
    engine.submit(request("g", prompt))
    engine.step()
    engine.submit(request("g", prompt, logged=whole.tokens[:5]))
    (output,) = engine.step()
    assert (output.start, output.tokens) == (5, whole.tokens[5:6])


def test_a_log_that_was_complete_ends_at_once(tiny_model: Path, tokenizer: Tokenizer) -> None:
    engine = tiny_engine(tiny_model)
    got = run_one(engine, request("g", tokenizer.encode("a"), logged=[70, 71], max_new_tokens=2))
    assert (got.tokens, got.finish and got.finish.reason) == ([], "length")


class BrokenDevice:
    """Fails every step as the device did."""

    name = "broken"

    def __init__(self, error: Exception) -> None:
        self.adapters = StepAdapters(0)
        self._error = error

    def __call__(self, *_: object, **__: object) -> torch.Tensor:
        raise self._error


def real_allocation_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (real_allocation_error(), DeviceMemoryError),
        (MemoryError(), DeviceMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DeviceMemoryError),
        (torch.AcceleratorError("CUDA error: out of memory"), DeviceMemoryError),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), DeviceLostError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when"), DeviceLostError),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
        (ValueError("anything else"), ValueError),
    ],
)
def test_what_happened_to_the_device_is_told(error: Exception, expected: type[Exception]) -> None:
    """Too little memory is one thing, a dead device another, and a bug neither."""
    cache = SlotCache({}, num_slots=1, max_tokens=8, dtype=torch.float32, device=CPU)
    runner = ModelRunner(BrokenDevice(error), cache)
    sequence = Sequence(request("g", [5, 6]), TextRules(byte_fallback_tokenizer(), frozenset()))
    with pytest.raises(expected) as caught:
        runner.run([Chunk(sequence, 0, 0, 2)])
    assert type(caught.value) is expected
    assert caught.value is error or caught.value.__cause__ is error
