"""What all commands of `headrace incident` share: which logs, which time, how findings are told.

A finding names its confidence and the next command to run. What is missing in the logs is said
before anything else, so that nobody takes a gap for health.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from common.clock import wall_ms
from ops.incident.source import Logs, open_logs

CLEAN, FINDINGS, INCOMPLETE = 0, 1, 2
"""Exit codes. A finding stands whatever is missing; without one, missing data is not health."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
Confidence = Literal["certain", "high", "medium", "low"]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_DATA_DIR = Path("var")
_COLOURS: Mapping[Confidence, str] = {
    "certain": "bold red",
    "high": "red",
    "medium": "yellow",
    "low": "dim",
}
_WIDE_COLUMNS = 160
"""Where no terminal sets a width: few lines are broken."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, how sure that is, on what grounds, and what to run next."""

    what: str
    confidence: Confidence
    why: str = ""
    next: str = ""
    data: dict[str, Any] = {}


class Question(msgspec.Struct, frozen=True):
    """Which logs are asked, about which time (seconds since 1970), and for whom the answer is."""

    sources: tuple[str, ...]
    since: float | None = None
    until: float | None = None
    as_json: bool = False
    data_dir: Path = _DATA_DIR

    def open(self) -> Logs:
        """Raises: Failure BAD_REQUEST, OSError."""
        return open_logs(self.sources, since=self.since, until=self.until)

    def next(self, command: str) -> str:
        """``headrace incident <command>`` about the same logs, to be run next."""
        logs = "" if self.sources == _default_sources(_DATA_DIR) else self.sources
        options = "".join(f" --logs {shlex.quote(source)}" for source in logs)
        return f"headrace incident {command}{options}"


def question_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --logs, --since, --until, --json; it takes them as ``question``."""

    @click.option(
        "--logs",
        "sources",
        multiple=True,
        metavar="PATH",
        help="A file of JSON lines, plain or gzip; a folder of them; a pattern; - for standard "
        "input. May be repeated. Default: DATA_DIR/log.",
    )
    @click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=_DATA_DIR,
        envvar="HEADRACE_DATA_DIR",
        help="Where `headrace up` writes its logs. [var; HEADRACE_DATA_DIR]",
    )
    @moment_option("--since", "2h (ago), or 2026-11-23T05:00 (UTC).")
    @moment_option("--until", "As --since.")
    @click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
    @wraps(command)
    def ask(
        *,
        sources: tuple[str, ...],
        data_dir: Path,
        since: float | None,
        until: float | None,
        as_json: bool,
        **given: Any,
    ) -> Any:
        if since is not None and until is not None and since >= until:
            raise click.BadParameter("--since must be before --until")
        asked = sources or _default_sources(data_dir)
        return command(question=Question(asked, since, until, as_json, data_dir), **given)

    return ask


def moment_option(name: str, words: str) -> Callable[[_Function], _Function]:
    """An option whose value is a moment, in seconds since 1970: ``2h`` ago, or an ISO moment."""
    return click.option(name, callback=_moment, metavar="TIME", help=words)


def output_option(default: str) -> Callable[[_Function], _Function]:
    """-o, for a command that writes a file."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        default=Path(default),
        show_default=True,
        help="Where to write it.",
    )


def tell(
    question: Question,
    logs: Logs,
    findings: Sequence[Finding],
    *,
    data: Mapping[str, Any],
    shown: Sequence[RenderableType] = (),
) -> int:
    """Print an answer and return the exit code.

    ``data`` is what JSON holds beside the findings; ``shown`` what a person sees in front of them.
    """
    if question.as_json:
        answer = {
            "incomplete": logs.incomplete,
            "malformed": {
                "count": logs.malformed.count,
                "places": [str(place) for place in logs.malformed.places],
            },
            "findings": findings,
            **data,
        }
        click.echo(msgspec.json.format(msgspec.json.encode(answer, enc_hook=str), indent=2))
        return exit_code(logs, len(findings))
    console = open_console()
    console.print(*warnings_of(logs), sep="\n", end="")
    for one in shown:
        console.print(one)
    for finding in findings:
        console.print(shown_finding(finding))
    return exit_code(logs, len(findings))


def exit_code(logs: Logs, num_findings: int) -> int:
    if num_findings:
        return FINDINGS
    return INCOMPLETE if logs.incomplete else CLEAN


def open_console() -> Console:
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=_WIDE_COLUMNS)


def warnings_of(logs: Logs) -> list[Text]:
    """What is missing in the logs, loudly, and the lines that are no events."""
    told = [
        Text.assemble(("DATA INCOMPLETE  ", "bold red"), (reason, "red"), "\n")
        for reason in logs.incomplete
    ]
    if logs.malformed.count:
        first = ", ".join(map(str, logs.malformed.places))
        noted = f"{logs.malformed.count} malformed lines were left out; first: {first}\n"
        told.append(Text(noted, style="yellow"))
    return told


def shown_finding(finding: Finding) -> Text:
    text = Text.assemble(
        (f"{finding.confidence.upper():<8}", _COLOURS[finding.confidence]), " ", finding.what
    )
    if finding.why:
        text.append(f"\n         {finding.why}", style="dim")
    if finding.next:
        text.append("\n         next: ", style="dim").append(finding.next, style="bold")
    return text


def shown_moment(at_s: float | None) -> str:
    """UTC to the millisecond; a dash where there is none."""
    if at_s is None:
        return "–"
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="milliseconds")[:23]


def shown_time(seconds: float | None) -> str:
    """A duration as a person reads it: ``850 µs``, ``12.3 ms``, ``4.21 s``, ``3 min 20 s``."""
    if seconds is None:
        return "–"
    size = abs(seconds)
    if size < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if size < 1:
        return f"{seconds * 1000:.3g} ms"
    if size < 100:
        return f"{seconds:.3g} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _default_sources(data_dir: Path) -> tuple[str, ...]:
    return (str(data_dir / "log"),)


def _moment(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Seconds since 1970 of ``2h``, a number, or an ISO moment (UTC where it names no zone)."""
    if text is None:
        return None
    ago = _AGO.fullmatch(text.strip())
    if ago is not None:
        return wall_ms() / 1000 - float(ago[1]) * _UNITS_S[ago[2]]
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is neither 2h nor 2026-11-23T05:00") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
