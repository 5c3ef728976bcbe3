"""`headrace incident verify`: the log as a history, checked against what Headrace promises.

Each property is one query that returns what contradicts it. What a log can not show is not held
against the system: work that was going on when the log began or ended, lines that a process is
known to have lost, processes that were killed, and a Redis that went back in time excuse what they
explain; such cases are counted apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import click
import msgspec
from rich.table import Table

from ops.incident.command import Finding, Question, question_options, tell
from ops.incident.source import Logs
from ops.incident.tables import DIED

_SHOWN = 5
"""Violations of one property that are named; JSON has :data:`_KEPT`."""
_KEPT = 1000
_RUN_LIMIT_S = 660.0
"""Longest run of a generation as gateways are set by default, and a minute."""
_CLOSE_S = 60.0
"""After the end of its work a request has at most so long to be told of: its client may be slow."""
_LEASE_S = 15.0
"""Within this after a worker's death its work has been handed on."""
_APART_S = 2.0
"""How far moments in lines of different processes may contradict each other: a busy process logs
late, and clocks are compared once a minute."""


class Violation(msgspec.Struct, frozen=True):
    """``ids`` is the request or job, ``lines`` are where it can be read, as ``file:line``."""

    property: str
    id: str
    what: str
    lines: list[str]
    excuse: str = ""
    """Why it need not be one; empty: it is."""


@dataclass(frozen=True, slots=True)
class Property:
    """``query`` returns rows of (id, what, lines as ``seq``, process, moment); the process is who
    should have said what is missing.

    ``is_absence``: that something is missing in the log, which lost lines excuse.
    ``is_of_redis``: that Redis said two things, which its going back in time excuses.
    """

    name: str
    promise: str
    query: str
    is_absence: bool = False
    is_of_redis: bool = False


_ANYONE = "*"
"""In the place of a process: any one could have said it."""
_FINALS = "('worker.finished', 'worker.failed', 'job.dead', 'job.closed')"

