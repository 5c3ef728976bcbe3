"""The overview: what the whole pool looked like in one second, as people and programs read it.

One process makes it each second (:mod:`common.watching`), and everybody else only reads it: the
feed of the live page, ``/v1/stats`` and ``headrace top``. All times are in seconds. No prompt, text
or tenant is in it.
"""

from typing import Literal

import msgspec

Severity = Literal["ok", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "ok")
"""The worst first."""


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The five figures of teaching texts, over the last ``over_s`` seconds.

    ``queue_time`` and ``generation_time`` are means of the requests that ended; None: none did.
    ``tokens_per_second`` is what all workers made together. ``error_rate`` is the share of requests
    that failed through no fault of their callers, of all but those refused for such a fault.
    """

    queue_time: float | None = None
    generation_time: float | None = None
    tokens_per_second: float = 0.0
    error_rate: float = 0.0
    model_version: str = ""
    over_s: float = 0.0


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """``per_s`` end, over ten seconds; ``running`` are generations that workers hold now; the
    others ended within the last minute.
    """

    per_s: float = 0.0
    running: int = 0
    ok: int = 0
    failed: int = 0
    cancelled: int = 0
    """By the caller, or because he left."""


class LaneView(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in a lane, with what was handed back to it. ``est_wait_s``: None: not known."""

    lane: str
    depth: int = 0
    oldest_age_s: float = 0.0
    backlog_tokens: int = 0
    est_wait_s: float | None = None


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. ``kv_used`` is the share of its cache that is promised to generations."""

    name: str
    host: str = ""
    state: str = "ready"
    """loading, ready, draining, drained, degraded or dead."""
    model_version: str = ""
    batch_size: float = 0.0
    """Generations in a step, on average over its last second or so."""
    max_batch_size: int = 0
    kv_used: float = 0.0
    tokens_per_second: float = 0.0
    rss_bytes: int = 0
    gpu_mem_bytes: int = 0
    """What it has taken of its GPU's memory, and all that this has; 0: it has no GPU."""
    gpu_mem_total_bytes: int = 0
    heartbeat_age_s: float = 0.0
    held: int = 0
    pid: int = 0
    up_s: float = 0.0
    drain_cause: str = ""
    """Who asked it to rest; empty: nobody."""


class GatewayView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    streams: int = 0
    relay_lag_p99_s: float = 0.0
    loop_lag_s: float = 0.0
    """99th percentile, as of the relay's, over a minute."""
    host: str = ""
    state: str = "ready"
    up_s: float = 0.0


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Over the last minute; None: nothing was measured."""

    p50: float | None = None
    p99: float | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    ttft: Quantiles = Quantiles()
    """From the arrival of a request to its first token, at the gateway."""
    inter_token: Quantiles = Quantiles()


class ErrorCount(msgspec.Struct, frozen=True, kw_only=True):
    """``total``: since the exporter began to look."""

    code: str
    count_1m: int = 0
    total: int = 0


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a batch that has not ended."""

    id: str
    status: str
    total: int = 0
    completed: int = 0
    failed: int = 0


class RedisView(msgspec.Struct, frozen=True, kw_only=True):
    """``max_bytes`` 0: no limit is set."""

    used_bytes: int = 0
    max_bytes: int = 0
    rtt_s: float = 0.0
    is_up: bool = True
    evicts: bool = False
    """It may throw away what it has no room for, which would be prompts."""
    evicted_keys: int = 0
    durability_gap: str = ""
    """Why what is promised for later may be lost with the server; empty: it is not."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A worker or gateway that ended without taking leave."""

    at: float
    role: str
    name: str
    host: str = ""
    cause: str = "lease"
    """``lease``: it was silent for too long. ``seen``: its supervisor saw it die."""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What a person who knows nothing of the system is told: what is so, why we think so, and the
    one command to run. ``code`` names the case for programs.
    """

    severity: Severity
    what: str
    why: str
    command: str
    code: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """One second. The first entry of ``diagnosis`` is the banner."""

    at: float
    """Seconds since 1970, by the clock of Redis."""
    model: str
    model_version: str = ""
    stats: Stats = Stats()
    stats_5m: Stats = Stats()
    stats_1h: Stats = Stats()
    requests: Requests = Requests()
    lanes: list[LaneView] = []
    workers: list[WorkerView] = []
    gateways: list[GatewayView] = []
    latency: Latency = Latency()
    errors: list[ErrorCount] = []
    """The most frequent of the last minute first."""
    streams: int = 0
    batches: list[BatchView] = []
    dead_letters: int = 0
    redis: RedisView = RedisView()
    losses: list[Loss] = []
    """Of the last ten minutes, the newest first."""
    diagnosis: list[Diagnosis] = []


SERIES: tuple[str, ...] = (
    "requests.per_s",
    "requests.running",
    "requests.ok",
    "requests.failed",
    "requests.cancelled",
    "stats.queue_time",
    "stats.generation_time",
    "stats.tokens_per_second",
    "stats.error_rate",
    "latency.ttft.p50",
    "latency.ttft.p99",
    "latency.inter_token.p50",
    "latency.inter_token.p99",
    *(
        f"lanes.{lane}.{figure}"
        for lane in ("priority", "default", "flex", "batch")
        for figure in ("depth", "oldest_age_s", "backlog_tokens", "est_wait_s")
    ),
    "workers.ready",
    "workers.held",
    "workers.kv_used",
    "workers.batch_size",
    "streams",
    "dead_letters",
    "redis.used_bytes",
    "redis.rtt_s",
)
"""What is remembered of each second: where it stands in an overview. Of workers ``ready`` is a
count, ``held`` and ``batch_size`` are sums and ``kv_used`` is the mean of those that are ready."""

Row = list[float | int | None]
"""When, and one number for each of :data:`SERIES`."""


def row_of(overview: Overview) -> Row:
    """What is remembered of a second once its overview is gone."""
    ready = [worker for worker in overview.workers if worker.state == "ready"]
    lanes = {lane.lane: lane for lane in overview.lanes}
    found: dict[str, float | int | None] = {
        "workers.ready": len(ready),
        "workers.held": sum(worker.held for worker in overview.workers),
        "workers.kv_used": sum(it.kv_used for it in ready) / len(ready) if ready else None,
        "workers.batch_size": sum(worker.batch_size for worker in overview.workers),
    }
    for name in SERIES:
        if name in found:
            continue
        place, *path = name.split(".")
        value: object = overview
        if place == "lanes":
            value = lanes.get(path.pop(0), LaneView(lane=""))
        else:
            path.insert(0, place)
        for step in path:
            value = getattr(value, step)
        found[name] = value if isinstance(value, float | int) else None
    return [round(overview.at, 3), *(_short(found[name]) for name in SERIES)]


def _short(value: float | None) -> float | int | None:
    """Six digits are more than a chart can show."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def history_of(rows: list[Row]) -> dict[str, Row]:
    """Columns by name, and ``at``: what the feed sends as its ``history`` event."""
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(99)]
    return dict(zip(("at", *SERIES), columns, strict=False))


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Overview).decode
