"""`headrace incident show REQUEST`: the whole way of one request, and what was around it.

The request's lines are found by a scan over bytes, before anything is parsed; then only what stands
near them in the files is read. So a gigabyte of logs takes about a second.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.failures import KINDS
from common.ids import request_of
from ops.incident.command import (
    INCOMPLETE,
    Finding,
    Question,
    question_options,
    shown_moment,
    shown_time,
    tell,
)
from ops.incident.phases import MEANINGS, MIN_LIKE, Phase, culprit, make_phases, phases_of
from ops.incident.source import LogFile, Logs, Stretch, find_offset
from ops.incident.tables import rows_of

Span = tuple[int, int]
"""Bytes of a file, from a line's start to a line's end."""

_REACH_BYTES = 1024 * 1024
"""What is read of each file on both sides of the request's lines: a thousand requests, some 3,000
 lines."""
_MAX_HITS = 10_000
_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "batch_req_")
"""What the APIs put in front of a request's id."""
_MIN_ID = 6
_NEAR_S = 1800.0
_SOON_S = 60.0
_MAX_CHANGES = 16
_MAX_NEIGHBOURS = 20
_MANY_TIMES = 3.0
_WORTH_TELLING_S = 0.25
_SURE_LIKE = 100
_BAR = 30


class NoSuchRequest(click.ClickException):
    """No line names it: the data is incomplete."""

    exit_code = INCOMPLETE


class Story(msgspec.Struct, kw_only=True):
    """All that is known of one request. Times are seconds since 1970 where nothing else is said."""

    request: dict[str, Any]
    phases: list[Phase]
    attempts: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    neighbours: list[dict[str, Any]]
    """Other generations in the same worker's batch."""
    num_neighbours: int
    changes: list[dict[str, Any]]
    compared: dict[str, Any]
    """How many requests of which stretch it is compared with."""


@click.command("show")
@click.argument("request")
@question_options
def main(request: str, *, question: Question) -> int:
    """Show the way of REQUEST through gateway, queue and workers, and where its time went.

    REQUEST is a request's id, the beginning of one, a generation's (`ID.0`), what the caller named
    it (x-request-id), a trace id, or an answer's id (chatcmpl-…).
    """
    with Logs(question.sources) as logs:
        request_id = load_request(logs, request)
        story = tell_story(logs, request_id)
        data = {"story": story}
        return tell(question, logs, find(question, story), data=data, shown=show_story(story))


# --- finding the lines ---------------------------------------------------------------------------


def load_request(logs: Logs, request: str) -> str:
    """Load the lines of ``request`` and those near them; its id.

    Raises: NoSuchRequest; click.BadParameter where it may be several.
    """
    needle = needle_of(request)
    files = [file for file in logs.work.files if not file.is_crash]
    hits = {file: find_lines(file.path, needle) for file in files}
    lines = _parsed(hits)
    request_id = _settle(request, lines)
    if request_id != needle:
        hits = {file: find_lines(file.path, request_id) for file in files}
        lines = _parsed(hits)
    first = min((line["ts"] for line in lines if isinstance(line.get("ts"), str)), default="")
    with suppress(ValueError):
        moment = datetime.fromisoformat(first).timestamp()
        logs.load(list(_around(hits, moment)))
        return request_id
    raise NoSuchRequest(f"no line about {request} names its time")


def needle_of(request: str) -> str:
    """What to look for: the id without what an API puts in front of it and what names a choice."""
    for prefix in _PREFIXES:
        request = request.removeprefix(prefix)
    head, dot, choice = request.rpartition(".")
    needle = head if dot and choice.isdigit() else request
    if len(needle) < _MIN_ID:
        raise click.BadParameter(f"{request!r} is shorter than {_MIN_ID} characters")
    return needle


