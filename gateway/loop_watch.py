"""How late the event loop is, and how much of that is this process' own doing.

A loop comes late to a task either because something in this process held it up, which is a defect,
or because the machine gave the processor to others, which is not. Both are told apart by what the
process computed meanwhile and, on Linux, by how long the loop's thread was ready and not run.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Self

from common.clock import monotonic_s
from common.metrics import GatewayMetrics
from common.pauses import tell_pause

LOOK_S = 0.05
"""Between two looks."""
LATE_S = 0.02
"""A look that is late by less is not worth the question why."""


class LoopWatch:
    """Looks every 50 ms, for as long as :meth:`run` is not cancelled."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics

    async def run(self) -> None:
        with ThreadTimes() as times:
            while True:
                due_s = monotonic_s() + LOOK_S
                before_s = times.read()
                await asyncio.sleep(LOOK_S)
                late_s = max(0.0, monotonic_s() - due_s)
                self._metrics.loop_lag_s.observe(late_s)
                self._metrics.tally.figures.loop_lag.observe(late_s)
                own_s = 0.0
                if late_s > LATE_S:
                    after_s = times.read()
                    own_s = own_share_s(late_s, before_s, after_s)
                    tell_pause(late_s, after_s[0] - before_s[0])
                self._metrics.loop_held_s.observe(own_s)


def own_share_s(
    late_s: float, before_s: tuple[float, float], after_s: tuple[float, float]
) -> float:
    """How much of a delay this process made: no more than it computed, in all of its threads, and
    nothing of what its loop's thread waited for a processor.
    """
    computed_s = after_s[0] - before_s[0]
    unscheduled_s = after_s[1] - before_s[1]
    return max(0.0, min(computed_s, late_s - unscheduled_s))


class ThreadTimes:
    """Processor time of this process, and how long the calling thread was ready but not run.

    The second figure is Linux' own (``/proc/<pid>/task/<tid>/schedstat``); elsewhere it is 0.
    """

    def __init__(self) -> None:
        self._read_unscheduled: Callable[[], float] = lambda: 0.0
        self._file = -1

    def __enter__(self) -> Self:
        try:
            path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
            self._file = os.open(path, os.O_RDONLY)
        except OSError:
            return self
        self._read_unscheduled = self._from_schedstat
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self) -> tuple[float, float]:
        """Both in seconds."""
        return time.process_time(), self._read_unscheduled()

    def _from_schedstat(self) -> float:
        return int(os.pread(self._file, 100, 0).split()[1]) / 1e9
