"""What counts can tell: risk ratios, how much a set explains, and when a rate was high.

Plain arithmetic over counts that SQL made; nothing here knows what a request is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959964
"""Standard normal quantile of 97.5 %."""


@dataclass(frozen=True, slots=True)
class Table:
    """A two-by-two table: of ``total`` things ``bad`` are bad, ``exposed`` share a trait.

    ``hit`` are bad and share it.
    """

    hit: int
    exposed: int
    bad: int
    total: int

    @property
    def support(self) -> float:
        """Share of the bad ones that have the trait, 0..1."""
        return self.hit / self.bad if self.bad else 0.0

    @property
    def purity(self) -> float:
        """Share of those with the trait that are bad, 0..1."""
        return self.hit / self.exposed if self.exposed else 0.0

    @property
    def other_purity(self) -> float:
        """Share of those without the trait that are bad, 0..1."""
        others = self.total - self.exposed
        return (self.bad - self.hit) / others if others else 0.0

    def risk_ratio(self) -> tuple[float, float, float]:
        """Ratio of the risks with and without the trait, with its 95 % confidence interval.

        On the logarithm (Katz et al. 1978), half a thing added to each cell, so that empty cells
        give wide intervals and not infinities.
        """
        hit, exposed = self.hit + 0.5, self.exposed + 1.0
        miss, others = self.bad - self.hit + 0.5, self.total - self.exposed + 1.0
        log = math.log((hit / exposed) / (miss / others))
        spread = _Z95 * math.sqrt(max(1 / hit - 1 / exposed + 1 / miss - 1 / others, 0.0))
        return math.exp(log), math.exp(log - spread), math.exp(log + spread)

    def gain(self) -> float:
        """Log-likelihood, in nats, that knowing the trait adds to what is said about badness.

        Zero where the trait goes with *less* badness: an absence is not a cause.
        """
        if self.purity <= self.other_purity:
            return 0.0
        known = _entropy(self.hit, self.exposed)
        known += _entropy(self.bad - self.hit, self.total - self.exposed)
        return max(0.0, _entropy(self.bad, self.total) - known)

    def entropy(self) -> float:
        """The most that any trait can add, in nats."""
        return _entropy(self.bad, self.total)

    def p_value(self) -> float:
        """Of the G-test with one degree of freedom (twice the gain is chi-squared)."""
        return math.erfc(math.sqrt(self.gain()))


def _entropy(part: int, whole: int) -> float:
    """Whole times the entropy of one draw, in nats."""
    if part <= 0 or part >= whole:
        return 0.0
    rest = whole - part
    return -part * math.log(part / whole) - rest * math.log(rest / whole)


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place], reverse=True)
    adjusted, least = [1.0] * len(p_values), 1.0
    for rank, place in enumerate(order):
        least = min(least, p_values[place] * len(p_values) / (len(p_values) - rank))
        adjusted[place] = least
    return adjusted


@dataclass(frozen=True, slots=True)
class Interval:
    """Places ``start`` (inclusive) to ``end`` (exclusive) of a series, where its rate was high."""

    start: int
    end: int
    inside: float
    """The rate there, and ``outside`` elsewhere: bad ones per thing, or things per expected one."""
    outside: float
    gain: float
    """Log-likelihood over one rate for all, in nats."""
    p_value: float


def scan(bad: Sequence[float], total: Sequence[float]) -> Interval | None:
    """The interval whose rate of bad ones differs most, if it is higher and not chance.

    ``total`` holds what each place exposes: things (then bad ones are part of them), or expected
    counts. Kulldorff's scan statistic (1997) under Poisson, over all intervals; the p-value is
    bounded by the number of intervals times the tail of one.
    """
    size = len(bad)
    all_bad, all_total = sum(bad), sum(total)
    if size < 2 or all_bad <= 0 or all_total <= 0:
        return None
    best: tuple[float, int, int] = (0.0, 0, 0)
    for start in range(size):
        if not bad[start]:
            continue  # an interval that begins without a bad one is beaten by a shorter one
        inner_bad = inner_total = 0.0
        for end in range(start, size):
            inner_bad += bad[end]
            inner_total += total[end]
            if not bad[end]:
                continue
            gain = _poisson_gain(inner_bad, inner_total, all_bad, all_total)
            if gain > best[0]:
                best = (gain, start, end + 1)
    gain, start, end = best
    if gain <= 0:
        return None
    inner_bad, inner_total = sum(bad[start:end]), sum(total[start:end])
    rest = all_total - inner_total
    return Interval(
        start=start,
        end=end,
        inside=inner_bad / inner_total if inner_total else math.inf,
        outside=(all_bad - inner_bad) / rest if rest else 0.0,
        gain=gain,
        p_value=min(1.0, size * (size + 1) / 2 * math.erfc(math.sqrt(gain))),
    )


def _poisson_gain(inner_bad: float, inner_total: float, bad: float, total: float) -> float:
    if inner_total >= total or inner_bad * total <= bad * inner_total:
        return 0.0
    expected = bad * inner_total / total
    gain = inner_bad * math.log(inner_bad / expected) if expected else math.inf
    rest = bad - inner_bad
    return gain + (rest * math.log(rest / (bad - expected)) if rest else 0.0)
