"""`headrace bench peers`: Headrace beside the servers that people would pick instead, in one run.

Every server gets the same weights, cores, prompts and load client, one server at a time. All of it
happens in rounds, so that what disturbs the machine for a while disturbs each of them, and each
figure is the best of its rounds.
"""

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import uvloop
from rich.console import Console

from common.clock import monotonic_s
from common.models.store import DEFAULT_MODEL, ModelStore
from ops.bench import comparison, installed
from ops.bench.comparison import Comparison, EngineRow, Row
from ops.bench.engine import Figures
from ops.bench.installed import Server
from ops.bench.load import Load, LoadError, Session, Target, find_target
from ops.bench.machine import describe
from ops.bench.processes import Use, busy_s, running, use_of
from ops.bench.scenarios import measure_scenarios
from ops.probe import free_ports

_START_TIMEOUT_S = 300.0
_LOOK_S = 0.5
_LONG_LEVEL_S = 15.0
"""A level that takes longer is measured in the first round only."""
_TOO_LONG_S = 45.0
"""A level that would take longer, by the rate of the one before, is left out."""
_MANY = 8
"""From here on, more clients do not get many more tokens out of a server."""
_QUIET_LOOK_S = 2.0
_WAYS = ("step", "operations", "modules")


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    counts: list[int]
    rounds: int
    load: Load
    stored: Path
    peers_dir: Path
    scratch: Path

    @property
    def model(self) -> str:
        return self.stored.name


@click.command()
@click.option(
    "--peers-dir",
    type=click.Path(path_type=Path),
    default=Path("var/peers"),
    show_default=True,
    envvar="HEADRACE_PEERS_DIR",
    help="Where the other servers are installed; see ops/bench/README.md. [HEADRACE_PEERS_DIR]",
)
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("var"), show_default=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--concurrency", default="1,8,32,64", show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--requests", default=2, show_default=True, help="Of each client in each round.")
@click.option("--only", multiple=True, help="Only servers whose name begins so; repeatable.")
@click.option("--no-engines", is_flag=True, help="Leave out the engines alone.")
@click.option("--no-scenarios", is_flag=True, help="Leave out long prompts and shared prefixes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option(
    "--readme", type=click.Path(path_type=Path), help="A document to put the tables into."
)
def peers(
    peers_dir: Path,
    data_dir: Path,
    model: str,
    concurrency: str,
    rounds: int,
    requests: int,
    only: tuple[str, ...],
    no_engines: bool,
    no_scenarios: bool,
    json_path: Path | None,
    readme: Path | None,
) -> None:
    """Headrace beside vLLM, llama.cpp, transformers serve and OpenVINO, on this machine.

    Starts each server that is installed, one after another, and puts the same load on it. What is
    absent is listed. The machine must be quiet: other processes cost the others more than us.
    """
    # So that a server that was started here is also stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="headrace-peers-") as scratch:
        plan = Plan(
            counts=[int(count) for count in concurrency.split(",")],
            rounds=rounds,
            load=Load(requests=requests, limit_s=8.0),
            stored=ModelStore(data_dir).get(model).path.absolute(),
            peers_dir=peers_dir.absolute(),
            scratch=Path(scratch),
        )
        result = uvloop.run(
            _compare(plan, console, only, engines=not no_engines, scenarios=not no_scenarios)
        )
    text = comparison.markdown(result)
    click.echo(text)
    if json_path is not None:
        comparison.write_json(result, json_path)
    if readme is not None:
        comparison.put_into(readme, text)


async def _compare(
    plan: Plan, console: Console, only: tuple[str, ...], *, engines: bool, scenarios: bool
) -> Comparison:
    busy_before = await _busy_cores()
    if busy_before > 0.1:
        console.print(
            f"! this machine is not quiet: others use {busy_before:.1f} cores", style="red"
        )
    rows: dict[str, Row] = {}
    engine_rows: dict[str, EngineRow] = {}
    for number in range(plan.rounds):
        for server in _servers(plan, only):
            console.print(f"round {number + 1}: {server.name}")
            row = rows.setdefault(server.name, Row(name=server.name))
            row.version = row.version or server.version()
            await _measure(server, row, plan, scenarios=scenarios and number == 0)
            console.print(f"  {_so_far(row)}", style="dim")
        for name, command in _engine_commands(plan) if engines else ():
            console.print(f"round {number + 1}: {name}, in process")
            row = engine_rows.setdefault(name, EngineRow(name=name))
            await asyncio.to_thread(_measure_engine, row, command, plan)
    return Comparison(
        date=datetime.now(UTC).date().isoformat(),
        machine=describe(),
        model=plan.model,
        prompt_tokens=plan.load.prompt_tokens,
        new_tokens=plan.load.new_tokens,
        rounds=plan.rounds,
        concurrency=plan.counts,
        busy_before=round(busy_before, 2),
        rows=list(rows.values()),
        engines=list(engine_rows.values()),
        absent=installed.absent(plan.peers_dir),
    )


