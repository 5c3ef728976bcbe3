"""The watermark of Kirchenbauer et al. (arXiv 2301.10226): green tokens, and how to find them.

Behind each token a share ``gamma`` of the vocabulary is green, and green tokens get ``delta`` more.
Which are green is a hash of the previous token and the token itself (the paper's "left hash" with a
context of one), so a detector needs neither model nor vocabulary, and every worker agrees. Token
``t`` is green behind ``p`` if, of the four signed 16-bit numbers that make up the 64 bits of
``random_bits(noise_key(HASH_KEY, p), t // 4)``, lowest first, number ``t % 4`` is below
``(gamma - 1/2) * 2**16``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from workers.model.noise import noise_key, random_bits

HASH_KEY = 15_485_863
"""The millionth prime, as in the paper's own code and in TGI."""

_LANES = 4
_LANE_VALUES = 1 << 16


def green_lists(
    previous: Sequence[int], gammas: Sequence[float], vocab_size: int, device: torch.device
) -> torch.Tensor:
    """``[rows, vocab_size]`` in float32: 1 where a token is green behind ``previous``, else 0."""
    words = torch.arange(-(-vocab_size // _LANES), device=device)
    lanes = _lanes(previous, words[None])[:, :vocab_size]
    return _are_below(lanes, gammas)


def detect(tokens: Sequence[int], gamma: float) -> float:
    """The z-score of ``tokens``: how far their share of green lies above chance.

    In standard deviations (section 4 of the paper); about 0 without the watermark, and 4 is one
    false alarm in 30,000 texts. The first token only begins the count; each pair of neighbours
    counts once, since a text that repeats itself would repeat its green.

    Raises:
        ValueError: for fewer than two tokens.
    """
    pairs = sorted(set(pairwise(tokens)))
    if not pairs:
        raise ValueError("a watermark needs two tokens to be seen")
    ids = torch.tensor([[token] for _, token in pairs])
    lanes = _lanes([previous for previous, _ in pairs], ids // _LANES).gather(1, ids % _LANES)
    num_green = float(_are_below(lanes, [gamma] * len(pairs)).sum())
    expected = gamma * len(pairs)
    return (num_green - expected) / math.sqrt(expected * (1.0 - gamma))


def add_watermark(
    scores: torch.Tensor,
    rows: Sequence[int],
    previous: Sequence[int],
    gammas: Sequence[float],
    deltas: Sequence[float],
) -> None:
    """Add each ``delta`` to the green tokens of its row of ``scores`` ``[batch, vocabulary]``."""
    bias = green_lists(previous, gammas, scores.shape[1], scores.device)
    bias *= torch.tensor(deltas, dtype=torch.float32, device=scores.device)[:, None]
    scores.index_add_(0, torch.tensor(rows, device=scores.device), bias)


def green_key(previous: int) -> int:
    """Where the noise begins that says which tokens are green behind ``previous``."""
    return noise_key(HASH_KEY, previous)


def green_bound(gamma: float) -> int:
    """Tokens whose 16 bits are below this are green."""
    return round(gamma * _LANE_VALUES) - _LANE_VALUES // 2


def _lanes(previous: Sequence[int], words: torch.Tensor) -> torch.Tensor:
    """``[rows, 4 * words]`` in float32: a signed 16-bit number for each token."""
    keys = [[green_key(token)] for token in previous]
    return random_bits(torch.tensor(keys, device=words.device), words).view(torch.int16).float()


def _are_below(lanes: torch.Tensor, gammas: Sequence[float]) -> torch.Tensor:
    """1 or 0. By arithmetic: for whole numbers it is exact, and ten times faster than to compare
    and convert.
    """
    bounds = [green_bound(gamma) for gamma in gammas]
    bound = torch.tensor(bounds, dtype=torch.float32, device=lanes.device)[:, None]
    return (bound - lanes).clamp_(0.0, 1.0)
