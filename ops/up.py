"""`headrace up`: everything in one command, under one supervisor.

Start: the lock of the data directory, the ports, the model, the server; then gateways, workers and
the background worker side by side. Stop: from the front of the stream to its source, so that nobody
loses what he still needs: gateways drain, workers hand over, the server ends last.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

import click

from common.broker import Broker, Moved, connect
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import new_process_name
from common.logs import configure, flush, get_logger
from common.reaping import reap_once, tell_moves
from common.settings import BackgroundSettings, GatewaySettings, WorkerSettings
from ops import runfile
from ops.deploys import Deploys, versions_of
from ops.embedded import answers, remove_socket, server_binary, server_spec, socket_path
from ops.models import ensure_model
from ops.probe import (
    Unreachable,
    check_redis,
    count_oom_kills,
    free_ports,
    http_status,
    without_password,
)
from ops.processes import (
    EXPORTER,
    Processes,
    UpSettings,
    background_names,
    reachable,
    worker_names,
)
from ops.rotation import LogRotation
from ops.supervisor import Slot, State, Supervisor
from ops.tail import LogTail
from ops.terminal import Terminal

log = get_logger()

_STOP_ORDER = ("gateway", "worker", "background", "exporter", "server")
_LOGGED = ("gateway", "worker", "background", "exporter")
_LOOK_S = 0.1
_LOOK_SERVER_S = 0.02
_SERVER_START_TIMEOUT_S = 120.0
"""A large append-only file takes a while to load."""
_STILL_STARTING_S = 30.0
_BURY_TIMEOUT_S = 3.0
"""Within the lease, or there is no point in it."""


def up(settings: UpSettings, processes_of: Callable[..., Processes] = Processes) -> None:
    """Run until Ctrl-C or SIGTERM. ``processes_of`` makes what is started, from the same fields.

    Raises: click.ClickException or Failure for what could not be started; all that was is stopped.
    """
    data_dir = settings.data_dir.resolve()
    with runfile.lock(data_dir):
        socket = None if settings.redis_url else socket_path(data_dir)
        processes = processes_of(
            settings=settings,
            redis_url=settings.redis_url or f"unix://{socket}",
            data_dir=data_dir,
            log_dir=(settings.log_dir or data_dir / "log").resolve(),
            ports=free_ports(settings.host, settings.port, settings.gateways),
            metrics_ports=_metrics_ports(settings),
        )
        try:
            asyncio.run(_Run(processes, socket).run())
        finally:
            flush()
            if socket is not None:
                remove_socket(socket, data_dir)


def _metrics_ports(settings: UpSettings) -> dict[str, int]:
    """Of each process that has such a port. Raises: Unreachable."""
    names = [EXPORTER, *worker_names(settings), *background_names(settings)]
    ports = dict(zip(names, free_ports(settings.metrics_host, 0, len(names)), strict=True))
    if settings.metrics_port:
        host, port = settings.metrics_host, settings.metrics_port
        [ports[EXPORTER]] = free_ports(host, port, 1, option="--metrics-port")
    return ports


class _Run:
    """One start of everything, from its first process to its last.

    ``socket`` is where the embedded server listens; None: the user's own server is used.
    """

    def __init__(self, processes: Processes, socket: Path | None) -> None:
        self._processes = processes
        self._settings = processes.settings
        self._socket = socket
        self._specs = processes.specs()
        self._terminal = Terminal()
        self._supervisor = Supervisor(self._note_change)
        self._tasks = asyncio.TaskGroup()
        self._stop_asked = asyncio.Event()
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._began_s = monotonic_s()
        self._num_oom_kills = count_oom_kills()

    async def run(self) -> None:
        """Start everything, wait for the signal, stop everything.

        Raises: click.ClickException or Failure for what could not be started, at the very end.
        """
        configure("supervisor", new_process_name("supervisor"), log_dir=self._processes.log_dir)
        log.info("supervisor.started", data_dir=str(self._processes.data_dir))
        self._handle_signals()
        async with self._tasks:
            following = self._tasks.create_task(self._follow_logs())
            rotating = self._tasks.create_task(self._rotation().keep_rotating())
            async with self._supervisor:
                refusal = await self._start_unless_stopped()
                if refusal is None:
                    await self._stop_asked.wait()
                for role in _STOP_ORDER:
                    await self._supervisor.stop(role)
            following.cancel()
            rotating.cancel()
        runfile.forget_state(self._processes.data_dir)
        log.info("supervisor.stopped", refusal=str(refusal or ""))
        if refusal is not None:
            raise refusal
        self._terminal.note("headrace", "everything has stopped")

    def _rotation(self) -> LogRotation:
        settings = self._settings
        return LogRotation(
            self._processes.log_dir,
            max_bytes=settings.log_max_bytes,
            num_kept=settings.log_num_kept,
        )

    def _handle_signals(self) -> None:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it ignored
            signals.append(signal.SIGHUP)
        for signum in signals:
            asyncio.get_running_loop().add_signal_handler(signum, self._on_signal)

    # --- start

    async def _start_unless_stopped(self) -> click.ClickException | Failure | None:
        """Start everything; ends early at a stop signal. Returns what prevented the start."""
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        starting.cancel()  # does nothing to one that has ended
        try:
            await starting
        except asyncio.CancelledError:
            return None
        except (click.ClickException, Failure) as refusal:
            return refusal
        return None

    async def _start(self) -> None:
        processes = self._processes
        self._terminal.heading(version("headrace"), self._facts())
        await ensure_model(self._settings)
        deploys = self._deploys()
        deploys.tell_started()
        if self._socket is not None:
            await self._start_server(self._socket)
        await check_redis(processes.redis_url, self._settings.model)
        runfile.write_targets(processes.data_dir, processes.targets())
        await self._until_up([self._supervisor.start(spec) for spec in self._specs])
        await self._until_served()
        seconds = monotonic_s() - self._began_s
        log.info("supervisor.ready", startup_s=round(seconds, 3))
        deploys.tell_promoted()
        addresses = [processes.address(port) for port in processes.ports]
        self._terminal.ready(seconds, addresses, processes.log_dir)

    def _deploys(self) -> Deploys:
        data_dir, settings = self._processes.data_dir, self._settings
        versions = versions_of(data_dir, settings.model)
        # What its processes read from their environment, and over it what this command was told.
        given = (GatewaySettings(), WorkerSettings(), BackgroundSettings(), settings)
        return Deploys(data_dir, versions, *given)

    def _facts(self) -> list[tuple[str, str]]:
        settings = self._settings
        parts = [_count(settings.gateways, "gateway"), _count(settings.workers, "worker")]
        return [
            ("model", f"{settings.model} ({settings.engine} engine)"),
            ("server", without_password(settings.redis_url) or "embedded, on a private socket"),
            ("processes", ", ".join([*parts, _count(settings.background, "background worker")])),
            ("data", str(self._processes.data_dir)),
        ]

    async def _start_server(self, socket: Path) -> None:
        spec = server_spec(server_binary(), self._processes.data_dir, socket)
        slot = self._supervisor.start(spec)
        try:
            await asyncio.wait_for(asyncio.shield(slot.came_up), _SERVER_START_TIMEOUT_S)
        except TimeoutError:
            limit = f"{_SERVER_START_TIMEOUT_S:.0f} s"
            raise Unreachable(f"the embedded server did not answer within {limit}") from None

    async def _until_up(self, slots: list[Slot]) -> None:
        """Return when each has been ready once.

        Raises: NeverCameUp.
        """
        waiting = {slot.came_up for slot in slots}
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=_STILL_STARTING_S, return_when=asyncio.FIRST_EXCEPTION
            )
            for came_up in done:
                came_up.result()
            for slot in slots:
                if not slot.came_up.done():
                    self._terminal.note(slot.spec.name, "is still starting", role=slot.spec.role)

    async def _until_served(self) -> None:
        """Return when every gateway says that a request would be answered."""
        path = "/ready" if self._settings.workers else "/health"
        host = reachable(self._settings.host)
        for port in self._processes.ports:
            while await http_status(host, port, path) != HTTPStatus.OK:
                await asyncio.sleep(_LOOK_S)

    # --- while it runs

    def _on_signal(self) -> None:
        """First: stop in order. Second: whoever is in a hurry gets an end without drain."""
        if not self._stop_asked.is_set():
            self._stop_asked.set()
            if self._supervisor.slots:
                words = "stopping: open streams may finish; Ctrl-C again to stop at once"
                self._terminal.note("headrace", words)
            return
        for slot in self._supervisor.slots:
            if slot.spec.role != "server":
                slot.kill()

    def _note_change(self, slot: Slot, words: str) -> None:
        if words:
            level = "warning" if slot.state in (State.WAITING, State.FAILED) else "info"
            self._terminal.note(slot.spec.name, words, role=slot.spec.role, level=level)
        self._write_state()
        if slot.state is State.WAITING and slot.instance:
            if slot.spec.role == "worker":
                change = {"from": "ready", "to": "dead"}
                log.warning("worker.state", worker=slot.instance, cause=slot.outcome, **change)
                self._tasks.create_task(self._bury(slot.instance, slot.exit_code))
            if slot.spec.role == "background":
                self._tasks.create_task(self._free_batches(slot.instance))
        if slot.spec.role == "server" and slot.state is State.STARTING:
            self._tasks.create_task(self._watch_server(slot, slot.pid))

    async def _bury(self, worker: str, exit_code: int) -> None:
        """We saw it die: others go on with its work now, not when its lease ends.

        SIGKILL that was not the kernel's, for want of memory, came from a person: then what the
        worker ran bears no blame.
        """
        before, self._num_oom_kills = self._num_oom_kills, count_oom_kills()
        was_oom_killed = before is None or before != self._num_oom_kills
        was_shot = exit_code == -signal.SIGKILL and not was_oom_killed
        async with self._broker_if_it_answers() as broker:
            if was_shot:
                workers = (await broker.state()).workers
                held = [id for known in workers if known.name == worker for id in known.held]
                await broker.leave_worker(worker, has_died=True)
                tell_moves(Moved(id, "requeued", worker) for id in held)
            else:
                await broker.bury_worker(worker)
                await reap_once(broker)

    async def _free_batches(self, background: str) -> None:
        """We saw it die: others steer its batches now, not when its leases end."""
        async with self._broker_if_it_answers() as broker:
            store = broker.batch_store
            await store.drop_leases(await store.active(self._settings.model), background)

    @asynccontextmanager
    async def _broker_if_it_answers(self) -> AsyncGenerator[Broker]:
        """For what leases end, too, only later: where it does not answer, that is left to them."""
        broker = Broker(connect(self._processes.redis_url), self._settings.model)
        try:
            async with asyncio.timeout(_BURY_TIMEOUT_S):
                yield broker
        except (Failure, TimeoutError) as error:
            log.warning("redis.disconnected", error=str(error))
        finally:
            await broker.close()

    def _write_state(self) -> None:
        processes = [
            runfile.ProcessState(
                role=slot.spec.role,
                name=slot.spec.name,
                state=slot.state,
                pid=slot.pid,
                instance=slot.instance,
                restarts=slot.restarts,
                started=slot.started,
                address=slot.spec.address,
            )
            for slot in self._supervisor.slots
        ]
        state = runfile.RunState(
            pid=os.getpid(),
            started=self._began,
            redis_url=self._processes.redis_url,
            model=self._settings.model,
            processes=processes,
        )
        runfile.write_state(self._processes.data_dir, state)

    async def _watch_server(self, slot: Slot, pid: int) -> None:
        """The server logs no line of ours: it is ready when it answers."""
        while self._socket and slot.pid == pid and slot.state is State.STARTING:
            if await answers(self._socket):
                log.info("server.started", child_pid=pid, socket=str(self._socket))
                self._supervisor.mark_ready(pid, "")
            await asyncio.sleep(_LOOK_SERVER_S)

    async def _follow_logs(self) -> None:
        """Learn from the logs who is ready, and show what matters of them."""
        with closing(LogTail(self._processes.log_dir, _LOGGED)) as tail:
            while True:
                lines = tail.read()
                for line in lines:
                    if line.get("event") == f"{line.get('service')}.ready":
                        self._supervisor.mark_ready(int(line["pid"]), str(line["instance"]))
                names = {slot.pid: slot.spec.name for slot in self._supervisor.slots}
                self._terminal.log_lines(lines, names)
                await asyncio.sleep(_LOOK_S)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
