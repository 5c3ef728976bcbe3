"""Where the time of a request went: phases from its arrival to its last byte, beside its like.

A phase is compared with what the median request of the same hour would have taken: prefill for as
long a prompt, decode for as many tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec
from duckdb import DuckDBPyConnection

from ops.incident.tables import rows_of

MIN_LIKE = 5
"""Fewer neighbours say nothing."""
_REACH_S = 1800.0
_MUCH = 0.2

MEANINGS = {
    "validate": "checked and tokenized by the gateway",
    "queue": "waited for a worker",
    "prefill": "the prompt was computed, up to the first token",
    "decode": "tokens were made",
    "handover": "waited for another worker to go on",
    "relay": "the rest was sent to the client",
}


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """``expected_s`` is what it would have taken the median neighbour; None where there are none.
    ``share`` is of the whole.
    """

    name: str
    seconds: float
    share: float
    expected_s: float | None = None
    num_like: int = 0

    @property
    def excess_s(self) -> float:
        """What it took beyond that."""
        return self.seconds - (self.expected_s or 0.0)

    @property
    def factor(self) -> float | None:
        """How many times the median."""
        return self.seconds / self.expected_s if self.expected_s else None


@dataclass(frozen=True, slots=True)
class Like:
    """Medians over the neighbours: of a phase, and of what it takes by token."""

    num: int
    seconds: dict[str, float]
    decode_per_token_s: float | None
    prefill_s: float | None
    """Of those whose prompt is about as long."""


def make_phases(db: DuckDBPyConnection) -> None:
    """Make the table ``phases``: one row per request that a worker took, a column per phase.

    What cannot be told is NULL. ``decode`` and ``prefill`` add up over attempts.
    """
    db.execute(
        """
        CREATE OR REPLACE TABLE phases AS
        WITH queued AS (
            SELECT request_id, min(t) AS queued FROM events
            WHERE event = 'queue.enqueued' GROUP BY request_id
        ), steps AS (
            SELECT *, lead(claimed) OVER job AS next_claimed,
                lag(ended) OVER job AS last_ended
            FROM attempts WINDOW job AS (PARTITION BY job_id ORDER BY attempt)
        ), jobs AS (
            SELECT request_id, job_id, min(claimed) AS claimed, max(ended) AS ended,
                sum(coalesce(first_token, ended) - claimed) AS prefill,
                -- Whose end nobody told was at work, or dead, until somebody else went on.
                sum(coalesce(ended, next_claimed) - first_token) AS decode,
                sum(greatest(0, claimed - last_ended)) AS handover
            FROM steps GROUP BY request_id, job_id
        ), work AS (
            -- Of several choices the one that ended last is what the client waited for.
            SELECT * FROM jobs
            QUALIFY row_number() OVER (PARTITION BY request_id ORDER BY ended DESC NULLS FIRST) = 1
        ), timed AS (
            -- A worker may have a request before its gateway knows that it is queued.
            SELECT r.*, w.claimed, w.ended AS worked, w.prefill, w.decode, w.handover,
                coalesce(w.claimed - r.queue_time, least(q.queued, w.claimed), r.ended) AS admitted
            FROM requests r LEFT JOIN queued q USING (request_id)
                LEFT JOIN work w USING (request_id)
        )
        SELECT request_id, arrived, prompt_tokens, tokens, n, code,
            greatest(0, admitted - arrived) AS validate,
            greatest(0, coalesce(claimed, ended) - greatest(admitted, arrived)) AS queue,
            greatest(0, prefill) AS prefill, greatest(0, decode) AS decode,
            nullif(handover, 0) AS handover,
            greatest(0, ended - worked) AS relay,
            ended - arrived AS whole
        FROM timed
        """
    )


def phases_of(db: DuckDBPyConnection, request_id: str) -> list[Phase]:
    """The phases of a request in their order; needs :func:`make_phases`."""
    found = rows_of(db, "SELECT * FROM phases WHERE request_id = ?", [request_id])
    if not found:
        return []
    row = found[0]
    like = _like(db, row)
    times = {name: float(row[name]) for name in MEANINGS if row[name] is not None}
    whole = float(row["whole"] or sum(times.values()) or 0.0)
    return [
        Phase(
            name=name,
            seconds=round(seconds, 6),
            share=round(seconds / whole, 4) if whole else 0.0,
            expected_s=_expected(name, like, (row["tokens"] or 0) / (row["n"] or 1)),
            num_like=like.num,
        )
        for name, seconds in times.items()
    ]


def culprit(phases: Sequence[Phase]) -> Phase | None:
    """The phase that ate the time: the one that took most beyond what was to be expected, if that
    is much of the whole, else the longest.
    """
    worst = max(phases, key=lambda phase: phase.excess_s, default=None)
    whole_s = sum(phase.seconds for phase in phases)
    if worst is not None and worst.excess_s >= _MUCH * whole_s:
        return worst
    return max(phases, key=lambda phase: phase.seconds, default=None)


def _expected(name: str, like: Like, tokens: float) -> float | None:
    if like.num < MIN_LIKE:
        return None
    if name == "decode" and like.decode_per_token_s is not None and tokens:
        return round(like.decode_per_token_s * tokens, 6)
    if name == "prefill" and like.prefill_s is not None:
        return round(like.prefill_s, 6)
    return round(like.seconds.get(name, 0.0), 6)


def _like(db: DuckDBPyConnection, of: dict[str, Any]) -> Like:
    """The neighbours of a request: those that arrived in the hour around it and were answered."""
    rows = rows_of(
        db,
        """
        SELECT * FROM phases
        WHERE code = 'ok' AND request_id <> ? AND arrived BETWEEN ? AND ? AND whole IS NOT NULL
        """,
        [of["request_id"], of["arrived"] - _REACH_S, of["arrived"] + _REACH_S],
    )
    prompt = int(of["prompt_tokens"] or 0)
    per_token = [
        row["decode"] / row["tokens"]
        for row in rows
        if row["decode"] is not None and row["tokens"] and (row["n"] or 1) == 1
    ]
    as_long = [
        float(row["prefill"])
        for row in rows
        if row["prefill"] is not None
        and prompt / 1.5 <= (row["prompt_tokens"] or 0) <= max(1, prompt) * 1.5
    ]
    return Like(
        len(rows),
        {
            name: median(float(row[name] or 0.0) for row in rows) if rows else 0.0
            for name in MEANINGS
        },
        median(per_token) if per_token else None,
        median(as_long) if len(as_long) >= MIN_LIKE else None,
    )
