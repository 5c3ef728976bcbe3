"""The engine's thread: takes commands, steps while there is work, hands each step over in one call.

Commands from the event loop are queued and take effect between two steps, in their order. Results
go back by one ``call_soon_threadsafe`` per step, however many generations it served.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from common.clock import monotonic_s
from workers.engine.port import Engine, EngineLoad, EngineRequest, StepOutput, StepWork


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step brought. ``step`` counts from 1; steps without output are reported too."""

    outputs: list[StepOutput]
    load: EngineLoad
    step: int
    duration_s: float
    work: StepWork


class EngineLoop:
    """Drives one engine in a thread of its own.

    ``submit``, ``cancel``, ``pause``, ``resume`` and ``stop`` never wait for a step (``stop`` does
    for the thread's end) and may be called from any thread. ``on_step`` runs in the event loop that
    ``start`` was called in.
    """

    failed: "asyncio.Future[Exception]"
    """Set by ``start``; done when the engine has raised, with its exception as the result."""

    def __init__(
        self, engine: Engine, on_step: Callable[[StepReport], None], *, step_timeout_s: float
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._step_timeout_s = step_timeout_s
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._paused = False
        self._stopping = False
        self._num_steps = 0
        self._step_began_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; must be called in the event loop that wants the results."""
        self._event_loop = asyncio.get_running_loop()
        self.failed = self._event_loop.create_future()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; what runs is left as it is.

        Waits for that, but not longer than a step may take: a stuck engine is left behind.
        """
        self._commands.put(self._set_stopping)
        self._thread.join(self._step_timeout_s)

    def submit(self, request: EngineRequest) -> None:
        self._commands.put(lambda: self._engine.submit(request))

    def cancel(self, id: str) -> None:
        self._commands.put(lambda: self._engine.cancel(id))

    def run_between_steps(self, command: Callable[[], None]) -> None:
        """Have ``command`` run in the engine thread, in the order of all that is asked of it."""
        self._commands.put(command)

    def pause(self) -> None:
        """No further step begins until ``resume``; commands are still taken."""
        self._commands.put(lambda: self._set_paused(True))

    def resume(self) -> None:
        self._commands.put(lambda: self._set_paused(False))

    @property
    def last_step_age_s(self) -> float:
        """How long the current step has been running; 0.0 between steps and when idle."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else monotonic_s() - began_s

    @property
    def is_stalled(self) -> bool:
        return self.last_step_age_s > self._step_timeout_s

    def _run(self) -> None:
        try:
            has_work = False
            while not self._stopping:
                took_command = self._take_commands(wait=self._paused or not has_work)
                if not self._paused and not self._stopping and (has_work or took_command):
                    has_work = self._step()
        except Exception as error:  # noqa: BLE001 - the outer border of this thread
            self._step_began_s = None
            self._tell(set_result, self.failed, error)

    def _step(self) -> bool:
        """Run one step and hand it over; returns whether another one is needed."""
        self._step_began_s = began_s = monotonic_s()
        outputs = self._engine.step()
        load = self._engine.load()
        self._num_steps += 1
        self._step_began_s = None
        duration_s = monotonic_s() - began_s
        report = StepReport(outputs, load, self._num_steps, duration_s, self._engine.last_step)
        self._tell(self._on_step, report)
        return load.running + load.waiting > 0

    def _take_commands(self, *, wait: bool) -> bool:
        """Carry out what has been asked for; with ``wait``, sleep until something is."""
        took = False
        with suppress(queue.Empty):
            while True:
                command = self._commands.get(block=wait and not took)
                command()
                took = True
        return took

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the event loop has ended before this thread
            self._event_loop.call_soon_threadsafe(call, *args)

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused

    def _set_stopping(self) -> None:
        self._stopping = True


def set_result(future: "asyncio.Future[Exception]", error: Exception) -> None:
    """Unless it has one."""
    if not future.done():
        future.set_result(error)
