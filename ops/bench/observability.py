"""What logs and metrics cost: an instance that tells all, beside one that tells nothing.

Both are `headrace up`, on the real model or, with ``--engine simulated``, with an engine that takes
no time, so that gateway, Redis and worker are all there is; they get the same load in turns. Of the
quiet one every process drops its events where they are logged, but for those by which it is known
to be ready, and nobody asks it for figures; of the other one, whose logs go to files, somebody asks
as a Prometheus does.
"""

import asyncio
import contextlib
import json
import runpy
import sys
import tempfile
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Literal

import click
import msgspec

from common import logs
from ops.bench import machine
from ops.bench.instance import instance_in
from ops.bench.load import Level, Load, Session, find_target
from ops.bench.processes import use_of
from ops.options import build
from ops.processes import Processes, UpSettings
from ops.runfile import read_state
from ops.supervisor import ProcessSpec
from ops.up import up

_MODULE = "ops.bench.observability"
_SCRAPE_S = 5.0
"""As `ops/prometheus/prometheus.yml` says."""
_EVERYTHING_AT_ONCE = {
    "HEADRACE_SIMULATED_FIRST_TOKEN_MS": "0",
    "HEADRACE_SIMULATED_INTER_TOKEN_MS": "0",
}


class Turn(msgspec.Struct, frozen=True):
    """One load of one instance."""

    tokens_per_second: float
    cpu_us_per_token: float
    """Processor time of its gateway and worker: a supervisor that shows requests has its own."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Turns of both in the order in which they ran, and what the loud one loses by each measure."""

    clients: int
    new_tokens: int
    loud: list[Turn]
    quiet: list[Turn]
    lost_throughput: float
    """Share of the quiet one's tokens per second: the median over pairs of turns."""
    added_cpu: float
    """Share of the quiet one's processor time per token, likewise."""


@click.command()
@click.option("--engine", type=click.Choice(["torch", "simulated"]), default="torch")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("var"), show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of two turns of each.")
@click.option("--clients", default=16, show_default=True, help="At once.")
@click.option("--new-tokens", default=64, show_default=True, help="Of each answer.")
@click.option("--requests", default=8, show_default=True, help="Of each client in each turn.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    engine: Literal["torch", "simulated"],
    data_dir: Path,
    rounds: int,
    clients: int,
    new_tokens: int,
    requests: int,
    json_path: Path | None,
) -> None:
    """Measure what logs and metrics take of the throughput."""
    load = Load(prompt_tokens=64, new_tokens=new_tokens, requests=requests)
    models = data_dir / "models" if engine == "torch" else None
    figures = measure(rounds, clients, load, models)
    for name, turns in (("with logs and metrics", figures.loud), ("without", figures.quiet)):
        rate = median(turn.tokens_per_second for turn in turns)
        cpu = median(turn.cpu_us_per_token for turn in turns)
        click.echo(f"{name:<24}{rate:10.0f} tokens/s{cpu:10.1f} µs of processors per token")
    click.echo(f"throughput lost {figures.lost_throughput:.1%}, time added {figures.added_cpu:.1%}")
    if json_path is not None:
        told = {"machine": machine.describe(), "figures": figures}
        json_path.write_text(json.dumps(msgspec.to_builtins(told), indent=1) + "\n")


def measure(rounds: int, clients: int, load: Load, models: Path | None) -> Figures:
    """``models`` is the store's folder to serve from; None: simulate an engine that takes no time.

    Raises: click.ClickException when an instance does not start.
    """
    options = ("--engine", "torch" if models else "simulated")
    env = {} if models else _EVERYTHING_AT_ONCE
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as loud,
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as quiet,
        instance_in(Path(loud), *options, env=env, models=models) as [loud_url],
        instance_in(Path(quiet), *options, env=env, models=models, program=(_MODULE, "up")) as [
            quiet_url
        ],
    ):
        places = [(Path(loud), loud_url), (Path(quiet), quiet_url)]
        turns = asyncio.run(_turns(places, rounds, clients, load))
    louds, quiets = turns
    pairs = list(zip(louds, quiets, strict=True))
    return Figures(
        clients=clients,
        new_tokens=load.new_tokens,
        loud=louds,
        quiet=quiets,
        lost_throughput=median(1 - a.tokens_per_second / b.tokens_per_second for a, b in pairs),
        added_cpu=median(a.cpu_us_per_token / b.cpu_us_per_token - 1 for a, b in pairs),
    )


