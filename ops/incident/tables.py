"""The tables that every question to a log is put to: events, requests, attempts, changes.

- ``events``: one row per line, in the order of files and lines (``seq``). ``t`` is seconds since
  1970 on Redis' clock where the line's process knew it, else on its host's; ``fields`` is the
  whole line as JSON text.
- ``requests``: one row per generation request. ``ended`` is NULL where no final event is found;
  ``is_bad`` says that it failed, and not by what its caller did; ``flagged`` what was wrong with an
  answer that ended well.
- ``attempts``: one row per claim of a generation by a worker, made of ``job_lines``.
- ``changes``: what was done to the system or happened to it, that may explain what came after.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
from duckdb import DuckDBPyConnection

from common.failures import KINDS, Actor

CRASHED = "process.crashed"
"""Event made of a file that an interpreter wrote when it crashed."""

CHANGES = (
    "adapter.%",
    "background.%",
    "config.changed",
    "deploy.%",
    "engine.%",
    "eval.run",
    "fault.injected",
    "follower.%",
    "gateway.draining",
    "gateway.ready",
    "gateway.started",
    "gateway.stopped",
    "model.%",
    "process.%",
    "redis.%",
    "server.%",
    "storage.failed",
    "supervisor.%",
    "worker.crashed",
    "worker.draining",
    "worker.ready",
    "worker.started",
    "worker.state",
    "worker.stopped",
)
"""Events that are changes, as patterns of LIKE."""

ENDS_OF_ATTEMPTS = (
    "worker.finished",
    "worker.failed",
    "generation.cancelled",
    "generation.diverged",
    "generation.lost",
    "generation.released",
    "generation.yielded",
    "job.closed",
    "job.dead",
    "job.requeued",
)
"""Each attempt ends in one of these; a job.* line stands for a worker that could not say it."""

DIED = "process.exited"
"""How an attempt ended whose worker was killed."""

FINAL_EVENTS = ("request.finished", "gateway.rejected")

_COLUMNS: Mapping[str, str] = {
    "level": "VARCHAR",
    "event": "VARCHAR",
    "service": "VARCHAR",
    "instance": "VARCHAR",
    "host": "VARCHAR",
    "version": "VARCHAR",
    "git_sha": "VARCHAR",
    "request_id": "VARCHAR",
    "job_id": "VARCHAR",
    "attempt": "INTEGER",
    "tenant_hash": "VARCHAR",
    "model_version": "VARCHAR",
    "lane": "VARCHAR",
    "worker": "VARCHAR",
    "code": "VARCHAR",
}
"""What is taken out of each line beside its times; all else stays in ``fields``."""

_OURS = {"ok", "cancelled", "disconnected"} | {
    code for code, kind in KINDS.items() if kind.actor in (Actor.CALLER, Actor.TENANT)
}
"""Codes of requests that did not fail, or failed by what their callers did."""

_LOST_AFTER_S = 60.0
"""A request without an end counts as lost when the log goes on for so long after its last line."""
_MAX_SILENCE_S = 180.0
"""Serving processes say something each minute (``clock.sampled``)."""


def connect(folder: Path) -> DuckDBPyConnection:
    """A database in memory that moves to ``folder`` what does not fit."""
    db = duckdb.connect()
    # A log is often read on a machine that serves models at the same time.
    db.execute("SET memory_limit = '25%'")
    db.execute("SET temp_directory = ?", [str(folder)])
    db.execute("SET enable_progress_bar = false")
    columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
    db.execute(
        f"CREATE TABLE lines (ts TIMESTAMP, ts_redis_ms BIGINT, t DOUBLE, {columns}, "
        "fields VARCHAR, is_blank BOOLEAN)"
    )
    return db


def count_lines(db: DuckDBPyConnection) -> int:
    return _number(db, "SELECT count(*) FROM lines")


def add_lines(db: DuckDBPyConnection, path: Path) -> list[int]:
    """Append the lines of ``path``; the numbers of those that could not become rows.

    A row whose line is no event has neither event nor fields, so that rows count as lines do.
    """
    shape = ", ".join(
        f'"{name}": "{kind}"'
        for name, kind in {"ts": "VARCHAR", "ts_redis_ms": "BIGINT", **_COLUMNS}.items()
    )
    names = ", ".join(
        f"CASE WHEN is_event THEN s.{name} END" if name == "event" else f"s.{name}"
        for name in _COLUMNS
    )
    # A separator that JSON never holds unescaped makes the CSV reader one of lines: the fastest
    # that there is, in parallel and in order.
    db.execute(
        f"""
        INSERT INTO lines
        SELECT said_at, s.ts_redis_ms, epoch(said_at), {names},
               CASE WHEN is_event THEN line END, coalesce(trim(line), '') = ''
        FROM (
            SELECT *, s.event IS NOT NULL AND said_at IS NOT NULL AS is_event
            FROM (
                SELECT line, s, try_cast(s.ts AS TIMESTAMP) AS said_at
                FROM (
                    SELECT line, TRY(json_transform(line, '{{{shape}}}')) AS s
                    FROM read_csv(
                        ?, columns = {{'line': 'VARCHAR'}}, delim = '\x1f', quote = '',
                        escape = '', comment = '', header = false, auto_detect = false,
                        strict_mode = false, ignore_errors = true, store_rejects = true
                    )
                )
            )
        )
        """,
        [str(path)],
    )
    rows = db.execute("SELECT DISTINCT line FROM reject_errors ORDER BY line").fetchall()
    db.execute("DROP TABLE reject_errors")
    db.execute("DROP TABLE reject_scans")
    return [int(line) for (line,) in rows]


def find_malformed(db: DuckDBPyConnection) -> list[int]:
    """Rows that are no events, but for empty lines and a last one that is still being written."""
    rows = db.execute(
        "SELECT rowid FROM lines WHERE event IS NULL AND NOT is_blank ORDER BY rowid"
    ).fetchall()
    return [int(seq) for (seq,) in rows]


def make(db: DuckDBPyConnection, since: float | None = None, until: float | None = None) -> None:
    """Make all tables anew of the lines so far, those of ``[since, until)``."""
    _set_clock(db)
    low, high = since if since is not None else "-inf", until if until is not None else "inf"
    db.execute(
        f"""
        CREATE OR REPLACE VIEW events AS
        SELECT rowid AS seq, * EXCLUDE (is_blank) FROM lines
        WHERE event IS NOT NULL AND t >= '{low}'::DOUBLE AND t < '{high}'::DOUBLE
        """
    )
    _make_pids(db)
    _make_job_lines(db)
    _make_attempts(db)
    _make_requests(db)
    _make_changes(db)


def _set_clock(db: DuckDBPyConnection) -> None:
    """Put ``t`` on Redis' clock.

    ``ts_redis_ms`` has no more than milliseconds: each process' offset of a minute is their median,
    so that lines stay in the order in which it wrote them.
    """
    db.execute(
        """
        UPDATE lines SET t = epoch(ts) + CASE
            WHEN abs(apart_ms - ts_redis_ms + epoch_us(ts) / 1000.0) <= 2 THEN apart_ms
            ELSE ts_redis_ms - epoch_us(ts) / 1000.0 END / 1000.0
        FROM (
            SELECT instance, epoch_ms(ts) // 60000 AS minute,
                   median(ts_redis_ms + 0.5 - epoch_us(ts) / 1000.0) AS apart_ms
            FROM lines WHERE ts_redis_ms IS NOT NULL AND event IS NOT NULL GROUP BY ALL
        ) AS clock
        WHERE lines.instance = clock.instance AND epoch_ms(lines.ts) // 60000 = clock.minute
          AND lines.ts_redis_ms IS NOT NULL
        """
    )


def _make_job_lines(db: DuckDBPyConnection) -> None:
    """What workers, and who buries them, say of generations: one row per line."""
    events = _quoted(("worker.claimed", "batch.joined", "worker.first_token", *ENDS_OF_ATTEMPTS))
    db.execute(
        f"""
        CREATE OR REPLACE TABLE job_lines AS
        WITH told AS (
            SELECT seq, t, event, job_id, request_id, attempt, service, instance, code, host,
                model_version, git_sha,
                coalesce(worker, CASE WHEN service = 'worker' THEN instance END) AS worker,
                json_transform(fields, '{{"next": "INTEGER", "position": "INTEGER",
                    "end": "INTEGER", "batch_size": "INTEGER", "flagged": "VARCHAR",
                    "gpu_uuid": "VARCHAR"}}') AS s
            FROM events WHERE job_id IS NOT NULL AND event IN ({events})
        )
        SELECT seq, t, event, job_id,
            coalesce(any_value(request_id) OVER (PARTITION BY job_id),
                     regexp_replace(job_id, '\\.\\d+$', '')) AS request_id,
            -- Who buries a worker does not know which claim it was: its last one before.
            coalesce(
                attempt,
                last_value(attempt IGNORE NULLS) OVER (
                    PARTITION BY job_id, worker ORDER BY t, seq
                    ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW),
                last_value(attempt IGNORE NULLS) OVER (
                    PARTITION BY job_id ORDER BY t, seq
                    ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW),
                0) AS attempt,
            worker, service, instance, code, host, model_version, git_sha,
            s.next AS next, s.position AS position, s."end" AS "end", s.batch_size AS batch_size,
            s.flagged AS flagged, s.gpu_uuid AS gpu
        FROM told
        """
    )


def _make_pids(db: DuckDBPyConnection) -> None:
    """Which incarnation had which process id: a supervisor knows its children by that alone."""
    db.execute(
        """
        CREATE OR REPLACE TEMP TABLE pids AS
        SELECT instance, host, fields->>'pid' AS pid, min(t) AS began FROM events
        WHERE event LIKE '%.started' OR event LIKE '%.ready' OR event LIKE '%.stopped'
            OR event IN ('worker.state', 'clock.sampled', 'worker.measured')
        GROUP BY ALL
        """
    )


def _make_attempts(db: DuckDBPyConnection) -> None:
    """Who is killed ends its attempts without a word: at the moment of its death, if that is told
    by who watched over it.
    """
    is_end = f"event IN ({_quoted(ENDS_OF_ATTEMPTS)})"
    db.execute(
        f"""
        CREATE OR REPLACE TABLE attempts AS
        WITH deaths AS (
            SELECT worker, min(t) AS died FROM (
                SELECT p.instance AS worker, e.t FROM events e
                JOIN pids p ON p.host = e.host AND p.pid = e.fields->>'child_pid'
                WHERE e.event = 'process.exited' AND p.began <= e.t
                UNION ALL
                SELECT worker, t FROM events
                WHERE event = 'worker.state' AND fields->>'to' = 'dead'
            ) WHERE worker IS NOT NULL GROUP BY worker
        ), said AS (
            SELECT job_id, attempt, any_value(request_id) AS request_id,
                coalesce(
                    any_value(worker) FILTER (service = 'worker'), any_value(worker)) AS worker,
                min(t) FILTER (event = 'worker.claimed') AS claimed,
                min(t) FILTER (event = 'batch.joined') AS joined,
                min(t) FILTER (event = 'worker.first_token') AS first_token,
                min(t) FILTER ({is_end}) AS ended,
                arg_min(event, (t, seq)) FILTER ({is_end}) AS end_event,
                arg_min(code, (t, seq)) FILTER ({is_end} AND code IS NOT NULL) AS code,
                any_value(batch_size) FILTER (event = 'batch.joined') AS batch_size,
                any_value(flagged) AS flagged,
                any_value(next) FILTER (event = 'worker.claimed') AS next,
                coalesce(max(position) FILTER (event = 'job.requeued'), max("end")) AS "end",
                any_value(model_version) FILTER (service = 'worker') AS model_version,
                any_value(host) FILTER (service = 'worker') AS host,
                any_value(gpu) AS gpu,
                any_value(git_sha) FILTER (service = 'worker') AS git_sha
            FROM job_lines GROUP BY job_id, attempt
        )
        SELECT * EXCLUDE (died, is_cut) REPLACE (
            CASE WHEN is_cut THEN died ELSE ended END AS ended,
            CASE WHEN is_cut THEN '{DIED}' ELSE end_event END AS end_event
        ) FROM (
            SELECT said.*, died, died >= claimed AND (ended IS NULL OR died < ended
                AND end_event = 'job.requeued') AS is_cut
            FROM said LEFT JOIN deaths USING (worker)
        )
        """
    )


_TOLD: Mapping[str, str] = {
    "api": "VARCHAR",
    "status": "INTEGER",
    "stream": "BOOLEAN",
    "ttft": "DOUBLE",
    "queue_time": "DOUBLE",
    "generation_time": "DOUBLE",
    "duration": "DOUBLE",
    "tokens": "INTEGER",
    "tokens_per_second": "DOUBLE",
    "prompt_tokens": "INTEGER",
    "max_tokens": "INTEGER",
    "n": "INTEGER",
    "grammar": "VARCHAR",
    "sampling": "VARCHAR",
    "adapter": "VARCHAR",
    "user_agent": "VARCHAR",
    "attempts": "INTEGER",
    "deaths": "INTEGER",
    "finish_reason": "VARCHAR",
    "relay_lag_p99": "DOUBLE",
    "blocked_time": "DOUBLE",
    "unsent_bytes": "INTEGER",
    "flagged": "VARCHAR",
}
"""What a gateway tells of a request in its lines, beside the columns of ``events``."""


def _make_requests(db: DuckDBPyConnection) -> None:
    shape = ", ".join(f'"{name}": "{kind}"' for name, kind in _TOLD.items())
    either = ",\n".join(f"coalesce(f.s.{name}, a.s.{name}) AS told_{name}" for name in _TOLD)
    db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE said AS
        SELECT seq, t, event, request_id, instance, git_sha, tenant_hash, lane, model_version,
               worker, code, json_transform(fields, '{{{shape}}}') AS s
        FROM events
        WHERE request_id IS NOT NULL
          AND event IN ('gateway.accepted', 'gateway.rejected', 'request.finished')
        """
    )
    db.execute(
        f"""
        CREATE OR REPLACE TABLE requests AS
        WITH accepted AS (
            SELECT * FROM said WHERE event = 'gateway.accepted'
            QUALIFY row_number() OVER (PARTITION BY request_id ORDER BY t, seq) = 1
        ), final AS (
            SELECT * FROM said WHERE event IN ({_quoted(FINAL_EVENTS)})
            QUALIFY row_number() OVER (
                PARTITION BY request_id ORDER BY event = 'request.finished' DESC, t, seq) = 1
        ), work AS (
            SELECT request_id, count(*) AS num_attempts,
                   min(claimed) AS claimed, max(ended) AS ended,
                   min(first_token) AS first_token,
                   arg_max(worker, attempt) AS worker, arg_max(host, attempt) AS host,
                   arg_max(gpu, attempt) AS gpu,
                   arg_max(git_sha, attempt) AS git_sha,
                   arg_max(model_version, attempt) AS model_version,
                   arg_max(end_event, attempt) AS end_event, arg_max(code, attempt) AS code,
                   max(batch_size) AS batch_size, max(attempt) AS attempt,
                   any_value(flagged) AS flagged
            FROM attempts GROUP BY request_id
        ), ids AS (
            SELECT request_id FROM accepted UNION SELECT request_id FROM final
            UNION SELECT request_id FROM work
        ), told AS (
            SELECT ids.request_id, a.t AS accepted, f.t AS final, f.event AS final_event,
                f.code AS final_code,
                {either},
                coalesce(f.instance, a.instance) AS gateway,
                coalesce(f.tenant_hash, a.tenant_hash) AS tenant_hash,
                coalesce(f.lane, a.lane) AS lane,
                coalesce(f.model_version, a.model_version) AS told_version,
                f.worker AS told_worker, coalesce(f.git_sha, a.git_sha) AS gateway_sha,
                w.* EXCLUDE (request_id), a.t IS NOT NULL OR f.t IS NOT NULL AS has_gateway
            FROM ids LEFT JOIN accepted a USING (request_id) LEFT JOIN final f USING (request_id)
            LEFT JOIN work w USING (request_id)
        ), ends AS (
            SELECT *,
                -- Lines of a batch have no gateway: what their worker said is their end.
                CASE WHEN has_gateway THEN final
                     WHEN end_event IN ('worker.finished', 'worker.failed') THEN ended
                END AS over,
                CASE WHEN has_gateway THEN final_code
                     WHEN end_event = 'worker.finished' THEN coalesce(code, 'ok')
                     WHEN end_event = 'worker.failed' THEN code END AS last_code
            FROM told
        )
        SELECT request_id,
            coalesce(final - told_duration, accepted, claimed) AS arrived,
            over AS ended,
            last_code AS code,
            CASE WHEN over IS NULL THEN 'unfinished'
                 WHEN final_event = 'gateway.rejected' THEN 'rejected'
                 WHEN last_code IN ('ok', 'cancelled', 'disconnected') THEN last_code
                 ELSE 'failed' END AS outcome,
            told_status AS status, told_api AS api, told_stream AS stream,
            coalesce(told_ttft, first_token - claimed) AS ttft,
            told_queue_time AS queue_time, told_generation_time AS generation_time,
            coalesce(told_duration, over - accepted) AS duration,
            told_tokens AS tokens, told_tokens_per_second AS tokens_per_second,
            told_prompt_tokens AS prompt_tokens, told_max_tokens AS max_tokens,
            coalesce(told_n, 1) AS n, told_grammar AS grammar, told_sampling AS sampling,
            nullif(told_adapter, '') AS adapter, told_user_agent AS user_agent,
            tenant_hash, lane, coalesce(model_version, told_version) AS model_version,
            coalesce(worker, nullif(told_worker, '')) AS worker,
            coalesce(told_attempts, attempt, 0) AS attempts, coalesce(told_deaths, 0) AS deaths,
            batch_size, gateway, gpu, host, nullif(coalesce(git_sha, gateway_sha), '') AS git_sha,
            told_finish_reason AS finish_reason, told_relay_lag_p99 AS relay_lag_p99,
            told_blocked_time AS blocked_time, told_unsent_bytes AS unsent_bytes,
            coalesce(told_flagged, flagged) AS flagged,
            CASE WHEN over IS NULL
                 THEN coalesce(ended, first_token, claimed, accepted)
                      < (SELECT max(t) FROM events) - {_LOST_AFTER_S}
                 ELSE last_code NOT IN ({_quoted(sorted(_OURS))}) END AS is_bad
        FROM ends
        """
    )
    db.execute("DROP TABLE said")


