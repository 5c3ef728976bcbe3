"""Choosing tokens: one batch of logits, every row with its own parameters.

Order, as in TGI: repetition penalty, temperature, top-k, top-p, choice; the log-probability of a
choice is taken after all of them. A row's result depends on its logits, its parameters, its seed
and its position, never on its neighbours in the batch or on the process.

Noise is a hash of (seed, position, index), so any worker draws the same. The choice is an
exponential race, ``argmax(p / Exp(1))``, in two rounds: between blocks of the vocabulary by their
mass, then inside the block that won. That is the categorical distribution, exactly, for a hundredth
of the noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from numpy.typing import NDArray

from common.messages import Sampling, TopTokens
from workers.engine.counts import TokenCounts

_BLOCK = 128
"""Tokens per block of the vocabulary; common vocabulary sizes are multiples."""

_NUCLEUS_GUESS = 64
"""Candidates among which the end of a nucleus is looked for before the whole row is sorted."""

_FEW_BLOCKS = 64
"""Up to so many, blocks that hold kept tokens are taken out before anything is computed on them."""

_ROWS_AT_ONCE = 8
"""When whole rows are walked several times: so many stay in the processor's cache meanwhile."""

_FAINTEST = -80.0
"""Scores below this weigh as much as this, 1e-35 of the best: nothing. Numbers too small for a
float32 would make ``exp`` ten times slower."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
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
    """Of a grammar; see :meth:`workers.engine.grammar.Matcher.mask`."""
    banned: Sequence[int] = ()
    """Tokens that must not be chosen here."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One entry per row; where ``finite`` is False the other two mean nothing."""

    tokens: list[int]
    logprobs: list[float]
    finite: list[bool]
    tops: list[TopTokens | None]
    """None where the row asks for none."""


