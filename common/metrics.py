"""What every process shows of itself, and the instruments of a gateway, with unit and meaning.

Labels take values from closed sets only (APIs, failure codes, lanes); no client can make a series.
Figures of the whole pool are the exporter's (``ops/pool_metrics.py``), those of an engine its
worker's (``workers/metrics.py``).
"""

from collections.abc import Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common import build, logs
from common.instruments import counter, exposition, gauge
from common.request_metrics import RequestMetrics
from common.settings import Compat
from common.tally import Tally

disable_created_metrics()  # a series more for each one, of use to nobody here

_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0)


def process_collectors(registry: CollectorRegistry) -> None:
    """Have ``registry`` tell what is true of any process: build, memory, processor, collections,
    lines of the log that were lost.
    """
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(_Process())


class _Process(Collector):
    def collect(self) -> Iterable[Metric]:
        yield gauge(
            "headrace_build_info",
            "1, with the version of the product and the commit that it was built of.",
            ["version", "git_sha"],
            [([build.version(), build.git_sha()], 1)],
        )
        yield counter(
            "headrace_log_lines_dropped_total",
            "Lines of the log that were lost because it could not be written in time.",
            [],
            [([], logs.dropped())],
        )


class GatewayMetrics:
    """Instruments of one gateway process, which serves ``model``; ``max_tokens`` is the longest
    prompt plus answer.
    """

    def __init__(
        self,
        *,
        model: str = "",
        model_version: str = "",
        max_tokens: int = 4096,
        compat: Sequence[Compat] = ("vllm-current", "tgi"),
    ) -> None:
        self.tally = Tally()
        self.registry = registry = CollectorRegistry()
        process_collectors(registry)
        self.requests = RequestMetrics(
            registry,
            model=model,
            model_version=model_version,
            max_tokens=max_tokens,
            compat=compat,
        )
        self.streams = Gauge(
            "headrace_stream_subscribers",
            "Answers that this gateway is relaying now, streamed or not.",
            registry=registry,
        )
        self.resumes = Counter(
            "headrace_stream_resumes_total",
            "Requests to continue a stream: resumed, ended (nothing was missing), or a code.",
            ["result"],
            registry=registry,
        )
        self.lags = Counter(
            "headrace_slow_consumer_drops_total",
            "Buffers dropped because a client was too slow; it reads the log instead.",
            registry=registry,
        )
        self.heals = Counter(
            "headrace_stream_heals_total",
            "Holes in what the inbox brought, filled from the log.",
            registry=registry,
        )
        self.relay_lag_s = Histogram(
            "headrace_relay_lag_seconds",
            "From the write of an inbox record in Redis to its arrival here. Compares two clocks:"
            " exact on one machine, else only as good as their synchronisation.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        self.loop_lag_s = Histogram(
            "headrace_event_loop_lag_seconds",
            "How late the event loop comes back to a task that sleeps 50 ms: what holds up all"
            " streams of this gateway at once.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        self.loop_held_s = Histogram(
            "headrace_event_loop_held_seconds",
            "The part of that for which this process itself kept its loop, instead of the machine"
            " being busy with others.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        self.model_info = Gauge(
            "headrace_model_info",
            "1, with the model this gateway serves.",
            ["model", "model_version"],
            registry=registry,
        )
        self.model_info.labels(model, model_version).set(1)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return exposition(self.registry)
