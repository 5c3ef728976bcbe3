"""What is wrong with which requests: failed, never ended, moved, or slower than their like.

Makes the table ``judged``: one row per request with its traits as words, and for each symptom a
flag and the moment at which it showed. A slow request is one that took much longer than the median
of its like (prompts of its length, its lane) in the part of the log that is not suspected itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from duckdb import DuckDBPyConnection

from ops.incident.conditions import Condition
from ops.incident.statistics import Interval, scan

TRAITS: dict[str, str] = {
    # Of what ran: a refused request has the version that its gateway knew, and ran nowhere.
    "model_version": "CASE WHEN worker IS NOT NULL THEN model_version END",
    "git_sha": "CASE WHEN worker IS NOT NULL THEN git_sha END",
    "adapter": "adapter",
    "grammar": "grammar",
    "worker": "worker",
    "gpu": "gpu",
    "host": "host",
    "gateway": "gateway",
    "tenant_hash": "tenant_hash",
    "user_agent": "user_agent",
    "lane": "lane",
    "api": "api",
    "n": "CAST(n AS VARCHAR)",
    "sampling": "sampling",
    "stream": "CAST(stream AS VARCHAR)",
    "prompt_tokens": "{prompt_tokens}",
    "max_tokens": "{max_tokens}",
    "batch_size": "{batch_size}",
    "after_change": "after_change",
    "attempts": "CASE WHEN attempts > 1 THEN 'more than 1' END",
}
"""By name, the expression over ``requests``. In the order in which a cause is named when several
go together: what runs, where it runs, who asks, how it asks, and last what is rather an effect."""

EFFECTS = frozenset({"attempts", "batch_size", "after_change"})
"""Traits that trouble itself brings about: named as a cause only where nothing else explains it."""

_NUM_BUCKETS = 160
_MIN_BUCKET_S = 1.0
_MIN_REFERENCE = 8
"""Requests of a like whose median says what is usual."""
_CHANGE_REACH_S = 60.0
_P_VALUE = 1e-4
"""Of an interval to be an incident; four symptoms on ten quiet logs a day stay quiet for years."""
_MIN_RATIO = 3.0
_MIN_INSIDE = 0.01


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to be bad. ``weight`` is how much one request of it matters beside the others."""

    name: str
    words: str
    weight: float
    value: str = ""
    """For slowness: the figure in seconds, an expression over ``requests``; its like are those
    of equal ``like``; ``floor_s`` above their median is the least that counts as slow."""
    like: str = "'all'"
    floor_s: float = 0.0

    @property
    def is_slowness(self) -> bool:
        return bool(self.value)


KINDS = (
    Kind("errors", "failed", 3.0),
    Kind("unfinished", "never got an end", 3.0),
    Kind("moved", "had to be started again by another worker", 2.0),
    Kind("refused", "were refused, by what their callers did", 0.5),
    Kind("corrupt", "got an answer that was flagged as corrupt", 1.0),
    Kind("left", "were left by their readers", 0.7),
    Kind("queue", "waited long in the queue", 1.0, "queue_time", "lane", 0.3),
    Kind(
        "first_token",
        "got their first token late, not counting the queue",
        1.0,
        "greatest(ttft - coalesce(queue_time, 0), 0)",
        # Half powers of two: within one, a prompt's length hardly matters. A grammar is compiled.
        "concat(round(2 * log2(1 + coalesce(prompt_tokens, 0))), ' ', grammar)",
        0.15,
    ),
    Kind(
        "pace",
        "got their tokens slowly",
        1.0,
        # Not where its client held it up.
        "CASE WHEN tokens >= 4 AND coalesce(blocked_time, 0) < 0.1 THEN"
        " CASE WHEN ttft IS NOT NULL AND stream THEN greatest(duration - ttft, 0) / (tokens - 1)"
        " ELSE generation_time / tokens END END",
        "CASE WHEN stream THEN 'stream' ELSE 'whole' END",
        0.015,
    ),
    Kind("relay", "got tokens late from their gateway", 1.0, "relay_lag_p99", floor_s=0.25),
    Kind(
        "reading",
        "were read slowly by their clients",
        0.5,
        "CASE WHEN stream THEN coalesce(blocked_time, 0) END",
        floor_s=0.25,
    ),
)
_MINE = Kind("asked", "meet the condition", 3.0)

_BUCKETS = {
    "prompt_tokens": (64, 256, 1024, 4096, 16384),
    "max_tokens": (32, 128, 512, 2048, 8192),
    "batch_size": (1, 4, 16, 64),
}


