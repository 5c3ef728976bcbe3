"""The choices of one request in one stream, interleaved as their tokens come."""

import asyncio
from collections.abc import Sequence

from gateway.stream import Batch, Outlet, Stream


class Choices:
    """Reads several streams as one, each batch with its ``choice``; :meth:`close` it at the end.

    Whoever waited longest is served first, so no choice can hold up another. What goes wrong with
    one of them is raised as it is.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.id = streams[0].id
        self._streams = streams
        self._idle = list(streams)
        self._reading: dict[asyncio.Task[Batch | None], Stream] = {}

    @property
    def lags(self) -> int:
        return sum(stream.lags for stream in self._streams)

    @property
    def heals(self) -> int:
        return sum(stream.heals for stream in self._streams)

    def feed(self, outlet: Outlet | None) -> None:
        for stream in self._streams:
            stream.feed(outlet)

    async def next(self) -> Batch | None:
        """As :meth:`Stream.next`, of whichever stream has something."""
        self._reading |= {asyncio.create_task(stream.next()): stream for stream in self._idle}
        self._idle.clear()
        await asyncio.wait(self._reading, return_when=asyncio.FIRST_COMPLETED)
        task = next(task for task in self._reading if task.done())
        stream = self._reading.pop(task)
        batch = task.result()
        if batch is None or batch.finish is None:
            self._idle.append(stream)
        return batch

    def abandon(self) -> None:
        for stream in self._streams:
            stream.abandon()

    def close(self) -> None:
        """Read nothing any more; what was read and not taken is dropped."""
        for task in self._reading:
            if task.done() and not task.cancelled():
                task.exception()  # looked at, or asyncio would complain that nobody did
            task.cancel()
        self._reading.clear()
