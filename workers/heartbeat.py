"""The beat: what this worker holds, said to Redis on a task and a connection of its own.

The beat lives as long as the engine makes progress. A beat over a stuck engine would hold its
generations for ever, so after a stall it stops, the process ends, and the lease does the rest.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from common.broker import Broker, WorkerPresence
from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from workers.attempts import Ledger

log = get_logger()

_ANNOUNCE_S = 3.0
_SMOOTHING = 0.3
"""Weight of the newest interval in the rate of work."""


async def keep_announcing(broker: Broker, name: str) -> None:
    """Say that this worker loads its model, until cancelled: it is there, and takes nothing yet."""
    began_s = monotonic_s()
    while True:
        presence = WorkerPresence(
            model_version="",
            max_cost=0,
            state="loading",
            pid=os.getpid(),
            host=socket.gethostname(),
            up_s=round(monotonic_s() - began_s, 3),
        )
        with suppress(Failure):
            await broker.announce_worker(name, presence)
        await asyncio.sleep(_ANNOUNCE_S)


class EngineStalledError(Exception):
    """No step ended within its limit although there was work."""


class EngineProgress(Protocol):
    """What of the engine loop the heartbeat watches."""

    @property
    def is_stalled(self) -> bool: ...
    @property
    def last_step_age_s(self) -> float: ...


class BeatFigures(Protocol):
    """What of the worker's figures goes with each beat."""

    batch_size: int
    generated_tokens: int

    @property
    def kv_used(self) -> float: ...
    @property
    def rss_bytes(self) -> int: ...
    @property
    def gpu_mem_bytes(self) -> int: ...
    @property
    def gpu_mem_total_bytes(self) -> int: ...


class Heartbeat:
    """Beats every ``beat_ms`` for the worker ``name``.

    ``free_tokens`` and ``figures`` are asked at each beat; ``state`` is what others read. ``heed``
    is told who wants this worker to rest, empty: nobody.
    """

    def __init__(
        self,
        broker: Broker,
        name: str,
        ledger: Ledger,
        engine: EngineProgress,
        *,
        model_version: str,
        max_cost: int,
        beat_ms: int,
        lease_ms: int,
        free_tokens: Callable[[], int],
        max_batch_size: int = 0,
        figures: BeatFigures | None = None,
        heed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._broker = broker
        self._name = name
        self._ledger = ledger
        self._engine = engine
        self._model_version = model_version
        self._max_cost = max_cost
        self._beat_s = beat_ms / 1000
        self._lease_ms = lease_ms
        self._free_tokens = free_tokens
        self._max_batch_size = max_batch_size
        self._figures = figures
        self._heed = heed
        self._began_s = monotonic_s()
        self._rate = 0.0
        self._rated = (monotonic_s(), 0)
        self._beaten_s = 0.0
        self.state = "ready"
        self.num_steps = 0

    async def keep_beating(self) -> None:
        """Beat until cancelled.

        Raises:
            EngineStalledError: the engine hangs; no beat was sent for it.
        """
        was_stalled = False
        while True:
            # Twice: after a sleep of the whole process a step only looks old, and soon ends.
            is_stalled = self._engine.is_stalled
            if is_stalled and was_stalled:
                raise self._stalled()
            if not is_stalled:
                with suppress(Failure):  # the worker's loop says so, and beats when it is back
                    await self.beat()
            was_stalled = is_stalled
            await asyncio.sleep(self._beat_s)

    @property
    def has_lease(self) -> bool:
        """Whether the last beat is recent enough for our lease to hold, as far as we can know."""
        return monotonic_s() - self._beaten_s < self._lease_ms / 1000

    async def beat(self) -> None:
        """One beat. Logs what Redis handed back because a claim's answer had been lost."""
        seen, began_s = self._ledger.seen, monotonic_s()
        answer = await self._broker.beat_worker(
            self._name,
            self._presence(),
            seen=seen,
            holding=self._ledger.holding(),
            lease_ms=self._lease_ms,
        )
        self._beaten_s = began_s
        for generation_id in answer.returned:
            log.warning("claim.recovered", job_id=generation_id, seen=seen)
            log.info("job.requeued", job_id=generation_id, cause="beat", worker=self._name)
        self._heed(answer.drain_cause)

    def _stalled(self) -> EngineStalledError:
        age_s = round(self._engine.last_step_age_s, 3)
        log.error("engine.stalled", step_age_s=age_s, holding=self._ledger.holding())
        return EngineStalledError()

    def _presence(self) -> WorkerPresence:
        figures = self._figures
        return WorkerPresence(
            model_version=self._model_version,
            max_cost=self._max_cost,
            tokens_per_second=self._measure_rate(),
            state=self.state,
            pid=os.getpid(),
            host=socket.gethostname(),
            free_tokens=self._free_tokens(),
            steps=self.num_steps,
            max_batch_size=self._max_batch_size,
            held_in=self._ledger.count_by_lane(),
            batch_size=figures.batch_size if figures else 0,
            kv_used=round(figures.kv_used, 4) if figures else 0.0,
            generated_tokens=figures.generated_tokens if figures else 0,
            rss_bytes=figures.rss_bytes if figures else 0,
            gpu_mem_bytes=figures.gpu_mem_bytes if figures else 0,
            gpu_mem_total_bytes=figures.gpu_mem_total_bytes if figures else 0,
            up_s=round(monotonic_s() - self._began_s, 3),
        )

    def _measure_rate(self) -> float:
        """Cost per second of what ended here, over the time in which something ran."""
        now_s, done = monotonic_s(), self._ledger.done_tokens
        since_s, before = self._rated
        if now_s - since_s >= self._beat_s / 2:
            self._rated = (now_s, done)
            if done > before:
                newest = (done - before) / (now_s - since_s)
                self._rate += _SMOOTHING * (newest - self._rate) if self._rate else newest
        return round(self._rate, 3)
