"""The figures of a whole pool, as Prometheus reads them from the one exporter that shows them.

What a process knows of itself it tells itself; nothing here is a sum over what others show, so that
no figure is counted twice.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.broker import Census, CountedWorker, Memory
from common.instruments import Distribution, counter, exposition, gauge, histogram
from common.metrics import process_collectors
from common.settings import Compat
from common.watching import Look

MAX_WORKERS = 200
"""Workers with series of their own, some ten each; the sums hold all."""
WORKER_STATES = ("loading", "ready", "draining", "drained", "degraded", "dead", "unknown")
_RTT_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0)


class PoolMetrics(Collector):
    """Figures of the pool ``model``.

    While Redis is away, or another exporter shows them, most are missing: none are better than old
    ones.
    """

    def __init__(self, model: str, compat: Sequence[Compat]) -> None:
        self.model = model
        self._look: Look | None = None
        """The newest, where it is to be shown."""
        self.is_active = False
        """This exporter shows the figures of the pool, and no other does."""
        self.is_redis_up = False
        self.round_trips = Distribution(_RTT_BUCKETS_S)
        self._has_tgi = "tgi" in compat
        self.registry = CollectorRegistry()
        process_collectors(self.registry)
        self.registry.register(self)

    def note(self, look: Look | None, is_active: bool) -> None:
        """A second has passed; None: Redis did not answer. See :func:`keep_overview`."""
        self.is_redis_up, self.is_active = look is not None, is_active
        self._look = look if is_active else None
        if look is not None:
            self.round_trips.observe(look.rtt_s)

    def text(self) -> bytes:
        """The exposition, in Prometheus' text format."""
        return exposition(self.registry)

    def collect(self) -> Iterable[Metric]:
        yield gauge(
            "headrace_exporter_is_active",
            "1 where this exporter shows the figures of its pool; among several, one does.",
            ["model"],
            [([self.model], self.is_active)],
        )
        yield gauge(
            "headrace_redis_up",
            "1 while Redis answers this exporter.",
            ["model"],
            [([self.model], self.is_redis_up)],
        )
        yield histogram(
            "headrace_redis_rtt_seconds",
            "From a question to Redis to its answer, once a second.",
            ["model"],
            [([self.model], self.round_trips)],
        )
        look = self._look
        if look is not None:
            yield from self._queue(look.census)
            yield from self._depths(look)
            yield from self._workers(look.census)
            yield from self._redis(look.memory)

    def _queue(self, pool: Census) -> Iterable[Metric]:
        model = self.model
        yield gauge(
            "headrace_queue_oldest_age_seconds",
            "How long the first in line of a lane has waited since its admission; 0: nobody waits.",
            ["model", "lane"],
            [([model, name], lane.oldest_ms / 1000) for name, lane in pool.lanes.items()],
        )
        yield gauge(
            "headrace_backlog_tokens",
            "Work that waits, in tokens of prompt plus allowed answer.",
            ["model", "lane"],
            [([model, name], lane.backlog_tokens) for name, lane in pool.lanes.items()],
        )
        yield gauge(
            "headrace_estimated_wait_seconds",
            "Time until somebody who comes now would be claimed: the work before him over the rate"
            " at which work is done. Missing while no rate is known.",
            ["model", "lane"],
            [
                ([model, name], lane.wait_ms / 1000)
                for name, lane in pool.lanes.items()
                if lane.wait_ms or not lane.backlog_tokens
            ],
        )
        yield gauge(
            "headrace_drain_tokens_per_second",
            "Work that leaves the queue while some waits, in tokens of prompt plus allowed answer.",
            ["model"],
            [([model], pool.drain_rate)],
        )
        num_waiting = sum(lane.depth for lane in pool.lanes.values())
        handed_back = sum(lane.handed_back for lane in pool.lanes.values())
        if self._has_tgi:
            yield gauge(
                "tgi_queue_size", "Requests that wait in the queue.", [], [([], num_waiting)]
            )
        yield gauge(
            "vllm:num_requests_waiting",
            "Number of requests waiting to be processed.",
            ["model_name", "engine"],
            [([model, "queue"], num_waiting)],
        )
        reasons = {"capacity": num_waiting - handed_back, "deferred": handed_back}
        yield gauge(
            "vllm:num_requests_waiting_by_reason",
            "Number of requests waiting, by reason; deferred: handed back by a worker.",
            ["model_name", "engine", "reason"],
            [([model, "queue", reason], count) for reason, count in reasons.items()],
        )

    def _depths(self, look: Look) -> Iterable[Metric]:
        told = [worker.presence for worker in look.census.workers if worker.presence]
        depths: list[tuple[list[str], float]] = []
        for name, lane in look.census.lanes.items():
            states = {
                "ready": lane.depth - lane.handed_back,
                "delayed": lane.handed_back,
                "claimed": sum(presence.held_in.get(name, 0) for presence in told),
                "dead": look.dead.num_in.get(name, 0),
            }
            depths += [([self.model, name, state], count) for state, count in states.items()]
        yield gauge(
            "headrace_queue_depth",
            "Generations: ready to be claimed, delayed (handed back by a worker), claimed, and dead"
            " (kept aside because workers died of them).",
            ["model", "lane", "state"],
            depths,
        )
        yield counter(
            "headrace_dead_letters_total",
            "Generations that were kept aside and not run again.",
            ["model", "code"],
            [([self.model, "POISON_REQUEST"], look.dead.num_ever)],
        )

    def _workers(self, pool: Census) -> Iterable[Metric]:
        model = self.model
        states = [state_of(worker) for worker in pool.workers]
        yield gauge(
            "headrace_workers",
            "Workers with a lease and those that load, by the state they name.",
            ["model", "state"],
            [([model, state], states.count(state)) for state in WORKER_STATES],
        )
        yield gauge(
            "headrace_gateways",
            "Gateways with a lease.",
            ["model"],
            [([model], sum(it.expires_in_ms > 0 for it in pool.gateways))],
        )
        yield gauge(
            "headrace_running",
            "Generations that workers hold now.",
            ["model"],
            [([model], sum(worker.held for worker in pool.workers))],
        )
        shown = list(zip(pool.workers, states, strict=True))[:MAX_WORKERS]
        yield gauge(
            "headrace_worker_up",
            "1 while the lease of a worker holds.",
            ["model", "worker"],
            [([model, it.name], state not in ("dead", "loading")) for it, state in shown],
        )
        yield gauge(
            "headrace_worker_heartbeat_age_seconds",
            "Since the last beat of a worker.",
            ["model", "worker"],
            [
                ([model, worker.name], worker.heartbeat_age_ms / 1000)
                for worker, _ in shown
                if worker.heartbeat_age_ms is not None
            ],
        )
        yield gauge(
            "headrace_worker_state",
            "1 for the state that a worker is in, 0 for the others.",
            ["model", "worker", "state"],
            [
                ([model, worker.name, name], name == state)
                for worker, state in shown
                for name in WORKER_STATES
            ],
        )

    def _redis(self, memory: Memory) -> Iterable[Metric]:
        sizes = {"used": memory.used_bytes, "max": memory.max_bytes}
        yield gauge(
            "headrace_redis_memory_bytes",
            "Memory of Redis: used, and the most that it may use (0: no limit).",
            ["kind"],
            [([kind], size) for kind, size in sizes.items()],
        )
        yield gauge(
            "headrace_redis_memory_ratio",
            "Used memory over the most that Redis may use; missing without a limit.",
            [],
            [([], memory.used_bytes / memory.max_bytes)] if memory.max_bytes else [],
        )
        yield counter(
            "headrace_redis_evicted_keys_total",
            "Keys that Redis dropped for want of memory: what waited there is lost.",
            [],
            [([], memory.evicted_keys)],
        )


def state_of(worker: CountedWorker) -> str:
    """One of ``WORKER_STATES``."""
    if worker.expires_in_ms <= 0:
        return "dead"
    state = worker.presence.state if worker.presence else "unknown"
    return state if state in WORKER_STATES else "unknown"