async def _turns(
    places: Sequence[tuple[Path, str]], rounds: int, clients: int, load: Load
) -> list[list[Turn]]:
    sessions = [Session(await find_target(url, load), load) for _, url in places]
    for session in sessions:
        await session.warm_up(clients)
    turns: list[list[Turn]] = [[], []]
    async with _scraped(places[0][0]):
        for which in [0, 1, 1, 0] * rounds:  # whoever is first is not always
            pids = _serving(places[which][0])
            before_s = _cpu_s(pids)
            level = await sessions[which].closed_loop(clients)
            turns[which].append(_turn(level, _cpu_s(pids) - before_s))
    return turns


def _turn(level: Level, cpu_s: float) -> Turn:
    if level.failures or not level.output_tokens:
        raise click.ClickException(f"not all requests were answered: {level.failures}")
    return Turn(level.tokens_per_second, cpu_s * 1e6 / level.output_tokens)


def _serving(data_dir: Path) -> list[int]:
    """Process ids of gateway and worker."""
    state = read_state(data_dir)
    if state is None:
        raise click.ClickException("the instance to measure ended")
    return [it.pid for it in state.processes if it.role in ("gateway", "worker")]


def _cpu_s(pids: Sequence[int]) -> float:
    return sum(sum(use_of(pid).cpu_s.values()) for pid in pids)


@contextlib.asynccontextmanager
async def _scraped(data_dir: Path) -> AsyncGenerator[None]:
    """Meanwhile all its processes are asked for their figures, as a Prometheus would ask."""
    asking = asyncio.create_task(_keep_scraping(_targets(data_dir)))
    try:
        yield
    finally:
        asking.cancel()


def _targets(data_dir: Path) -> list[str]:
    groups = json.loads((data_dir / "run" / "prometheus-targets.json").read_bytes())
    return [f"http://{target}/metrics" for group in groups for target in group["targets"]]


async def _keep_scraping(urls: Sequence[str]) -> None:
    while True:
        await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls))
        await asyncio.sleep(_SCRAPE_S)


def _fetch(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own instance
        answer.read()


# The quiet instance ------------------------------------------------------------------------------


class _QuietProcesses(Processes):
    """What `headrace up` starts, each through this module."""

    def specs(self) -> list[ProcessSpec]:
        return [replace(spec, argv=_quietly(spec.argv)) for spec in super().specs()]


def _quietly(argv: Sequence[str]) -> list[str]:
    place = list(argv).index("-m")
    return [*argv[: place + 1], _MODULE, "run", *argv[place + 1 :]]


def _be_quiet() -> None:
    """Drop events as soon as they are logged: as near to no logging as a call can come."""
    set_up_chain = logs.set_up_chain

    def set_up(**options: object) -> None:
        set_up_chain(**options)  # pyright: ignore[reportArgumentType] - passed on as they are
        loud = logs.structlog.get_config()["wrapper_class"]

        def info(self: object, event: str, **fields: object) -> None:
            if event.endswith(".ready"):
                loud.info(self, event, **fields)

        quiet = type("Quiet", (loud,), {"info": info})
        logs.structlog.configure(wrapper_class=quiet)

    logs.set_up_chain = set_up


def _run(arguments: Sequence[str]) -> None:
    """``up`` with the options of `headrace up` that are needed here, or a module of the product."""
    command, *rest = arguments
    if command == "run":
        _be_quiet()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    settings = {name.removeprefix("--").replace("-", "_"): it for name, it in given.items()}
    up(build(UpSettings, settings), _QuietProcesses)


if __name__ == "__main__":
    _run(sys.argv[1:])
