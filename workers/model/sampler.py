"""Choosing tokens: one batch of logits, every row with its own parameters.

Order, as in TGI: repetition penalty, temperature, top-k, top-p, choice; the log-probability of a
choice is taken after all of them. A row's result depends on its logits, its parameters, its seed
and its position, never on its neighbours in the batch or on the process.

Noise is a hash of (seed, position, index), so any worker draws the same. The choice is an
exponential race, ``argmax(p / Exp(1))``, in two rounds: between blocks of the vocabulary by their
mass, then inside the block that won. That is the categorical distribution, exactly, for a hundredth
of the noise.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from common.messages import Sampling

_BLOCK = 128
"""Tokens per block of the vocabulary; common vocabulary sizes are multiples."""

_NUCLEUS_GUESS = 64
"""Candidates among which the end of a nucleus is looked for before the whole row is sorted."""

_FAINTEST = -80.0
"""Scores below this weigh as much as this, 1e-35 of the best: nothing. Numbers too small for a
float32 would make ``exp`` ten times slower."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits needs to become a token.

    ``position`` is the place of the new token in its log; ``seen_ids`` are the distinct ids of
    prompt and answer so far, needed for a repetition penalty only.
    """

    sampling: Sampling
    position: int
    seen_ids: "array[int] | None" = None


@dataclass(frozen=True, slots=True)
class Samples:
    """One entry per row; where ``finite`` is False the other two mean nothing."""

    tokens: list[int]
    logprobs: list[float]
    finite: list[bool]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Samples:
    """Choose one token per row of ``logits``, ``[rows, vocabulary]`` of any float type.

    Rows without ``do_sample`` take the best token (the first of equals); temperature, top-k and
    top-p do not touch them. ``logits`` may be overwritten.
    """
    blocks = _blocks(logits)
    scores = blocks.view(len(rows), -1)
    _penalize(scores, rows)
    block_max = blocks.amax(-1)
    row_max = block_max.amax(-1, keepdim=True)
    # Relative to the best token: then no temperature, however small, can overflow.
    scores.sub_(row_max)
    block_max.sub_(row_max)
    _heat(scores, block_max, rows)
    weights = blocks.clamp(min=_FAINTEST).exp_()
    _cut(scores, block_max, weights.view_as(scores), rows)
    block_mass = weights.sum(-1)
    total = block_mass.sum(-1)
    tokens = _choose(blocks, block_max, weights, block_mass, rows)
    logprobs = scores.gather(1, tokens[:, None])[:, 0] - total.log()
    return Samples(tokens.tolist(), logprobs.tolist(), total.isfinite().tolist())


def _blocks(logits: torch.Tensor) -> torch.Tensor:
    """``[rows, blocks, 128]`` in float32, padded with -inf."""
    scores = logits.float()
    padding = -scores.shape[1] % _BLOCK
    if padding:
        scores = F.pad(scores, (0, padding), value=float("-inf"))
    return scores.contiguous().view(scores.shape[0], -1, _BLOCK)


def _penalize(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divide positive and multiply negative scores of seen tokens (CTRL, section 4.1)."""
    penalized = [(i, row) for i, row in enumerate(rows) if row.seen_ids]
    if not penalized:
        return
    ids = torch.cat([torch.frombuffer(row.seen_ids, dtype=torch.int64) for _, row in penalized])
    counts = torch.tensor([len(row.seen_ids or ()) for _, row in penalized])
    ids = ids.to(scores.device)
    numbers = torch.tensor([i for i, _ in penalized]).repeat_interleave(counts).to(scores.device)
    penalties = torch.tensor([row.sampling.repetition_penalty for _, row in penalized])
    penalty = penalties.repeat_interleave(counts).to(scores.device)
    seen = scores[numbers, ids]
    scores[numbers, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def _heat(scores: torch.Tensor, block_max: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Divide by the temperature of each row that samples."""
    temperatures = [row.sampling.temperature if row.sampling.do_sample else 1.0 for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        divisor = torch.tensor(temperatures, device=scores.device)[:, None]
        scores.div_(divisor)
        block_max.div_(divisor)


def _cut(
    scores: torch.Tensor,
    block_max: torch.Tensor,
    weights: torch.Tensor,
    rows: Sequence[SamplingRow],
) -> None:
    """Take the weight of what top-k or top-p exclude; equals of the last token kept stay."""
    samplings = [row.sampling for row in rows]
    if any(_has_cut(sampling, scores.shape[1]) for sampling in samplings):
        weights.mul_(scores >= _floors(scores, block_max, weights, samplings))


def _has_cut(sampling: Sampling, vocab_size: int) -> bool:
    return sampling.do_sample and (0 < sampling.top_k < vocab_size or sampling.top_p < 1.0)


def _floors(
    scores: torch.Tensor,
    block_max: torch.Tensor,
    weights: torch.Tensor,
    samplings: Sequence[Sampling],
) -> torch.Tensor:
    """The lowest score that each row keeps, ``[rows, 1]``.

    The end of the nucleus is sought among the best few, and in the row only if they do not hold
    enough of its mass.
    """
    vocab_size, device = scores.shape[1], scores.device
    is_cut = [_has_cut(sampling, vocab_size) for sampling in samplings]
    limits = [
        s.top_k if c and 0 < s.top_k < vocab_size else 0
        for s, c in zip(samplings, is_cut, strict=True)
    ]
    shares = [s.top_p if c else 1.0 for s, c in zip(samplings, is_cut, strict=True)]
    count = max(*limits, min(_NUCLEUS_GUESS, vocab_size))
    best = _best(scores, block_max, count)
    mass = best.clamp(min=_FAINTEST).exp().cumsum(-1)
    last = torch.tensor([(limit or count) - 1 for limit in limits], device=device)[:, None]
    is_limited = torch.tensor([limit > 0 for limit in limits], device=device)[:, None]
    share = torch.tensor(shares, device=device)[:, None]
    total = torch.where(is_limited, mass.gather(1, last), weights.sum(-1, keepdim=True))
    goal = torch.where(share < 1.0, share * total, float("inf"))
    floors = best.gather(1, (mass < goal).sum(-1, keepdim=True).minimum(last))
    is_open = ~is_limited & (mass[:, -1:] < goal)
    floors.masked_fill_(is_open, float("-inf"))
    for i in (is_open & (share < 1.0))[:, 0].nonzero()[:, 0].tolist():
        floors[i] = _nucleus_floor(scores[i], weights[i], goal[i], total[i])
    return floors


def _nucleus_floor(
    scores: torch.Tensor, weights: torch.Tensor, goal: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """The lowest score of the smallest set whose mass reaches ``goal``.

    Tokens that weigh less than an even share of the rest, ``total - goal``, cannot fill that rest
    together, so the nucleus lies among the others, and only those are sorted.
    """
    candidates = scores[weights * len(scores) >= total - goal]
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


def _choose(
    blocks: torch.Tensor,
    block_max: torch.Tensor,
    weights: torch.Tensor,
    block_mass: torch.Tensor,
    rows: Sequence[SamplingRow],
) -> torch.Tensor:
    """``[rows]``: the winner of the race, or the best token of a row that does not sample."""
    every = torch.arange(len(rows), device=blocks.device)
    samples = [row.sampling.do_sample for row in rows]
    if not any(samples):
        block = block_max.argmax(-1)
        return block * _BLOCK + blocks[every, block].argmax(-1)
    is_sampled = torch.tensor(samples, device=blocks.device)[:, None]
    keys = torch.tensor([noise_key(row.sampling.seed, row.position) for row in rows])
    keys = keys.to(blocks.device)[:, None]
    num_blocks = torch.arange(blocks.shape[1], device=blocks.device)
    race = block_mass / exponential_noise(keys, num_blocks)
    block = torch.where(is_sampled, race, block_max).argmax(-1)
    ids = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=blocks.device)
    # Behind the block numbers, so that the second round draws noise of its own.
    race = weights[every, block] / exponential_noise(keys, (1 << 32) + ids)
    inside = torch.where(is_sampled, race, blocks[every, block]).argmax(-1)
    return block * _BLOCK + inside


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
