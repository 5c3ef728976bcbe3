"""The histogram for what happens at every token reads as any other of Prometheus' does."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from common.metrics import Gaps

BOUNDS = (0.01, 0.1, 1.0)


def test_it_is_told_as_the_librarys_own_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = Gaps("gap_seconds", "Meaning.", "api", BOUNDS)
    ours.register(gaps)
    histogram = Histogram("gap_seconds", "Meaning.", ["api"], buckets=BOUNDS, registry=theirs)
    for api, gap_s in (("chat", 0.01), ("chat", 0.5), ("tgi", 7.0), ("chat", 0.0)):
        gaps.labels(api).observe(gap_s)
        histogram.labels(api).observe(gap_s)
    assert _lines(ours) == _lines(theirs)


def _lines(registry: CollectorRegistry) -> set[str]:
    """Without the moments at which the library's series were made."""
    return {
        line for line in generate_latest(registry).decode().splitlines() if "_created" not in line
    }
