"""A batch as it is worked off: server-sent events of its counts and of its lines as they finish.

The lines are those of its parts in storage, in their order, so any gateway shows the same ones at
the same positions. One is read when the client takes it: who is slow costs no memory. While Redis
or the storage is away, the tail waits.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import orjson

from common.batches import BatchRecord
from common.broker import BatchStore, BatchWatch
from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from common.parts import Part, Parts
from gateway.frames import PING
from gateway.sse import RETRY_MS

log = get_logger()

END = "-end"
"""Behind the position in the id of the last event."""
_LOOK_S = 0.5
"""How soon a tail notices that its gateway is to stop."""
_RETRY_S = 1.0
_WRITE_BYTES = 64 * 1024


class BatchTail:
    """One reader of one batch, who has seen ``position`` lines. ``shows_lines``: else counts only.

    ``is_stopping`` says whether the gateway is to end; then the frames end, too, without the last
    event, and the client goes on elsewhere.
    """

    def __init__(
        self,
        record: BatchRecord,
        position: int,
        *,
        store: BatchStore,
        watch: BatchWatch,
        parts: Parts,
        shows_lines: bool,
        keep_alive_s: float,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.position = position
        self._record = record
        self._store = store
        self._watch = watch
        self._parts = parts
        self._shows_lines = shows_lines
        self._keep_alive_s = keep_alive_s
        self._is_stopping = is_stopping
        self.has_ended = False
        """Whether all of it was shown."""
        self._part: Part | None = None
        """The last one whose lines were all shown."""

    async def frames(self) -> AsyncGenerator[bytes]:
        """What is written, as soon as it is there; ends with the batch.

        Raises: Failure STREAM_EXPIRED when its lines are no longer kept, NOT_FOUND when it is not.
        """
        shown: BatchRecord | None = None
        lead = b"retry: %d\n" % RETRY_MS  # on a frame with data: alone it would trip up SDKs
        async with self._watch.following(self._record.id) as changed:
            while not self._is_stopping():
                if not await self._waited(changed):
                    yield PING
                    continue
                changed.clear()
                try:
                    record = self._record = await self._newest()
                    if record != shown and not record.is_final:
                        yield lead + _event("batch", record)
                        shown, lead = record, b""
                    async with aclosing(self._lines(record.num_parts)) as frames:
                        async for data in frames:
                            yield lead + data
                            lead = b""
                            if self._is_stopping():
                                return
                except Failure as failure:
                    if not failure.kind.retryable:
                        raise
                    await asyncio.sleep(_RETRY_S)
                    changed.set()
                    continue
                if record.is_final:
                    id = f"{record.counts.finished}{END}"
                    yield lead + _event("done", record, id)
                    self.has_ended = True
                    return

    async def check(self) -> None:
        """Raises: Failure BAD_REQUEST for a position that its batch, which has ended, does not
        have; STREAM_EXPIRED when there are lines behind it that are no longer kept.
        """
        finished = self._record.counts.finished
        if self.position > finished:
            raise Failure("BAD_REQUEST", f"There are only {finished} lines", field="starting_after")
        try:
            await self._parts.at(self.position, self._record.num_parts)
        except FileNotFoundError:
            if self.position < finished:
                raise _lines_gone() from None

    async def _waited(self, changed: asyncio.Event) -> bool:
        """Whether there may be news; False: there was silence for as long as there may be."""
        silent_until_s = monotonic_s() + self._keep_alive_s
        while not changed.is_set() and not self._is_stopping():
            left_s = silent_until_s - monotonic_s()
            if left_s <= 0:
                return False
            try:
                await asyncio.wait_for(changed.wait(), min(left_s, _LOOK_S))
            except TimeoutError:
                continue
        return True

    async def _newest(self) -> BatchRecord:
        record = await self._store.get(self._record.id)
        if record is None:
            raise Failure("NOT_FOUND", "This batch is no longer kept.")
        return record

    async def _lines(self, num_parts: int) -> AsyncGenerator[bytes]:
        """Frames of the lines behind the position, of the first ``num_parts`` parts."""
        if not self._shows_lines:
            return
        try:
            while part := await self._next_part(num_parts):
                async with aclosing(self._lines_of(part)) as frames:
                    async for data in frames:
                        yield data
                self._part = part
        except FileNotFoundError:
            if self.position < self._record.counts.finished:
                raise _lines_gone() from None

    async def _next_part(self, num_parts: int) -> Part | None:
        if self._part is None:
            return await self._parts.at(self.position, num_parts)
        number = self._part.number + 1
        return await self._parts.part(number) if number <= num_parts else None

    async def _lines_of(self, part: Part) -> AsyncGenerator[bytes]:
        position, written = part.header.first, bytearray()
        async with aclosing(self._parts.lines(part)) as lines:
            async for line in lines:
                position += 1
                if position <= self.position:
                    continue
                written += b"id: %d\nevent: line\ndata: %b\n\n" % (position, line)
                if len(written) >= _WRITE_BYTES:
                    yield bytes(written)
                    self.position = position
                    written.clear()
        if written:
            yield bytes(written)
            self.position = position


def _lines_gone() -> Failure:
    return Failure(
        "STREAM_EXPIRED", "The lines of this batch are no longer kept one by one, but in its files."
    )


def _event(kind: str, record: BatchRecord, id: str = "") -> bytes:
    name = f"id: {id}\nevent: {kind}\n" if id else f"event: {kind}\n"
    return b"%bdata: %b\n\n" % (name.encode(), orjson.dumps(record.shown()))
