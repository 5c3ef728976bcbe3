"""Runs a step: brings the cache in order, computes all chunks by one way, has the tokens chosen.

Knows neither the model nor how a step is computed: that is a :class:`Forward`, chosen once at load.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from operator import or_
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.batching import Choice, Outcome
from workers.engine.grammar import GrammarError
from workers.engine.port import DeviceLostError, DeviceMemoryError
from workers.engine.scheduler import Chunk
from workers.model.adapters import AdapterHost
from workers.model.attention import Stretch
from workers.model.sampler import Sampler, Samples, SamplingRow, sample


class Forward(Protocol):
    """One way of computing a step."""

    name: str

    @property
    def adapters(self) -> AdapterHost: ...

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        """Compute ``tokens``, lying where ``stretches`` say, and store their keys and values.

        Stretches of one token come first, ordered by slot; the adapters that they name are held.
        The answer is the logits of ``rows`` among the tokens, ``[len(rows), vocabulary]``, in
        float32 or the type of the model.
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
        sampler: Sampler = sample,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._sampler = sampler
        self._unproven: dict[int, int] = {}
        """Slot -> end of the positions there that no finite logits have vouched for."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See the protocol.

        Raises:
            DeviceMemoryError: the step did not fit; it may be tried again in parts.
            DeviceLostError: nothing can be computed on the device any more.
        """
        with torch.inference_mode(), device_errors():
            if self._cache is not None:
                self._prepare_slots(chunks, self._cache)
            inputs = StepInputs(chunks)
            logits = self._forward(inputs.tokens, inputs.stretches, inputs.rows)
            inputs.score_prompts(logits)
            choosing = Choosing(inputs)
            if not choosing.rows:
                return []
            samples = self._sampler(logits[inputs.num_scored :], choosing.rows)
        if self._cache is not None:
            self._note_proven(inputs.sampled, samples)
        return choosing.outcomes(samples)

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

    def _note_proven(self, sampled: list[Chunk], samples: Samples) -> None:
        first = 0
        for chunk in sampled:
            end = first + 1 + len(chunk.draft)
            if all(map(or_, samples.finite[first:end], samples.exhausted[first:end])):
                self._unproven.pop(chunk.slot, None)
            first = end


class StepInputs:
    """What a way is asked to compute, in the order in which attention wants it.

    Of chunks that are foreseen, ``tokens`` has none.
    """

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self._ordered = sorted(chunks, key=lambda chunk: (chunk.count > 1, chunk.slot))
        self.sampled = [chunk for chunk in self._ordered if chunk.samples]
        """Those behind which a token is chosen."""
        self.tokens: list[int] = []
        self.stretches: list[Stretch] = []
        scored: list[int] = []
        chosen: list[int] = []
        end = 0
        for chunk in self._ordered:
            start, sequence = end, chunk.sequence
            end += chunk.count
            self.stretches.append(
                Stretch(chunk.slot, chunk.start, chunk.count, chunk.pages, sequence.adapter)
            )
            if chunk.is_foreseen:
                chosen.append(start)
                continue
            self.tokens += chunk.tokens
            if sequence.prompt_scores is not None:
                scored += range(start, start + chunk.num_scored)
            if chunk.samples:
                chosen += range(end - 1 - len(chunk.draft), end)
        self.num_scored = len(scored)
        """Rows at the start that tell about prompts; behind the others tokens are chosen."""
        self.rows = scored + chosen
        """Tokens whose logits are wanted."""

    def score_prompts(self, logits: torch.Tensor) -> None:
        """Tell sequences how likely the tokens of their prompts were, as the model sees them."""
        if self.num_scored:
            _score_prompts(logits[: self.num_scored], self._ordered)