PROPERTIES = (
    Property(
        "final-event",
        "Every accepted request ends in a final event.",
        f"""
        WITH ends AS (SELECT max(t) AS over FROM events),
        work AS (SELECT request_id, max(t) AS worked, max(t) FILTER (event IN {_FINALS}) AS done
                 FROM job_lines GROUP BY request_id)
        SELECT e.request_id, 'has no final event', [e.seq], e.instance, e.t
        FROM events e JOIN requests r USING (request_id) LEFT JOIN work w USING (request_id), ends
        WHERE e.event = 'gateway.accepted' AND r.ended IS NULL
          AND ends.over > coalesce(w.done + {_CLOSE_S}, greatest(w.worked, e.t) + {_RUN_LIMIT_S})
        """,
        is_absence=True,
    ),
    Property(
        "one-final-event",
        "No request has two final events.",
        """
        SELECT request_id, 'has ' || count(*) || ' final events: ' || string_agg(code, ', '
            ORDER BY seq), list(seq ORDER BY seq), any_value(instance), max(t)
        FROM events WHERE event IN ('request.finished', 'gateway.rejected')
          AND request_id IS NOT NULL
        GROUP BY request_id HAVING count(*) > 1
        """,
    ),
    Property(
        "one-end",
        "A generation ends once; nothing finishes after its finish.",
        f"""
        SELECT job_id, 'ended ' || count(*) || ' times: ' || string_agg(
            event || ' of attempt ' || attempt, ', ' ORDER BY t, seq),
            list(seq ORDER BY t, seq), any_value(worker), max(t)
        FROM job_lines WHERE event IN {_FINALS} GROUP BY job_id HAVING count(*) > 1
        """,
        is_of_redis=True,
    ),
    Property(
        "rising-epochs",
        "Each claim of a generation has a higher epoch than those before.",
        f"""
        SELECT job_id, 'epoch ' || attempt || ' was claimed by ' || worker || ' after epoch '
            || before || ' by ' || coalesce(other, '?'), [earlier, seq], worker, t
        FROM (
            SELECT job_id, attempt, worker, t, seq,
                lag(attempt) OVER claims AS before, lag(worker) OVER claims AS other,
                lag(seq) OVER claims AS earlier, lag(t) OVER claims AS earlier_t
            FROM job_lines WHERE event = 'worker.claimed'
            WINDOW claims AS (PARTITION BY job_id ORDER BY t, seq)
        ) WHERE attempt = before OR (attempt < before AND t > earlier_t + {_APART_S})
        """,
        is_of_redis=True,
    ),
    Property(
        "no-stale-epoch",
        "Only the latest claim of a generation ends it; a worker that was replaced can not.",
        """
        SELECT l.job_id, l.event || ' of epoch ' || l.attempt || ' by ' || l.worker
            || ' stands beside epoch ' || c.attempt || ', claimed by ' || c.worker,
            [l.seq, c.seq], l.worker, greatest(l.t, c.t)
        FROM job_lines l JOIN job_lines c
          ON c.job_id = l.job_id AND c.event = 'worker.claimed' AND c.attempt > l.attempt
        WHERE l.event IN ('worker.finished', 'worker.failed')
        QUALIFY row_number() OVER (PARTITION BY l.seq ORDER BY c.attempt) = 1
        """,
        is_of_redis=True,
    ),
    Property(
        "dense-positions",
        "An attempt goes on exactly where the one before left the log.",
        """
        SELECT job_id, CASE
            WHEN next < before_next THEN 'attempt ' || attempt || ' began at ' || next
                || ', before attempt ' || before_attempt || ', which had begun at ' || before_next
            ELSE 'attempt ' || attempt || ' began at ' || next || ', attempt ' || before_attempt
                || ' had left the log at ' || left_at END,
            list_filter([before_seq, left_seq, seq], lambda x: x IS NOT NULL), worker, t
        FROM (
            SELECT c.job_id, c.attempt, c.next, c.seq, c.worker, c.t, c.model_version,
                lag(c.next) OVER claims AS before_next,
                lag(c.attempt) OVER claims AS before_attempt,
                lag(c.seq) OVER claims AS before_seq, lag(r.position) OVER claims AS left_at,
                lag(r.seq) OVER claims AS left_seq,
                lag(c.model_version) OVER claims AS before_version
            FROM job_lines c LEFT JOIN (
                SELECT job_id, attempt, position, seq FROM job_lines
                WHERE event = 'job.requeued' AND position IS NOT NULL
                QUALIFY row_number() OVER (PARTITION BY job_id, attempt ORDER BY t, seq) = 1
            ) r USING (job_id, attempt)
            WHERE c.event = 'worker.claimed'
            WINDOW claims AS (PARTITION BY c.job_id ORDER BY c.attempt, c.t)
        )
        WHERE next IS NOT NULL AND (next < before_next OR next < left_at)
          AND (before_version IS NULL OR model_version = before_version)
        UNION ALL
        SELECT l.job_id, l.event || ' ends at ' || l."end" || ', its claim began at ' || c.next,
            [c.seq, l.seq], l.worker, l.t
        FROM job_lines l JOIN job_lines c USING (job_id, attempt)
        WHERE l.event = 'worker.finished' AND c.event = 'worker.claimed' AND l."end" < c.next
        """,
        is_of_redis=True,
    ),
    Property(
        "tokens-arrive",
        "A finished answer has exactly the tokens that its generations made.",
        """
        WITH made AS (
            SELECT request_id, sum("end") AS tokens, count(*) AS num_ends,
                count(DISTINCT job_id) AS num_jobs, list(seq ORDER BY seq) AS seqs
            FROM job_lines WHERE event = 'worker.finished' GROUP BY request_id
        )
        SELECT e.request_id, 'the gateway relayed ' || (e.fields->>'tokens')
            || ' tokens, the workers made ' || m.tokens,
            list_prepend(e.seq, m.seqs[:4]), e.instance, e.t
        FROM events e JOIN made m USING (request_id)
        WHERE e.event = 'request.finished' AND e.code = 'ok' AND m.num_ends = m.num_jobs
          AND e.fields->>'finish_reason' IS NOT NULL
          AND coalesce(e.fields->>'replayed', 'false') = 'false'
          AND m.num_jobs = coalesce(TRY_CAST(e.fields->>'choices' AS INTEGER), 1)
          AND TRY_CAST(e.fields->>'tokens' AS INTEGER) <> m.tokens
        """,
    ),
    Property(
        "claims-end",
        "Every claim ends, or is handed on to another worker.",
        f"""
        WITH ends AS (SELECT max(t) AS over FROM events),
        latest AS (SELECT job_id, max(attempt) AS attempt,
                       max(t) FILTER (event IN {_FINALS}) AS done
                   FROM job_lines GROUP BY job_id)
        SELECT c.job_id, 'attempt ' || c.attempt || ' of worker ' || c.worker
            || CASE WHEN r.finish_reason IS NULL THEN ' neither ended nor was handed on'
                ELSE ' never said that it ended, but the gateway saw an end' END,
            -- A death explains that the worker is silent, not that nobody went on.
            [c.seq], CASE WHEN r.finish_reason IS NULL THEN '*' ELSE c.worker END, c.t
        FROM job_lines c JOIN attempts a USING (job_id, attempt)
            JOIN latest l ON l.job_id = c.job_id
            LEFT JOIN requests r ON r.request_id = c.request_id, ends
        WHERE c.event = 'worker.claimed' AND (a.ended IS NULL OR a.end_event = '{DIED}')
          AND l.attempt = c.attempt AND l.done IS NULL
          AND ends.over > coalesce(
              CASE WHEN r.finish_reason IS NOT NULL THEN r.ended + {_CLOSE_S} END,
              c.t + {_RUN_LIMIT_S})
        """,
        is_absence=True,
    ),
    Property(
        "ordered-times",
        "Times of one request agree: what follows is later, and parts fit into the whole.",
        f"""
        SELECT job_id, 'attempt ' || attempt || ': ' || CASE
            WHEN joined < claimed THEN 'joined its batch before it was claimed'
            WHEN first_token < claimed THEN 'made a token before it was claimed'
            ELSE 'ended before it was claimed' END
            || ' (' || round(claimed - least(joined, first_token, ended), 3) || ' s)',
            (SELECT list(seq ORDER BY seq) FROM job_lines l
             WHERE l.job_id = a.job_id AND l.attempt = a.attempt), worker, claimed
        FROM attempts a
        WHERE least(joined, first_token, ended) < claimed - {_APART_S}
        UNION ALL
        SELECT c.job_id, 'was claimed ' || round(e.t - c.t, 3) || ' s before it was queued',
            [e.seq, c.seq], c.worker, c.t
        FROM events e JOIN job_lines c USING (request_id)
        WHERE e.event = 'queue.enqueued' AND c.event = 'worker.claimed' AND c.t < e.t - {_APART_S}
        UNION ALL
        SELECT e.request_id, 'queue_time ' || r.queue_time || ' and generation_time '
            || r.generation_time || ' are more than the duration ' || r.duration,
            [e.seq], e.instance, e.t
        FROM requests r JOIN events e USING (request_id)
        WHERE e.event = 'request.finished' AND r.code = 'ok' AND r.finish_reason IS NOT NULL
          AND coalesce(e.fields->>'replayed', 'false') = 'false'
          AND r.queue_time + r.generation_time > r.duration + {_APART_S}
        UNION ALL
        SELECT e.request_id, 'its times are negative', [e.seq], e.instance, e.t
        FROM requests r JOIN events e USING (request_id)
        WHERE e.event = 'request.finished'
          AND least(r.queue_time, r.generation_time, r.ttft, r.duration) < 0
        """,
    ),
)


