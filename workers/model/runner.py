"""Runs a step: brings the cache in order, computes all chunks by one way, has the tokens chosen.

Knows neither the model nor how a step is computed: that is a :class:`Forward`, chosen once at load.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from workers.engine.batching import Choice
from workers.engine.port import DeviceLostError, DeviceMemoryError
from workers.engine.scheduler import Chunk
from workers.model.attention import Stretch
from workers.model.sampler import RowStatistics, SamplingRow, sample


class Forward(Protocol):
    """One way of computing a step."""

    name: str

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        """Compute ``tokens``, lying where ``stretches`` say, and store their keys and values.

        Stretches of one token come first, ordered by slot. The answer is the logits of ``rows``
        among the tokens, ``[len(rows), vocabulary]``, in float32 or the type of the model.
        """
        ...


class Cache(Protocol):
    """What the runner itself asks of a cache, between steps."""

    def copy(self, from_slot: int, to_slot: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` positions of one slot to another."""
        ...

    def scrub(self, slot: int, start: int, end: int) -> None:
        """Overwrite positions with zeros: a mask does not hide NaN."""
        ...


class ModelRunner:
    """Implements :class:`workers.engine.batching.Runner` with any way and the cache behind it.

    A cache of pages needs nothing between steps, so there is none to name.
    """

    def __init__(
        self,
        forward: Forward,
        cache: Cache | None = None,
        row_statistics: RowStatistics | None = None,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._row_statistics = row_statistics
        self._unproven: dict[int, int] = {}
        """Slot -> end of the positions there that no finite logits have vouched for."""

    def run(self, chunks: list[Chunk]) -> list[list[Choice] | None]:
        """See the protocol.

        Raises:
            DeviceMemoryError: the step did not fit; it may be tried again in parts.
            DeviceLostError: nothing can be computed on the device any more.
        """
        # The order in which attention wants them; answers go back in the order of the question.
        ordered = sorted(chunks, key=lambda chunk: (chunk.count > 1, chunk.slot))
        tokens = [t for c in ordered for t in c.sequence.tokens[c.start : c.end]]
        stretches = [
            Stretch(c.slot, c.start, c.count, c.pages, c.sequence.adapter) for c in ordered
        ]
        sampled = [chunk for chunk in ordered if chunk.samples]
        with torch.inference_mode(), _device_errors():
            if self._cache is not None:
                self._prepare_slots(chunks, self._cache)
            logits = self._forward(tokens, stretches, _last_rows(ordered))
            choices = self._choose(logits, sampled)
        for chunk, choice in zip(sampled, choices, strict=True):
            if choice is not None:
                self._unproven.pop(chunk.slot, None)
        by_slot = {chunk.slot: choice for chunk, choice in zip(sampled, choices, strict=True)}
        return [by_slot[chunk.slot] for chunk in chunks if chunk.samples]

    def _choose(self, logits: torch.Tensor, sampled: list[Chunk]) -> list[list[Choice] | None]:
        if not sampled:
            return []
        rows = [
            SamplingRow(c.sequence.sampling, c.sequence.num_generated, c.sequence.counts)
            for c in sampled
        ]
        samples = sample(logits, rows, self._row_statistics)
        return [
            [Choice(token, logprob, top)] if finite else None
            for token, logprob, finite, top in zip(
                samples.tokens, samples.logprobs, samples.finite, samples.tops, strict=True
            )
        ]

    def _prepare_slots(self, chunks: list[Chunk], cache: Cache) -> None:
        """Bring prefixes to where they are wanted, and clear what a last owner left behind them.

        A sequence that goes on begins where its own unproven positions end. Whoever begins before
        that has taken over the slot, and must not meet the NaN of the last owner.
        """
        for chunk in chunks:
            if chunk.copied_from is not None:
                from_slot, num_tokens = chunk.copied_from
                cache.copy(from_slot, chunk.slot, num_tokens)
        for chunk in chunks:
            end = self._unproven.get(chunk.slot, 0)
            if chunk.start < end:
                cache.scrub(chunk.slot, chunk.start, end)
            self._unproven[chunk.slot] = chunk.end


def _last_rows(ordered: list[Chunk]) -> list[int]:
    """Where the last token of each chunk that samples stands in the step."""
    rows: list[int] = []
    end = 0
    for chunk in ordered:
        end += chunk.count
        if chunk.samples:
            rows.append(end - 1)
    return rows


@contextmanager
def _device_errors() -> Generator[None]:
    """Tell what the device could not hold from what it did not survive; other errors pass.

    After an error inside a kernel every later call of CUDA fails as well ("sticky" errors, CUDA
    runtime API, section "Error handling"); memory that could not be had leaves no trace.
    """
    try:
        yield
    except MemoryError as error:
        raise DeviceMemoryError from error
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise DeviceMemoryError from error
        if isinstance(error, torch.AcceleratorError) or _is_cuda_failure(error):
            raise DeviceLostError from error
        raise


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Only CUDA's allocator has a type for it; the processor's and cuBLAS say it in words."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator: " in text
        or "CUDA error: out of memory" in text
        or "_STATUS_ALLOC_FAILED" in text
    )


def _is_cuda_failure(error: RuntimeError) -> bool:
    text = str(error)
    return "CUDA error: " in text or "CUDNN_STATUS_" in text
