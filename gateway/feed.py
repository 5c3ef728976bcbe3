"""The feed of the live page: what the pool looks like, one event a second, resumable anywhere.

On opening it sends ``history``, fifteen minutes of numbers as columns, then ``overview`` events as
they are made. Where nobody makes any, or Redis is away, it says so itself: events without an id,
which a client that comes back does not resume from.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

import msgspec
import orjson

from common.broker import OverviewStore
from common.clock import monotonic_s, wall_ms
from common.diagnosis import without_news, without_redis
from common.failures import Failure
from common.overview import Overview, decode, history_of
from gateway.frames import PING
from gateway.sse import RETRY_MS

LOOK_S = 0.25
"""How often Redis is asked for the next second."""
QUIET_S = 4.0
"""Without a new overview for so long, the last one is history."""
CLOCKS_S = 15.0
REPEAT_S = 1.0
"""Between two events of the feed's own making."""
MAX_MISSED = 60
"""Who missed more seconds is sent the history again, which is less."""


class Feed:
    """One follower's. ``cursor`` is the id of the last event that it has seen, empty: of none."""

    def __init__(
        self,
        store: OverviewStore,
        model: str,
        cursor: str,
        *,
        keep_alive_s: float,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._store = store
        self._model = model
        self._cursor = cursor
        self._keep_alive_s = keep_alive_s
        self._is_stopping = is_stopping
        self._last = b""
        self._heard_s = monotonic_s() - QUIET_S  # until the first one, nobody makes any
        self._told_s = monotonic_s() - REPEAT_S

    async def frames(self) -> AsyncGenerator[bytes]:
        """What is written, as soon as it is there; ends when the gateway stops."""
        lead = b"retry: %d\n" % RETRY_MS  # on a frame with data: alone it would be an empty event
        is_open = False
        while not self._is_stopping():
            try:
                frames = await self._next() if is_open else await self._opening()
                is_open = True
            except Failure:
                frames = self._own(without_redis)
            for frame in frames or self._own(without_news):
                yield lead + frame
                lead, self._told_s = b"", monotonic_s()
            if monotonic_s() - self._told_s >= self._keep_alive_s:
                yield PING
                self._told_s = monotonic_s()
            await asyncio.sleep(LOOK_S)

    async def _opening(self) -> list[bytes]:
        """The seconds that were missed; else the history, and the newest overview."""
        newest = await self._store.newest()
        if newest is None:
            self._cursor = "0-0"
            return []
        if self._cursor and _place(self._cursor) <= _place(newest[0]):
            missed = await self._store.after(self._cursor, MAX_MISSED + 1)
            if len(missed) <= MAX_MISSED:
                return self._take(missed)
        history = orjson.dumps(history_of(await self._store.rows()))
        return [b"event: history\ndata: %b\n\n" % history, *self._take([newest])]

    async def _next(self) -> list[bytes]:
        found = await self._store.after(self._cursor, MAX_MISSED)
        if not found and monotonic_s() - self._heard_s > QUIET_S:
            newest = await self._store.newest()
            if newest is not None and _place(newest[0]) < _place(self._cursor):
                found = [newest]  # Redis went back in time, and its ids with it
        return self._take(found)

    def _take(self, found: list[tuple[str, bytes]]) -> list[bytes]:
        if found:
            self._cursor, self._last = found[-1]
            self._heard_s = monotonic_s() - _age_s(self._cursor)
        return [
            b"id: %b\nevent: overview\ndata: %b\n\n" % (id.encode(), data) for id, data in found
        ]

    def _own(self, changed: Callable[[Overview, float], Overview]) -> list[bytes]:
        """What is known, and that it is old; nothing as long as it is not."""
        quiet_s = monotonic_s() - self._heard_s
        if quiet_s < QUIET_S or monotonic_s() - self._told_s < REPEAT_S:
            return []
        last = decode(self._last) if self._last else None
        last = last or Overview(at=wall_ms() / 1000, model=self._model)
        data = msgspec.json.encode(changed(last, quiet_s))
        return [b"event: overview\ndata: %b\n\n" % data]


def _age_s(id: str) -> float:
    """Of a second that was just read; what the clocks of two machines may differ by is not age."""
    age_s = (wall_ms() - _place(id)[0]) / 1000
    return age_s if age_s > CLOCKS_S else 0.0


def _place(id: str) -> tuple[int, int]:
    """Of a stream id among others."""
    ms, _, number = id.partition("-")
    return int(ms), int(number)
