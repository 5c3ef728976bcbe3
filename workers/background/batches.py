"""Batches in this process: who steers which, and what is left of those that have ended.

A batch is handed over by a job of arq, whichever process takes it; from then on the lease counts,
not the job. arq starts what a killed process held again only after its longest job's time limit, so
each process looks every second for batches that nobody steers, and makes jobs of them.
"""

import asyncio
import random
from contextlib import suppress

from arq.connections import ArqRedis

from common.batches import folder
from common.broker.connection import mapped_errors
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.logs import get_logger
from workers.background.results import OvertakenError
from workers.background.running import Means
from workers.background.steering import LEASE_MS, Steering

log = get_logger()

JOB = "steer"
"""Name of arq's job."""
MAX_STEERED = 64
"""Batches at once in one process."""
SWEEP_S = 1.0
_JOB_S = 3
"""A job that was not taken by then is of no use, as another one follows."""
_BROKEN_LEASE_MS = 30_000
"""After an error that nobody thought of, another try has time."""
_STOP_S = 8.0
"""For the last part of each batch, on SIGTERM."""
FOLDER_LIFE_S = 24 * 3600
"""How long the parts of a batch that has ended can be read line by line."""


class Steers:
    """The batches that this process steers."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._steered: dict[str, tuple[Steering, asyncio.Task[None]]] = {}
        self._is_stopping = False

    async def take_up(self, batch_id: str) -> None:
        """Steer a batch from now on, unless somebody else does, or there are enough here."""
        has_room = not self._is_stopping and len(self._steered) < MAX_STEERED
        if not has_room or batch_id in self._steered:
            return
        if await self._means.store.take_lease(batch_id, self._means.name, LEASE_MS):
            steering = Steering(self._means, batch_id)
            task = asyncio.create_task(self._steer(batch_id, steering))
            self._steered[batch_id] = steering, task

    async def keep_sweeping(self, queue: ArqRedis) -> None:
        """Make a job for each batch that nobody steers, until cancelled."""
        means = self._means
        while True:
            with suppress(Failure):  # Redis is away: whoever serves on it says so
                for batch_id in await means.store.unsteered(means.broker.pool):
                    # The same name in every process, and another one when this job has expired.
                    turn = int(wall_ms() / 1000 / _JOB_S)
                    with mapped_errors():
                        await queue.enqueue_job(
                            JOB, batch_id, _job_id=f"{batch_id}:{turn}", _expires=2 * _JOB_S
                        )
            await asyncio.sleep(SWEEP_S * random.uniform(0.75, 1.25))

    async def stop(self) -> None:
        """Step down from all batches, each with all that is known of it in storage."""
        self._is_stopping = True
        for steering, _ in self._steered.values():
            steering.stop()
        tasks = [task for _, task in self._steered.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_STOP_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def clear_folders(self) -> None:
        """Remove what lies in storage of batches that ended a day ago; their files stay."""
        store, storage = self._means.store, self._means.storage
        while ended := await store.ended_before(wall_ms() // 1000 - FOLDER_LIFE_S):
            for batch_id in ended:
                names = await storage.list(folder(batch_id))
                if names:
                    await storage.delete(*names)
                await store.note_cleared(batch_id)
            log.info("batch.cleared", count=len(ended))

    async def _steer(self, batch_id: str, steering: Steering) -> None:
        began_s = monotonic_s()
        means = self._means
        try:
            await steering.run()
            await means.store.drop_leases([batch_id], means.name)
        except* OvertakenError:
            log.info("batch.overtaken", batch_id=batch_id, duration=monotonic_s() - began_s)
            with suppress(Failure):
                await means.store.drop_leases([batch_id], means.name)
        except* Failure:  # of the lease alone: it ends by itself
            pass
        except* Exception:
            log.exception("batch.failed", batch_id=batch_id)
            with suppress(Failure):
                await means.store.take_lease(batch_id, means.name, _BROKEN_LEASE_MS)
        finally:
            del self._steered[batch_id]
