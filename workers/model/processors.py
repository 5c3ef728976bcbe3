"""What changes scores before anything is chosen, for greedy and drawn rows alike.

Order, as in TGI where it has them: watermark, repetition penalty, frequency and presence penalties,
logit bias, then what forbids: a grammar's mask and banned tokens. A bias stands behind the
penalties, so that what a request adds is what it gets, and before the masks, since no bias may
bring back what they take away. All add or multiply: a logit that is not finite stays so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat

import numpy as np
import torch
from numpy.typing import NDArray

from common.messages import Sampling
from workers.engine.counts import TokenCounts
from workers.model.watermark import add_watermark

_MASK_BITS = 32


@dataclass(slots=True)
class SamplingRow:
    """What one row of logits needs to become a token.

    ``position`` is the place of the new token in its log; ``counts`` are those of prompt and answer
    so far, needed for penalties only. ``draft`` are tokens taken for chosen behind those: they
    count as well, and ``position`` is behind them.
    """

    sampling: Sampling
    position: int
    counts: TokenCounts | None = None
    draft: Sequence[int] = ()
    previous: int | None = None
    """The token before the new one; needed for a watermark only."""
    mask: NDArray[np.int32] | None = None
    """Of a grammar; see :meth:`workers.engine.grammar.Matcher.mask`. Tokens behind its end are
    forbidden."""
    banned: Sequence[int] = ()
    """Tokens that must not be chosen here; those that are not in the vocabulary never are."""

    @property
    def is_restricted(self) -> bool:
        """Whether masks might leave nothing to choose."""
        return self.mask is not None or len(self.banned) > 0


def process(scores: torch.Tensor, rows: Sequence[SamplingRow], vocab_size: int) -> None:
    """Change ``scores`` in place: ``[rows, width]`` in float32, contiguous.

    Columns from ``vocab_size`` on are padding of -inf, and stay that.
    """
    _watermark(scores, rows)
    _penalize(scores, rows)
    _bias(scores, rows, vocab_size)
    _mask(scores, rows)


def _watermark(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    marked = [
        (i, row.previous, row.sampling.watermark)
        for i, row in enumerate(rows)
        if row.sampling.watermark is not None and row.previous is not None
    ]
    if marked:
        add_watermark(
            scores,
            [i for i, _, _ in marked],
            [previous for _, previous, _ in marked],
            [mark.gamma for _, _, mark in marked],
            [mark.delta for _, _, mark in marked],
        )


def _penalize(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition: divide positive and multiply negative scores (CTRL, arXiv 1909.05858, 4.1).

    Then subtract: OpenAI's penalties for each occurrence, and for any, in the answer; TGI's for the
    share of all tokens that are this one.
    """
    places: list[torch.Tensor] = []
    penalties: list[torch.Tensor] = []
    for i, row in enumerate(rows):
        if row.counts is None:
            continue
        counts, sampling = row.counts.with_draft(row.draft), row.sampling
        if not counts.ids:
            continue
        ids = torch.frombuffer(counts.ids, dtype=torch.int64)
        # In float64, so that one copy takes them to the device together with the places.
        in_all = torch.frombuffer(counts.in_all, dtype=torch.int64).double()
        in_answer = torch.frombuffer(counts.in_answer, dtype=torch.int64).double()
        less = in_answer * sampling.frequency_penalty
        less += in_answer.clamp(max=1) * sampling.presence_penalty
        less += in_all * (sampling.relative_frequency_penalty / counts.num_tokens)
        factors = torch.full_like(less, sampling.repetition_penalty)
        places.append(ids + i * scores.shape[1])
        penalties.append(torch.stack((factors, less)))
    if not places:
        return
    packed = torch.cat((torch.cat(places)[None], torch.cat(penalties, dim=1).view(torch.int64)))
    packed = packed.to(scores.device)
    factors, less = packed[1:].view(torch.float64).float().unbind()
    flat = scores.view(-1)
    seen = flat[packed[0]]
    flat[packed[0]] = torch.where(seen < 0, seen * factors, seen / factors) - less


def _bias(scores: torch.Tensor, rows: Sequence[SamplingRow], vocab_size: int) -> None:
    """Add logit biases, and -inf to banned tokens."""
    places: list[int] = []
    biases: list[float] = []
    for i, row in enumerate(rows):
        if not row.sampling.logit_bias and not row.banned:
            continue
        asked: Iterable[tuple[int, float]] = chain(
            row.sampling.logit_bias.items(), zip(row.banned, repeat(float("-inf")), strict=False)
        )
        for id, bias in asked:
            if 0 <= id < vocab_size:
                places.append(i * scores.shape[1] + id)
                biases.append(bias)
    if places:
        where = torch.tensor(places, device=scores.device)
        what = torch.tensor(biases, dtype=torch.float32, device=scores.device)
        scores.view(-1).index_add_(0, where, what)


def _mask(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Add -inf to what grammars forbid."""
    masks = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if not masks:
        return
    words = np.zeros((len(masks), scores.shape[1] // _MASK_BITS), dtype="<i4")
    for line, (_, mask) in zip(words, masks, strict=True):
        line[: len(mask)] = mask[: len(line)]
    octets = torch.from_numpy(words.view(np.uint8)).to(scores.device).flatten()
    bias = _biases_of_octets(scores.device).index_select(0, octets.int())
    index = torch.tensor([i for i, _ in masks], device=scores.device)
    scores.index_add_(0, index, bias.view(len(masks), -1))


@cache
def _biases_of_octets(device: torch.device) -> torch.Tensor:
    """``[256, 8]``: 0 for each bit that is set, -inf for the others; the lowest bit first."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.float().log().to(device)
