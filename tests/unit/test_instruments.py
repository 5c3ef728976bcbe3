"""Cheap instruments read as the library's own, and cannot make more series than they may."""

from prometheus_client import CollectorRegistry, Histogram

from common.instruments import (
    OTHER,
    Counts,
    Distribution,
    Distributions,
    exposition,
)

BOUNDS = (0.01, 0.1, 1.0)


def test_a_histogram_is_told_as_the_librarys_own() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = Distributions("gap_seconds", "Meaning.", ["api"], BOUNDS)
    ours.register(gaps)
    histogram = Histogram("gap_seconds", "Meaning.", ["api"], buckets=BOUNDS, registry=theirs)
    for api, gap_s in (("chat", 0.01), ("chat", 0.5), ("tgi", 7.0), ("chat", 0.0)):
        gaps.labels(api).observe(gap_s)
        histogram.labels(api).observe(gap_s)
    assert _lines(ours) == _lines(theirs)


def test_a_counter_has_exactly_its_name() -> None:
    """TGI's end in nothing; they are counters all the same."""
    registry = CollectorRegistry()
    counts = Counts("tgi_request_count", "Meaning.", ["method"])
    registry.register(counts)
    counts.add(2, "prefill")
    counts.add(1, "prefill")
    assert _lines(registry) == {
        "# HELP tgi_request_count Meaning.",
        "# TYPE tgi_request_count counter",
        'tgi_request_count{method="prefill"} 3.0',
    }


def test_beyond_its_limit_an_instrument_makes_no_series() -> None:
    """What comes on top is counted together, and nothing is lost."""
    counts = Counts("many_total", "Meaning.", ["model", "code"], max_series=3)
    times = Distributions("many_seconds", "Meaning.", ["model"], BOUNDS, max_series=3)
    for index in range(100):
        counts.add(1, f"m{index}", "ok")
        times.labels(f"m{index}").observe(0.5)
    assert set(counts.series()) == {("m0", "ok"), ("m1", "ok"), ("m2", "ok"), (OTHER, OTHER)}
    assert counts.series()[OTHER, OTHER] == 97
    assert sum(counts.series().values()) == 100
    assert [series.count for series in times.series().values()] == [1, 1, 1, 97]
    counts.add(1, "m1", "ok")
    assert counts.series()["m1", "ok"] == 2


def test_quantiles_lie_within_their_bucket() -> None:
    times = Distribution(BOUNDS)
    assert times.quantile(0.5) == 0.0
    times.observe(0.05, 98)
    times.observe(5.0, 2)
    assert 0.01 < times.quantile(0.5) < 0.1
    assert times.quantile(0.99) == 1.0
    assert times.count == 100
    assert times.sum == 98 * 0.05 + 10


def _lines(registry: CollectorRegistry) -> set[str]:
    """Without the moments at which the library's series were made."""
    text = exposition(registry)
    return {line for line in text.decode().splitlines() if "_created" not in line}
