"""Groups of failures: by code and fingerprint, with who can act, and since when and which version.

NEW marks a group that the part of the log before did not have, REGRESSED one that had stopped for
long before it came back.
"""

from dataclasses import dataclass

import click
from duckdb import DuckDBPyConnection
from rich.table import Table

from common.explanations import INSIDE
from common.failures import KINDS
from ops.incident.command import Finding, Question, question_options, shown_moment, tell
from ops.incident.conditions import Condition, condition_option
from ops.incident.why import widened

_NEW_AFTER = 0.25
"""Share of the log that has to be free of a group for it to be new."""
_REGRESSED_AFTER = 0.25
"""The same for a silence between two of its failures."""
_FAILED = "ended IS NOT NULL AND (code NOT IN ('ok', 'cancelled') OR flagged IS NOT NULL)"
_QUIET = frozenset({"ok", "cancelled", "disconnected"})


@dataclass(frozen=True, slots=True)
class Group:
    """Failures of one code and fingerprint; times in seconds since the epoch."""

    code: str
    fingerprint: str
    count: int
    share: float
    """Of all requests."""
    actor: str
    retryable: bool | None
    meaning: str
    first_seen: float
    last_seen: float
    model_version: str
    """That of the first one, as its ``git_sha``."""
    git_sha: str
    tenants: int
    workers: int
    badge: str
    """NEW, REGRESSED or empty."""
    example: str
    """The request id of the last one."""


@click.command("top")
@condition_option
@question_options
def main(*, question: Question, bad: Condition | None) -> int:
    """Show the groups of failures: how many, who can act, since when, what is new.

    The part of the log before --since decides what is new; without it, the log's first quarter.
    """
    with widened(question).open() as logs:
        groups = find_groups(logs.db, since=question.since, bad=bad)
        findings = [_finding(question, group) for group in groups if _is_ours(group)]
        shown = [_table(groups)] if groups else ["No request failed."]
        return tell(question, logs, findings, data={"groups": groups}, shown=shown)


def find_groups(
    db: DuckDBPyConnection, *, since: float | None = None, bad: Condition | None = None
) -> list[Group]:
    """The most frequent ones first; who failed by what its caller did is among them, and so are
    answers that ended well and were flagged.
    """
    condition = bad.sql if bad else _FAILED
    values = bad.values if bad else []
    span = db.execute("SELECT min(arrived), max(coalesce(ended, arrived)), count(*) FROM requests")
    start, end, total = span.fetchone() or (None, None, 0)
    if start is None or end is None:
        return []
    rows = db.execute(
        f"""
        WITH raised AS (
            SELECT request_id, any_value(coalesce(fields->>'fingerprint',
                fields->'exception'->>'fingerprint', fields->>'error_fingerprint')) AS fingerprint
            FROM events WHERE event IN ('worker.failed', 'request.failed') GROUP BY 1
        ), failed AS (
            SELECT requests.* REPLACE (
                    CASE WHEN code = 'ok' AND flagged IS NOT NULL
                        THEN 'OUTPUT_CORRUPT' ELSE code END AS code),
                coalesce(fingerprint, flagged, '') AS fingerprint,
                coalesce(ended, arrived) AS at_s
            FROM requests LEFT JOIN raised USING (request_id) WHERE {condition}
        ), gaps AS (
            SELECT *, at_s - lag(at_s) OVER (PARTITION BY code, fingerprint ORDER BY at_s) AS gap
            FROM failed
        )
        SELECT coalesce(code, 'no end'), fingerprint, count(*) FILTER (at_s >= $since),
            min(at_s), max(at_s), arg_min(coalesce(model_version, ''), at_s),
            arg_min(coalesce(git_sha, ''), at_s), count(DISTINCT tenant_hash),
            count(DISTINCT worker), max(gap), arg_max(request_id, at_s)
        FROM gaps GROUP BY ALL HAVING count(*) FILTER (at_s >= $since) > 0 ORDER BY 3 DESC, 1
        """.replace("$since", repr(since if since is not None else start)),
        values,
    ).fetchall()
    length = max(end - start, 1e-9)
    return [_group(row, total, start, length, since) for row in rows]


def _group(
    row: tuple[str, str, int, float, float, str, str, int, int, float | None, str],
    total: int,
    start: float,
    length: float,
    since: float | None,
) -> Group:
    code, fingerprint, count, first, last, version, sha, tenants, workers, gap, example = row
    kind = KINDS.get(code)
    limit = since if since is not None else start + _NEW_AFTER * length
    is_new = first >= limit > start
    is_back = gap is not None and gap > _REGRESSED_AFTER * length and count > 1
    return Group(
        code=code,
        fingerprint=fingerprint,
        count=count,
        share=count / total if total else 0.0,
        actor=kind.actor.value if kind else "",
        retryable=kind.retryable if kind else None,
        meaning=kind.meaning if kind else INSIDE[code].meaning if code in INSIDE else "",
        first_seen=first,
        last_seen=last,
        model_version=version,
        git_sha=sha,
        tenants=tenants,
        workers=workers,
        badge="NEW" if is_new else "REGRESSED" if is_back else "",
        example=example,
    )


def _is_ours(group: Group) -> bool:
    return group.actor not in {"caller", "tenant_admin"} and group.code not in _QUIET


def _finding(question: Question, group: Group) -> Finding:
    badge = f"{group.badge}: " if group.badge else ""
    return Finding(
        what=f"{badge}{group.count} × {group.code}: {group.meaning or 'not a known code'}",
        confidence="certain",
        why=f"first {shown_moment(group.first_seen)}"
        + (f" by {group.model_version}" if group.model_version else "")
        + (f", for {group.actor}" if group.actor else ""),
        next=question.next(f"show {group.example}"),
        data={"code": group.code, "count": group.count, "example": group.example},
    )


def _table(groups: list[Group]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "code", "fingerprint", "count", "share", "who", "retry", "first seen"):
        table.add_column(name, justify="right" if name in {"count", "share"} else "left")
    for name in ("last seen", "first version", "tenants", "workers", "example"):
        table.add_column(name)
    for group in groups:
        table.add_row(
            f"[bold red]{group.badge}[/]" if group.badge else "",
            group.code,
            group.fingerprint[:10],
            str(group.count),
            f"{group.share:.2%}",
            group.actor,
            {True: "yes", False: "no", None: ""}[group.retryable],
            shown_moment(group.first_seen)[:19],
            shown_moment(group.last_seen)[11:19],
            " ".join(filter(None, (group.model_version, group.git_sha[:8]))),
            str(group.tenants),
            str(group.workers),
            group.example,
        )
    return table