def _make_changes(db: DuckDBPyConnection) -> None:
    patterns = " OR ".join(f"e.event LIKE '{pattern}'" for pattern in CHANGES)
    db.execute(
        f"""
        CREATE OR REPLACE TABLE changes AS
        SELECT seq, t, event AS kind,
            coalesce(
                CASE event
                    WHEN 'worker.state' THEN concat_ws(' ', fields->>'from', '→', fields->>'to')
                    WHEN 'config.changed'
                        THEN array_to_string(json_keys(fields, '$.diff'), ', ')
                    WHEN 'fault.injected'
                        THEN concat_ws(' on ', fields->>'fault', fields->>'target')
                    WHEN 'process.paused' THEN concat('for ', fields->>'paused_s', ' s') END,
                CASE WHEN event LIKE 'deploy.%' THEN concat_ws(' ', fields->>'what',
                        fields->>'from_version', '→', fields->>'to_version')
                     WHEN event LIKE 'process.%' THEN concat_ws(' ', fields->>'name',
                        fields->>'signal',
                        'exit ' || nullif(fields->>'exit_code', '')) END,
                fields->>'cause', fields->>'reason', fields->>'message', code, fields->>'revision',
                fields->>'adapter', fields->>'url', model_version, ''
            ) AS what,
            service, coalesce(worker, child, instance) AS instance, fields AS details
        FROM (
            SELECT e.*, p.instance AS child FROM events e
            LEFT JOIN pids p ON e.event LIKE 'process.%' AND p.host = e.host
                AND p.pid = e.fields->>'child_pid' AND p.instance <> e.instance
            WHERE {patterns}
            -- Process ids come round again: the incarnation nearest in time.
            QUALIFY row_number() OVER (PARTITION BY e.seq ORDER BY abs(p.began - e.t)) = 1
        ) ORDER BY t, seq
        """
    )


