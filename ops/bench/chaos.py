"""Chaos: kill processes while clients stream, and compare every answer with an undisturbed run.

Starts ``headrace up`` with its supervisor, asks every prompt once in peace, then again while a
process is killed every few seconds. A run passes when no request failed, no position was missing or
came twice, and every text is byte-equal to the peaceful one (which a float32 engine promises).
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httpx

from ops import runfile
from ops.bench.sse_client import Reader, StreamDefect
from ops.probe import http_status
from ops.supervisor import State

_START_S = 180.0
_RETRY_S = 0.2
_RESUME_LIMIT_S = 60.0
_TOPICS = ("rivers", "mills", "canals", "turbines", "rain", "dams", "locks", "springs")


@dataclass
class Outcome:
    """What one client saw of one prompt."""

    prompt: str
    text: str = ""
    problem: str = ""
    resumes: int = 0
    attempts: int = 1


@dataclass
class Report:
    """Both runs side by side."""

    peaceful: list[Outcome]
    disturbed: list[Outcome]
    peaceful_s: float
    disturbed_s: float
    kills: Counter[str] = field(default_factory=Counter[str])

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in (*self.peaceful, *self.disturbed) if outcome.problem]

    @property
    def changed(self) -> list[tuple[Outcome, Outcome]]:
        """Pairs of the same prompt whose texts differ."""
        pairs = zip(self.peaceful, self.disturbed, strict=True)
        return [(a, b) for a, b in pairs if not a.problem and not b.problem and a.text != b.text]

    @property
    def has_passed(self) -> bool:
        return not self.failed and not self.changed

    def lines(self) -> list[str]:
        continued = sum(outcome.attempts > 1 for outcome in self.disturbed)
        resumes = sum(outcome.resumes for outcome in self.disturbed)
        return [
            f"streams            {len(self.disturbed)} in peace, then again under fire",
            f"killed             {shown_kills(self.kills)}",
            f"continued          {continued} by another worker, {resumes} reconnects by clients",
            f"failed             {len(self.failed)}",
            f"texts that differ  {len(self.changed)}",
            f"time               {self.peaceful_s:.1f} s, {self.disturbed_s:.1f} s under fire",
            *(f"  {outcome.prompt!r}: {outcome.problem}" for outcome in self.failed[:10]),
        ]


@dataclass(frozen=True)
class Plan:
    """One chaos run: who streams what, and who is killed how often."""

    data_dir: Path
    model: str
    engine: str = "torch"
    dtype: str = "float32"
    num_workers: int = 2
    num_gateways: int = 1
    num_clients: int = 8
    num_streams: int = 20
    max_new_tokens: int = 64
    kill_every_s: float = 5.0
    victims: tuple[str, ...] = ("worker",)
    log_path: Path | None = None

    def prompts(self, client: int) -> list[str]:
        topics = [_TOPICS[(client + i) % len(_TOPICS)] for i in range(self.num_streams)]
        return [f"{i}. Write a few words about {topic}." for i, topic in enumerate(topics)]


async def run(plan: Plan) -> Report:
    """Start, stream in peace, stream under fire, stop.

    Raises:
        RuntimeError: Headrace did not become ready.
    """
    up = await _start(plan)
    try:
        urls = await _until_ready(up, plan)
        kills: Counter[str] = Counter()
        began = time.monotonic()
        peaceful = await _storm(plan, urls)
        between = time.monotonic()
        killer = asyncio.create_task(_keep_killing(plan, kills))
        disturbed = await _storm(plan, urls)
        ended = time.monotonic()
        killer.cancel()
        return Report(peaceful, disturbed, between - began, ended - between, kills)
    finally:
        if up.returncode is None:
            up.terminate()
            await up.wait()


async def _start(plan: Plan) -> asyncio.subprocess.Process:
    options = {
        "--data-dir": plan.data_dir,
        "--model": plan.model,
        "--engine": plan.engine,
        "--dtype": plan.dtype,
        "--workers": plan.num_workers,
        "--gateways": plan.num_gateways,
        "--port": 0,
    }
    command = [sys.executable, "-m", "ops.cli", "up"]
    command += [str(part) for option in options.items() for part in option]
    with (plan.log_path or Path(os.devnull)).open("wb") as log:
        return await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)


async def _until_ready(up: asyncio.subprocess.Process, plan: Plan) -> list[str]:
    """Wait until every gateway is ready; returns where they are."""
    deadline = time.monotonic() + _START_S
    while not (urls := await _ready_urls(plan)):
        if up.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError("headrace up did not become ready")
        await asyncio.sleep(_RETRY_S)
    return urls


async def _ready_urls(plan: Plan) -> list[str]:
    """The addresses of all gateways, or none as long as one of them is not ready."""
    state = runfile.read_state(plan.data_dir)
    urls = [p.address for p in state.processes if p.role == "gateway"] if state else []
    if len(urls) < plan.num_gateways:
        return []
    for url in urls:
        if await http_status("127.0.0.1", urlsplit(url).port or 0, "/ready") != 200:
            return []
    return urls


async def _storm(plan: Plan, urls: list[str]) -> list[Outcome]:
    clients = [_client(plan, number, urls) for number in range(plan.num_clients)]
    return [outcome for outcomes in await asyncio.gather(*clients) for outcome in outcomes]


async def _client(plan: Plan, number: int, urls: list[str]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(_connection(url)) for url in urls]
        for prompt in plan.prompts(number):
            gateways = gateways[1:] + gateways[:1]
            outcomes.append(await _stream(gateways, prompt, plan.max_new_tokens))
    return outcomes


def _connection(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=60, verify=False)  # noqa: S501  no TLS here


async def _stream(gateways: list[httpx.AsyncClient], prompt: str, max_new_tokens: int) -> Outcome:
    """One prompt to its end, over as many connections and gateways as it takes."""
    outcome, reader = Outcome(prompt), Reader()
    give_up_at = time.monotonic() + _RESUME_LIMIT_S
    for client in cycle(gateways):
        try:
            if reader.stream_id:
                outcome.resumes += 1
                connection = reader.resume(client)
            else:
                connection = reader.generate(client, prompt, max_new_tokens=max_new_tokens)
            async with connection as events:
                async for _ in events:
                    pass
            reader.check_whole()
        except (httpx.HTTPError, StreamDefect) as error:
            outcome.problem = f"{type(error).__name__}: {error}"
        else:
            outcome.problem = ""
            outcome.text = reader.text
            outcome.attempts = reader.end["headrace"]["attempts"]
        is_broken_connection = outcome.problem and not reader.has_ended
        if not is_broken_connection or time.monotonic() > give_up_at:
            break
        await asyncio.sleep(_RETRY_S)
    return outcome


async def _keep_killing(plan: Plan, kills: Counter[str]) -> None:
    while True:
        await asyncio.sleep(plan.kill_every_s)
        role = kill_one(plan.data_dir, plan.victims)
        if role:
            kills[role] += 1


def kill_one(data_dir: Path, victims: Collection[str]) -> str:
    """SIGKILL for a process at random of these roles; returns its role, "" where none was there."""
    state = runfile.read_state(data_dir)
    processes = state.processes if state else []
    # Who is still starting is left alone: else none would ever be there on a slow machine.
    ready = [p for p in processes if p.role in victims and p.state == State.READY]
    if not ready:
        return ""
    victim = random.choice(ready)
    try:
        os.kill(victim.pid, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    return victim.role


def shown_kills(kills: Counter[str]) -> str:
    return ", ".join(f"{n} {role}" for role, n in sorted(kills.items())) or "none"


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("var"), show_default=True)
@click.option("--model", default="SmolLM2-135M-Instruct", show_default=True)
@click.option("--engine", type=click.Choice(["torch", "simulated"]), default="torch")
@click.option("--dtype", default="float32", show_default=True, help="Exactness needs float32.")
@click.option("--workers", "num_workers", default=2, show_default=True)
@click.option("--gateways", "num_gateways", default=1, show_default=True)
@click.option("--clients", "num_clients", default=8, show_default=True)
@click.option(
    "--streams", "num_streams", default=20, show_default=True, help="Per client, one after another."
)
@click.option(
    "--tokens", "max_new_tokens", default=64, show_default=True, help="New tokens per stream."
)
@click.option(
    "--kill-every",
    "kill_every_s",
    default=5.0,
    show_default=True,
    help="Seconds between two kills.",
)
@click.option(
    "--victim",
    "victims",
    multiple=True,
    type=click.Choice(["worker", "gateway", "background"]),
    default=["worker"],
    show_default=True,
)
def chaos(**options: Any) -> None:
    """Kill processes while clients stream and compare every answer with an undisturbed run.

    Exits with 1 when a request failed, a position was missing or repeated, or a text differs.
    """
    report = asyncio.run(run(Plan(**options)))
    click.echo("\n".join(report.lines()))
    sys.exit(0 if report.has_passed else 1)
