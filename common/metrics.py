"""Every instrument, with its unit and its meaning.

Labels take values from closed sets only (APIs, failure codes, lanes); no client can make a series.
Numbers of the whole pool are read from Redis when a gateway is scraped: with several gateways take
their maximum, not their sum.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.tally import Tally

if TYPE_CHECKING:
    from common.broker import PoolState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0)


class Gaps(Collector):
    """A histogram that costs a fifth of the library's, for what is observed with every token.

    It has no locks: all of it belongs to the thread of the event loop.
    """

    def __init__(self, name: str, meaning: str, label: str, bounds: tuple[float, ...]) -> None:
        self._name, self._meaning, self._label = name, meaning, label
        self._bounds = bounds
        self._series: dict[str, GapSeries] = {}

    def labels(self, value: str) -> "GapSeries":
        return self._series.setdefault(value, GapSeries(self._bounds))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._meaning, labels=[self._label])
        for value, series in self._series.items():
            family.add_metric([value], series.buckets(), series.sum)
        yield family


class GapSeries:
    """Of one value of the label."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.sum = 0.0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, gap_s: float) -> None:
        self.sum += gap_s
        self._counts[bisect_left(self._bounds, gap_s)] += 1

    def buckets(self) -> list[tuple[str, float]]:
        """How many there were up to each bound, as Prometheus counts them."""
        bounds = [*map(str, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))


class GatewayMetrics:
    """Instruments of one gateway process."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "headrace_requests_total",
            "Requests for a generation that came to their end, by API and outcome: ok,"
            " cancelled, disconnected, or a failure code.",
            ["api", "code"],
            registry=registry,
        )
        self.request_s = Histogram(
            "headrace_request_duration_seconds",
            "From the arrival of a request to the last byte of its answer.",
            ["api"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "headrace_time_to_first_token_seconds",
            "From the arrival of a request to its first token at the gateway.",
            ["api"],
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_s = Gaps(
            "headrace_inter_token_latency_seconds",
            "Between two arrivals of tokens of one streamed answer, per token.",
            "api",
            _INTER_TOKEN_BUCKETS_S,
        )
        registry.register(self.inter_token_s)
        self.queue_s = Histogram(
            "headrace_queue_time_seconds",
            "From admission to the first claim by a worker, by one clock: that of Redis.",
            ["lane"],
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "headrace_tokens_total",
            "Tokens of finished generations, kind prompt or generated.",
            ["kind"],
            registry=registry,
        )
        self.streams = Gauge(
            "headrace_streams",
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
            "headrace_slow_reader_drops_total",
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
        self.queue_depth = Gauge(
            "headrace_queue_depth",
            "Generations that wait for a worker, by lane. Of the whole pool.",
            ["lane"],
            registry=registry,
        )
        self.backlog_tokens = Gauge(
            "headrace_backlog_tokens",
            "Work that waits, in tokens of prompt plus allowed answer, by lane. Of the whole pool.",
            ["lane"],
            registry=registry,
        )
        self.handed_back = Gauge(
            "headrace_handed_back",
            "Generations that wait to be continued by another worker. Of the whole pool.",
            registry=registry,
        )
        self.oldest_wait_s = Gauge(
            "headrace_queue_oldest_age_seconds",
            "How long the longest waiting generation has waited. Of the whole pool.",
            registry=registry,
        )
        self.workers = Gauge(
            "headrace_workers",
            "Workers with a lease, by the state they name. Of the whole pool.",
            ["state"],
            registry=registry,
        )
        self.running = Gauge(
            "headrace_running",
            "Generations that workers hold now. Of the whole pool.",
            registry=registry,
        )
        self.model_info = Gauge(
            "headrace_model_info",
            "1, with the model this gateway serves.",
            ["model", "model_version"],
            registry=registry,
        )

    def show_pool(self, pool: "PoolState") -> None:
        """Set the numbers of the whole pool."""
        for lane, waiting in pool.waiting.items():
            self.queue_depth.labels(lane).set(waiting)
        for lane, tokens in pool.backlog_tokens.items():
            self.backlog_tokens.labels(lane).set(tokens)
        self.handed_back.set(pool.handed_back)
        self.oldest_wait_s.set(pool.oldest_wait_ms / 1000)
        self.running.set(sum(len(worker.held) for worker in pool.workers))
        for state in _WORKER_STATES:
            self.workers.labels(state).set(
                sum(
                    (worker.presence.state if worker.presence else "unknown") == state
                    for worker in pool.workers
                )
            )

    def forget_pool(self) -> None:
        """Show no numbers of the pool: better none than old ones."""
        for labelled in (self.queue_depth, self.backlog_tokens, self.workers):
            labelled.clear()
        for single in (self.handed_back, self.oldest_wait_s, self.running):
            single.set(float("nan"))

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry)


_WORKER_STATES = ("loading", "ready", "draining", "unknown")