@dataclass(frozen=True, slots=True)
class Window:
    """An interval of the log, in seconds since the epoch."""

    start: float
    end: float
    bucket_s: float
    """How exactly its edges are known."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """One kind of badness as it was found: how many, and when, if there is a time to it."""

    kind: Kind
    bad: int
    total: int
    window: Window | None
    interval: Interval | None
    """What the scan said about that window."""
    typical_s: float | None = None
    """Median of the like, and of the slow ones, for slowness."""
    slow_s: float | None = None

    @property
    def flag(self) -> str:
        return f"is_{self.kind.name}"

    @property
    def moment(self) -> str:
        return f"at_{self.kind.name}"

    @property
    def is_sudden(self) -> bool:
        """Whether it has a beginning (or an end) that is not chance."""
        return self.window is not None


def bucket_sql(name: str) -> str:
    """A figure as a word: ``65–256``; the bounds are powers that prompts and batches come in."""
    bounds = _BUCKETS[name]
    least = 0
    cases: list[str] = []
    for bound in bounds:
        shown = f"{least}–{bound}" if least < bound else f"{bound}"
        cases.append(f"WHEN {name} <= {bound} THEN '{shown}'")
        least = bound + 1
    return f"CASE {' '.join(cases)} WHEN {name} > {bounds[-1]} THEN '> {bounds[-1]}' END"


def judge(
    db: DuckDBPyConnection,
    *,
    since: float | None = None,
    until: float | None = None,
    bad: Condition | None = None,
    last_seen: float | None = None,
) -> list[Symptom]:
    """Make the table ``judged`` from ``requests``; returns the symptoms that anybody has.

    Who arrived outside of ``since`` and ``until`` (seconds since the epoch) is what the others are
    compared with, as far as nothing was wrong with it. ``bad`` replaces all symptoms by one of the
    user's. ``last_seen`` is the time of the log's last line: what has not ended shortly before it
    may still end.
    """
    _make_rows(db, last_seen)
    focus = _focus(since, until)
    if bad is not None:
        flags = {_MINE: _Flag(bad.sql, "coalesce(ended, arrived)", bad.values)}
    else:
        flags = {kind: _FLAGS[kind.name] for kind in KINDS if not kind.is_slowness}
        flags |= {kind: _slowness(db, kind) for kind in KINDS if kind.is_slowness}
    columns = ", ".join(
        f"{flag.condition} AND {focus} AS is_{kind.name}, "
        f"CASE WHEN {focus} OR NOT {flag.condition} THEN {flag.moment} END AS at_{kind.name}"
        for kind, flag in flags.items()
    )
    joins = " ".join(flag.join for flag in flags.values())
    values = [value for flag in flags.values() for value in (*flag.values, *flag.values)]
    db.execute(
        f"CREATE OR REPLACE TEMP TABLE judged AS SELECT judgeable.*, {columns} "
        f"FROM judgeable {joins}",
        values,
    )
    found = [_symptom(db, kind) for kind in flags]
    return [symptom for symptom in found if symptom is not None]


@dataclass(frozen=True, slots=True)
class _Flag:
    """How ``judgeable`` says that a request is bad, and when that showed; both SQL."""

    condition: str
    moment: str
    values: Sequence[str | float] = ()
    join: str = ""


_FLAGS = {
    "errors": _Flag("coalesce(is_bad AND ended IS NOT NULL, false)", "gone"),
    "unfinished": _Flag("is_open", "arrived"),
    "moved": _Flag("coalesce(attempts > 1 OR deaths > 0, false)", "moved_at"),
    "refused": _Flag(
        "coalesce(NOT is_bad AND code NOT IN ('ok', 'cancelled', 'disconnected')"
        " AND ended IS NOT NULL, false)",
        "gone",
    ),
    "corrupt": _Flag("flagged IS NOT NULL", "gone"),
    "left": _Flag("coalesce(code = 'disconnected', false)", "ended"),
}


def _filled(expression: str) -> str:
    return expression.format(**{name: bucket_sql(name) for name in _BUCKETS})


def _focus(since: float | None, until: float | None) -> str:
    bounds = [f"arrived >= {since!r}"] if since is not None else []
    bounds += [f"arrived <= {until!r}"] if until is not None else []
    return f"({' AND '.join(bounds) or 'true'})"


def _make_rows(db: DuckDBPyConnection, last_seen: float | None) -> None:
    """The table ``judgeable``: requests with their traits (``t_…``) and figures (``v_…``)."""
    traits = ",\n".join(
        f"coalesce(CAST({_filled(expression)} AS VARCHAR), '') AS t_{name}"
        for name, expression in TRAITS.items()
    )
    measures = ",\n".join(
        f"{kind.value} AS v_{kind.name}, {kind.like} AS like_{kind.name}"
        for kind in KINDS
        if kind.is_slowness
    )
    settled = _settled_until(db, last_seen)
    db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE judgeable AS
        WITH restarts AS (
            SELECT t, coalesce(instance, '') AS instance, kind FROM changes
            WHERE kind IN ('worker.state', 'process.restarted', 'process.started', 'model.loaded',
                           'deploy.started', 'deploy.promoted', 'config.changed')
        ), again AS (
            SELECT request_id, min(ended) AS moved_at
            FROM attempts WHERE end_event NOT IN ('worker.finished', 'request.finished')
            GROUP BY 1
        ), places AS (
            SELECT request_id, sum(greatest(ended - claimed, 0)) AS held_s
            FROM attempts GROUP BY 1
        ), rows AS (
            SELECT r.*, c.kind AS change_kind, r.arrived - c.t AS change_age
            FROM requests r ASOF LEFT JOIN restarts c
            ON r.worker = c.instance AND r.arrived >= c.t
            WHERE r.arrived IS NOT NULL
        ), named AS (
            SELECT *, CASE WHEN change_age < {_CHANGE_REACH_S} THEN
                'less than {_CHANGE_REACH_S:.0f} s after ' || change_kind END AS after_change
            FROM rows
        )
        SELECT named.*, greatest(coalesce(ended, arrived), arrived) AS gone,
            ended IS NULL AND arrived < {settled!r} AS is_open,
            coalesce(moved_at, arrived) AS moved_at, coalesce(held_s, 0) AS held_s,
            {traits}, {measures}
        FROM named LEFT JOIN again ON named.request_id = again.request_id
            LEFT JOIN places ON named.request_id = places.request_id
        """
    )


