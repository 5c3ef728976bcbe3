"""What a process has counted since its start, small enough to be told in each of its beats.

All of it only grows. So figures of several processes are added, those of some time ago are taken
away, and what is left is exact for the time between, whoever began or died meanwhile.
"""

from collections.abc import Iterable
from math import frexp, ldexp

import msgspec

_PARTS = 8
"""Buckets between a power of two and the next: none is wider than an eighth of its lower end."""
_SHORTEST_S = 2.0**-17
"""8 µs: all that is shorter is the same."""


class Spread(msgspec.Struct, array_like=True):
    """How often a time was observed, by how long it was; ``counts`` only of buckets that were hit.

    A bucket is ``8 * exponent + part``, which takes no logarithm to find: of tokens there are many.
    """

    counts: dict[int, int] = msgspec.field(default_factory=dict[int, int])
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        self.sum_s += seconds
        mantissa, exponent = frexp(max(seconds, _SHORTEST_S))
        bucket = _PARTS * exponent + int(2 * _PARTS * mantissa) - _PARTS
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    @property
    def num_observed(self) -> int:
        return sum(self.counts.values())

    @property
    def mean_s(self) -> float | None:
        number = self.num_observed
        return max(0.0, self.sum_s) / number if number else None

    def quantile_s(self, share: float) -> float | None:
        """What ``share`` of the observed times stayed below, as exactly as a bucket is wide."""
        left = share * self.num_observed
        if not self.counts:
            return None
        bucket = 0
        for bucket in sorted(self.counts):
            number = self.counts[bucket]
            if left <= number:
                break
            left -= number
        exponent, part = divmod(bucket, _PARTS)
        inside = min(1.0, left / self.counts[bucket])
        return ldexp((_PARTS + part + inside) / (2 * _PARTS), exponent)

    def add(self, other: "Spread") -> None:
        for bucket, number in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + number
        self.sum_s += other.sum_s

    def since(self, before: "Spread") -> "Spread":
        """What came behind ``before``, which is a part of this."""
        counts = {
            bucket: number - before.counts.get(bucket, 0) for bucket, number in self.counts.items()
        }
        kept = {bucket: number for bucket, number in counts.items() if number > 0}
        return Spread(kept, self.sum_s - before.sum_s)


def _spread() -> Spread:
    return Spread()


class Figures(msgspec.Struct, omit_defaults=True):
    """Of requests for generations at one gateway, or at all of them together.

    ``outcomes`` counts ends by ``ok``, ``cancelled``, ``disconnected`` or a failure's code, with
    those that were refused before they were queued. ``tokens`` are generated ones.
    """

    outcomes: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    tokens: int = 0
    ttft: Spread = msgspec.field(default_factory=_spread)
    inter_token: Spread = msgspec.field(default_factory=_spread)
    queue_time: Spread = msgspec.field(default_factory=_spread)
    generation_time: Spread = msgspec.field(default_factory=_spread)
    relay_lag: Spread = msgspec.field(default_factory=_spread)
    loop_lag: Spread = msgspec.field(default_factory=_spread)

    def add(self, other: "Figures") -> None:
        for outcome, number in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + number
        self.tokens += other.tokens
        for name in _SPREADS:
            getattr(self, name).add(getattr(other, name))

    def since(self, before: "Figures") -> "Figures":
        """What came behind ``before``, which is a part of this."""
        outcomes = {
            outcome: number - before.outcomes.get(outcome, 0)
            for outcome, number in self.outcomes.items()
        }
        spreads = {name: getattr(self, name).since(getattr(before, name)) for name in _SPREADS}
        return Figures(
            {outcome: number for outcome, number in outcomes.items() if number > 0},
            self.tokens - before.tokens,
            **spreads,
        )


_SPREADS = ("ttft", "inter_token", "queue_time", "generation_time", "relay_lag", "loop_lag")


def total(parts: Iterable[Figures]) -> Figures:
    found = Figures()
    for part in parts:
        found.add(part)
    return found
