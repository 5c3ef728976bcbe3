"""What `headrace up` shows a person: a heading, one readable line for each event that matters."""

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ops.tail import Line

_COLOURS = {
    "server": "magenta",
    "gateway": "cyan",
    "worker": "green",
    "background": "yellow",
    "exporter": "blue",
}
_MARKS = {"warning": ("!", "yellow"), "error": ("✗", "red"), "critical": ("✗", "red")}
_MAX_LINES_PER_LOOK = 20
"""Under load a terminal is slower than the system: beyond this, lines are counted, not shown."""
_MAX_VALUE_CHARS = 160
_HIDDEN = frozenset(
    {"ts", "ts_redis_ms", "level", "event", "schema", "service", "instance", "pid", "host"}
    | {"version", "git_sha", "exception", "tenant_hash", "trace_id", "span_id"}
)
_SHOWN_EVENTS = frozenset(
    {
        "engine.selected",
        "job.dead",
        "model.loaded",
        "request.finished",
        "redis.disconnected",
        "redis.reconnected",
    }
)
"""Shown whatever their level; warnings and errors always are. The rest is in the logs only."""


class _Console(Console):
    """rich would end the process when nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until this process ends


class Terminal:
    """Writes to standard output; colours only where that is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Console(highlight=False, soft_wrap=True)

    def _print(self, text: Text | str = "") -> None:
        """A terminal may go away while the rest still has to be stopped in order."""
        try:
            self._console.print(text)
        except OSError:
            self._console.quiet = True

    def heading(self, version: str, rows: Sequence[tuple[str, str]]) -> None:
        """The name of the product, and what is about to start."""
        self._print(Text.assemble("\n  ", ("Headrace", "bold"), f" {version}\n"))
        for name, value in rows:
            self._print(Text.assemble("  ", (f"{name:<11}", "dim"), value))
        self._print()

    def note(self, process: str, words: str, *, role: str = "", level: str = "info") -> None:
        """One line: the time, who, what."""
        mark, colour = _MARKS.get(level, (" ", ""))
        self._print(
            Text.assemble(
                (datetime.now().astimezone().strftime("  %H:%M:%S "), "dim"),
                (f"{mark} ", colour),
                (f"{process:<12} ", _COLOURS.get(role, "")),
                (words, colour if level != "info" else ""),
            )
        )

    def log_lines(self, lines: Sequence[Line], names: Mapping[int, str]) -> None:
        """Show what matters of the lines that processes logged; ``names`` are theirs, by pid."""
        wanted = [line for line in lines if _matters(line)]
        for line in wanted[:_MAX_LINES_PER_LOOK]:
            role = str(line.get("service", ""))
            name = names.get(line.get("pid", 0), role)
            self.note(name, _words(line), role=role, level=str(line.get("level", "info")))
        if len(wanted) > _MAX_LINES_PER_LOOK:
            self.note("", f"and {len(wanted) - _MAX_LINES_PER_LOOK} more lines, see the logs")

    def ready(self, seconds: float, addresses: Sequence[str], log_dir: Path) -> None:
        """Where the pages are, and a command to try."""
        first, *others = addresses
        prompt = '{"inputs": "A river is", "parameters": {"max_new_tokens": 60}}'
        self._print(
            Text.assemble(
                "\n  ",
                ("Ready", "bold green"),
                f" after {seconds:.1f} s.  ",
                (f"{first}/ui/", "bold underline"),
                "\n\n",
                *(f"  also at {other}\n" for other in others),
                f"  Watch it work: {first}/ops/\n\n",
                f"  curl -N {first}/generate_stream \\\n",
                "    -H 'content-type: application/json' \\\n",
                f"    -d '{prompt}'\n\n",
                (f"  Logs: {log_dir}/*.jsonl   State: headrace status   Stop: Ctrl-C\n", "dim"),
            )
        )


def _matters(line: Line) -> bool:
    return line.get("event") in _SHOWN_EVENTS or line.get("level") in _MARKS


def _words(line: Line) -> str:
    event = str(line.get("event", ""))
    if event == "request.finished":
        return _request_words(line)
    if event == "foreign.logged":
        return _short(line.get("message", ""))
    shown = [f"{name}={_short(value)}" for name, value in line.items() if _is_shown(name, value)]
    return "  ".join([event, *shown])


def _request_words(line: Line) -> str:
    """The canonical line of a request, as short as a person wants it."""
    parts = [
        f"{line.get('api', '')} {line.get('tokens', 0)} tokens, {line.get('finish_reason', '')}",
        f"queue {_ms(line.get('queue_time'))}, first token {_ms(line.get('ttft'))}",
        f"{line.get('tokens_per_second') or 0:.1f} tokens/s",
        str(line.get("request_id", "")),
    ]
    if line.get("attempts", 1) > 1:
        parts.insert(1, f"{line['attempts']} attempts")
    return "  ".join(parts)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"


def _is_shown(name: str, value: object) -> bool:
    return name not in _HIDDEN and value not in (None, "", [], {})


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
