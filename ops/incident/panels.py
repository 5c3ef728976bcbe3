"""The figures of a report's pictures: by bucket of time, by worker, and as a whole.

Nothing is made up: a bucket without a figure is None, and a time without any line is a gap.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from duckdb import DuckDBPyConnection

from ops.incident.drawing import COLOURS, Axis, Life, Mark, Series
from ops.incident.symptoms import bucket_width

_MAX_CODES = 6
_MIN_GAP_S = 90.0
"""A process that is there says something each minute."""
_RED, _AMBER, _GREY, _GREEN, _BLUE = "#d1242f", "#bf8700", "#8c959f", "#2da44e", "#1f6feb"
_STATES = {
    "loading": "#c8d1db",
    "ready": "#9fd3ad",
    "draining": "#f0c75e",
    "drained": "#f0c75e",
    "degraded": "#f5a97f",
    "dead": "#f1a7ab",
}
_MAX_LIVES = 40
_MAX_MARKS = 40
UNEVEN, VERY_UNEVEN = 1.2, 1.5
"""Ratios of the largest share to the mean from which workers' loads are uneven."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart's data. ``figures`` stand beside its title."""

    title: str
    says: str
    series: list[Series]
    unit: str = ""
    is_stacked: bool = False

    @property
    def is_empty(self) -> bool:
        return not any(value for one in self.series for value in one.values)


@dataclass(frozen=True, slots=True)
class Share:
    """One worker beside the others. A ratio is to the mean of all workers; None: not known."""

    worker: str
    host: str
    model_version: str
    requests: int
    failed: int
    load_ratio: float | None
    """Requests per second that it was there."""
    pace_s: float | None
    """Median time of one token."""
    pace_ratio: float | None
    kv_used: float | None
    """Most of its cache in use, 0..1."""

    @property
    def imbalance(self) -> float:
        return max(self.load_ratio or 0.0, self.pace_ratio or 0.0)

    @property
    def rating(self) -> str:
        if self.imbalance >= VERY_UNEVEN:
            return "red"
        return "yellow" if self.imbalance >= UNEVEN else "even"


@dataclass(frozen=True, slots=True)
class Totals:
    """A log, or a part of it, in a few figures; times in seconds, None where unknown."""

    requests: int
    seconds: float
    failed: int
    unfinished: int
    ttft_p50: float | None
    ttft_p99: float | None
    queue_p50: float | None
    queue_p99: float | None
    tokens_per_second: float | None
    tenants: int
    workers: int

    @property
    def error_rate(self) -> float:
        return (self.failed + self.unfinished) / self.requests if self.requests else 0.0


def axis_of(
    db: DuckDBPyConnection, troubles: Sequence[tuple[float, float]], *, since: float | None
) -> Axis | None:
    """The time of all panels; None where the log has no events."""
    row = db.execute("SELECT min(t), max(t) FROM events").fetchone()
    if row is None or row[0] is None:
        return None
    start, end = max(row[0], since or row[0]), row[1]
    width = bucket_width(end - start)
    return Axis(start, end + width, width, troubles, _gaps(db, start, end), _marks(db, start))


def _gaps(db: DuckDBPyConnection, start: float, end: float) -> list[tuple[float, float]]:
    rows = db.execute(
        f"""SELECT t, next FROM (SELECT t, lead(t) OVER (ORDER BY t) AS next FROM events)
            WHERE next - t > {_MIN_GAP_S} AND next > {start!r} AND t < {end!r}"""
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


_MARKED = {
    "deploy.": _BLUE,
    "config.changed": _BLUE,
    "fault.injected": "#8250df",
    "redis.disconnected": _RED,
    "engine.failed": _RED,
    "engine.stalled": _RED,
    "storage.failed": _AMBER,
}


def _marks(db: DuckDBPyConnection, start: float) -> list[Mark]:
    rows = db.execute(
        "SELECT t, kind, what, instance FROM changes WHERE t >= ? ORDER BY t", [start]
    ).fetchall()
    found = [
        Mark(t, f"{kind} {what or ''} ({instance})", colour)
        for t, kind, what, instance in rows
        for beginning, colour in _MARKED.items()
        if kind.startswith(beginning)
    ]
    return found[:_MAX_MARKS]


def _by_bucket(
    db: DuckDBPyConnection, axis: Axis, moment: str, figures: str, source: str
) -> list[tuple[float | None, ...]]:
    size = int((axis.end - axis.start) / axis.width) + 1
    rows = db.execute(
        f"""SELECT CAST(floor(({moment} - {axis.start!r}) / {axis.width!r}) AS INTEGER) AS place,
            {figures} FROM {source}
            WHERE {moment} >= {axis.start!r} AND {moment} < {axis.end!r} GROUP BY 1"""
    ).fetchall()
    none: tuple[float | None, ...] = (None,) * (len(rows[0]) - 1 if rows else 1)
    filled: list[tuple[float | None, ...]] = [none for _ in range(size)]
    for row in rows:
        filled[row[0]] = row[1:]
    return filled


def _column(
    rows: Sequence[tuple[float | None, ...]],
    place: int,
    *,
    per: float = 1.0,
    empty: float | None = None,
) -> list[float | None]:
    """``empty`` stands where a bucket has nothing."""
    return [
        row[place] / per if place < len(row) and row[place] is not None else empty  # pyright: ignore[reportOptionalOperand]
        for row in rows
    ]


def panels(db: DuckDBPyConnection, axis: Axis) -> list[Panel]:
    """All charts over time, in the order in which they are read; ``judged`` must exist."""
    came = _by_bucket(
        db,
        axis,
        "arrived",
        """count(*), median(ttft), quantile_cont(ttft, 0.99), median(queue_time),
           quantile_cont(queue_time, 0.99)""",
        "judged",
    )
    done = _by_bucket(
        db,
        axis,
        "ended",
        "count(*) FILTER (NOT is_bad), count(*) FILTER (is_bad), sum(tokens)",
        "judged",
    )
    return [
        Panel(
            "Requests per second",
            "what came, and what was finished",
            [
                Series("came", _column(came, 0, per=axis.width, empty=0.0), COLOURS[0]),
                Series("finished well", _column(done, 0, per=axis.width, empty=0.0), COLOURS[4]),
                Series("failed", _column(done, 1, per=axis.width, empty=0.0), COLOURS[1]),
            ],
        ),
        Panel(
            "Time to the first token",
            "what a reader waits for anything to appear",
            [
                Series("half of them within", _column(came, 1), COLOURS[0]),
                Series("99 % within", _column(came, 2), COLOURS[2]),
            ],
            "s",
        ),
        Panel(
            "Time in the queue",
            "before a worker took it: rises when there is more work than workers",
            [
                Series("half of them within", _column(came, 3), COLOURS[0]),
                Series("99 % within", _column(came, 4), COLOURS[2]),
            ],
            "s",
        ),
        _errors(db, axis),
        Panel(
            "Tokens per second",
            "of all workers together",
            [Series("tokens", _column(done, 2, per=axis.width, empty=0.0), COLOURS[3])],
        ),
        _kv(db, axis),
    ]


def _errors(db: DuckDBPyConnection, axis: Axis) -> Panel:
    codes = [
        row[0]
        for row in db.execute(
            "SELECT code FROM judged WHERE ended IS NOT NULL AND code NOT IN ('ok', 'cancelled')"
            f" GROUP BY 1 ORDER BY count(*) DESC LIMIT {_MAX_CODES}"
        ).fetchall()
    ]
    figures = ", ".join(f"count(*) FILTER (code = '{code}')" for code in codes) or "count(*)"
    rows = _by_bucket(db, axis, "ended", figures, "judged")
    series = [
        Series(code, _column(rows, place, empty=0.0), COLOURS[(place + 1) % len(COLOURS)])
        for place, code in enumerate(codes)
    ]
    lost = _by_bucket(db, axis, "arrived", "count(*) FILTER (is_open)", "judged")
    series.append(Series("never ended", _column(lost, 0, empty=0.0), COLOURS[6]))
    return Panel("Failures", "by code, stacked", series, is_stacked=True)


def _kv(db: DuckDBPyConnection, axis: Axis) -> Panel:
    """What each worker measured once a minute, so only where it did."""
    rows = db.execute(
        """SELECT coalesce(worker, instance), t, TRY_CAST(fields->>'kv_used' AS DOUBLE) FROM events
           WHERE event = 'worker.measured' ORDER BY t"""
    ).fetchall()
    size = int((axis.end - axis.start) / axis.width) + 1
    by_worker: dict[str, list[float | None]] = defaultdict(lambda: [None] * size)
    for worker, t, used in rows:
        place = int((t - axis.start) / axis.width)
        if used is not None and 0 <= place < size:
            by_worker[worker][place] = used
    series = [
        Series(worker, _carried(values, max(1, int(90 / axis.width))), COLOURS[at % len(COLOURS)])
        for at, (worker, values) in enumerate(list(by_worker.items())[: len(COLOURS)])
    ]
    return Panel(
        "Cache (KV) in use", "by worker; full means that somebody has to wait", series, "%"
    )


def _carried(values: Sequence[float | None], reach: int) -> list[float | None]:
    """A measurement holds until the next one is due."""
    found: list[float | None] = []
    last, age = None, 0
    for value in values:
        last, age = (value, 0) if value is not None else (last, age + 1)
        found.append(last if age <= reach else None)
    return found


def worker_lives(db: DuckDBPyConnection) -> list[Life]:
    """Every worker and gateway: from its first line to its last, by state, and what befell it."""
    seen = db.execute(
        """SELECT instance, service, min(t), max(t), any_value(host), any_value(model_version)
           FROM events WHERE service IN ('worker', 'gateway') AND instance IS NOT NULL
           GROUP BY 1, 2 ORDER BY service DESC, min(t)"""
    ).fetchall()
    states = _states(db)
    blows = _blows(db)
    lives: list[Life] = []
    for name, service, first, last, host, version in seen[:_MAX_LIVES]:
        spans = [(first, last, _STATES["ready"] if service == "worker" else "#a9c7f5")]
        changes = [(t, to) for t, to in states.get(name, []) if first <= t <= last]
        for place, (t, to) in enumerate(changes):
            end = changes[place + 1][0] if place + 1 < len(changes) else last
            spans.append((t, end, _STATES.get(to, _STATES["ready"])))
        note = f"{service} on {host or '?'}, {version or ''}"
        lives.append(Life(name, note, spans, blows.get(name, [])))
    return lives


def _states(db: DuckDBPyConnection) -> dict[str, list[tuple[float, str]]]:
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, t, details in db.execute(
        "SELECT instance, t, details FROM changes WHERE kind = 'worker.state' ORDER BY t"
    ).fetchall():
        found[name].append((t, str(json.loads(details).get("to", ""))))
    return found


def _blows(db: DuckDBPyConnection) -> dict[str, list[Mark]]:
    by_pid = {
        row[0]: row[1]
        for row in db.execute(
            """SELECT TRY_CAST(fields->>'pid' AS INTEGER), instance FROM events
               WHERE event IN ('worker.started', 'worker.ready', 'gateway.started', 'gateway.ready')
            """
        ).fetchall()
    }
    found: dict[str, list[Mark]] = defaultdict(list)
    for t, kind, what, instance, details in db.execute(
        """SELECT t, kind, what, instance, details FROM changes WHERE kind IN ('process.exited',
           'worker.crashed', 'engine.failed', 'engine.stalled')
           OR (kind = 'worker.state' AND details LIKE '%"to":"dead"%') ORDER BY t"""
    ).fetchall():
        told = json.loads(details)
        if kind == "process.exited" and told.get("cause") == "asked":
            continue
        name = by_pid.get(told.get("child_pid")) or instance
        found[name].append(Mark(t, f"{kind} {what or ''}", _RED))
    return found


def shares(db: DuckDBPyConnection) -> list[Share]:
    """The workers beside one another, the most uneven first."""
    rows = db.execute(
        """
        WITH measured AS (
            SELECT coalesce(worker, instance) AS worker,
                max(TRY_CAST(fields->>'kv_used' AS DOUBLE)) AS kv
            FROM events WHERE event = 'worker.measured' GROUP BY 1
        ), there AS (
            SELECT instance AS worker, greatest(max(t) - min(t), 1) AS seconds FROM events
            WHERE service = 'worker' GROUP BY 1
        )
        SELECT worker, any_value(host), any_value(model_version), count(*),
            count(*) FILTER (is_bad), count(*) / any_value(seconds), median(v_pace), any_value(kv)
        FROM judged LEFT JOIN measured USING (worker) LEFT JOIN there USING (worker)
        WHERE worker IS NOT NULL GROUP BY 1
        """
    ).fetchall()
    rates = [row[5] for row in rows if row[5] is not None]
    paces = [row[6] for row in rows if row[6] is not None]
    found = [
        Share(
            worker=row[0],
            host=row[1] or "",
            model_version=row[2] or "",
            requests=row[3],
            failed=row[4],
            load_ratio=_ratio(row[5], rates),
            pace_s=row[6],
            pace_ratio=_ratio(row[6], paces),
            kv_used=row[7],
        )
        for row in rows
    ]
    return sorted(found, key=lambda share: -share.imbalance)


def _ratio(value: float | None, all_values: Sequence[float]) -> float | None:
    mean = sum(all_values) / len(all_values) if all_values else 0.0
    return value / mean if value is not None and mean > 0 else None


def totals(
    db: DuckDBPyConnection, since: float | None = None, until: float | None = None
) -> Totals:
    """Of ``judged``, those who arrived in that time."""
    row = db.execute(
        """SELECT count(*), coalesce(max(gone) - min(arrived), 0),
            count(*) FILTER (is_bad AND ended IS NOT NULL), count(*) FILTER (is_open),
            median(ttft), quantile_cont(ttft, 0.99), median(queue_time),
            quantile_cont(queue_time, 0.99), sum(tokens), count(DISTINCT tenant_hash),
            count(DISTINCT worker)
           FROM judged WHERE arrived >= ? AND arrived <= ?""",
        [since if since is not None else -1e18, until if until is not None else 1e18],
    ).fetchone()
    if row is None:
        return Totals(0, 0.0, 0, 0, None, None, None, None, None, 0, 0)
    seconds = float(row[1])
    return Totals(
        requests=row[0],
        seconds=seconds,
        failed=row[2],
        unfinished=row[3],
        ttft_p50=row[4],
        ttft_p99=row[5],
        queue_p50=row[6],
        queue_p99=row[7],
        tokens_per_second=row[8] / seconds if row[8] is not None and seconds else None,
        tenants=row[9],
        workers=row[10],
    )
