"""`headrace status`: every process with role, pid, state and what it holds.

Two sources are joined: Redis knows what every worker and gateway of the pool holds, wherever it
runs; the supervisor of this data directory knows pids, addresses and restarts.
"""

import asyncio
import os
import socket

import click
import msgspec
from rich.console import Console
from rich.table import Table

from common.broker import Broker, GatewayState, PoolState, WorkerState, connect
from common.settings import Settings
from ops import runfile
from ops.probe import Unreachable, check_redis, without_password

_WIDE_COLUMNS = 200
"""Where no terminal sets a width: no line is broken."""


class ProcessStatus(msgspec.Struct, kw_only=True):
    """One process. ``holds`` are generation ids; ``streams`` is what a gateway relays now."""

    role: str
    name: str
    instance: str = ""
    pid: int = 0
    host: str = ""
    state: str
    holds: list[str] = msgspec.field(default_factory=list[str])
    streams: int = 0
    free_tokens: int = 0
    model_version: str = ""
    lease_ms: int = 0
    restarts: int = 0
    started: str = ""
    address: str = ""


class Status(msgspec.Struct, kw_only=True):
    """The whole answer; ``supervisor_pid`` is 0 when no `headrace up` runs here."""

    pool: str
    redis_url: str
    supervisor_pid: int
    processes: list[ProcessStatus]
    waiting: dict[str, int]
    handed_back: int
    backlog_tokens: dict[str, int]
    oldest_wait_ms: int
    drain_tokens_per_second: float


class NotWell(click.ClickException):
    """What was expected to run here does not."""


def status(settings: Settings, *, as_json: bool, expect_worker: bool = False) -> None:
    """Print one look at the pool.

    Raises: Unreachable, Failure; NotWell when a worker is expected on this host and none is alive.
    """
    found = asyncio.run(look(settings))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        _print(found)
    here = socket.gethostname()
    workers = [p for p in found.processes if p.role == "worker" and p.lease_ms > 0]
    if expect_worker and not any(worker.host == here for worker in workers):
        raise NotWell(f"no worker of pool {found.pool} is alive on {here}")


async def look(settings: Settings) -> Status:
    """Ask Redis and the supervisor.

    Without a Redis of the user's choice, the one that the supervisor of the data directory uses.
    """
    run = runfile.read_state(settings.data_dir)
    named = "redis_url" in settings.model_fields_set
    redis_url = runfile.redis_url_of(settings)
    pool = run.model if run and "model" not in settings.model_fields_set else settings.model
    try:
        await check_redis(redis_url, pool)
    except Unreachable as error:
        if run or named:
            raise
        hint = f"no `headrace up` runs on {settings.data_dir} (see --data-dir), and "
        raise Unreachable(hint + error.message) from error
    broker = Broker(connect(redis_url), pool)
    try:
        state = await broker.state()
    finally:
        await broker.close()
    return Status(
        pool=pool,
        redis_url=without_password(redis_url),
        supervisor_pid=run.pid if run else 0,
        processes=_join(run.processes if run else [], state),
        waiting=state.waiting,
        handed_back=state.handed_back,
        backlog_tokens=state.backlog_tokens,
        oldest_wait_ms=state.oldest_wait_ms,
        drain_tokens_per_second=state.drain_rate,
    )


def _join(supervised: list[runfile.ProcessState], state: PoolState) -> list[ProcessStatus]:
    """Supervised processes first, with what Redis knows of them; then those of other hosts."""
    found = [_of_supervisor(process) for process in supervised]
    by_instance = {process.instance: process for process in found if process.instance}
    for worker in state.workers:
        process = by_instance.get(worker.name)
        if process is None:
            process = ProcessStatus(role="worker", name=worker.name, state="alive")
            found.append(process)
        _add_worker(process, worker)
    for gateway in state.gateways:
        process = by_instance.get(gateway.name)
        if process is None:
            process = ProcessStatus(role="gateway", name=gateway.name, state="alive")
            found.append(process)
        _add_gateway(process, gateway)
    return found


def _of_supervisor(process: runfile.ProcessState) -> ProcessStatus:
    return ProcessStatus(
        role=process.role,
        name=process.name,
        instance=process.instance,
        pid=process.pid,
        host=socket.gethostname(),
        state=process.state,
        restarts=process.restarts,
        started=process.started,
        address=process.address,
    )


def _add_worker(process: ProcessStatus, worker: WorkerState) -> None:
    process.instance = worker.name
    process.holds = worker.held
    process.lease_ms = worker.expires_in_ms
    if worker.presence is not None:
        process.state = worker.presence.state
        process.pid = worker.presence.pid
        process.host = worker.presence.host
        process.free_tokens = worker.presence.free_tokens
        process.model_version = worker.presence.model_version
    if process.host == socket.gethostname() and not _is_alive(process.pid):
        process.state = "dead, its lease runs out"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _add_gateway(process: ProcessStatus, gateway: GatewayState) -> None:
    process.instance = gateway.name
    process.streams = gateway.streams
    process.lease_ms = gateway.expires_in_ms


def _print(found: Status) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE_COLUMNS)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("process", "pid", "state", "holds", "restarts", "instance", "where"):
        table.add_column(heading, overflow="fold")
    for process in found.processes:
        table.add_row(
            process.name if process.role in process.name else f"{process.role} {process.name}",
            str(process.pid or ""),
            process.state,
            _holds(process),
            str(process.restarts),
            process.instance,
            process.address or process.host,
        )
    console.print(table if found.processes else "nothing runs")
    waiting = [f"{number} in {lane}" for lane, number in found.waiting.items() if number]
    if found.handed_back:
        waiting.append(f"{found.handed_back} handed back")
    console.print(f"\nwaiting  {', '.join(waiting) or 'nothing'}")
    console.print(f"pool     {found.pool}\nserver   {found.redis_url}")


def _holds(process: ProcessStatus) -> str:
    if process.role == "gateway":
        return f"{process.streams} streams"
    if process.role == "worker":
        return f"{len(process.holds)} generations"
    return ""