@click.command("verify")
@question_options
def main(*, question: Question) -> int:
    """Check the logs as a history: one end for each request, no gap, nothing twice.

    Names each violated promise with the request and the lines that show it. What the logs cannot
    show (their beginning and end, lost lines, killed processes) is counted apart.
    """
    with question.open() as logs:
        violations = verify(logs)
        real = [one for one in violations if not one.excuse]
        findings = [
            _finding(question, each, of_it)
            for each in PROPERTIES
            if (of_it := [one for one in real if one.property == each.name])
        ]
        shown = [_table(violations)]
        data = {"violations": violations, "checked": _counts(logs)}
        return tell(question, logs, findings, data=data, shown=shown)


def verify(logs: Logs) -> list[Violation]:
    """Whatever contradicts a promise, by property; at most :data:`_KEPT` of each."""
    excuses = _Excuses(logs)
    found: list[Violation] = []
    for each in PROPERTIES:
        rows = logs.db.execute(each.query).fetchmany(_KEPT)
        for id, what, seqs, process, at_s in rows:
            lines = [str(logs.place(seq)) for seq in seqs[:_SHOWN]]
            excuse = excuses.find(each, process, at_s)
            found.append(Violation(each.name, str(id), str(what), lines, excuse))
    return found


class _Excuses:
    """Why something that is missing, or said twice, may be nobody's fault."""

    def __init__(self, logs: Logs) -> None:
        self._lossy = _by_process(
            logs,
            "SELECT instance, sum(TRY_CAST(fields->>'lines' AS BIGINT)) FROM events "
            "WHERE event = 'log.dropped' GROUP BY instance",
        )
        # A process that is alive says something each minute; one that ends on purpose says so.
        self._gone = _by_process(
            logs,
            """
            SELECT instance, max(t) FROM events
            WHERE service IN ('gateway', 'worker') AND instance IS NOT NULL
            GROUP BY instance
            HAVING count(*) FILTER (event IN ('gateway.stopped', 'worker.stopped')) = 0
              AND (max(t) < (SELECT max(t) FROM events) - 180
                   OR any_value((service, host, TRY_CAST(fields->>'pid' AS INTEGER))) IN (
                       SELECT (fields->>'role', host, TRY_CAST(fields->>'child_pid' AS INTEGER))
                       FROM events WHERE event = 'process.exited'))
            """,
        )
        self._heard = {
            row[0] for row in logs.db.execute("SELECT DISTINCT instance FROM events").fetchall()
        }
        self._redis_back = [
            float(row[0])
            for row in logs.db.execute(
                "SELECT t FROM events WHERE event IN ('redis.reconnected', 'server.started', "
                "'generation.restored', 'admission.resubmitted') ORDER BY t"
            ).fetchall()
        ]
        self._is_torn = logs.malformed.count > 0

    def find(self, broken: Property, process: str, at_s: float) -> str:
        """In words; empty where there is none."""
        if broken.is_absence and process == _ANYONE and self._lossy:
            return "lines were lost"
        if broken.is_absence and process != _ANYONE:
            if process in self._lossy:
                return f"{process} lost {self._lossy[process]:.0f} lines"
            if process in self._gone:
                return f"{process} ended without a word"
            if process not in self._heard:
                return f"there are no lines of {process}"
        if broken.is_absence and self._is_torn:
            return "lines are malformed"
        near = (back for back in self._redis_back if abs(back - at_s) < _LEASE_S)
        if broken.is_of_redis and next(near, None) is not None:
            return "Redis came back, maybe without its last second"
        return ""