def find_missing(db: DuckDBPyConnection, *, is_excerpt: bool = False) -> list[str]:
    """What the log does not hold although it should, in words.

    An excerpt holds parts of files that need not be of one stretch of time: there only lines that
    are known to be lost are told.
    """
    missing: list[str] = []
    if not _number(db, "SELECT count(*) FROM events"):
        return ["there are no events"]
    dropped = db.execute(
        """
        SELECT service, instance, sum(TRY_CAST(fields->>'lines' AS BIGINT)) FROM events
        WHERE event = 'log.dropped' GROUP BY ALL ORDER BY ALL
        """
    ).fetchall()
    missing += [f"{service} {name} lost {lines} lines" for service, name, lines in dropped]
    if is_excerpt:
        return missing
    silent = db.execute(
        f"""
        WITH heard AS (
            SELECT DISTINCT service, instance, CAST(floor(t / 15) AS BIGINT) * 15 AS heard_at
            FROM events
            WHERE instance IN (SELECT instance FROM events WHERE event = 'clock.sampled')
        )
        SELECT service, instance, heard_at - lag(heard_at) OVER (
            PARTITION BY service, instance ORDER BY heard_at)
            AS silence FROM heard QUALIFY silence > {_MAX_SILENCE_S} ORDER BY ALL
        """
    ).fetchall()
    missing += [f"{service} {name} said nothing for {s:.0f} s" for service, name, s in silent]
    return missing + _missing_services(db)