RowStatistics = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Of each row in float32: where its best stands (the first of equals), the best, and the sum of
``exp(x - best)``, NaN where anything is NaN or infinite."""


def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    row_statistics: RowStatistics | None = None,
) -> Samples:
    """Choose one token per row of ``logits``, ``[rows, vocabulary]`` of any float type.

    Rows without ``do_sample`` take the best token (the first of equals); temperature, top-k and
    top-p do not touch them. ``logits`` may be overwritten. ``row_statistics`` is used where it is
    all that is needed.
    """
    drawn = [i for i, row in enumerate(rows) if row.sampling.do_sample]
    if row_statistics is not None and not drawn:
        scores = logits.float().contiguous()
        _penalize(scores, rows)
        tokens, _, total = row_statistics(scores)
        return _samples(tokens, -total.log())
    blocks = _blocks(logits)
    _penalize(blocks.view(len(rows), -1), rows)
    block_max = blocks.amax(-1)
    if not drawn:
        tokens, logprobs = _most_likely(blocks, block_max)
    elif len(drawn) == len(rows):
        tokens, logprobs = _draw(blocks, block_max, rows)
    else:
        index = torch.tensor(drawn, device=blocks.device)
        tokens, logprobs = _most_likely(blocks, block_max)
        subset = [rows[i] for i in drawn]
        tokens[index], logprobs[index] = _draw(blocks[index], block_max[index], subset)
    return _samples(tokens, logprobs)


def _samples(tokens: torch.Tensor, logprobs: torch.Tensor) -> Samples:
    """One copy from the device, where each would wait for all that was asked of it before."""
    ids, numbers = torch.stack((tokens.double(), logprobs.double())).tolist()
    finite = [math.isfinite(number) for number in numbers]
    return Samples([int(id) for id in ids], numbers, finite, [None] * len(numbers))


def _blocks(logits: torch.Tensor) -> torch.Tensor:
    """``[rows, blocks, 128]`` in float32, padded with -inf."""
    scores = logits.float()
    padding = -scores.shape[1] % _BLOCK
    if padding:
        scores = F.pad(scores, (0, padding), value=float("-inf"))
    return scores.contiguous().view(scores.shape[0], -1, _BLOCK)


def _penalize(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divide positive and multiply negative scores of seen tokens (CTRL, section 4.1)."""
    penalized = [
        (i, row.counts.with_draft(row.draft).ids, row.sampling.repetition_penalty)
        for i, row in enumerate(rows)
        if row.counts is not None and row.sampling.repetition_penalty != 1.0
    ]
    if not penalized:
        return
    ids = torch.cat([torch.frombuffer(ids, dtype=torch.int64) for _, ids, _ in penalized])
    counts = torch.tensor([len(ids) for _, ids, _ in penalized])
    ids = ids.to(scores.device)
    numbers = torch.tensor([i for i, _, _ in penalized]).repeat_interleave(counts).to(scores.device)
    penalties = torch.tensor([penalty for _, _, penalty in penalized])
    penalty = penalties.repeat_interleave(counts).to(scores.device)
    seen = scores[numbers, ids]
    scores[numbers, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _most_likely(
    blocks: torch.Tensor, block_max: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows]`` each: the best token and its log-probability."""
    # Twice over a small part: torch's argmax of a row takes as long as ten of its maxima.
    block = block_max.argmax(-1, keepdim=True)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).argmax(-1)
    tokens = block * _BLOCK + inside
    return tokens[:, 0], blocks.flatten(1).log_softmax(-1).gather(1, tokens)[:, 0]


def _draw(
    blocks: torch.Tensor, block_max: torch.Tensor, rows: Sequence[SamplingRow]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows]`` each: a token drawn from what top-k and top-p keep, and its log-probability.

    Only blocks that hold a kept token are looked at, which for most rows are few.
    """
    temperatures = torch.tensor([row.sampling.temperature for row in rows])[:, None]
    heat = _Heat(block_max.amax(-1, keepdim=True), temperatures.to(blocks.device))
    heated_max = heat(block_max)
    floors = _floors(blocks.flatten(1), heated_max, heat, [row.sampling for row in rows])
    keys = torch.tensor([noise_key(row.sampling.seed, row.position) for row in rows])
    keys = keys.to(blocks.device)[:, None]
    num_kept = (heated_max >= floors).sum(-1)
    is_few = num_kept <= _FEW_BLOCKS
    tokens, logprobs = torch.empty_like(num_kept), torch.empty_like(floors[:, 0])
    for group in (is_few, ~is_few):
        index = group.nonzero()[:, 0]
        if len(index) == 0:
            continue
        tokens[index], logprobs[index] = _race(
            blocks if len(index) == len(rows) else blocks[index],
            heated_max[index],
            floors[index],
            keys[index],
            heat.of(index),
            count=max(1, int(num_kept[index].max())),
        )
    return tokens, logprobs


@dataclass(frozen=True, slots=True)
class _Heat:
    """Makes scores relative to the best of their row, and divides them by its temperature.

    Relative, no temperature, however small, can overflow. Both fields are ``[rows, 1]``.
    """

    best: torch.Tensor
    temperature: torch.Tensor

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` is ``[rows, …]`` and is left as it is."""
        shape = (-1,) + (1,) * (scores.ndim - 1)
        return (scores - self.best.view(shape)).div_(self.temperature.view(shape))

    def of(self, index: torch.Tensor) -> "_Heat":
        """The same for some of the rows."""
        return _Heat(self.best[index], self.temperature[index])


def _race(
    blocks: torch.Tensor,
    heated_max: torch.Tensor,
    floors: torch.Tensor,
    keys: torch.Tensor,
    heat: _Heat,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from what lies at or above ``floors`` in the ``count`` blocks with the best maxima."""
    every = torch.arange(len(blocks), device=blocks.device)
    if count > _FEW_BLOCKS:
        numbers = torch.arange(blocks.shape[1], device=blocks.device).expand(len(blocks), -1)
    else:
        numbers = heated_max.topk(count).indices
        blocks = blocks.gather(1, numbers[..., None].expand(-1, -1, _BLOCK))
    heated = heat(blocks)
    weights = heated.clamp(min=_FAINTEST).exp_()
    if not floors.isneginf().all():
        weights.masked_fill_(heated < floors[..., None], 0.0)
    mass = weights.sum(-1)
    block = (mass / exponential_noise(keys, numbers)).argmax(-1)
    ids = numbers[every, block][:, None] * _BLOCK + torch.arange(_BLOCK, device=blocks.device)
    # Behind the block numbers, so that the second round draws noise of its own.
    inside = (weights[every, block] / exponential_noise(keys, (1 << 32) + ids)).argmax(-1)
    return ids[every, inside], heated[every, block, inside] - mass.sum(-1).log()


def _floors(
    scores: torch.Tensor, heated_max: torch.Tensor, heat: _Heat, samplings: Sequence[Sampling]
) -> torch.Tensor:
    """The lowest heated score that each row keeps, ``[rows, 1]``; equals of it stay as well.

    The end of the nucleus is sought among the best few, and in the row only if they do not hold
    enough of its mass.
    """
    vocab_size, device = scores.shape[1], scores.device
    limits = [s.top_k if 0 < s.top_k < vocab_size else 0 for s in samplings]
    shares = [s.top_p for s in samplings]
    if not any(limits) and min(shares) >= 1.0:
        return scores.new_full((len(samplings), 1), float("-inf"))
    is_limited = torch.tensor([limit > 0 for limit in limits], device=device)[:, None]
    share = torch.tensor(shares, device=device)[:, None]
    count = max(*limits, min(_NUCLEUS_GUESS, vocab_size))
    best = heat(_best(scores, heated_max, count))
    mass = best.clamp(min=_FAINTEST).exp().cumsum(-1)
    last = torch.tensor([(limit or count) - 1 for limit in limits], device=device)[:, None]
    total = mass.gather(1, last)
    open_rows = (~is_limited & (share < 1.0))[:, 0].nonzero()[:, 0]
    if len(open_rows):
        total[open_rows] = _total_mass(scores, heat, open_rows)
    goal = torch.where(share < 1.0, share * total, float("inf"))
    floors = best.gather(1, (mass < goal).sum(-1, keepdim=True).minimum(last))
    is_beyond = ~is_limited & (mass[:, -1:] < goal)
    floors.masked_fill_(is_beyond, float("-inf"))
    for i in (is_beyond & (share < 1.0))[:, 0].nonzero()[:, 0]:
        floors[i] = _nucleus_floor(heat.of(i[None])(scores[i][None])[0], goal[i], total[i])
    return floors


def _total_mass(scores: torch.Tensor, heat: _Heat, index: torch.Tensor) -> torch.Tensor:
    """``[len(index), 1]``: mass of whole rows, where the best token weighs 1."""
    parts = [
        heat.of(part)(scores[part]).softmax(-1).amax(-1, keepdim=True)
        for part in index.split(_ROWS_AT_ONCE)
    ]
    return 1.0 / torch.cat(parts)


def _nucleus_floor(heated: torch.Tensor, goal: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The lowest score of the smallest set whose mass reaches ``goal``.

    Tokens that weigh less than an even share of the rest, ``total - goal``, cannot fill that rest
    together, so the nucleus lies among the others, and only those are sorted.
    """
    weights = heated.clamp(min=_FAINTEST).exp()
    candidates = heated[weights * len(heated) >= total - goal]
    descending = candidates.sort(descending=True).values
    mass = descending.clamp(min=_FAINTEST).exp().cumsum(-1)
    end = (mass < goal).sum()
    return descending[end.clamp(max=len(descending) - 1)]


def _best(scores: torch.Tensor, block_max: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` best scores of each row, best first.

    The best k tokens lie in the k blocks with the best maxima, so the rest is not looked at.
    """
    num_blocks = block_max.shape[1]
    if count >= num_blocks:
        return scores.topk(count).values
    chosen = block_max.topk(count).indices
    blocks = scores.view(scores.shape[0], num_blocks, _BLOCK)
    candidates = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    return candidates.topk(count).values


def noise_key(seed: int, position: int) -> int:
    """One signed 64-bit number for a (seed, position): where its noise begins."""
    key = _mix(_mix(seed & _WORD) ^ (position & _WORD))
    return key - (1 << 64) if key >> 63 else key


def exponential_noise(keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Exp(1) numbers in float64, one for each pair of ``keys`` and ``indices`` (broadcast).

    SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: the state is
    ``key + (index + 1) * gamma``.
    """
    bits = keys + (indices + 1) * _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = bits ^ _shifted(bits, 31)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -uniform.log()


def _mix(word: int) -> int:
    """SplitMix64 of one word, in plain integers."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift right without the sign, which int64 would drag along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
