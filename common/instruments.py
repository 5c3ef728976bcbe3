"""Instruments that cost little where much happens, and whose series are bounded.

The library's take locks and look labels up at each observation; these are a few operations on plain
numbers. All observations of one instrument come from one thread; a scrape may read from another.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""Stands for the values of a label beyond those that are shown."""
MAX_SERIES = 1000
"""Most label sets of one instrument; llm-d's router caps the values of its labels alike."""

FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""vLLM's."""
INTER_TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
"""vLLM's, with three below them."""
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
"""vLLM's, for all parts of a request."""
PHASE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, *REQUEST_BUCKETS_S)
STEP_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 20.0,
)  # fmt: skip
TGI_DURATION_BUCKETS_S = tuple(0.0001 * 1.5**n for n in range(1, 36))
"""TGI's 35, from 0.00015 s to 146 s."""


class Distribution:
    """A histogram: how many observations there were up to each bound, and their sum.

    Two of one process at two moments, or of two processes, are subtracted and added by ``counts``.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """Per bucket, not accumulated; the last one is of what is above all bounds."""
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.sum += value * times
        self.counts[bisect_left(self.bounds, value)] += times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """About the value that ``share`` of the observations stay below; 0.0 without any."""
        return quantile_of(self.bounds, self.counts, share)

    def buckets(self) -> list[tuple[str, float]]:
        """How many there were up to each bound, as Prometheus counts them."""
        bounds = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(list(self.counts))), strict=True))


def quantile_of(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """Between the bounds of its bucket the values count as evenly spread, as in Prometheus'
    ``histogram_quantile``; what is above all bounds counts as the last of them.
    """
    rank, below = share * sum(counts), 0
    if rank == 0:
        return 0.0
    for index, count in enumerate(counts):
        if count and below + count >= rank:
            if index == len(bounds):
                break
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - below) / count
        below += count
    return bounds[-1]


_Values = tuple[str, ...]


class _Series:
    """Which label sets there are. Beyond so many all others are one, all of whose labels say so."""

    def __init__(self, labels: Sequence[str], max_series: int) -> None:
        self.labels = tuple(labels)
        self._others = (OTHER,) * len(labels)
        self._max_series = max_series

    def fold(self, values: _Values, known: Mapping[_Values, object]) -> _Values:
        return values if len(known) < self._max_series or values in known else self._others


class Distributions(Collector):
    """Histograms of one name, by their labels."""

    def __init__(
        self,
        name: str,
        meaning: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        *,
        max_series: int = MAX_SERIES,
    ) -> None:
        self._name, self._meaning = name, meaning
        self._bounds = tuple(bounds)
        self._bound = _Series(labels, max_series)
        self._series: dict[_Values, Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        """Keep it where much is observed: looking it up takes as long as observing."""
        series = self._series.get(values)
        if series is None:
            values = self._bound.fold(values, self._series)
            series = self._series.setdefault(values, Distribution(self._bounds))
        return series

    def series(self) -> dict[_Values, Distribution]:
        return dict(self._series)

    def collect(self) -> Iterable[Metric]:
        yield histogram(self._name, self._meaning, self._bound.labels, self.series().items())


class Counts(Collector):
    """Counters of one name, by their labels."""

    def __init__(
        self, name: str, meaning: str, labels: Sequence[str] = (), *, max_series: int = MAX_SERIES
    ) -> None:
        self._name, self._meaning = name, meaning
        self._bound = _Series(labels, max_series)
        self._series: dict[_Values, float] = {} if labels else {(): 0.0}

    def add(self, count: float, *values: str) -> None:
        if values not in self._series:
            values = self._bound.fold(values, self._series)
        self._series[values] = self._series.get(values, 0.0) + count

    def series(self) -> dict[_Values, float]:
        return dict(self._series)

    def collect(self) -> Iterable[Metric]:
        yield counter(self._name, self._meaning, self._bound.labels, self.series().items())


def counter(
    name: str,
    meaning: str,
    labels: Sequence[str] = (),
    series: Iterable[tuple[Sequence[str], float]] = (),
) -> Metric:
    """A counter under just this name: the library's must end in ``_total``, some peers' do not."""
    return _family(name, meaning, "unknown", labels, series)


def gauge(
    name: str,
    meaning: str,
    labels: Sequence[str] = (),
    series: Iterable[tuple[Sequence[str], float]] = (),
) -> Metric:
    return _family(name, meaning, "gauge", labels, series)


def histogram(
    name: str,
    meaning: str,
    labels: Sequence[str],
    series: Iterable[tuple[Sequence[str], Distribution]],
) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=labels)
    for values, distribution in series:
        family.add_metric(values, distribution.buckets(), distribution.sum)
    return family


def _family(
    name: str,
    meaning: str,
    kind: str,
    labels: Sequence[str],
    series: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    family = Metric(name, meaning, kind)
    for values, value in series:
        family.add_sample(name, dict(zip(labels, values, strict=True)), value)
    return family


def exposition(registry: CollectorRegistry) -> bytes:
    """All there is, in Prometheus' text format 0.0.4."""
    text = generate_latest(registry)
    return re.sub(rb"(?m)^(# TYPE \S+) untyped$", rb"\1 counter", text)  # see :func:`counter`