def find_lines(path: Path, needle: str) -> list[Span]:
    """Start and end of each line of ``path`` that holds ``needle``, in bytes."""
    wanted = needle.encode()
    if path.stat().st_size == 0:
        return []
    found: list[Span] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(wanted)
        while at >= 0 and len(found) < _MAX_HITS:
            start = data.rfind(b"\n", 0, at) + 1
            end = data.find(b"\n", at) + 1 or len(data)
            found.append((start, end))
            at = data.find(wanted, end)
    return found


def _settle(request: str, lines: Sequence[dict[str, Any]]) -> str:
    """The one request that ``lines`` are about.

    Raises: NoSuchRequest; click.BadParameter where there are several.
    """
    needle = needle_of(request)
    found: dict[str, None] = {}
    for line in lines:
        id = line.get("request_id") or request_of(line.get("job_id") or "")
        names = (id, line.get("client_request_id"), line.get("trace_id"), line.get("stream_id"))
        if id and any(isinstance(name, str) and name.startswith(needle) for name in names):
            found[str(id)] = None
    if needle in found:
        return needle
    if not found:
        raise NoSuchRequest(f"no line of these logs is about {request}; see --logs")
    first, *others = found
    if others:
        some = ", ".join(list(found)[:5])
        raise click.BadParameter(f"{request!r} may be any of {len(found)} requests: {some}")
    return first


