"""`headrace explain CODE`: what a failure code, an exit code or an alert means, and what to do.

Words of failures stand in :mod:`common.explanations`, those of an alert in its page of the runbook.
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from common.explanations import EXPLANATIONS, INSIDE, SAID_AS, Explanation
from common.failures import KINDS, Actor, Failure, FailureKind
from gateway.errors import status_of
from ops.batch import NOT_COMPLETED
from ops.doctor import EXIT_CODES as DOCTOR_CODES
from ops.tables import print_table
from workers import exit_codes

RUNBOOKS = Path(__file__).parent / "runbooks"
_OTHER_PAGES = frozenset({"operating-rule"})

_WHO = {
    Actor.CALLER: "the caller",
    Actor.TENANT: "whoever gives out the tenant's API keys",
    Actor.OPERATOR: "the operator",
    Actor.DEVELOPER: "the developers",
    Actor.AUTOMATIC: "nobody: Headrace or the client does so by itself",
}
_WORD_COLUMNS = 96


@dataclass(frozen=True, slots=True)
class ExitCode:
    """How one kind of process ends with one code."""

    process: str
    meaning: str
    fix: str


_OF_ALL = "any command"
_OF_WORKERS = "worker, background"
_EXIT_CODES: dict[int, tuple[ExitCode, ...]] = {
    0: (ExitCode(_OF_ALL, "It did what it was asked for.", ""),),
    1: (
        ExitCode(_OF_ALL, "It was refused; one line on standard error says why.", "Do as it says."),
        ExitCode("incident", "It found something.", "Run the command that the finding names."),
    ),
    2: (
        ExitCode(_OF_ALL, "An option or setting is wrong; starting again does not help.", ""),
        ExitCode("incident", "The logs are incomplete, so less is certain.", "Give it all logs."),
    ),
    exit_codes.NOT_HANDED_OVER: (  # which is also SOME_FAILED
        ExitCode(
            _OF_WORKERS,
            "Told to stop, it could not hand over: Redis was away, or a second SIGTERM came.",
            "Nothing: its lease ends, and others go on with its work.",
        ),
        ExitCode(
            "batch", "Some lines of the batch failed.", "headrace batch results --errors FILE"
        ),
    ),
    NOT_COMPLETED: (
        ExitCode("batch", "The batch failed, expired or was cancelled.", "It says why."),
    ),
    exit_codes.UNREACHABLE: (
        ExitCode(_OF_WORKERS, "Redis was not there at the start.", "headrace doctor"),
    ),
    exit_codes.ENGINE_FAILED: (
        ExitCode(
            "worker",
            "The model could not be loaded, or the engine raised.",
            "Read worker.crashed or engine.failed in its log.",
        ),
    ),
    exit_codes.DEVICE_LOST: (
        ExitCode(
            "worker",
            "Its device is unusable, or a process that computes with it has ended.",
            "Nothing once; headrace explain CUDA_ERROR if it comes again.",
        ),
    ),
    exit_codes.STALLED: (
        ExitCode(
            "worker",
            "No step of the engine ended within --step-timeout-s.",
            "Nothing once; headrace explain WORKER_STALLED if it comes again.",
        ),
    ),
    130: (ExitCode(_OF_ALL, "It was interrupted with Ctrl-C.", ""),),
}


class NotKnown(click.ClickException):
    """Nobody knows that code."""


def explain(word: str) -> None:
    """Print what is known of ``word``. Raises: NotKnown, with close spellings."""
    named = word.strip()
    if _is_exit_code(named):
        return _print_exit_code(int(named))
    code = named.upper().replace("-", "_")
    ours = SAID_AS.get(code, code)
    if ours in KINDS:
        return _print_failure(KINDS[ours], EXPLANATIONS[ours], asked=code)
    if code in INSIDE:
        return _print_inside(code)
    for alert, page in alert_pages().items():
        if alert.lower() == named.lower():
            return Console(width=_width()).print(Markdown(page.read_text("utf-8")))
    raise NotKnown(_not_known(named))


def explain_all() -> None:
    """Print a line for each code."""
    codes = Table(box=None, pad_edge=False)
    for heading in ("CODE", "HTTP", "RETRY", "WHO ACTS", "MEANING"):
        codes.add_column(heading, no_wrap=heading == "CODE")
    for kind in KINDS.values():
        retry = "yes" if kind.retryable else "no"
        codes.add_row(kind.code, str(kind.status), retry, kind.actor, kind.meaning)
    for code, inside in INSIDE.items():
        codes.add_row(code, "–", "–", "–", inside.meaning)
    print_table(codes)
    click.echo("\nAlso: exit codes of processes (headrace explain 70), and the alerts:")
    click.echo(click.wrap_text(" ".join(alert_pages()), _WORD_COLUMNS, "  ", "  "))


def alert_pages() -> dict[str, Path]:
    """The page of each alert by the alert's name: ``HeadraceNoWorkers`` has ``no-workers.md``."""
    pages = [page for page in sorted(RUNBOOKS.glob("*.md")) if page.stem not in _OTHER_PAGES]
    return {_alert_name(page): page for page in pages}