async def _busy_cores() -> float:
    began_s = busy_s()
    await asyncio.sleep(_QUIET_LOOK_S)
    return (busy_s() - began_s) / _QUIET_LOOK_S


# --- servers


def _servers(plan: Plan, only: tuple[str, ...]) -> Iterator[Server]:
    """Headrace first, each on a port of its own."""
    port = free_ports("127.0.0.1", 0, 1)[0]
    data_dir = Path(tempfile.mkdtemp(dir=plan.scratch))
    (data_dir / "models").mkdir()
    (data_dir / "models" / plan.model).symlink_to(plan.stored)
    ours = installed.headrace(data_dir, plan.model, port)
    for server in (*ours, *installed.peers(plan.peers_dir, plan.stored, port)):
        if not only or server.name.startswith(only):
            yield server


async def _measure(server: Server, row: Row, plan: Plan, *, scenarios: bool) -> None:
    """One round of one server; what goes wrong with it is its row's failure."""
    log_path = plan.scratch / "server.log"
    try:
        with running(server.command, server.env, log_path) as process:
            target = await _started(server, process, plan.load)
            await _measure_levels(target, process.pid, row, plan)
            if scenarios and server.has_scenarios:
                row.scenarios = await measure_scenarios(target, plan.load)
    except LoadError as error:
        last_words = log_path.read_text(encoding="utf-8", errors="replace")[-500:]
        row.failure = f"{error}: {last_words}"


async def _started(server: Server, process: subprocess.Popen[bytes], load: Load) -> Target:
    """Wait until it answers a request. Raises: LoadError when it ends, or takes too long."""
    deadline_s = monotonic_s() + _START_TIMEOUT_S
    while True:
        try:
            target = await find_target(server.url, load, model=server.model)
            return replace(target, headers=server.headers)
        except LoadError:
            if process.poll() is not None or monotonic_s() > deadline_s:
                raise
            await asyncio.sleep(_LOOK_S)


async def _measure_levels(target: Target, pid: int, row: Row, plan: Plan) -> None:
    session = Session(target, replace(plan.load, seed=plan.load.seed + plan.rounds))
    await session.warm_up(max(plan.counts))
    rate = 0.0
    for count in plan.counts:
        before = row.levels.get(count)
        expected_s = count * plan.load.new_tokens / rate if rate else 0.0
        if (before and before.seconds > _LONG_LEVEL_S) or expected_s > _TOO_LONG_S:
            continue
        use = use_of(pid)
        level = await session.closed_loop(count)
        row.add(level, _cores(use, use_of(pid), level.seconds))
        if count >= _MANY:
            rate = level.tokens_per_second
    row.rss_bytes = use_of(pid).rss_bytes


def _cores(before: Use, after: Use, seconds: float) -> dict[str, float]:
    return {
        name: round((cpu_s - before.cpu_s.get(name, 0.0)) / seconds, 3)
        for name, cpu_s in after.cpu_s.items()
    }


def _so_far(row: Row) -> str:
    rates = (f"{count}: {level.tokens_per_second:.0f}" for count, level in row.levels.items())
    return row.failure or ", ".join(rates)


# --- engines alone


def _engine_commands(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    shape = ["--prompt-tokens", str(plan.load.prompt_tokens)]
    shape += ["--new-tokens", str(plan.load.new_tokens)]
    counts = ",".join(map(str, plan.counts))
    for way in _WAYS:
        yield (
            f"Headrace, way {way!r}",
            [
                *[sys.executable, "-P", "-m", "ops.bench.engine", "--way", way, "--json"],
                *["--data-dir", str(plan.stored.parent.parent), "--model", plan.model],
                *["--concurrency", counts, *shape],
            ],
        )
    python = plan.peers_dir / "openvino/bin/python"
    model = plan.peers_dir / "models" / f"{plan.model}-openvino"
    if python.exists() and model.exists():
        script = Path(__file__).with_name("openvino_in_process.py")
        yield (
            "OpenVINO GenAI",
            [str(python), str(script), str(model), counts, *shape[1::2]],
        )


def _measure_engine(row: EngineRow, command: list[str], plan: Plan) -> None:
    """One round of one engine, in a process of its own; the last line it prints is its figures."""
    done = subprocess.run(  # noqa: S603 - the command is made in this module
        command, cwd=plan.scratch, capture_output=True, text=True, check=False
    )
    try:
        levels = msgspec.json.decode(done.stdout.splitlines()[-1], type=list[Figures])
    except (IndexError, msgspec.DecodeError):
        row.failure = (done.stderr or done.stdout)[-500:] or f"exit code {done.returncode}"
        return
    for figures in levels:
        row.add(figures)
