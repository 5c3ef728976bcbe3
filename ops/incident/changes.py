"""`headrace incident changes`: what was done to the system or befell it, and what came after.

Each change is held against the requests of the five minutes before and after it. A change after
which things were clearly worse is named; that it is their cause is for a person to judge.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec
from rich.table import Table
from rich.text import Text

from ops.incident.command import (
    Confidence,
    Finding,
    Question,
    moment_option,
    question_options,
    shown_moment,
    shown_time,
    tell,
)
from ops.incident.source import Logs
from ops.incident.tables import rows_of

_WINDOW_S = 300.0
_TOGETHER_S = 10.0
"""Changes of one kind within this are one change: four workers that restart."""
_SAME_MOMENT_S = 15.0
_NEAR_S = 900.0
_MIN_REQUESTS = 20
"""On each side; fewer show nothing."""
_MIN_Z = 4.0
"""Standard deviations: by chance once in thirty thousand looks."""
_SURE_Z = 8.0
_MIN_RATIO = 2.0
_MAX_SHOWN = 60


class Change(msgspec.Struct, kw_only=True):
    """One change, or ``count`` of one kind at about one time. ``t`` is the first one's moment."""

    t: float
    kind: str
    what: list[str]
    service: str
    instances: list[str]
    place: str
    count: int = 1
    before: dict[str, Any] = {}
    """Of the requests that arrived in the five minutes before: num, bad, ttft, queue_time."""
    after: dict[str, Any] = {}
    worse: list[str] = []
    """What was clearly worse behind it, in words."""
    z: float = 0.0
    """How clearly, in standard deviations."""


@click.command("changes")
@moment_option("--near", "Only what changed in the quarter of an hour around this moment.")
@question_options
def main(near: float | None, *, question: Question) -> int:
    """Show deploys, settings, restarts, faults and states of workers, and what followed on them.

    Errors, first tokens and waits of the five minutes before each change stand beside those of the
    five minutes after it.
    """
    if near is not None:
        question = msgspec.structs.replace(question, since=near - _NEAR_S, until=near + _NEAR_S)
    with question.open() as logs:
        changes = find_changes(logs)
        findings = list(_findings(question, changes))
        data = {"changes": changes}
        return tell(question, logs, findings, data=data, shown=[_table(changes)])


def find_changes(logs: Logs) -> list[Change]:
    """All changes in their order, those of one kind and moment as one, with what followed."""
    changes: list[Change] = []
    latest: dict[tuple[str, str], tuple[Change, float]] = {}
    for row in rows_of(logs.db, "SELECT * FROM changes ORDER BY t, seq"):
        key = (row["kind"], row["service"])
        change, last_s = latest.get(key, (None, 0.0))
        if change is None or row["t"] - last_s > _TOGETHER_S:
            change = Change(
                t=row["t"],
                kind=row["kind"],
                what=[],
                service=row["service"],
                instances=[],
                place=str(logs.place(row["seq"])),
                count=0,
            )
            changes.append(change)
        change.count += 1
        change.what += [row["what"]] if row["what"] not in ("", None, *change.what) else []
        name = row["instance"]
        change.instances += [name] if name and name not in change.instances else []
        latest[key] = change, row["t"]
    _compare(logs, changes)
    return changes


def _compare(logs: Logs, changes: Sequence[Change]) -> None:
    """Put the requests before and after it to each change."""
    logs.db.execute("CREATE OR REPLACE TEMP TABLE moments (number INTEGER, t DOUBLE)")
    if changes:
        logs.db.executemany(
            "INSERT INTO moments VALUES (?, ?)", [(i, c.t) for i, c in enumerate(changes)]
        )
    rows = rows_of(
        logs.db,
        f"""
        SELECT number, arrived >= m.t AS is_after, count(*) AS num,
            count(*) FILTER (is_bad) AS bad,
            median(ttft) AS ttft, median(queue_time) AS queue_time
        FROM moments m JOIN requests r
          ON arrived BETWEEN m.t - {_WINDOW_S} AND m.t + {_WINDOW_S}
        GROUP BY ALL
        """,
    )
    for row in rows:
        change = changes[row.pop("number")]
        if row.pop("is_after"):
            change.after = row
        else:
            change.before = row
    for change in changes:
        _judge(change)


