"""Keeps processes alive: starts them, starts again what dies, and stops them in order.

A slot is one place for a process; its process may be replaced many times. A process is *ready* when
somebody says so with :meth:`Supervisor.mark_ready`. One that dies before it was ever ready counts
towards giving up; one that has been ready is started again for ever, with growing delays while it
dies young. Children never outlive this process: the kernel kills them with it, however it dies.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

import click

from common.clock import monotonic_s
from common.logs import get_logger
from workers import exit_codes

log = get_logger()

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 15.0
_RAN_WELL_S = 5.0
"""A process that was ready and lived this long starts its next delays from the beginning."""
_MAX_FAILED_STARTS = 3
"""Starts in a row without ever being ready, after which a slot is given up."""
_EXIT_BAD_SETTINGS = 2
"""A process that says its settings are wrong will say so again: given up at once."""
_MAX_REMEMBERED_LINES = 20
_MAX_REASON_CHARS = 400
_MAX_LINE_BYTES = 64 * 1024


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting to restart"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to start one process, and how long it may take to stop after SIGTERM."""

    role: str
    name: str
    """For people: ``worker 2``."""
    argv: Sequence[str]
    env: Mapping[str, str]
    stop_timeout_s: float
    address: str = ""


class NeverCameUp(click.ClickException):
    """A process ended again and again before it was ready; the message holds its last words."""


