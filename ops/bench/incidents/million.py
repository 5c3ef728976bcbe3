"""Large logs, timed: a million lines analysed, and one request found in a gigabyte. As the commands
are typed, with all that they start.
"""

import os
import tempfile
from pathlib import Path

import msgspec
import orjson

from common.clock import monotonic_s
from ops.bench.incidents.history import Plan, Trouble, write_history
from ops.bench.incidents.score import ask, findings_in

_REQUESTS = 146_000
"""With eight lines each, a million."""
_SHOWN_REQUESTS = 240_000
"""A gigabyte."""
_TROUBLE = Trouble(where={"worker_number": 2}, code="ENGINE_ERROR", rate=0.5, since=0.8)
LIMIT_S = 10.0
SHOW_LIMIT_S = 2.0


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each question, each of which reads all lines anew."""

    lines: int
    spike_s: float
    why_s: float
    named: str
    """What `why` names first."""
    is_right: bool
    show_s: float
    """Of a request in the middle of ``show_bytes`` of log."""
    show_cpu_s: float
    show_bytes: int
    problem: str = ""

    @property
    def has_passed(self) -> bool:
        is_quick = max(self.spike_s, self.why_s) < LIMIT_S and self.show_s < SHOW_LIMIT_S
        return self.is_right and is_quick


def time_a_million(requests: int = _REQUESTS, shown_requests: int = _SHOWN_REQUESTS) -> Timed:
    """In the last fifth of half a day, half of what one worker gets fails; and what one request
    takes to be shown among many.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as at:
        log = Path(at)
        lines = write_history(log, Plan(requests=requests, troubles=(_TROUBLE,)))
        began_s = monotonic_s()
        _, _, problem = ask("spike", log)
        between_s = monotonic_s()
        _, answer, other_problem = ask("why", log)
        ended_s = monotonic_s()
    show_s, show_cpu_s, show_bytes, last_problem = _time_show(shown_requests)
    named = findings_in(answer)
    return Timed(
        lines=lines,
        spike_s=round(between_s - began_s, 2),
        why_s=round(ended_s - between_s, 2),
        named=named[0].words if named else "",
        is_right=bool(named) and "worker" in named[0].blamed,
        show_s=round(show_s, 2),
        show_cpu_s=round(show_cpu_s, 2),
        show_bytes=show_bytes,
        problem=problem or other_problem or last_problem,
    )


def _time_show(requests: int) -> tuple[float, float, int, str]:
    """Seconds, of processor time too; bytes of log, and what went wrong."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as at:
        log = Path(at)
        write_history(log, Plan(requests=requests))
        num_bytes = sum(path.stat().st_size for path in log.iterdir())
        request = _request_in_the_middle(log / "gateway.jsonl")
        began_s, before_s = monotonic_s(), _children_cpu_s()
        _, answer, problem = ask("show", log, request)
        seconds, cpu_s = monotonic_s() - began_s, _children_cpu_s() - before_s
    return seconds, cpu_s, num_bytes, problem or ("" if "story" in answer else "no story was told")


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _request_in_the_middle(path: Path) -> str:
    with path.open("rb") as lines:
        lines.seek(path.stat().st_size // 2)
        lines.readline()
        return next(str(line["request_id"]) for line in map(orjson.loads, lines) if "lane" in line)
