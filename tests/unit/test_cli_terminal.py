"""What a person at a terminal is shown of what happens."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from ops.tail import Line
from ops.terminal import Terminal


class Screen:
    """A terminal without colours, and what stands on it."""

    def __init__(self, file: io.StringIO | None = None) -> None:
        self._file = file or io.StringIO()
        self.terminal = Terminal(Console(file=self._file, width=200, highlight=False))

    def show(self, *lines: Line) -> list[str]:
        self.terminal.log_lines(lines, {7: "gateway 2"})
        return self._file.getvalue().splitlines()


def line(event: str, **fields: Any) -> Line:
    return {"event": event, "level": "info", "service": "gateway", "pid": 7, **fields}


def test_a_request_is_one_short_line() -> None:
    """Who answered, how much, how long; the id, to look it up in the logs."""
    shown = Screen().show(
        line(
            "request.finished",
            api="chat",
            tokens=12,
            finish_reason="length",
            queue_time=0.001,
            ttft=0.141,
            tokens_per_second=10.44,
            attempts=2,
            request_id="b8d3",
        )
    )
    assert len(shown) == 1
    for part in ("gateway 2", "chat 12 tokens, length", "2 attempts", "141 ms", "10.4", "b8d3"):
        assert part in shown[0]


def test_a_request_without_a_token_has_no_first_token() -> None:
    shown = Screen().show(line("request.finished", ttft=None, tokens_per_second=None))
    assert "first token –" in shown[0]


def test_what_does_not_matter_to_a_person_stays_in_the_logs() -> None:
    assert Screen().show(line("stream.attached")) == []


def test_warnings_and_errors_always_show() -> None:
    """Also of other libraries."""
    shown = Screen().show(
        line("foreign.logged", level="warning", message="disk is nearly full"),
        line("worker.failed", level="error", code="MODEL_LOAD_FAILED"),
    )
    assert "disk is nearly full" in shown[0]
    assert "code=MODEL_LOAD_FAILED" in shown[1]


def test_a_flood_is_counted() -> None:
    """A terminal is slower than the system: it must not hold it up."""
    shown = Screen().show(*[line("request.finished")] * 500)
    assert len(shown) == 21
    assert "480 more" in shown[-1]


def test_a_terminal_that_went_away_is_no_reason_to_stop() -> None:
    class Gone(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(5, f"Input/output error after {len(text)} characters")

    screen = Screen(Gone())
    screen.show(line("request.finished"))
    screen.terminal.note("worker 1", "stopped")


def test_every_gateway_is_named_when_all_is_ready() -> None:
    file = io.StringIO()
    addresses = ["http://127.0.0.1:8080", "http://127.0.0.1:8081"]
    Screen(file).terminal.ready(1.5, addresses, Path("var/log"))
    pages = ("http://127.0.0.1:8080/ui/", "http://127.0.0.1:8080/ops/")
    for part in (*addresses, *pages, "curl -N", "var/log"):
        assert part in file.getvalue()
