"""The score: what `headrace incident` says of each run's logs, beside what really happened.

The command is asked as a person would ask it, in a process of its own. Right is a first finding
that names the cause or one of its equivalents; on the logs of a healthy run, any named cause is
wrong.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from common.clock import monotonic_s
from ops.bench.incidents import truth
from ops.bench.incidents.produce import LOG
from ops.bench.incidents.truth import Cause, Truth
from ops.bench.machine import Machine

_LIMIT_S = 120.0
_TOP = 3
_INTERVAL = "interval"
"""The kind of a finding that says when, and blames nothing."""


class Named(msgspec.Struct, frozen=True):
    """One finding: what it blames, by dimension, and its words."""

    blamed: dict[str, str]
    words: str
    names_a_cause: bool = True

    def is_right(self, told: Truth) -> bool:
        return self.names_a_cause and told.names_any(self.blamed)


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``rank`` is that of the first finding that is right, 0 where none is."""

    name: str
    kind: str
    symptom: str
    is_healthy: bool
    true_cause: str
    named: str
    """The first finding, as it was told; empty where there is none."""
    rank: int
    blames: bool
    """Whether the first finding names a cause at all."""
    onset_error_s: float | None
    """Positive: it is told later than it was."""
    seconds: float
    """That `why` took, with the start of the command."""
    exit_code: int
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return not self.blames if self.is_healthy else self.rank == 1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    revision: str
    incidents: int
    first: float
    """Share of incidents whose cause is named first."""
    in_top: float
    """Share of those where it is among the first three findings."""
    healthy: int
    falsely_blamed: int
    """Healthy runs in which a cause is named."""
    onset_error_s: float | None
    """Median of its size."""
    scores: list[Score]


def score(folder: Path) -> Score:
    """Of the run in ``folder``."""
    told = truth.read(folder)
    log = folder / LOG
    began_s = monotonic_s()
    code, answer, problem = ask("why", log)
    seconds = monotonic_s() - began_s
    named = findings_in(answer)
    rank = next((n for n, one in enumerate(named, start=1) if one.is_right(told)), 0)
    onset = onset_in(answer)
    first = named[0] if named else None
    return Score(
        name=told.name,
        kind=told.kind,
        symptom=told.symptom,
        is_healthy=told.is_healthy,
        true_cause=_shown(told.causes),
        named=first.words if first else "",
        rank=rank,
        blames=first is not None and first.names_a_cause,
        onset_error_s=None if told.onset is None or onset is None else round(onset - told.onset, 2),
        seconds=round(seconds, 2),
        exit_code=code,
        problem=problem,
    )


def ask(question: str, log: Path, *arguments: str) -> tuple[int, Any, str]:
    """Exit code, JSON and last words of `headrace incident QUESTION --logs LOG --json`."""
    command = [sys.executable, "-P", "-m", "ops.cli", "incident", question, *arguments]
    command += ["--logs", str(log), "--json"]
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, {}, f"no answer within {_LIMIT_S:.0f} s"
    try:
        return done.returncode, orjson.loads(done.stdout), ""
    except orjson.JSONDecodeError:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        return done.returncode, {}, words[-1] if words else "it said nothing"


def findings_in(answer: Any) -> list[Named]:
    """Those of the JSON that `why` prints, the best first."""
    found: list[Named] = []
    for finding in answer.get("findings", []):
        told = finding.get("data", {})
        blamed = {**told.get("aliases", {}), **told.get("subject", {})}
        kind = str(told.get("kind", ""))
        blamed.setdefault("kind", kind)
        found.append(Named(blamed, str(finding.get("what", "")), kind != _INTERVAL))
    return found


def onset_in(answer: Any) -> float | None:
    """Since when the first finding holds, or else the first symptom shows, of the same JSON."""
    told = [finding.get("data", {}).get("since") for finding in answer.get("findings", [])[:1]]
    shown = [symptom.get("start") for symptom in answer.get("symptoms", [])]
    known = [at for at in told if at is not None] or [at for at in shown if at is not None]
    return min(map(float, known), default=None)


def _shown(causes: Sequence[Cause]) -> str:
    if not causes:
        return "none"
    value = causes[0].value
    shown = f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else str(value)
    return f"{causes[0].dimension} {shown}"


def summarise(scores: Sequence[Score], machine: Machine, revision: str) -> Report:
    ill = [one for one in scores if not one.is_healthy]
    well = [one for one in scores if one.is_healthy]
    errors = [abs(one.onset_error_s) for one in ill if one.onset_error_s is not None]
    return Report(
        machine=machine,
        revision=revision,
        incidents=len(ill),
        first=_share([one.rank == 1 for one in ill]),
        in_top=_share([1 <= one.rank <= _TOP for one in ill]),
        healthy=len(well),
        falsely_blamed=sum(one.blames for one in well),
        onset_error_s=round(statistics.median(errors), 2) if errors else None,
        scores=list(scores),
    )


def _share(facts: Sequence[bool]) -> float:
    return round(sum(facts) / len(facts), 3) if facts else 0.0


def markdown(report: Report) -> str:
    """The report as a page."""
    lines = [
        "# IncidentBench",
        "",
        f"{report.incidents} incidents and {report.healthy} healthy runs of a running system,",
        "analysed from their logs alone (`headrace bench incidents`).",
        "",
        "| measure | value |",
        "|---|---|",
        f"| true cause named first | {report.first:.0%} |",
        f"| true cause in the first {_TOP} | {report.in_top:.0%} |",
        f"| healthy runs with somebody blamed | {report.falsely_blamed} of {report.healthy} |",
        f"| median error of the onset | {_seconds(report.onset_error_s)} |",
        f"| longest analysis | {max((one.seconds for one in report.scores), default=0.0):.1f} s |",
        "",
        f"On {report.machine}, revision {report.revision}.",
        "",
        "| run | what broke | true cause | rank | named first | onset | time |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    lines += [_row(one) for one in report.scores]
    return "\n".join([*lines, ""])


def _row(score: Score) -> str:
    rank = ("–" if not score.blames else "✗") if score.is_healthy else str(score.rank or "✗")
    named = (score.problem or score.named or "nobody").replace("|", "\\|")
    cells = [
        score.name,
        score.kind,
        score.true_cause,
        rank,
        named[:120],
        _seconds(score.onset_error_s),
        f"{score.seconds:.1f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f} s"