class Slot:
    """One place for a process, and what is known of the process in it.

    ``came_up`` is done at the first readiness; it holds an exception when the slot was given up
    before, and is cancelled when it was stopped before.
    """

    def __init__(self, spec: ProcessSpec, on_change: "Callable[[Slot, str], None]") -> None:
        self.spec = spec
        self.state = State.STARTING
        self.pid = 0
        self.instance = ""
        self.exit_code = 0
        """Of the last process that ended here; negative: the signal that ended it."""
        self.outcome = ""
        """The same in words."""
        self.restarts = 0
        self.started = ""
        self.came_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=_MAX_REMEMBERED_LINES)
        self._was_ready = False
        self._failed_starts = 0
        self._delay_s = _FIRST_DELAY_S
        self._stop_asked = asyncio.Event()

    def mark_ready(self, instance: str) -> None:
        """The process in this slot does its work now, under the name ``instance``."""
        self.instance = instance
        self.state = State.READY
        self._was_ready = True
        if not self.came_up.done():
            self.came_up.set_result(None)
        self._on_change(self, f"is ready, pid {self.pid}")

    def ask_to_stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes longer than the spec allows. Returns at once."""
        self._stop_asked.set()

    def kill(self) -> None:
        """SIGKILL, and no new start."""
        self._stop_asked.set()
        self._signal(signal.SIGKILL)

    async def keep_alive(self) -> None:
        """Run the process again and again until it is asked to stop or given up."""
        while not self._stop_asked.is_set():
            started_s = monotonic_s()
            code, outcome = await self._run_once()
            if self._stop_asked.is_set():
                break
            if self._gives_up(code, outcome):
                return
            await self._wait_to_restart(outcome, lived_s=monotonic_s() - started_s)
        self.state = State.STOPPED
        self.came_up.cancel()
        self._on_change(self, "stopped")

    async def _run_once(self) -> tuple[int, str]:
        """Start a process and wait for its end: its exit code, and how it ended in words."""
        try:
            process = await _spawn(self.spec)
        except OSError as error:
            return -1, f"could not be started: {error}"
        self._note_start(process)
        listening = asyncio.create_task(self._listen(process))
        stopping = asyncio.create_task(self._stop_when_asked(process))
        try:
            code = await process.wait()
        finally:
            stopping.cancel()
            # Its last words are still in the pipe; but a grandchild may hold the pipe open.
            await asyncio.wait([listening], timeout=1.0)
            listening.cancel()
            await asyncio.gather(listening, stopping, return_exceptions=True)
        outcome = _outcome(code, self.spec.role)
        self._note_end(code, outcome)
        return code, outcome

    def _note_start(self, process: asyncio.subprocess.Process) -> None:
        self._process, self.pid, self.instance = process, process.pid, ""
        self.state, self._was_ready = State.STARTING, False
        is_first = not self.started
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        named = {"name": self.spec.name, "role": self.spec.role, "child_pid": process.pid}
        if is_first:
            log.info("process.started", **named)
        else:
            self.restarts += 1
            log.info("process.restarted", cause=self.outcome, **named)
        self._on_change(self, "")

    def _note_end(self, code: int, outcome: str) -> None:
        write = log.info if self._stop_asked.is_set() else log.warning
        write(
            "process.exited",
            name=self.spec.name,
            role=self.spec.role,
            child_pid=self.pid,
            exit_code=code,
            signal=signal_name(code),
            cause="asked" if self._stop_asked.is_set() else outcome,
        )
        self._process, self.pid, self.exit_code, self.outcome = None, 0, code, outcome

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Keep what a process says outside its log: the reason when it can not start."""
        stdout = process.stdout
        while stdout is not None:
            try:
                line = await stdout.readline()
            except ValueError:  # longer than the limit; the reader has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").strip()
            if text:
                self._last_words.append(text)
                log.info("foreign.logged", name=self.spec.name, message=text)

    async def _stop_when_asked(self, process: asyncio.subprocess.Process) -> None:
        await self._stop_asked.wait()
        self.state = State.STOPPING
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self.spec.stop_timeout_s)
        except TimeoutError:
            self._on_change(self, f"did not stop in {self.spec.stop_timeout_s:.0f} s: killed")
            self._signal(signal.SIGKILL)

    def _gives_up(self, code: int, outcome: str) -> bool:
        """True when it never came up and more tries would not help; tells who waits for it."""
        if self.came_up.done():
            return False
        self._failed_starts += 1
        if code != _EXIT_BAD_SETTINGS and self._failed_starts < _MAX_FAILED_STARTS:
            return False
        self.state = State.FAILED
        self.came_up.set_exception(NeverCameUp(f"{self.spec.name} {outcome}{self._reason()}"))
        self._on_change(self, f"{outcome}: given up")
        return True

    def _reason(self) -> str:
        """What it said of its end: its own one clear line, or else whatever came last."""
        clear = [line for line in self._last_words if line.startswith("headrace ")]
        words = clear or list(self._last_words)
        return f": {words[-1][:_MAX_REASON_CHARS]}" if words else ""

    async def _wait_to_restart(self, outcome: str, *, lived_s: float) -> None:
        if self._was_ready and lived_s >= _RAN_WELL_S:
            self._delay_s = _FIRST_DELAY_S
        delay_s = self._delay_s
        self._delay_s = min(self._delay_s * 2, _MAX_DELAY_S)
        self.state = State.WAITING
        self._on_change(self, f"{outcome}, starts again in {delay_s:.1f} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_asked.wait(), delay_s)

    def _signal(self, signum: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)


Report = Callable[[Slot, str], None]
"""Told of every change, with words for people if it concerns them. Must not block."""


class Supervisor:
    """All slots of one start. Whoever leaves the ``async with`` has killed what still ran."""

    def __init__(self, on_change: Report) -> None:
        self._on_change = on_change
        self.slots: list[Slot] = []
        self._tasks: dict[Slot, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for slot in self.slots:
            slot.kill()
        await asyncio.gather(*self._tasks.values())

    def start(self, spec: ProcessSpec) -> Slot:
        """Keep a process of this kind alive from now on."""
        slot = Slot(spec, self._on_change)
        self.slots.append(slot)
        self._tasks[slot] = asyncio.create_task(slot.keep_alive(), name=f"keep {spec.name} alive")
        return slot

    def mark_ready(self, pid: int, instance: str) -> None:
        """The process ``pid`` does its work now; a pid that no slot is starting is ignored."""
        for slot in self.slots:
            if slot.pid == pid and slot.state is State.STARTING:
                slot.mark_ready(instance)

    async def stop(self, role: str) -> None:
        """SIGTERM every process of ``role`` and wait; SIGKILL those that take too long."""
        slots = [slot for slot in self.slots if slot.spec.role == role]
        for slot in slots:
            slot.ask_to_stop()
        await asyncio.gather(*(self._tasks[slot] for slot in slots))


async def _spawn(spec: ProcessSpec) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *spec.argv,
        env=spec.env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=_MAX_LINE_BYTES,
        # Ctrl-C at the terminal reaches the supervisor alone, which then stops them in order.
        start_new_session=True,
        preexec_fn=die_with(os.getpid()),
    )


def _outcome(code: int, role: str) -> str:
    killer = signal_name(code)
    if killer:
        return f"was killed by {killer}"
    reason = exit_codes.REASONS.get(code) if role == "worker" else None
    return f"ended with exit code {code}" + (f" ({reason})" if reason else "")


def signal_name(exit_code: int) -> str | None:
    """Which signal an exit code below 0 stands for; None: the process ended by itself."""
    if exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs between fork and exec so that the kernel kills it with its parent.

    Linux only; elsewhere a supervisor that is SIGKILLed leaves its children behind.
    """
    if _libc is None:
        return None
    prctl = _libc.prctl

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return arm
