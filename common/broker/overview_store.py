"""The overviews of a pool in Redis, second by second: one process writes them, everybody reads.

Two streams of fifteen minutes share their ids: whole overviews, compressed, for who follows them,
and rows of numbers, some two hundred bytes each, for who draws what was before he came.
"""

import zlib
from typing import Any

import msgspec

from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.overview import Overview, Row, encode, row_of

KEPT_S = 15 * 60
"""One overview a second, for so long."""
_TTL_MS = 30 * 60_000
_LEASE_MS = 5000

_pack = msgspec.msgpack.Encoder().encode
_row = msgspec.msgpack.Decoder(list[float | int | None]).decode


class OverviewStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client, prefix: str) -> None:
        self._redis: Any = redis
        self._seconds = keys.overviews(prefix)
        self._rows = keys.overview_rows(prefix)
        self._lease = keys.overview_lease(prefix)

    async def take_lease(self, owner: str) -> bool:
        """Whether ``owner`` makes the overviews from now on, or goes on to; False: another does.

        It keeps two from writing the same second; should they, nothing is harmed.
        """
        with mapped_errors():
            if await self._redis.set(self._lease, owner, nx=True, px=_LEASE_MS):
                return True
            if await self._redis.get(self._lease) != owner.encode():
                return False
            return bool(await self._redis.pexpire(self._lease, _LEASE_MS))

    async def drop_lease(self, owner: str) -> None:
        """Let another one go on at once."""
        with mapped_errors():
            if await self._redis.get(self._lease) == owner.encode():
                await self._redis.delete(self._lease)

    async def append(self, overview: Overview) -> None:
        """Keep the newest second, and let go of what is older than ``KEPT_S``."""
        whole = zlib.compress(encode(overview), 1)
        row = _pack(row_of(overview))
        with mapped_errors():
            pipe = self._redis.pipeline(transaction=True)
            for stream, data in ((self._seconds, whole), (self._rows, row)):
                # By their exact number: "about" could be a third more, of what is large.
                pipe.xadd(stream, {"d": data}, maxlen=KEPT_S, approximate=False)
                pipe.pexpire(stream, _TTL_MS)
            await pipe.execute()

    async def newest(self) -> tuple[str, bytes] | None:
        """Id and JSON of the last overview; None: nobody makes any."""
        with mapped_errors():
            found = await self._redis.execute_command(
                "XREVRANGE", self._seconds, "+", "-", "COUNT", 1
            )
        return _read(found[0]) if found else None

    async def after(self, id: str, limit: int) -> list[tuple[str, bytes]]:
        """Those behind the id, in order, at most ``limit``."""
        with mapped_errors():
            found = await self._redis.execute_command(
                "XRANGE", self._seconds, f"({id}", "+", "COUNT", limit
            )
        return [_read(entry) for entry in found]

    async def rows(self) -> list[Row]:
        """What is remembered of the last fifteen minutes, in order."""
        with mapped_errors():
            found = await self._redis.execute_command("XRANGE", self._rows, "-", "+")
        return [_row(fields[b"d"]) for _, fields in found]


def _read(entry: tuple[bytes, dict[bytes, bytes]]) -> tuple[str, bytes]:
    id, fields = entry
    return id.decode(), zlib.decompress(fields[b"d"])
