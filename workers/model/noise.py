"""Randomness without state: 64 bits for any (key, index), the same on every device and version.

SplitMix64 (Steele, Lea, Flood 2014) as a counter-based generator: the state is
``key + (index + 1) * gamma``. What it gives is part of what a running generation relies on.
"""

import torch

_WORD = (1 << 64) - 1


def noise_key(first: int, second: int) -> int:
    """One signed 64-bit number for a pair, such as seed and position: where its noise begins."""
    return _signed(_mix(_mix(first & _WORD) ^ (second & _WORD)))


def exponential_noise(keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Exp(1) numbers in float64, one for each pair of ``keys`` and ``indices`` (broadcast)."""
    uniform = (_shifted(random_bits(keys, indices), 11).double() + 0.5) * 2.0**-53
    return -uniform.log()


def random_bits(keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """64 bits as an int64 for each pair of ``keys`` and ``indices`` (broadcast), also int64."""
    bits = keys + (indices + 1) * _signed(0x9E3779B97F4A7C15)
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


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
