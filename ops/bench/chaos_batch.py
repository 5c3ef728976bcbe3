"""Chaos for batches: kill processes while a batch is worked off, then count its lines.

One batch runs undisturbed, and then the same one while a process is killed every few seconds: a
background worker, a worker, a gateway, or the server, which keeps an append-only file. Then each
phase of a batch is looked for, and a process killed in it. A run passes when every line stands
exactly once in the output or the error file, with the answer that it had in peace.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import click
import orjson

from common.clock import monotonic_s
from ops import runfile
from ops.batch_client import Batch, BatchClient
from ops.bench.chaos import kill_one, shown_kills
from ops.bench.instance import own_instance
from ops.gateways import Gateways
from ops.supervisor import State

VICTIMS = ("background", "worker", "gateway", "server")
PHASES = ("validating", "in_progress", "finalizing", "cancelling")
_ENDPOINT = "/v1/completions"
_RESTART_S = 120.0
_LOOK_S = 0.1
_BAD_EVERY = 50
"""One line in so many can not be answered: it belongs into the error file."""
_CANCEL_AT = 0.3
"""Share of the lines that are finished when a batch is cancelled."""


@dataclass(frozen=True)
class Plan:
    num_lines: int = 5000
    max_new_tokens: int = 16
    num_workers: int = 4
    num_gateways: int = 2
    num_background: int = 2
    kill_every_s: float = 2.0
    max_kills: int = 10_000
    victims: tuple[str, ...] = VICTIMS
    phases: tuple[str, ...] = PHASES
    phase_lines: int = 300
    phase_rounds: int = 1
    """Batches per phase and victim."""
    inter_token_ms: float = 50.0
    """So that an answer takes time, and not the processors: they are needed for restarts."""


@dataclass
class Outcome:
    """One batch, and what is wrong with its results."""

    name: str
    status: str
    seconds: float
    answers: dict[str, str]
    """Text by custom id."""
    problems: list[str] = field(default_factory=list[str])
    kills: Counter[str] = field(default_factory=Counter[str])


@dataclass
class Report:
    peaceful: Outcome
    disturbed: Outcome
    phases: list[Outcome]

    @property
    def outcomes(self) -> list[Outcome]:
        return [self.peaceful, self.disturbed, *self.phases]

    @property
    def slowdown(self) -> float:
        return self.disturbed.seconds / self.peaceful.seconds

    @property
    def has_passed(self) -> bool:
        return not any(outcome.problems for outcome in self.outcomes)

    def lines(self) -> list[str]:
        rows = [
            f"{o.name:<28} {o.status:<10} {o.seconds:7.1f} s   killed: {shown_kills(o.kills)}"
            for o in self.outcomes
        ]
        problems = [f"  {o.name}: {problem}" for o in self.outcomes for problem in o.problems[:10]]
        return [*rows, f"time under fire              {self.slowdown:.2f} times", *problems]


def run(plan: Plan, tell: Callable[[str], None]) -> Report:
    """Start, run in peace, run under fire, look for each phase, stop. ``tell`` hears how far it is.

    Raises: click.ClickException when Headrace does not start, or stops to answer.
    """
    env = {"HEADRACE_SIMULATED_INTER_TOKEN_MS": str(plan.inter_token_ms)}
    options = {
        "engine": "simulated",
        "workers": plan.num_workers,
        "gateways": plan.num_gateways,
        "background": plan.num_background,
    }
    words = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    with own_instance(*words, env=env) as (data_dir, urls), Gateways(urls, None, tell) as gateways:
        client = BatchClient(gateways)
        peaceful = _batch(client, "in peace", plan, plan.num_lines, data_dir)
        tell(f"in peace: {peaceful.seconds:.1f} s")
        with _kept_killing(data_dir, plan) as kills:
            disturbed = _batch(client, "under fire", plan, plan.num_lines, data_dir)
        disturbed.kills = Counter(kills)
        disturbed.problems += _changed(peaceful, disturbed)
        tell(f"under fire: {disturbed.seconds:.1f} s, killed {shown_kills(kills)}")
        phases: list[Outcome] = []
        for phase in plan.phases * plan.phase_rounds:
            for victim in plan.victims:
                name = f"{victim} while {phase}"
                outcome = _batch(
                    client, name, plan, plan.phase_lines, data_dir, phase=phase, victim=victim
                )
                outcome.problems += _changed(peaceful, outcome)
                tell(f"{name}: {outcome.seconds:.1f} s, killed {shown_kills(outcome.kills)}")
                phases.append(outcome)
        return Report(peaceful, disturbed, phases)


def _batch(
    client: BatchClient,
    name: str,
    plan: Plan,
    num_lines: int,
    data_dir: Path,
    *,
    phase: str = "",
    victim: str = "",
) -> Outcome:
    """Run one batch to its end; ``victim`` is killed once, as soon as it is in ``phase``."""
    _until_all_are_ready(data_dir)
    kills: Counter[str] = Counter()
    input_path = data_dir / "chaos.jsonl"
    input_path.write_bytes(b"".join(_lines(num_lines, plan.max_new_tokens)))
    began_s = monotonic_s()
    created = batch = client.create(client.upload(input_path), _ENDPOINT)
    has_cancelled = phase != "cancelling"
    for batch in chain([created], client.followed(created["id"])):
        status, counts = batch["status"], batch["request_counts"]
        if not has_cancelled and counts["completed"] > _CANCEL_AT * num_lines:
            has_cancelled = True
            status = client.cancel(batch["id"])["status"]
        if status == phase and not kills and (killed := kill_one(data_dir, (victim,))):
            kills[killed] += 1
    seconds = monotonic_s() - began_s
    answers, problems = judged(
        {f"{number}" for number in range(num_lines)},
        batch,
        _content(client, batch["output_file_id"]),
        _content(client, batch["error_file_id"]),
    )
    return Outcome(name, batch["status"], seconds, answers, problems, kills)


def _lines(num_lines: int, max_new_tokens: int) -> Generator[bytes]:
    for number in range(num_lines):
        tokens = -1 if number % _BAD_EVERY == 7 else max_new_tokens
        body = {"model": "simulated", "prompt": f"{number}. A river is", "max_tokens": tokens}
        line: dict[str, Any] = {
            "custom_id": f"{number}",
            "method": "POST",
            "url": _ENDPOINT,
            "body": body | {"temperature": 0},
        }
        yield orjson.dumps(line) + b"\n"


def _content(client: BatchClient, file_id: str | None) -> list[bytes]:
    content = BytesIO()
    if file_id is not None:
        client.copy(file_id, content)
    return content.getvalue().splitlines()


# --- judging


def judged(
    wanted: set[str], batch: Batch, output: Iterable[bytes], errors: Iterable[bytes]
) -> tuple[dict[str, str], list[str]]:
    """The answers by custom id, and what is wrong: a line that is missing, there twice, in the
    wrong file or failed for no reason of its own; counts that are not those of the files.
    """
    problems: list[str] = []
    answered = [orjson.loads(line) for line in output]
    failed = [orjson.loads(line) for line in errors]
    seen = Counter(line["custom_id"] for line in (*answered, *failed))
    problems += [f"line {id} stands {count} times" for id, count in seen.items() if count > 1]
    problems += [f"line {id} is missing" for id in sorted(wanted - seen.keys())]
    problems += [f"line {id} was not asked for" for id in sorted(seen.keys() - wanted)]
    answers: dict[str, str] = {}
    for line in answered:
        if line["response"]["status_code"] == 200:
            answers[line["custom_id"]] = line["response"]["body"]["choices"][0]["text"]
        else:
            problems.append(f"line {line['custom_id']} failed and is in the output file")
    may_be_unfinished = batch["status"] in ("cancelled", "expired")
    for line in failed:
        is_bad = int(line["custom_id"]) % _BAD_EVERY == 7
        is_unfinished = (line["error"] or {}).get("code") == f"batch_{batch['status']}"
        if not is_bad and not (may_be_unfinished and is_unfinished):
            problems.append(f"line {line['custom_id']} failed: {line}"[:300])
    counts = batch["request_counts"]
    if counts["completed"] != len(answered) or counts["total"] != len(wanted):
        problems.append(f"{counts} are the counts of {len(answered)} answers, {len(failed)} errors")
    return answers, problems


def _changed(peaceful: Outcome, other: Outcome) -> list[str]:
    return [
        f"line {id} has another answer than in peace"
        for id, text in other.answers.items()
        if text != peaceful.answers.get(id, text)
    ]


# --- killing


def _until_all_are_ready(data_dir: Path) -> None:
    """So that each batch begins alike. Raises: click.ClickException when it takes too long."""
    give_up_at_s = monotonic_s() + _RESTART_S
    while True:
        state = runfile.read_state(data_dir)
        if state and all(process.state == State.READY for process in state.processes):
            return
        if monotonic_s() > give_up_at_s:
            raise click.ClickException("not everything that was killed came back")
        time.sleep(_LOOK_S)


@contextmanager
def _kept_killing(data_dir: Path, plan: Plan) -> Generator[Counter[str]]:
    """A process at random every few seconds, until the end of this."""
    kills: Counter[str] = Counter()
    has_ended = threading.Event()

    def keep_killing() -> None:
        while kills.total() < plan.max_kills and not has_ended.wait(plan.kill_every_s):
            role = kill_one(data_dir, plan.victims)
            if role:
                kills[role] += 1

    thread = threading.Thread(target=keep_killing)
    thread.start()
    try:
        yield kills
    finally:
        has_ended.set()
        thread.join()


@click.command()
@click.option("--lines", "num_lines", default=5000, show_default=True)
@click.option("--tokens", "max_new_tokens", default=16, show_default=True, help="Of each answer.")
@click.option("--workers", "num_workers", default=4, show_default=True)
@click.option("--gateways", "num_gateways", default=2, show_default=True)
@click.option("--background", "num_background", default=2, show_default=True)
@click.option("--kill-every", "kill_every_s", default=2.0, show_default=True, help="Seconds.")
@click.option(
    "--victim",
    "victims",
    multiple=True,
    type=click.Choice(VICTIMS),
    default=VICTIMS,
    show_default=True,
)
@click.option(
    "--phase",
    "phases",
    multiple=True,
    type=click.Choice(PHASES),
    default=PHASES,
    show_default=True,
)
@click.option("--phase-rounds", default=1, show_default=True, help="Per phase and victim.")
def main(**options: Any) -> None:  # fmt: skip
    """Kill processes while a batch is worked off, and count its lines.

    Exits with 1 when a line is missing, there twice, or other than in peace.
    """
    report = run(Plan(**options), lambda line: click.echo(line, err=True))
    click.echo("\n".join(report.lines()))
    sys.exit(0 if report.has_passed else 1)
