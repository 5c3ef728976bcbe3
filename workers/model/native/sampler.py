"""Choosing tokens with the kernels: what :func:`workers.model.sampler.sample` does, in one call.

The rows of a batch are shared between the kernels' threads, and each is done in a few passes over
its logits. Scores and noise are the torch path's to the bit, and sums of probabilities to the last
bits of a float32: a token differs only where a sum decides by those.
"""

import ctypes
import math
from array import array
from collections.abc import Sequence

import torch

from common.messages import Sampling, TopTokens
from workers.model.native.binding import Engine
from workers.model.native.binding import SamplingRow as Asked
from workers.model.processors import SamplingRow
from workers.model.sampler import Samples
from workers.model.watermark import green_bound, green_key

_CHOSEN = 0
_EXHAUSTED = 2


class NativeSampler:
    """Implements :data:`workers.model.sampler.Sampler` on the threads of ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Samples:
        """See :func:`workers.model.sampler.sample`; ``logits`` are on the processor."""
        if logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        asked = (Asked * len(rows))()
        tops = _Tops(rows, logits.shape[1])
        kept: list[object] = []
        for number, (one, row) in enumerate(zip(asked, rows, strict=True)):
            _ask(one, row, kept)
            tops.ask(one, number)
        self._engine.sample(logits.contiguous(), asked)
        outcomes = [one.outcome for one in asked]
        return Samples(
            tokens=[one.token for one in asked],
            logprobs=[one.logprob for one in asked],
            finite=[outcome == _CHOSEN for outcome in outcomes],
            tops=[tops.told(one, number) for number, one in enumerate(asked)],
            exhausted=[outcome == _EXHAUSTED for outcome in outcomes],
        )


class _Tops:
    """Room for the likeliest tokens of all rows that ask for some."""

    def __init__(self, rows: Sequence[SamplingRow], vocab_size: int) -> None:
        self._counts = [min(row.sampling.top_logprobs, vocab_size) for row in rows]
        self._places: list[int] = []
        total = 0
        for count in self._counts:
            self._places.append(total)
            total += count
        self._ids = (ctypes.c_int32 * total)()
        self._logprobs = (ctypes.c_float * total)()

    def ask(self, one: Asked, number: int) -> None:
        if self._counts[number]:
            one.num_tops = self._counts[number]
            one.top_ids = ctypes.addressof(self._ids) + 4 * self._places[number]
            one.top_logprobs = ctypes.addressof(self._logprobs) + 4 * self._places[number]

    def told(self, one: Asked, number: int) -> TopTokens | None:
        if not self._counts[number]:
            return None
        first = self._places[number]
        told = slice(first, first + one.num_tops_found)
        return list(zip(self._ids[told], self._logprobs[told], strict=True))


def _ask(one: Asked, row: SamplingRow, kept: list[object]) -> None:
    """Fill in what ``row`` asks for; ``kept`` must live as long as ``one`` is used."""
    sampling = row.sampling
    if sampling.do_sample:
        _ask_to_draw(one, sampling, row.position)
    if row.counts is not None:
        counts = row.counts.with_draft(row.draft)
        kept.append(counts)
        one.num_seen = len(counts.ids)
        one.seen_ids, _ = counts.ids.buffer_info()
        one.seen_in_all, _ = counts.in_all.buffer_info()
        one.seen_in_answer, _ = counts.in_answer.buffer_info()
        one.repetition = sampling.repetition_penalty
        one.frequency = sampling.frequency_penalty
        one.presence = sampling.presence_penalty
        one.relative = sampling.relative_frequency_penalty / max(1, counts.num_tokens)
    if sampling.logit_bias:
        ids, biases = array("q", sampling.logit_bias), array("f", sampling.logit_bias.values())
        kept += (ids, biases)
        one.bias_ids, one.num_biases = ids.buffer_info()
        one.biases, _ = biases.buffer_info()
    if row.banned:
        banned = array("q", row.banned)
        kept.append(banned)
        one.banned, one.num_banned = banned.buffer_info()
    if row.mask is not None:
        kept.append(row.mask)
        one.mask = row.mask.ctypes.data
        one.num_mask_words = len(row.mask)
    if sampling.watermark is not None and row.previous is not None:
        one.watermark_key = green_key(row.previous)
        one.watermark_bound = green_bound(sampling.watermark.gamma)
        one.watermark_delta = sampling.watermark.delta


def _ask_to_draw(one: Asked, sampling: Sampling, position: int) -> None:
    one.is_drawn = True
    one.seed = sampling.seed
    one.position = position
    one.temperature = sampling.temperature
    one.top_k = sampling.top_k
    one.top_p = sampling.top_p
    one.log_min_p = math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf
    one.typical_p = sampling.typical_p