def _settled_until(db: DuckDBPyConnection, last_seen: float | None) -> float:
    """Who came before and has no end will have none: three of the longest answers ago."""
    row = db.execute(
        """SELECT min(arrived), max(greatest(arrived, ended)),
            coalesce(quantile_cont(ended - arrived, 0.99), 0) FROM requests"""
    ).fetchone()
    if row is None or row[0] is None:
        return 0.0
    last = max(row[1], last_seen or row[1])
    return last - max(2.0, min(3.0 * row[2], (last - row[0]) / 4))


def _slowness(db: DuckDBPyConnection, kind: Kind) -> _Flag:
    """Judge by the quiet half of the time, find when it was worst, and judge by all other times.

    By the quiet half, since a flood may be most of all requests; but where no interval stands out,
    all requests say what is usual.
    """
    flag = _judge_slow(db, kind, _quiet_half(db, kind))
    source = f"SELECT {flag.condition} AS bad, {flag.moment} AS moment FROM judgeable {flag.join}"
    window = window_in(db, source)[0]
    if window is None:
        return _judge_slow(db, kind, "true")
    return _judge_slow(
        db, kind, f"({flag.moment}) NOT BETWEEN {window.start!r} AND {window.end!r}", flag.join
    )


def _quiet_half(db: DuckDBPyConnection, kind: Kind) -> str:
    """The condition of having come in a bucket whose median is not above the median bucket's."""
    span = db.execute("SELECT min(arrived), max(arrived) FROM judgeable").fetchone()
    if span is None or span[0] is None:
        return "true"
    width = 4 * bucket_width(span[1] - span[0])
    bucket = f"CAST(floor((arrived - {span[0]!r}) / {width!r}) AS INTEGER)"
    rows = db.execute(
        f"""SELECT {bucket}, median(v_{kind.name}) AS usual FROM judgeable
            WHERE v_{kind.name} IS NOT NULL GROUP BY 1 ORDER BY usual"""
    ).fetchall()
    quiet = ", ".join(str(row[0]) for row in rows[: (len(rows) + 1) // 2])
    return f"{bucket} IN ({quiet})" if quiet else "true"


def _judge_slow(db: DuckDBPyConnection, kind: Kind, reference: str, join: str = "") -> _Flag:
    """``reference`` says whose median counts; of which it has too few a like, none is slow."""
    value, like, table = f"v_{kind.name}", f"like_{kind.name}", f"usual_{kind.name}"
    chosen = f"FROM judgeable {join} WHERE {value} IS NOT NULL AND ({reference})"
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE {table}_next AS
            SELECT {like} AS kin, median({value}) AS usual, mad({value}) AS spread
            {chosen} GROUP BY 1 HAVING count(*) >= {_MIN_REFERENCE}"""
    )
    db.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS FROM {table}_next")
    usual, spread = f"{table}.usual", f"{table}.spread"
    bound = f"greatest(2.5 * {usual}, {usual} + 7.4 * {spread}, {usual} + {kind.floor_s})"
    return _Flag(
        f"coalesce({value} > {bound}, false)",
        f"CASE WHEN {value} IS NOT NULL THEN {_overdue(kind, usual)} END",
        join=f"LEFT JOIN {table} ON {table}.kin = {like}",
    )


def _overdue(kind: Kind, usual: str) -> str:
    """The moment from which it was later than its like: trouble had begun by then."""
    if kind.name == "queue":
        return f"arrived + least({usual}, v_queue)"
    if kind.name == "first_token":
        return f"arrived + coalesce(queue_time, 0) + least({usual}, v_first_token)"
    if kind.name == "relay":
        return "gone"
    if kind.name == "reading":
        return "gone - least(v_reading, gone - arrived)"
    return f"greatest(arrived, gone - greatest(v_pace - {usual}, 0) * tokens)"


def _symptom(db: DuckDBPyConnection, kind: Kind) -> Symptom | None:
    flag, moment = f"is_{kind.name}", f"at_{kind.name}"
    row = db.execute(
        f"SELECT count(*) FILTER ({flag}), count(*) FROM judged WHERE {moment} IS NOT NULL"
    ).fetchone()
    if row is None or not row[0]:
        return None
    window, interval = window_in(db, f"SELECT {flag} AS bad, {moment} AS moment FROM judged")
    symptom = Symptom(kind, row[0], row[1], window, interval)
    if not kind.is_slowness:
        return symptom
    medians = db.execute(
        f"""SELECT median(v_{kind.name}) FILTER (NOT {flag}),
            median(v_{kind.name}) FILTER ({flag}) FROM judged"""
    ).fetchone()
    usual, slow = medians or (None, None)
    return replace(symptom, typical_s=usual, slow_s=slow)


def bucket_width(span_s: float) -> float:
    """Width in seconds, at least one, such that the log has some 160 buckets."""
    raw = max(_MIN_BUCKET_S, span_s / _NUM_BUCKETS)
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
    return float(next((step for step in steps if step >= raw), raw))


def series(
    db: DuckDBPyConnection,
    figures: str,
    *,
    source: str,
    start: float,
    end: float,
    width: float,
) -> list[tuple[float, ...]]:
    """``figures`` (SQL aggregates over ``source``, a query with a ``moment``) for each bucket."""
    num = int((end - start) / width) + 1
    rows = db.execute(
        f"""SELECT CAST(floor((moment - {start!r}) / {width!r}) AS INTEGER) AS place, {figures}
            FROM ({source}) WHERE moment BETWEEN {start!r} AND {end!r} GROUP BY 1"""
    ).fetchall()
    size = len(rows[0]) - 1 if rows else 1
    filled: list[tuple[float, ...]] = [(0.0,) * size] * num
    for row in rows:
        filled[min(row[0], num - 1)] = tuple(float(figure or 0) for figure in row[1:])
    return filled


def window_in(db: DuckDBPyConnection, source: str) -> tuple[Window | None, Interval | None]:
    """The interval of ``source`` (a query of ``bad`` and ``moment``) with many more bad ones."""
    span = db.execute(
        f"SELECT min(moment), max(moment), count(*) FILTER (bad) FROM ({source})"
    ).fetchone()
    if span is None or span[0] is None or span[2] < 3:
        return None, None
    start, end = span[0], span[1]
    width = bucket_width(end - start)
    figures = "count(*) FILTER (bad), count(*)"
    rows = series(db, figures, source=source, start=start, end=end, width=width)
    interval = scan([row[0] for row in rows], [row[1] for row in rows])
    if interval is None or interval.p_value > _P_VALUE:
        return None, None
    if interval.inside < max(_MIN_INSIDE, _MIN_RATIO * interval.outside):
        return None, None
    window = Window(start + interval.start * width, start + interval.end * width, width)
    return window, interval