class Choosing:
    """What is to be chosen in a step, and what the choices mean for its sequences."""

    def __init__(self, inputs: StepInputs) -> None:
        self._inputs = inputs
        self._masks = [_masks(chunk) for chunk in inputs.sampled]
        self.rows: list[SamplingRow] = []
        """One for each token of a chunk's draft and one behind it, chunk by chunk."""
        for chunk, masks in zip(inputs.sampled, self._masks, strict=True):
            _add_rows(self.rows, chunk, masks)

    def outcomes(self, samples: Samples) -> list[Outcome]:
        """In the order in which the chunks were given."""
        outcomes: dict[int, Outcome] = {}
        first = 0
        for chunk, masks in zip(self._inputs.sampled, self._masks, strict=True):
            failure = masks if isinstance(masks, GrammarError) else None
            outcomes[chunk.slot] = failure or _outcome(samples, first, chunk.draft)
            first += 1 + len(chunk.draft)
        slots = (chunk.slot for chunk in self._inputs.chunks)
        return [outcomes[slot] for slot in slots if slot in outcomes]


def _score_prompts(logits: torch.Tensor, ordered: list[Chunk]) -> None:
    """Tell sequences how likely the tokens of their prompts were, as the model itself sees them."""
    first = 0
    for chunk in ordered:
        sequence, start = chunk.sequence, chunk.start + 1
        if not chunk.num_scored or sequence.prompt_scores is None:
            continue
        part = logits[first : first + chunk.num_scored].float()
        first += chunk.num_scored
        ids = torch.tensor(sequence.tokens[start : start + len(part)], device=part.device)
        total = part.logsumexp(-1, keepdim=True)
        tops = None
        if sequence.sampling.top_logprobs:
            best = part.topk(sequence.sampling.top_logprobs)
            pairs = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
            tops = [list(zip(*pair, strict=True)) for pair in pairs]
        logprobs = (part.gather(1, ids[:, None]) - total)[:, 0].tolist()
        sequence.prompt_scores.fill(start, logprobs, tops)


def _masks(chunk: Chunk) -> list[NDArray[np.int32]] | GrammarError | None:
    """What may come behind the last known token and behind each of the draft; None is anything."""
    matcher = chunk.sequence.matcher
    if matcher is None or chunk.sequence.finish is not None:
        return None
    try:
        return matcher.masks(list(chunk.draft)) if chunk.draft else [matcher.mask()]
    except GrammarError as error:
        return error


def _add_rows(
    rows: list[SamplingRow], chunk: Chunk, masks: list[NDArray[np.int32]] | GrammarError | None
) -> None:
    sequence, draft = chunk.sequence, chunk.draft
    sampling, position, last = sequence.sampling, sequence.num_generated, sequence.tokens[-1]
    if masks is None and not draft:  # nearly always
        row = SamplingRow(sampling, position, sequence.counts, (), last, None, sequence.banned())
        rows.append(row)
        return
    for place in range(len(draft) + 1):
        mask = masks[place] if isinstance(masks, list) else None
        banned = sequence.banned(place)
        if mask is not None and banned and not _allows_others(mask, banned):
            banned = ()  # where a grammar ends, so does the answer, be it too short
        rows.append(
            SamplingRow(
                sampling,
                position + place,
                sequence.counts,
                draft[:place],
                draft[place - 1] if place else last,
                mask,
                banned,
            )
        )


def _allows_others(mask: NDArray[np.int32], banned: Sequence[int]) -> bool:
    left = mask.copy().view(np.uint32)
    for token in banned:
        left[token // 32] &= ~np.uint32(1 << token % 32)
    return bool(left.any())


def _outcome(samples: Samples, first: int, draft: Sequence[int]) -> Outcome:
    """The tokens from row ``first`` on, as far as each was chosen behind what really came.

    Behind a row that is not finite nothing is known; it is met again as the first of a later step.
    """
    if samples.exhausted[first]:
        return GrammarError("Of all tokens that are allowed here, none is left to choose.")
    if not draft:
        if not samples.finite[first]:
            return None
        return [Choice(samples.tokens[first], samples.logprobs[first], samples.tops[first])]
    choices: list[Choice] = []
    for row, guess in enumerate((*draft, None), first):
        if not samples.finite[row]:
            break
        token = samples.tokens[row]
        choices.append(Choice(token, samples.logprobs[row], samples.tops[row]))
        if token != guess:
            break
    return choices or None


@contextmanager
def device_errors() -> Generator[None]:
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
