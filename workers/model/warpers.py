"""Which tokens a drawn row keeps: temperature, top-k, top-p, min-p and typical-p, in this order.

The order is that of transformers' ``generate``, and of TGI, which has no min-p: that stands before
typical-p because it is relative to the likeliest token, which typical-p may take away. What is left
is always a band of scores, so a row is described by three numbers. Equals stay or go together.

The end of what is kept is sought among a row's best few tokens, and in the whole row only where
those cannot tell. Sums run in order (``cumsum``), so that neither padding nor threads change them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.messages import Sampling

BLOCK = 128
"""Tokens per block of the vocabulary; common vocabulary sizes are multiples."""

_FEW = 72
"""Candidates looked at first; more than 64, a usual top-k, so that equals of its last show."""

_ROWS_AT_ONCE = 8
"""When whole rows are walked several times: so many stay in the processor's cache meanwhile."""

_FAINTEST = -80.0
"""Scores below this weigh as much as this, 1e-35 of the best: nothing. Numbers too small for a
float32 would make ``exp`` ten times slower."""

_LOWEST = torch.finfo(torch.float32).min
"""Nobody keeps -inf."""


@dataclass(frozen=True, slots=True)
class HeatedRows:
    """Scores of some rows of a batch, relative to the best of their row, divided by temperature.

    Relative, no temperature, however small, can overflow. They are computed where they are looked
    at: most rows need little of their vocabulary.
    """

    blocks: torch.Tensor
    """``[batch, blocks, 128]`` in float32, as they came out of the processors."""
    index: torch.Tensor
    """``[rows]``: which of the batch; int64."""
    best: torch.Tensor
    """``[rows, 1]``: the best score of each row."""
    temperature: torch.Tensor
    """``[rows, 1]``"""

    @property
    def num_rows(self) -> int:
        return self.index.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[1]

    def of(self, rows: torch.Tensor) -> "HeatedRows":
        """Some of these rows, by their numbers among these."""
        return HeatedRows(self.blocks, self.index[rows], self.best[rows], self.temperature[rows])

    def heat(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` ``[rows, …]`` of these rows; they are left as they are."""
        shape = (-1,) + (1,) * (scores.ndim - 1)
        return (scores - self.best.view(shape)).div_(self.temperature.view(shape))

    def whole(self) -> torch.Tensor:
        """``[rows, vocabulary]``"""
        return self.heat(self.blocks[self.index].flatten(1))

    def take(self, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """``[len(rows), 128]``: for each number of a row the block of that number."""
        places = self.index[rows] * self.num_blocks + numbers
        taken = self.blocks.view(-1, BLOCK).index_select(0, places)
        return taken.sub_(self.best[rows]).div_(self.temperature[rows])


@dataclass(frozen=True, slots=True)
class Band:
    """What rows keep: heated scores from ``floor`` on that lie within ``radius`` of ``center``.

    All are ``[rows, 1]``.
    """

    floor: torch.Tensor
    center: torch.Tensor
    radius: torch.Tensor

    @staticmethod
    def open(num_rows: int, device: torch.device) -> "Band":
        """All that is finite."""
        floor = torch.full((num_rows, 1), _LOWEST, device=device)
        return Band(floor, torch.zeros_like(floor), torch.full_like(floor, math.inf))

    def of(self, rows: torch.Tensor) -> "Band":
        return Band(self.floor[rows], self.center[rows], self.radius[rows])

    def put(self, rows: torch.Tensor, band: "Band") -> None:
        """Set some of the rows."""
        self.floor[rows], self.center[rows] = band.floor, band.center
        self.radius[rows] = band.radius

    @property
    def lowest(self) -> torch.Tensor:
        """``[rows, 1]``: nothing below is kept. A little low, since sums of floats are rounded."""
        slack = (self.radius + self.center.abs()) * 1e-5
        return self.floor.maximum(self.center - self.radius - slack)

    def holds(self, heated: torch.Tensor) -> torch.Tensor:
        """1.0 where a score of ``heated`` ``[rows, width]`` is kept, else 0.0."""
        is_held = _at_least(heated, self.floor)
        if not self.radius.isposinf().all():
            is_held *= _at_least(self.radius, (heated - self.center).abs())
        return is_held


def weigh(heated: torch.Tensor) -> torch.Tensor:
    """The probabilities of heated scores, relative to the best of their row."""
    return heated.clamp(min=_FAINTEST).exp_()


@dataclass(frozen=True, slots=True)
class Limits:
    """Parameters of rows on their device, ``[rows, 1]`` each, float32 if nothing else is said."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    """int64"""
    has_top_k: torch.Tensor
    """bool"""
    top_p: torch.Tensor
    min_p: torch.Tensor
    """Its logarithm: a heated score."""
    typical_p: torch.Tensor

    @staticmethod
    def of_samplings(
        samplings: Sequence[Sampling], vocab_size: int, device: torch.device
    ) -> "Limits":
        """One copy to the device."""
        numbers = [
            (
                s.temperature,
                _top_k(s, vocab_size),
                s.top_p,
                math.log(s.min_p) if s.min_p > 0.0 else -math.inf,
                s.typical_p,
            )
            for s in samplings
        ]
        columns = torch.tensor(numbers, dtype=torch.float32).to(device)[..., None]
        temperature, top_k, top_p, min_p, typical_p = columns.unbind(1)
        return Limits(temperature, top_k.long(), top_k > 0, top_p, min_p, typical_p)

    def of(self, rows: torch.Tensor) -> "Limits":
        return Limits(
            self.temperature[rows],
            self.top_k[rows],
            self.has_top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.typical_p[rows],
        )


def find_bands(
    rows: HeatedRows, heated_max: torch.Tensor, samplings: Sequence[Sampling], limits: Limits
) -> Band:
    """What each row keeps. ``heated_max`` is ``[rows, blocks]``, the best of each block."""
    device, vocab_size = heated_max.device, rows.num_blocks * BLOCK
    band = Band.open(rows.num_rows, device)
    narrowed = [i for i, s in enumerate(samplings) if _narrows(s, vocab_size)]
    early = [i for i in narrowed if _ends_early(samplings[i], vocab_size)]
    wide = [i for i in narrowed if i not in set(early)]
    if early:
        index = torch.tensor(early, device=device)
        some = [samplings[i] for i in early]
        found, is_closed = _look_at_few(rows.of(index), heated_max[index], some, limits.of(index))
        band.put(index, found)
        wide += [early[i] for i in (~is_closed).nonzero()[:, 0].tolist()]
    if device.type == "cpu":  # one by one, without those where nothing could be found
        is_finite = rows.best[:, 0].isfinite().tolist()
        parts = [[i] for i in wide if is_finite[i]]
    else:
        parts = [wide] if wide else []
    for part in parts:
        index = torch.tensor(part, device=device)
        some = [samplings[i] for i in part]
        band.put(index, _look_at_all(rows.of(index).whole(), some, limits.of(index)))
    return band


def _top_k(sampling: Sampling, vocab_size: int) -> int:
    """0: off."""
    return sampling.top_k if 0 < sampling.top_k < vocab_size else 0


def _has_floor(sampling: Sampling, vocab_size: int) -> bool:
    return _top_k(sampling, vocab_size) > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _narrows(sampling: Sampling, vocab_size: int) -> bool:
    return _has_floor(sampling, vocab_size) or sampling.typical_p < 1.0


def _ends_early(sampling: Sampling, vocab_size: int) -> bool:
    """Whether the best few may hold all that is kept."""
    return _has_floor(sampling, vocab_size) and _top_k(sampling, vocab_size) < _FEW


def _look_at_few(
    rows: HeatedRows, heated_max: torch.Tensor, samplings: Sequence[Sampling], limits: Limits
) -> tuple[Band, torch.Tensor]:
    """What rows keep, and where that is true: ``[rows]``, where something is kept no longer."""
    vocab_size = rows.num_blocks * BLOCK
    best = _best_few(rows, heated_max)
    total = torch.ones_like(rows.best)
    unlimited = [i for i, s in enumerate(samplings) if s.top_p < 1.0 and not _top_k(s, vocab_size)]
    for part in torch.tensor(unlimited, dtype=torch.int64, device=best.device).split(_ROWS_AT_ONCE):
        total[part] = _total(rows.of(part).whole())
    band = _band(best, _floor(best, total, limits), samplings, limits)
    # A row that is not finite keeps nothing, whatever is looked at.
    is_closed = (best[:, -1:] < band.floor) | ~rows.best.isfinite()
    return band, is_closed[:, 0] if best.shape[1] < vocab_size else is_closed[:, 0].fill_(True)


def _best_few(rows: HeatedRows, heated_max: torch.Tensor) -> torch.Tensor:
    """The best scores of each row, best first: ``[rows, 72]``, or all if there are no more.

    The best k tokens lie in the k blocks with the best maxima, so the rest is not looked at.
    """
    count = min(_FEW, rows.num_blocks * BLOCK)
    chosen = heated_max.topk(min(count, rows.num_blocks)).indices
    every = torch.arange(rows.num_rows, device=chosen.device).repeat_interleave(chosen.shape[1])
    return rows.take(every, chosen.flatten()).view(rows.num_rows, -1).topk(count).values


def _look_at_all(heated: torch.Tensor, samplings: Sequence[Sampling], limits: Limits) -> Band:
    """What rows keep, ``heated`` being their whole vocabulary; on a processor, of one row."""
    vocab_size = heated.shape[1]
    has_floor = any(_has_floor(s, vocab_size) for s in samplings)
    total = _total(heated)
    if heated.device.type == "cpu":
        # Sorted is only what may matter.
        heated = _select(heated, heated >= _cut(heated, total, samplings[0]))
    if not has_floor:
        return _band(heated, torch.full_like(total, _LOWEST), samplings, limits)
    descending = heated.sort(descending=True).values
    return _band(descending, _floor(descending, total, limits), samplings, limits)


def _cut(heated: torch.Tensor, total: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What the floor of a row is not below, ``[1, 1]``, found without sorting it."""
    vocab_size = heated.shape[1]
    if top_k := _top_k(sampling, vocab_size):
        return heated.topk(top_k).values[:, -1:].clamp(min=_LOWEST)
    if sampling.top_p < 1.0:
        return _negligible(total, sampling.top_p, vocab_size)
    return torch.full_like(total, math.log(sampling.min_p) if sampling.min_p > 0.0 else _LOWEST)


def _negligible(total: torch.Tensor, share: float, vocab_size: int) -> torch.Tensor:
    """A heated score: tokens below do not hold ``1 - share`` of the mass, all together."""
    return (total * ((1.0 - share) / vocab_size)).log() - 1e-3


def _floor(descending: torch.Tensor, total: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The lowest score that top-k, top-p and min-p keep, ``[rows, 1]``.

    ``descending`` are the best of each row, ``total`` is the mass of all of it.
    """
    last = (limits.top_k - 1).clamp(min=0, max=descending.shape[1] - 1)
    kth = descending.gather(1, last).clamp(min=_LOWEST)
    floor = torch.where(limits.has_top_k, kth, _LOWEST)
    mass = (weigh(descending) * _at_least(descending, floor)).cumsum(-1)
    goal = limits.top_p * torch.where(limits.has_top_k, mass[:, -1:], total)
    end = (mass < goal).sum(-1, keepdim=True).clamp(max=descending.shape[1] - 1)
    nucleus = torch.where(limits.top_p < 1.0, descending.gather(1, end), _LOWEST)
    return floor.maximum(nucleus).maximum(limits.min_p)


def _band(
    heated: torch.Tensor, floor: torch.Tensor, samplings: Sequence[Sampling], limits: Limits
) -> Band:
    """Of what is kept so far, what typical-p keeps (Meister et al., arXiv 2202.00666).

    Those tokens whose surprise is nearest to the expected one: the entropy, of which a heated
    score is as far as it is from the mean of the heated scores.
    """
    center, radius = torch.zeros_like(floor), torch.full_like(floor, math.inf)
    if all(s.typical_p >= 1.0 for s in samplings):
        return Band(floor, center, radius)
    weights = weigh(heated) * _at_least(heated, floor)
    total = _sum(weights)
    mean = _sum(weights * heated.clamp(min=_FAINTEST)) / total
    distance = (heated - mean).abs()
    goal = limits.typical_p * total
    if heated.device.type == "cpu" and len(heated) == 1:
        lowest = mean - _negligible(total, samplings[0].typical_p, heated.shape[1])
        is_near = distance <= lowest.maximum(-mean)
        distance, weights = _select(distance, is_near), _select(weights, is_near)
    reach = _reach(distance, weights, goal)
    is_on = limits.typical_p < 1.0
    return Band(floor, torch.where(is_on, mean, center), torch.where(is_on, reach, radius))


def _reach(distance: torch.Tensor, weights: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The smallest distance within which the weights sum to ``goal``, ``[rows, 1]``."""
    ascending = distance.sort(-1)
    mass = weights.gather(1, ascending.indices).cumsum(-1)
    end = (mass < goal).sum(-1, keepdim=True).clamp(max=distance.shape[1] - 1)
    return ascending.values.gather(1, end)


def _total(heated: torch.Tensor) -> torch.Tensor:
    """``[rows, 1]``: the mass of whole rows, where the best token weighs 1."""
    return 1.0 / heated.softmax(-1).amax(-1, keepdim=True)


def _sum(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.cumsum(-1)[:, -1:]


def _select(values: torch.Tensor, is_wanted: torch.Tensor) -> torch.Tensor:
    """Some of one row on a processor, ``[1, count]``: torch takes five times as long as numpy."""
    return torch.from_numpy(values[0].numpy()[is_wanted[0].numpy()])[None]


def _at_least(values: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """1.0 or 0.0, for a product: a tenth of the time of choosing by truth values.

    ``values`` and ``bound`` broadcast.
    """
    shape = torch.broadcast_shapes(values.shape, bound.shape)
    return torch.ge(values, bound, out=values.new_empty(shape))