def _by_process(logs: Logs, query: str) -> dict[str, float]:
    return {str(name): float(value or 0) for name, value in logs.db.execute(query).fetchall()}


def _counts(logs: Logs) -> dict[str, int]:
    return {
        table: int((logs.db.execute(f"SELECT count(*) FROM {table}").fetchone() or (0,))[0])
        for table in ("events", "requests", "attempts")
    }


def _finding(question: Question, broken: Property, violations: Sequence[Violation]) -> Finding:
    first = violations[0]
    examples = "\n         ".join(
        f"{one.id}: {one.what}  ({', '.join(one.lines)})" for one in violations[:_SHOWN]
    )
    more = len(violations) - _SHOWN
    request = first.id.rpartition(".")[0] or first.id
    return Finding(
        what=f"{broken.name}, {len(violations)}×: not so: {broken.promise}",
        confidence="certain",
        why=examples + (f"\n         and {more} more (--json has them)" if more > 0 else ""),
        next=question.next(f"show {request}"),
        data={"property": broken.name, "count": len(violations)},
    )


def _table(violations: Sequence[Violation]) -> Table:
    table = Table("property", "promise", "violated", "excused", box=None, header_style="dim")
    for each in PROPERTIES:
        of_it = [one for one in violations if one.property == each.name]
        excused = [one for one in of_it if one.excuse]
        num_real = len(of_it) - len(excused)
        reasons = dict.fromkeys(one.excuse for one in excused)
        table.add_row(
            each.name,
            each.promise,
            f"[bold red]{num_real}[/]" if num_real else "[green]0[/]",
            f"{len(excused)}: {'; '.join(list(reasons)[:2])}" if excused else "",
        )
    return table
