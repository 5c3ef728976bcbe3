"""Redis as it is after it lost its last moments: another server process with older data.

Keys are saved with DUMP and put back with RESTORE; the functions stay, as they would be on disk.
"""

from dataclasses import dataclass

from common.broker.keys import prefix
from tests.conftest import POOL
from tests.support.redis_server import RawRedis


@dataclass
class Disk:
    """What is on the disk of the server behind ``redis``, a client that does not decode."""

    redis: RawRedis
    saved: dict[bytes, tuple[bytes, int]]

    @classmethod
    async def of(cls, redis: RawRedis) -> "Disk":
        names = await redis.keys("*")
        return cls(redis, {it: (await redis.dump(it), await redis.pttl(it)) for it in names})

    async def go_back(self, pool: str = POOL) -> None:
        """Restart with it; every lease that it knows begins anew, as with the first guard().

        In one step, as far as anybody else can see.
        """
        async with self.redis.pipeline(transaction=True) as restart:
            restart.flushdb()
            for name, (value, ttl_ms) in self.saved.items():
                restart.restore(name, max(0, ttl_ms), value)
            restart.hset(f"{prefix(pool)}clock", mapping={"run": "0" * 40, "seen": 1})
            await restart.execute()

    async def end_settling(self, pool: str = POOL) -> None:
        await self.redis.hset(f"{prefix(pool)}clock", "settle", 0)
