"""The analysis of a million lines, timed: as the command is typed, with all that it starts."""

import tempfile
from pathlib import Path

import msgspec

from common.clock import monotonic_s
from ops.bench.incidents.history import Plan, Trouble, write_history
from ops.bench.incidents.score import ask, findings_in

_REQUESTS = 146_000
"""With eight lines each, a million."""
_TROUBLE = Trouble(where={"worker_number": 2}, code="ENGINE_ERROR", rate=0.5, since=0.8)
LIMIT_S = 10.0


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each question, each of which reads all lines anew."""

    lines: int
    spike_s: float
    why_s: float
    named: str
    """What `why` names first."""
    is_right: bool
    problem: str = ""

    @property
    def has_passed(self) -> bool:
        return self.is_right and max(self.spike_s, self.why_s) < LIMIT_S


def time_a_million(requests: int = _REQUESTS) -> Timed:
    """In the last fifth of half a day, half of what one worker gets fails."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as at:
        log = Path(at)
        lines = write_history(log, Plan(requests=requests, troubles=(_TROUBLE,)))
        began_s = monotonic_s()
        _, _, problem = ask("spike", log)
        between_s = monotonic_s()
        _, answer, other_problem = ask("why", log)
        ended_s = monotonic_s()
    named = findings_in(answer)
    return Timed(
        lines=lines,
        spike_s=round(between_s - began_s, 2),
        why_s=round(ended_s - between_s, 2),
        named=named[0].words if named else "",
        is_right=bool(named) and "worker" in named[0].blamed,
        problem=problem or other_problem,
    )