def _missing_services(db: DuckDBPyConnection) -> list[str]:
    """Gateways and workers tell of one another's work: one side alone is half of a log."""
    services = {row[0] for row in db.execute("SELECT DISTINCT service FROM lines").fetchall()}
    missing: list[str] = []
    served = _number(db, "SELECT count(*) FROM requests WHERE worker IS NOT NULL")
    if served and "worker" not in services:
        missing.append("there are no lines of any worker")
    if served and "gateway" not in services:
        missing.append("there are no lines of any gateway")
    unseen = db.execute(
        """
        SELECT DISTINCT worker FROM requests
        WHERE worker NOT IN (
            SELECT instance FROM lines WHERE service = 'worker' AND instance IS NOT NULL)
          AND (SELECT count(*) FROM lines WHERE service = 'worker') > 0
        ORDER BY ALL
        """
    ).fetchall()
    return missing + [f"worker {name} served requests, and has no lines" for (name,) in unseen]


def rows_of(
    db: DuckDBPyConnection, query: str, values: Sequence[Any] | Mapping[str, Any] = ()
) -> list[dict[str, Any]]:
    """What ``query`` finds, by the names of its columns."""
    found = db.execute(query, values)
    names = [str(column[0]) for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _number(db: DuckDBPyConnection, query: str) -> int:
    row = db.execute(query).fetchone()
    return int(row[0]) if row else 0


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
