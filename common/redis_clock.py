"""Redis' clock, as far as a process can know it without asking: its own plus a sampled offset.

Hosts disagree about the time; Redis is one. What two processes compare is taken from there.
"""

import asyncio
import random
import time

from common import logs
from common.broker import Broker
from common.failures import Failure
from common.logs import get_logger

log = get_logger()

_INTERVAL_S = 60.0
_RETRY_S = 1.0
_MAX_RETRY_S = 10.0


class RedisClock:
    """``offset_s`` is Redis' clock less this host's; None until it was sampled."""

    def __init__(self) -> None:
        self.offset_s: float | None = None

    def now_s(self) -> float | None:
        """Seconds since 1970 on Redis' clock; None until it was sampled."""
        return None if self.offset_s is None else time.time() + self.offset_s

    async def sample(self, broker: Broker) -> None:
        """Ask Redis, and put what it says into every line of the log from now on.

        Raises: Failure BROKER_UNAVAILABLE.
        """
        self.offset_s = await broker.clock_offset_s()
        logs.note_redis_clock(self.offset_s)
        log.info("clock.sampled", offset_s=round(self.offset_s, 6))

    async def keep_sampling(self, broker: Broker) -> None:
        """Sample about once a minute until cancelled; an unreachable Redis only delays it."""
        retry_s = _RETRY_S
        if self.offset_s is not None:
            await asyncio.sleep(_INTERVAL_S)
        while True:
            try:
                await self.sample(broker)
            except Failure:
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S)
            else:
                retry_s = _RETRY_S
                await asyncio.sleep(_INTERVAL_S * random.uniform(0.9, 1.0))