def _parsed(hits: Mapping[LogFile, Sequence[Span]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file, spans in hits.items():
        with file.path.open("rb") as lines:
            for start, end in spans:
                lines.seek(start)
                with suppress(orjson.JSONDecodeError):
                    fields = orjson.loads(lines.read(end - start))
                    found += [fields] if isinstance(fields, dict) else []
    return found


def _around(hits: Mapping[LogFile, Sequence[Span]], at_s: float) -> Iterator[Stretch]:
    """Parts of the files that hold the request's lines and what is near them; of a file without
    any, what is of that time.
    """
    for file, spans in hits.items():
        size = file.path.stat().st_size
        middle = find_offset(file, at_s) if not spans else 0
        near = spans or [(middle, middle)]
        for start, end in _merged([_widened(near[0]), *near[1:-1], _widened(near[-1])], file.path):
            yield Stretch(file, start, min(end, size), size)


def _widened(span: Span) -> Span:
    return max(0, span[0] - _REACH_BYTES), span[1] + _REACH_BYTES


def _merged(spans: Sequence[Span], path: Path) -> list[Span]:
    """Whole lines, each once."""
    merged: list[Span] = []
    for start, end in sorted(_whole_lines(span, path) for span in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _whole_lines(span: Span, path: Path) -> Span:
    """From the next line's start to the end of the line that ``span`` ends in."""
    with path.open("rb") as file:
        edges: list[int] = []
        for edge in span:
            file.seek(max(0, edge - 1))
            if edge:
                file.readline()
            edges.append(file.tell())
    return edges[0], edges[1]


# --- what is known of it -------------------------------------------------------------------------


def tell_story(logs: Logs, request_id: str) -> Story:
    """Put together what the loaded logs say of ``request_id``."""
    db = logs.db
    make_phases(db)
    request = rows_of(db, "SELECT * FROM requests WHERE request_id = ?", [request_id])
    if not request:
        raise NoSuchRequest(f"no event of these logs is about {request_id}; see --logs")
    attempts = rows_of(
        db, "SELECT * FROM attempts WHERE request_id = ? ORDER BY job_id, attempt", [request_id]
    )
    timeline = rows_of(
        db,
        """
        SELECT seq, t, event, level, service, instance, host, job_id, attempt, worker, code, fields
        FROM events WHERE request_id = $id OR job_id IN (
            SELECT job_id FROM attempts WHERE request_id = $id)
        ORDER BY t, seq
        """,
        {"id": request_id},
    )
    for line in timeline:
        line["fields"] = orjson.loads(line["fields"])
        line["place"] = str(logs.place(line.pop("seq")))
    neighbours = rows_of(db, _NEIGHBOURS, [request_id])
    (compared,) = rows_of(
        db, "SELECT count(*) AS requests, min(arrived) AS since, max(arrived) AS until FROM phases"
    )
    return Story(
        request=request[0],
        phases=phases_of(db, request_id),
        attempts=attempts,
        timeline=timeline,
        neighbours=neighbours[:_MAX_NEIGHBOURS],
        num_neighbours=len(neighbours),
        changes=_changes_near(logs, request[0], attempts),
        compared=compared,
    )


_NEIGHBOURS = """
    SELECT o.job_id, any_value(o.worker) AS worker, any_value(r.outcome) AS outcome,
        any_value(r.code) AS code, any_value(r.lane) AS lane,
        any_value(r.tenant_hash) AS tenant_hash, any_value(r.prompt_tokens) AS prompt_tokens,
        any_value(r.tokens) AS tokens, any_value(r.attempts) AS attempts,
        max(least(o.ended, a.ended) - greatest(o.claimed, a.claimed)) AS together_s
    FROM attempts a
    JOIN attempts o ON o.worker = a.worker AND o.request_id <> a.request_id
        AND o.claimed < coalesce(a.ended, 'inf'::DOUBLE)
        AND coalesce(o.ended, 'inf'::DOUBLE) > a.claimed
    LEFT JOIN requests r ON r.request_id = o.request_id
    WHERE a.request_id = ? GROUP BY o.job_id ORDER BY together_s DESC NULLS LAST
"""


def _changes_near(
    logs: Logs, request: dict[str, Any], attempts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What changed in the half hour before it and until it ended: of the whole system, of the
    processes that served it, and of those that started or ended meanwhile.
    """
    began = request["arrived"]
    ended = request["ended"] or max(
        [began, *(one["ended"] or one["claimed"] or began for one in attempts)]
    )
    mine = [*(one["worker"] for one in attempts), request["gateway"]]
    changes = rows_of(
        logs.db,
        """
        SELECT seq, t, kind, what, service, instance, list_contains($mine, instance) AS is_mine
        FROM changes
        WHERE t BETWEEN $since AND $until
          AND (list_contains($mine, instance) OR t >= $began - 60 OR kind LIKE 'deploy.%'
               OR kind IN ('config.changed', 'fault.injected') OR kind LIKE 'redis.%')
        ORDER BY is_mine DESC, abs(t - $began) LIMIT $limit
        """,
        {
            "mine": [name for name in mine if name],
            "since": began - _NEAR_S,
            "until": ended + _SOON_S,
            "began": began,
            "limit": _MAX_CHANGES,
        },
    )
    for change in changes:
        change["place"] = str(logs.place(change.pop("seq")))
    return sorted(changes, key=lambda change: change["t"])


# --- what is wrong with it -----------------------------------------------------------------------


def find(question: Question, story: Story) -> list[Finding]:
    """What a person should know first, the surest before the rest."""
    request = story.request
    since, until = request["arrived"] - _NEAR_S, (request["ended"] or request["arrived"]) + _SOON_S
    nearby = f"--since {since:.0f} --until {until:.0f}"
    return [
        *_failure(question, request, nearby),
        *_corrupt(request),
        *_asked_anew(question, story),
        *_handovers(question, story, nearby),
        *_slow_phase(question, story, nearby),
        *_slow_client(request),
        *_bad_company(question, story, nearby),
    ]


def _failure(question: Question, request: dict[str, Any], nearby: str) -> Iterator[Finding]:
    code = request["code"]
    if request["outcome"] == "unfinished":
        yield Finding(
            what="it has no final event: it still runs, or its gateway died",
            confidence="high" if request["is_bad"] else "low",
            next=question.next("verify"),
        )
    elif code in KINDS:
        kind = KINDS[code]
        yield Finding(
            what=f"it failed with {code}: {kind.meaning}",
            confidence="certain",
            why=f"{kind.actor} can act on it; sent again, it may "
            f"{'succeed' if kind.retryable else 'fail in the same way'}",
            next=f"headrace explain {code}",
        )
    elif code not in ("ok", "cancelled", "disconnected"):
        yield Finding(
            what=f"it failed with {code}, a code that this version does not know",
            confidence="certain",
            next=question.next(f"why {nearby}"),
        )


def _corrupt(request: dict[str, Any]) -> Iterator[Finding]:
    if request["flagged"]:
        yield Finding(
            what=f"its answer was flagged as corrupt: {request['flagged']}",
            confidence="high",
            why="it was sent all the same",
            next="headrace explain OUTPUT_CORRUPT",
        )


def _asked_anew(question: Question, story: Story) -> Iterator[Finding]:
    """Its end stands, and a request of its own took up what it wanted."""
    for line in story.timeline:
        if line["event"] == "job.revived":
            other = line["fields"]["revived_as"]
            yield Finding(
                what=f"it was asked anew as {other} by {line['fields']['cause']}",
                confidence="certain",
                why=f"{shown_moment(line['t'])} ({line['place']})",
                next=question.next(f"show {other}"),
            )


def _handovers(question: Question, story: Story, nearby: str) -> Iterator[Finding]:
    told = set[tuple[str, str]]()
    for one in story.attempts:
        key = (one["worker"], one["end_event"])
        if one["ended"] is None or one["end_event"] in _OWN_ENDS or key in told:
            continue
        told.add(key)  # once for all choices of one request
        held_s = one["ended"] - (one["claimed"] or one["ended"])
        cause = _what_befell(story, one["worker"], one["ended"])
        yield Finding(
            what=f"worker {one['worker']} did not end it: {_ENDS.get(one['end_event'], 'it left')} "
            f"{shown_time(held_s)} after its claim",
            confidence="certain",
            why=f"attempt {one['attempt']} ended in {one['end_event']}" + cause,
            next=question.next(f"changes {nearby}"),
        )


def _what_befell(story: Story, worker: str, at_s: float) -> str:
    """What is known of a worker's end, as the end of a sentence."""
    ends = [
        change
        for change in story.changes
        if change["instance"] == worker and abs(change["t"] - at_s) < _LEASE_S
    ]
    for kind in _ENDS_OF_WORKERS:
        for change in ends:
            if change["kind"] == kind and (kind != "worker.state" or "dead" in change["what"]):
                return f"; {kind}: {change['what']} ({change['place']})"
    return ""


_LEASE_S = 15.0
"""A worker's death is noticed within this."""
_ENDS_OF_WORKERS = (
    "engine.failed",
    "engine.stalled",
    "worker.crashed",
    "process.exited",
    "worker.draining",
    "worker.stopped",
    "worker.state",
)
"""What tells most first."""
_OWN_ENDS = ("worker.finished", "worker.failed")
_ENDS = {
    "job.requeued": "its work was handed to another one",
    "process.exited": "it died",
    "job.dead": "the generation was put aside, because workers died of it,",
    "job.closed": "Redis closed the generation",
    "generation.cancelled": "the generation was cancelled",
    "generation.lost": "another worker had taken it over",
    "generation.released": "it gave it back",
    "generation.yielded": "it made room for others",
    "generation.diverged": "its tokens were not those of the log",
}


def _slow_phase(question: Question, story: Story, nearby: str) -> Iterator[Finding]:
    phase = culprit(story.phases)
    if phase is None or phase.factor is None or phase.num_like < MIN_LIKE:
        return
    if phase.factor < _MANY_TIMES or phase.excess_s < _WORTH_TELLING_S:
        return
    yield Finding(
        what=f"{phase.name} ate the time: {shown_time(phase.seconds)}, {phase.share:.0%} of the "
        f"whole and {phase.factor:.0f} times what its neighbours took",
        confidence="high" if phase.num_like >= _SURE_LIKE else "medium",
        why=f"{MEANINGS[phase.name]}; median of {phase.num_like} requests in the hour around: "
        f"{shown_time(phase.expected_s)}",
        next=question.next(f"why {nearby}"),
    )


def _slow_client(request: dict[str, Any]) -> Iterator[Finding]:
    blocked_s = request["blocked_time"] or 0.0
    if blocked_s < _WORTH_TELLING_S:
        return
    yield Finding(
        what=f"its client read more slowly than the tokens came: for {shown_time(blocked_s)} it "
        "could not be sent any",
        confidence="certain",
        why=f"{request['unsent_bytes'] or 0} bytes had not gone out to it when all was written",
        next="headrace explain SLOW_CONSUMER",
    )


def _bad_company(question: Question, story: Story, nearby: str) -> Iterator[Finding]:
    """Others in its batch had trouble too: then it is the worker rather than this request."""
    known = [one for one in story.neighbours if one["outcome"]]
    bad = [one for one in known if one["outcome"] == "failed" or (one["attempts"] or 0) > 1]
    if len(bad) < 2 or len(bad) * 2 < len(known):
        return
    yield Finding(
        what=f"{len(bad)} of {len(known)} generations in the same batches failed or were moved",
        confidence="high" if len(bad) >= MIN_LIKE else "medium",
        why="so the worker is a likelier cause than this request",
        next=question.next(f"changes {nearby}"),
    )


# --- for people ----------------------------------------------------------------------------------


def show_story(story: Story) -> list[RenderableType]:
    return [
        _heading(story),
        _phase_table(story),
        *([_attempt_table(story)] if len(story.attempts) > 1 else []),
        _timeline_table(story),
        *([_neighbour_table(story)] if story.neighbours else []),
        *([_change_table(story)] if story.changes else []),
    ]


def _heading(story: Story) -> Text:
    request = story.request
    colour = "red" if request["is_bad"] else "green" if request["code"] == "ok" else "yellow"
    text = Text.assemble(
        ("\n" + request["request_id"], "bold"),
        "  ",
        (str(request["code"] or request["outcome"]), f"bold {colour}"),
        f"  status {request['status'] or '–'}  {shown_moment(request['arrived'])} UTC",
        f"  took {shown_time(request['duration'])}\n",
    )
    told = {
        "api": request["api"],
        "lane": request["lane"],
        "tenant": request["tenant_hash"],
        "client": request["user_agent"],
        "prompt": request["prompt_tokens"],
        "allowed": request["max_tokens"],
        "answer": request["tokens"],
        "sampling": request["sampling"],
        "grammar": request["grammar"],
        "adapter": request["adapter"],
        "model_version": request["model_version"],
        "gateway": request["gateway"],
        "worker": request["worker"],
        "host": request["host"],
        "first token": shown_time(request["ttft"]) if request["ttft"] is not None else None,
        "tokens/s": request["tokens_per_second"],
        "attempts": request["attempts"] if (request["attempts"] or 0) > 1 else None,
        "client retries": _client_retries(story),
    }
    for name, value in told.items():
        if value not in (None, ""):
            text.append(f"  {name} ", style="dim").append(str(value))
    return text


def _client_retries(story: Story) -> object:
    return next(
        (line["fields"]["retries"] for line in story.timeline if line["fields"].get("retries")),
        None,
    )


def _phase_table(story: Story) -> Table:
    table = Table(
        "phase", "time", "share", "", "median", "", box=None, header_style="dim", pad_edge=True
    )
    worst = culprit(story.phases)
    for phase in story.phases:
        is_worst = phase is worst and phase.excess_s > 0
        bar = "█" * max(1, round(phase.share * _BAR)) if phase.seconds > 0 else ""
        times = f"{phase.factor:.1f}×" if phase.factor is not None else ""
        table.add_row(
            phase.name,
            shown_time(phase.seconds),
            f"{phase.share:.0%}",
            Text(bar, style="red" if is_worst else "cyan"),
            f"{shown_time(phase.expected_s)}  {times}" if phase.expected_s is not None else "–",
            Text(f"◀ {MEANINGS[phase.name]}", style="bold red") if is_worst else "",
        )
    num, compared = max((phase.num_like for phase in story.phases), default=0), story.compared
    table.caption = (
        f"median of {num} requests, {shown_moment(compared['since'])} to "
        f"{shown_moment(compared['until'])}"
    )
    table.caption_justify = "left"
    return table


def _attempt_table(story: Story) -> Table:
    table = Table(
        "job", "attempt", "worker", "claimed", "held", "from token", "end", "code", box=None
    )
    for one in story.attempts:
        held = one["ended"] - one["claimed"] if one["ended"] and one["claimed"] else None
        table.add_row(
            one["job_id"][-12:],
            str(one["attempt"]),
            one["worker"],
            _after(one["claimed"], story),
            shown_time(held),
            str(one["next"] if one["next"] is not None else "–"),
            one["end_event"] or "–",
            one["code"] or "",
        )
    return table


def _timeline_table(story: Story) -> Table:
    table = Table("after", "where", "event", "", "line", box=None, header_style="dim")
    colours = {"gateway": "cyan", "worker": "green", "background": "yellow"}
    for line in story.timeline:
        is_bad = line["level"] in ("warning", "error", "critical")
        table.add_row(
            _after(line["t"], story),
            Text(
                f"{line['service']} {line['instance'] or ''}",
                style=colours.get(line["service"], ""),
            ),
            Text(line["event"], style="red" if is_bad else ""),
            _words(line),
            Text(line["place"], style="dim"),
        )
    return table


_TOLD = (
    "code",
    "cause",
    "attempt",
    "worker",
    "next",
    "position",
    "depth_before",
    "est_wait_s",
    "claim_lag_s",
    "batch_size",
    "cached_tokens",
    "finish_reason",
    "completion_tokens",
    "tokens",
    "ttft",
    "reason",
    "disconnected_after",
    "blocked_time",
    "unsent_bytes",
)
"""What of a line is shown to a person; JSON has the rest."""


def _words(line: dict[str, Any]) -> str:
    fields = line["fields"]
    shown = ((name, fields.get(name)) for name in _TOLD if name != "worker")
    told = [f"{name}={value}" for name, value in shown if value not in (None, "", 0, 0.0)]
    if line["service"] != "worker" and fields.get("worker"):
        told.append(f"worker={fields['worker']}")
    return " ".join(told)


def _neighbour_table(story: Story) -> Table:
    title = f"beside it in its batches: {story.num_neighbours}"
    table = Table("job", "together", "outcome", "lane", "tenant", "prompt", "tokens", box=None)
    table.title, table.title_justify = title, "left"
    for one in story.neighbours[:8]:
        table.add_row(
            one["job_id"],
            shown_time(one["together_s"]),
            one["code"] or one["outcome"] or "–",
            one["lane"] or "–",
            one["tenant_hash"] or "–",
            str(one["prompt_tokens"] or "–"),
            str(one["tokens"] if one["tokens"] is not None else "–"),
        )
    return table


def _change_table(story: Story) -> Table:
    table = Table("after", "change", "what", "of", "line", box=None)
    table.title, table.title_justify = "what changed around it", "left"
    for change in story.changes:
        table.add_row(
            _after(change["t"], story),
            Text(change["kind"], style="yellow" if change["is_mine"] else ""),
            change["what"],
            f"{change['service']} {change['instance'] or ''}",
            Text(change["place"], style="dim"),
        )
    return table


def _after(at_s: float | None, story: Story) -> str:
    """Since its arrival."""
    if at_s is None:
        return "–"
    seconds = at_s - story.request["arrived"]
    return f"{'−' if seconds < 0 else '+'}{shown_time(abs(seconds))}"