def _judge(change: Change) -> None:
    """Say what was clearly worse behind ``change``."""
    before, after = change.before, change.after
    if min(before.get("num", 0), after.get("num", 0)) < _MIN_REQUESTS:
        return
    z = _proportions_apart(before["bad"], before["num"], after["bad"], after["num"])
    share_before, share_after = before["bad"] / before["num"], after["bad"] / after["num"]
    if z >= _MIN_Z and share_after >= _MIN_RATIO * share_before:
        change.worse.append(
            f"{share_before:.1%} of requests failed before, {share_after:.1%} after"
        )
        change.z = z
    for name, words in (("ttft", "first tokens took"), ("queue_time", "requests waited")):
        if before[name] is None or after[name] is None:
            continue
        if after[name] >= _MIN_RATIO * max(before[name], 0.02):
            change.worse.append(
                f"{words} {shown_time(before[name])} before, {shown_time(after[name])} after "
                "(medians)"
            )
            # A doubled median of so many: by the sign test, half of them on the wrong side.
            change.z = max(change.z, math.sqrt(min(before["num"], after["num"])))


def _proportions_apart(bad: int, num: int, later_bad: int, later_num: int) -> float:
    """By how many standard deviations the second share is above the first (two-proportion z)."""
    pooled = (bad + later_bad) / (num + later_num)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / num + 1 / later_num))
    return (later_bad / later_num - bad / num) / deviation if deviation else 0.0


def _findings(question: Question, changes: Sequence[Change]) -> Iterator[Finding]:
    """The clearest one of those that stand near each other, with those of the same moment."""
    told: list[Change] = []
    for change in sorted(changes, key=lambda change: -change.z):
        if not change.worse or any(abs(change.t - one.t) < _WINDOW_S for one in told):
            continue
        told.append(change)
        moment = [one for one in changes if abs(one.t - change.t) < _SAME_MOMENT_S]
        first = min(moment, key=_rank)
        beside = [one for one in moment if one is not first]
        confidence: Confidence = "high" if change.z >= _SURE_Z else "medium"
        yield Finding(
            what=f"worse since {_words(first)} at {shown_moment(first.t)}",
            confidence=confidence,
            why="; ".join(change.worse) + _beside(beside),
            next=question.next(
                f"why --since {change.t - _WINDOW_S:.0f} --until {change.t + _WINDOW_S:.0f}"
            ),
            data={"t": first.t, "kind": first.kind, "place": first.place, "z": change.z},
        )


def _rank(change: Change) -> tuple[int, float]:
    """Of changes at one moment the likeliest to be the first of them: what people do comes before
    what processes do.
    """
    kinds = ("fault.injected", "deploy.", "config.changed", "redis.", "engine.", "process.exited")
    places = (i for i, kind in enumerate(kinds) if change.kind.startswith(kind))
    return next(places, len(kinds)), change.t


def _beside(changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    return "; at the same moment: " + ", ".join(_words(one) for one in changes[:4])


def _words(change: Change) -> str:
    what = f" ({', '.join(change.what[:3])})" if change.what else ""
    return f"{change.kind}{what}" + (f" ×{change.count}" if change.count > 1 else "")


def _table(changes: Sequence[Change]) -> Table:
    table = Table(
        "when (UTC)", "change", "what", "of", "failed", "first token", "line",
        box=None, header_style="dim",
    )  # fmt: skip
    shown = sorted(changes, key=lambda change: -change.z)[:_MAX_SHOWN]
    for change in sorted(shown, key=lambda change: change.t):
        before, after = change.before, change.after
        table.add_row(
            shown_moment(change.t),
            Text(change.kind, style="bold red" if change.worse else ""),
            ", ".join(change.what[:3]) + (f"  ×{change.count}" if change.count > 1 else ""),
            f"{change.service} {' '.join(change.instances[:2])}",
            f"{_share(before)} → {_share(after)}" if before or after else "",
            f"{shown_time(before.get('ttft'))} → {shown_time(after.get('ttft'))}",
            Text(change.place, style="dim"),
        )
    if len(changes) > len(shown):
        table.caption = f"{len(changes) - len(shown)} more changed nothing; --json has them"
    return table


def _share(side: dict[str, Any]) -> str:
    return f"{side['bad'] / side['num']:.1%}" if side.get("num") else "–"
