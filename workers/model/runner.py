"""Runs a step on a model: one flat forward pass for all chunks, then the choice of tokens."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from workers.engine.batching import Choice
from workers.engine.scheduler import Chunk
from workers.model.attention import StepLayout, Stretch, running
from workers.model.kv_cache import SlotCache
from workers.model.sampler import SamplingRow, sample


class ModelRunner:
    """Implements :class:`workers.engine.batching.Runner` with a model of transformers.

    The model must have been loaded with :data:`workers.model.attention.ATTENTION`.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache
        self._unproven: dict[int, int] = {}
        """Slot -> tokens stored there that no finite logits have vouched for."""

    def run(self, chunks: list[Chunk]) -> list[Choice | None]:
        self._scrub_reused_slots(chunks)
        # The order in which attention wants them; answers go back in the order of the question.
        ordered = sorted(chunks, key=lambda chunk: (chunk.count > 1, chunk.slot))
        tokens = [t for c in ordered for t in c.sequence.tokens[c.start : c.end]]
        stretches = [Stretch(chunk.slot, chunk.start, chunk.count) for chunk in ordered]
        sampled = [chunk for chunk in ordered if chunk.samples]
        with torch.inference_mode():
            logits = forward(self._model, self._cache, tokens, stretches, _last_rows(ordered))
            choices = _choose(logits, sampled)
        for chunk in ordered:
            self._unproven[chunk.slot] = chunk.end
        for chunk, choice in zip(sampled, choices, strict=True):
            if choice is not None:
                del self._unproven[chunk.slot]
        by_slot = {chunk.slot: choice for chunk, choice in zip(sampled, choices, strict=True)}
        return [by_slot[chunk.slot] for chunk in chunks if chunk.samples]

    def _scrub_reused_slots(self, chunks: list[Chunk]) -> None:
        """A new owner must not meet the NaN of the last one behind its own end."""
        for chunk in chunks:
            if chunk.start == 0 and (num_tokens := self._unproven.pop(chunk.slot, 0)):
                self._cache.scrub(chunk.slot, num_tokens)


def forward(
    model: PreTrainedModel,
    cache: SlotCache,
    tokens: list[int],
    stretches: Sequence[Stretch],
    rows: list[int],
) -> torch.Tensor:
    """Compute ``tokens``, lying where ``stretches`` say, and the logits of ``rows`` among them.

    Keys and values are stored in ``cache``; the answer is ``[len(rows), vocabulary]``.
    """
    layout = StepLayout(cache, stretches)
    with running(layout):
        output = model(
            input_ids=torch.tensor([tokens], device=cache.device),
            position_ids=layout.positions[None],
            use_cache=False,
            # Never empty: not every kernel takes a matrix without rows.
            logits_to_keep=torch.tensor(rows or [0], device=cache.device),
        )
    return output.logits[0, : len(rows)]


def _last_rows(ordered: list[Chunk]) -> list[int]:
    """Where the last token of each chunk that samples stands in the step."""
    rows: list[int] = []
    end = 0
    for chunk in ordered:
        end += chunk.count
        if chunk.samples:
            rows.append(end - 1)
    return rows


def _choose(logits: torch.Tensor, sampled: list[Chunk]) -> list[Choice | None]:
    if not sampled:
        return []
    rows = [
        SamplingRow(c.sequence.sampling, c.sequence.num_generated, c.sequence.seen_ids)
        for c in sampled
    ]
    samples = sample(logits, rows)
    return [
        Choice(token, logprob) if finite else None
        for token, logprob, finite in zip(
            samples.tokens, samples.logprobs, samples.finite, strict=True
        )
    ]