def _alert_name(page: Path) -> str:
    return "Headrace" + "".join(part.capitalize() for part in page.stem.split("-"))


def _print_failure(kind: FailureKind, explanation: Explanation, *, asked: str) -> None:
    status, on_tgi = kind.status, status_of(Failure(kind.code), "tgi")
    where = "" if on_tgi == status else f" ({on_tgi} on TGI's routes)"
    retry = "yes, after the time in Retry-After" if kind.retryable else "no"
    title = kind.code if asked == kind.code else f"{kind.code} (in place of {asked})"
    _print_entry(
        title,
        kind.meaning,
        [
            ("HTTP", f"{status}{where}, {kind.openai_type}; once a stream runs, an event in it"),
            ("Retry", retry),
            ("Who acts", _WHO[kind.actor]),
            *_rows(explanation),
        ],
    )


def _print_inside(code: str) -> None:
    inside = INSIDE[code]
    _print_entry(
        code,
        inside.meaning,
        [
            ("Seen as", inside.seen_as),
            ("The client", f"sees {inside.client_sees}"),
            *_rows(inside.explanation),
        ],
    )


def _rows(explanation: Explanation) -> list[tuple[str, str]]:
    rows = [("Cause", explanation.cause), ("Fix", explanation.fix)]
    if explanation.checks:
        rows.insert(1, ("Check", "\n".join(explanation.checks)))
    if explanation.runbook:
        rows.append(("Runbook", str(RUNBOOKS / f"{explanation.runbook}.md")))
    return rows


def _print_exit_code(code: int) -> None:
    rows = [
        (exit_code.process, f"{exit_code.meaning} {exit_code.fix}".strip())
        for exit_code in _EXIT_CODES.get(code, ())
    ]
    for check, its_code in DOCTOR_CODES.items():
        if its_code == code:
            rows.append(("doctor", f"The check {check!r} found something; it says what mends it."))
    name = _signal_name(code)
    if name:
        killed = " Often by the kernel, for want of memory: see dmesg." if name == "SIGKILL" else ""
        rows.append(("a process", f"It was ended by {name}.{killed}"))
    if not rows:
        raise NotKnown(f"no process of Headrace ends with exit code {code} by itself")
    _print_entry(f"exit code {code}", "", rows)


def _is_exit_code(word: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,3}", word) is not None


def _signal_name(code: int) -> str:
    """As a shell counts, 128 + n, or as Python does, -n."""
    number = -code if code < 0 else code - 128
    return {it.value: it.name for it in signal.Signals}.get(number, "")


def _print_entry(title: str, meaning: str, rows: Iterable[tuple[str, str]]) -> None:
    console = Console(highlight=False, width=_width())
    console.print(f"[bold]{title}[/]  {meaning}".rstrip())
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in rows:
        table.add_row(name, words)
    console.print(table)


def _width() -> int:
    return min(Console().width, _WORD_COLUMNS) if Console().is_terminal else _WORD_COLUMNS


def _not_known(word: str) -> str:
    known = {name.upper(): name for name in (*KINDS, *INSIDE, *SAID_AS, *alert_pages())}
    near = get_close_matches(word.upper().replace("-", "_"), known, n=3, cutoff=0.5)
    if near:
        return f"no code {word!r}: did you mean {' or '.join(known[name] for name in near)}?"
    return f"no code {word!r}: see all with headrace explain"
