"""One HTML file that tells an incident: first in words for anybody, then in pictures and tables.

It is self-contained: no script, no network, styles and pictures inside, so that it opens from a
disk, prints, and can be sent on. All that comes out of logs is escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from msgspec import structs

from ops.incident.command import (
    Question,
    exit_code,
    open_console,
    output_option,
    question_options,
    shown_time,
    warnings_of,
)
from ops.incident.drawing import Axis, figure, lines, lives, stacks
from ops.incident.panels import (
    UNEVEN,
    VERY_UNEVEN,
    Panel,
    Share,
    Totals,
    axis_of,
    panels,
    shares,
    totals,
    worker_lives,
)
from ops.incident.source import Logs, open_logs
from ops.incident.symptoms import Symptom
from ops.incident.top import find_groups
from ops.incident.verify import verify
from ops.incident.why import Explanation, Verdict, explain, how_slow, widened

_MAX_CHANGES = 40
_MAX_SHARES = 24
_NEAR_S = 30.0
_ROUTINE = (
    "background.started",
    "engine.selected",
    "gateway.started",
    "model.loading",
    "supervisor.started",
    "worker.started",
)
"""Changes that say no more than the one which follows them."""
_WORSE = 1.2

_ADVICE = {
    "worker": "Drain worker {value} on the page /ops/ and restart it; others take over its work.",
    "gpu": "Take GPU {value} out, and ask its driver why: headrace explain GPU_HW_FAULT.",
    "host": "Take the workers of host {value} out, and look at that machine.",
    "model_version": "Go back to the model version before {value}.",
    "git_sha": "Go back to the release before {value}.",
    "gateway": "Restart gateway {value}; readers go on at another one.",
    "adapter": "Remove the adapter {value}, or load it again: headrace adapter list.",
    "grammar": "Refuse or repair requests with the grammar {value} until workers can run it.",
    "tenant_hash": "Speak with tenant {value}, or lower its keys' limits: headrace keys list.",
    "user_agent": "Speak with whoever runs the client {value}; its requests are at fault.",
    "prompt_tokens": "Bound the length of prompts: those of {value} tokens suffer.",
    "max_tokens": "Bound max_tokens: those of {value} suffer.",
    "batch_size": "Bound the batch size of workers below {value}: --max-batch-size.",
    "lane": "Look at what the lane {value} holds, and move or pause it.",
}
_ADVICE_BY_KIND = {
    "redis": "See that Redis is up, reachable and has memory: headrace doctor.",
    "standstill": "See what stopped them: the machine, its disk, or Redis (headrace doctor).",
    "worker_lost": "It was replaced by itself. If it happens again, read its last lines.",
    "workers_lost": "See what they had in common: the machine, memory, or a request they all ran.",
    "process_lost": "It was replaced by itself. If it happens again, read its last lines.",
    "paused": "See who stopped it, or what else takes the processors of its machine.",
    "poison_request": "The request is kept aside. Do not send it again; give it to a developer.",
    "deploy": "Go back to the version before.",
    "restart": "It was done on purpose. Replace processes one by one, so that nobody notices.",
    "config": "Put the setting back to what it was.",
    "load": "Lower the limits of whoever brought the load, or start more workers.",
    "capacity": "Start the workers again, or more of them.",
    "clock": "Set the clock of that machine (NTP); times of its lines mislead until then.",
    "storage": "Look at the storage of files: room, rights, and that it can be reached.",
    "memory": "Give workers more memory, or bound prompts and batches.",
    "webhook": "Tell the owner of the webhook: headrace webhooks dead.",
    "log_lost": "Give the log room: a full disk or a blocked pipe loses lines.",
}


_METHOD = (
    "The cause is the set of requests (with a trait, or touched by an event) that agrees best with"
    " the failed, lost or slow ones; risk ratios with 95 % intervals, false discoveries bounded at"
    " 1 %. It is a strong hint, no proof."
)


@click.command("report")
@output_option("report.html")
@click.option(
    "--compare-with",
    "other",
    metavar="PATH|FROM..TO",
    help="Other logs, or another time of these (2026-11-23T05:00..2026-11-23T06:00).",
)
@question_options
def main(*, question: Question, output: Path, other: str | None) -> int:
    """Write what happened as one HTML page that opens from disk, prints, and can be sent on."""
    with widened(question).open() as logs:
        page, verdict = write_report(logs, question, other=other)
        output.write_text(page, encoding="utf-8")
        console = open_console()
        console.print(*warnings_of(logs), sep="\n", end="")
        console.print(f"{headline(verdict)}\nwritten to {output}")
        return exit_code(logs, len(verdict.findings))


def write_report(
    logs: Logs, question: Question, *, other: str | None = None
) -> tuple[str, Verdict]:
    """The page, and what it rests on."""
    verdict = explain(logs.db, since=question.since, until=question.until)
    troubles = _troubles(verdict)
    axis = axis_of(logs.db, troubles, since=question.since)
    facts = totals(logs.db, question.since, question.until)
    page = _template().render(
        headline=headline(verdict),
        start=_moment(axis.start) if axis else "–",
        end=_moment(axis.end) if axis else "–",
        incomplete=logs.incomplete,
        answers=_answers(logs, question, verdict, facts),
        others=[_other(one) for one in verdict.findings[1:]],
        compared=_compared(question, other, facts) if other else [],
        compared_with=other or "",
        pictures=_pictures(logs, axis) if axis else [],
        shares=[_share_row(one) for one in shares(logs.db)[:_MAX_SHARES]],
        uneven=UNEVEN,
        very_uneven=VERY_UNEVEN,
        groups=_groups(logs, question),
        **_changes(logs, question, troubles),
        violations=_violations(logs),
        basis=_basis(logs, facts),
        version=_version(),
    )
    return page, verdict


def _template() -> Any:
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return ""


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _troubles(verdict: Verdict) -> list[tuple[float, float]]:
    """The times of trouble as one or few intervals."""
    spans = sorted((one.window.start, one.window.end) for one in verdict.symptoms if one.window)
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# In words ------------------------------------------------------------------------------------


def headline(verdict: Verdict) -> str:
    """The whole in one line."""
    if verdict.culprit is not None:
        return _sentence(verdict.culprit)
    if verdict.symptoms:
        worst = verdict.symptoms[0]
        return f"{worst.bad} of {worst.total} requests {worst.kind.words}; no cause can be named"
    return f"Nothing unusual in {verdict.total} requests"


_SPOKEN = {
    "model_version": "model version",
    "git_sha": "release",
    "tenant_hash": "tenant",
    "user_agent": "client",
    "prompt_tokens": "prompts of",
    "max_tokens": "answers of up to",
    "batch_size": "batches of",
    "after_change": "requests",
    "n": "choices n =",
    "attempts": "attempts:",
}
_TOKENS = frozenset({"prompt_tokens", "max_tokens"})


def _sentence(one: Explanation) -> str:
    """Such as ``Requests with worker w2 got their tokens slowly``."""
    if one.kind != "trait":
        return one.cause[0].upper() + one.cause[1:]
    parts = [
        f"{_SPOKEN.get(name, name)} {value}{' tokens' if name in _TOKENS else ''}"
        for name, value in one.subject.items()
    ]
    return f"Requests with {' and '.join(parts)} {one.explains[0]}"


@dataclass(frozen=True, slots=True)
class _Answer:
    """One row of the first box."""

    asks: str
    lines: Sequence[str]
    commands: Sequence[str] = ()
    certainty: str = ""
    figures: str = ""
    is_cause: bool = False


def _answers(logs: Logs, question: Question, verdict: Verdict, facts: Totals) -> list[_Answer]:
    if not verdict.symptoms and not verdict.findings:
        said = f"{facts.requests} requests were served, {facts.failed} failed."
        hint = " But the log is incomplete, so this is no proof." if logs.incomplete else ""
        return [_Answer("What happened?", [f"Nothing stands out. {said}{hint}"])]
    first = verdict.findings[0] if verdict.findings else None
    rows = [
        _Answer(
            "What happened?", [_said(one) for one in verdict.symptoms] or ["No request suffered."]
        ),
        _Answer("Since when?", [_since(verdict)]),
        _Answer("Who was affected?", _affected(logs, verdict, facts)),
    ]
    if first is None:
        return [*rows, _Answer("Most likely cause", ["The log names none."], is_cause=True)]
    named = _sentence(first)
    if first.aliases:
        named += f" (the same as {', '.join(f'{k} {v}' for k, v in first.aliases.items())})"
    return [
        *rows,
        _Answer(
            "Most likely cause",
            [named],
            certainty=first.certainty,
            figures=f"{first.confidence:.0%} · {first.figures}",
            is_cause=True,
        ),
        _Answer("What to do", [_advice(first)], [question.next(first.command)]),
    ]


def _said(symptom: Symptom) -> str:
    share = symptom.bad / symptom.total if symptom.total else 0.0
    how_many = f"{symptom.bad} of {symptom.total} requests ({share:.1%})"
    return f"{how_many} {symptom.kind.words}{how_slow(symptom)}."


def _since(verdict: Verdict) -> str:
    windows = [one.window for one in verdict.symptoms if one.window is not None]
    first = verdict.findings[0] if verdict.findings else None
    if windows:
        start, end = min(one.start for one in windows), max(one.end for one in windows)
        exact = max(one.bucket_s for one in windows)
        lasted = (
            "and it went on to the end of the log"
            if end >= verdict.until - 2 * exact
            else (f"until {_moment(end)[11:]} ({shown_time(end - start)})")
        )
        return f"{_moment(start)} UTC (± {exact:.0f} s), {lasted}."
    if first is not None and first.since is not None:
        return f"{_moment(first.since)} UTC."
    return "Over the whole log: it did not begin at one moment."


def _affected(logs: Logs, verdict: Verdict, facts: Totals) -> list[str]:
    if not verdict.symptoms:
        return ["Nobody, as far as the log tells."]
    flags = " OR ".join(f"coalesce({one.flag}, false)" for one in verdict.symptoms)
    row = logs.db.execute(
        f"SELECT count(*), count(DISTINCT tenant_hash) FROM judged WHERE {flags}"
    ).fetchone() or (0, 0)
    share = row[0] / facts.requests if facts.requests else 0.0
    lines_ = [
        f"{row[0]} of {facts.requests} requests ({share:.1%}); tenants: {row[1]} of {facts.tenants}"
    ]
    for name, what in (("tenant_hash", "tenant"), ("lane", "lane"), ("api", "API")):
        most = logs.db.execute(
            f"""SELECT {name}, count(*) AS num FROM judged WHERE ({flags}) AND {name} IS NOT NULL
                GROUP BY 1 ORDER BY num DESC LIMIT 3"""
        ).fetchall()
        if len(most) > 1 or (most and name == "tenant_hash"):
            lines_.append(f"By {what}: " + ", ".join(f"{value} {num}" for value, num in most) + ".")
    return lines_


def _advice(one: Explanation) -> str:
    if one.kind == "interval":
        return (
            "Look at what was changed at that time, and at the machine: processor, disk, network."
        )
    for name, value in one.subject.items():
        if one.kind in {"trait", "load"} and name in _ADVICE:
            return _ADVICE[name].format(value=value)
    return _ADVICE_BY_KIND.get(
        one.kind, "Look at the requests that suffered, with the command below."
    )


def _other(one: Explanation) -> dict[str, str]:
    return {
        "cause": _sentence(one),
        "since": _moment(one.since) if one.since else "",
        "certainty": one.certainty,
        "figures": one.figures,
    }


# Pictures and tables -------------------------------------------------------------------------


def _pictures(logs: Logs, axis: Axis) -> list[dict[str, Any]]:
    found = [_picture(axis, panel) for panel in panels(logs.db, axis)]
    rows = worker_lives(logs.db)
    legend = [
        {"name": name, "colour": colour}
        for name, colour in (
            ("worker ready", "#9fd3ad"),
            ("loading", "#c8d1db"),
            ("draining", "#f0c75e"),
            ("degraded", "#f5a97f"),
            ("gateway", "#a9c7f5"),
            ("× ended or failed unasked", "#d1242f"),
        )
    ]
    svg = Markup(lives(axis, rows, "Lives of processes")) if rows else ""  # noqa: S704 - escaped in drawing
    found.append(
        {
            "title": "Processes",
            "says": "each bar is one process; a restart is a new bar",
            "svg": svg,
            "legend": legend,
            "absent": "no lines of workers or gateways",
        }
    )
    return found


def _picture(axis: Axis, panel: Panel) -> dict[str, Any]:
    draws = (
        stacks(axis, panel.series, panel.title)
        if panel.is_stacked
        else (lines(axis, panel.series, panel.unit, panel.title))
    )
    is_known = any(value is not None for one in panel.series for value in one.values)
    if panel.is_stacked and panel.is_empty:
        is_known = False
    return {
        "title": panel.title,
        "says": panel.says,
        "svg": Markup(draws) if is_known else "",  # noqa: S704 - escaped in drawing
        "legend": [{"name": one.name, "colour": one.colour} for one in panel.series],
        "absent": "none" if panel.is_stacked else "the log has no such figures",
    }


def _share_row(one: Share) -> dict[str, Any]:
    def ratio(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}×"

    def rating(value: float | None) -> str:
        if value is None or value < UNEVEN:
            return ""
        return "red" if value >= VERY_UNEVEN else "yellow"

    return {
        "worker": one.worker,
        "host": one.host,
        "model_version": one.model_version,
        "requests": one.requests,
        "failed": one.failed,
        "load": ratio(one.load_ratio),
        "load_rating": rating(one.load_ratio),
        "pace": shown_time(one.pace_s),
        "pace_ratio": ratio(one.pace_ratio),
        "pace_rating": rating(one.pace_ratio),
        "kv": "–" if one.kv_used is None else f"{one.kv_used:.0%}",
    }


def _groups(logs: Logs, question: Question) -> list[dict[str, Any]]:
    return [
        {
            "badge": one.badge,
            "code": one.code,
            "fingerprint": one.fingerprint,
            "count": one.count,
            "meaning": one.meaning,
            "actor": one.actor.replace("_", " "),
            "first": _moment(one.first_seen),
            "version": one.model_version,
            "example": one.example,
        }
        for one in find_groups(logs.db, since=question.since)
    ]


def _changes(
    logs: Logs, question: Question, troubles: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    rows = logs.db.execute(
        f"SELECT t, kind, what, instance FROM changes WHERE t >= ? AND kind NOT IN {_ROUTINE}"
        " ORDER BY t",
        [question.since if question.since is not None else -1e18],
    ).fetchall()
    span = rows[-1][0] - rows[0][0] if rows else 0.0
    near_s = min(_NEAR_S, max(2.0, span / 20))

    def is_near(t: float) -> bool:
        return any(start - near_s <= t <= start + near_s / 3 for start, _ in troubles)

    kept = rows
    if len(rows) > _MAX_CHANGES:  # those around the onset matter most
        middle = min((start for start, _ in troubles), default=rows[0][0])
        near = sorted(rows, key=lambda row: abs(row[0] - middle))[:_MAX_CHANGES]
        kept = sorted(near, key=lambda row: row[0])
    return {
        "changes": [
            {
                "when": _moment(t),
                "kind": kind,
                "what": what or "",
                "where": instance or "",
                "is_near": is_near(t),
            }
            for t, kind, what, instance in kept
        ],
        "more_changes": len(rows) - len(kept),
        "changes_command": question.next("changes"),
    }


def _violations(logs: Logs) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for one in verify(logs):
        row = found.setdefault(
            one.property, {"name": one.property, "real": 0, "excused": 0, "first": ""}
        )
        row["excused" if one.excuse else "real"] += 1
        if not row["first"] or not one.excuse:
            row["first"] = f"{one.id}: {one.what}" + (f" ({one.excuse})" if one.excuse else "")
    return list(found.values())


def _compared(question: Question, other: str, now: Totals) -> list[dict[str, str]]:
    then = _totals_of(question, other)
    rows = (
        ("requests", now.requests, then.requests, "", False),
        ("requests per second", _rate(now), _rate(then), "", False),
        ("failed or lost", now.error_rate, then.error_rate, "%", True),
        ("first token, half within", now.ttft_p50, then.ttft_p50, "s", True),
        ("first token, 99 % within", now.ttft_p99, then.ttft_p99, "s", True),
        ("queue, half within", now.queue_p50, then.queue_p50, "s", True),
        ("queue, 99 % within", now.queue_p99, then.queue_p99, "s", True),
        ("tokens per second", now.tokens_per_second, then.tokens_per_second, "", False),
        ("tenants", now.tenants, then.tenants, "", False),
        ("workers", now.workers, then.workers, "", False),
    )
    return [_compared_row(*row) for row in rows]


def _rate(facts: Totals) -> float | None:
    return facts.requests / facts.seconds if facts.seconds else None


def _compared_row(
    name: str, now: float | None, then: float | None, unit: str, more_is_worse: bool
) -> dict[str, str]:
    ratio = now / then if now is not None and then else None
    is_worse = more_is_worse and ratio is not None and ratio >= _WORSE
    return {
        "name": name,
        "now": figure(now, unit) if unit != "%" else f"{now or 0:.2%}",
        "then": figure(then, unit) if unit != "%" else f"{then or 0:.2%}",
        "change": "–" if ratio is None else f"{ratio:.2f}×",
        "rating": "red" if is_worse and (ratio or 0) >= 2 else "yellow" if is_worse else "",
    }


def _totals_of(question: Question, other: str) -> Totals:
    """Of other logs, or of another time of the same.

    Raises: click.BadParameter where it is neither.
    """
    start, dots, end = other.partition("..")
    if dots and not Path(other).exists():
        try:
            since, until = (datetime.fromisoformat(part) for part in (start, end))
        except ValueError as error:
            raise click.BadParameter(
                f"{other!r} is neither a path nor FROM..TO", param_hint="--compare-with"
            ) from error
        bounds = [
            (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() for at in (since, until)
        ]
        asked = structs.replace(question, since=bounds[0], until=bounds[1])
    else:
        asked = Question((other,))
    with open_logs(asked.sources, since=asked.since, until=asked.until) as logs:
        explain(logs.db)
        return totals(logs.db)


def _basis(logs: Logs, facts: Totals) -> list[tuple[str, str]]:
    counted = logs.db.execute(
        "SELECT count(*), count(DISTINCT instance) FROM events"
    ).fetchone() or (0, 0)
    torn = logs.malformed
    return [
        ("lines", f"{counted[0]:,} of {counted[1]} processes"),
        ("requests", f"{facts.requests:,} of {facts.tenants} tenants at {facts.workers} workers"),
        (
            "malformed lines",
            f"{torn.count}" + (f", first {', '.join(map(str, torn.places))}" if torn.count else ""),
        ),
        ("what is missing", "; ".join(logs.incomplete) or "nothing that is known of"),
        ("how it was found", _METHOD),
    ]
