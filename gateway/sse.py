"""Server-sent events: an answer with one write for all that is there.

Its task writes the beginning, the end, keep-alives, and whatever a client that is slow has waiting.
Tokens of a client that keeps up do not wake it: they go from the relay to the connection.

Not sse-starlette's response: it runs three tasks per stream, its keep-alive ends in a blank line,
which SDKs take for an empty event once ids are in use, and it hooks uvicorn's signals, which the
drain owns here.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import aclosing, contextmanager

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.failures import Failure
from common.logs import get_logger
from gateway.account import Account
from gateway.errors import envelope
from gateway.frames import PING, Frames, Interleaved, queue_event
from gateway.http_server import DirectBody, direct_body
from gateway.stream import Batch, Reader, ReaderGone

log = get_logger()

SEND_LIMIT_S = 60.0
"""A client that takes nothing for so long is disconnected; it may resume from its last id."""
RETRY_MS = 500
"""How soon a browser's EventSource comes back."""
EVENT_STREAM_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
"""So that nothing between here and the client gathers events, or changes them."""


class EventStream(Response):
    """Writes ``frames`` of ``stream`` until the last one, or until the client leaves.

    ``on_close`` is called once at the end, however it comes. ``is_reconnecting``: the client is one
    that comes back by itself with its last id (EventSource), so a drain just ends the body.
    """

    def __init__(
        self,
        stream: Reader,
        frames: Frames | Interleaved,
        account: Account,
        *,
        on_close: Callable[[], None],
        headers: dict[str, str],
        is_reconnecting: bool = False,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._stream = stream
        self._frames = frames
        self._account = account
        self._on_close = on_close
        self._is_reconnecting = self._is_first = is_reconnecting
        self._direct: DirectBody | None = None
        self._sending_since_s: float | None = None
        self._looking: asyncio.TimerHandle | None = None
        self.init_headers({**EVENT_STREAM_HEADERS, **headers})

    async def __call__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        direct: DirectBody | None = None
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            self._direct = direct = direct_body(scope)
            with abandoned_on_disconnect([self._stream], receive):
                await self._write_in_time(send)
        except ReaderGone:
            self._account.note_disconnect()
        finally:
            self._on_close()
            self._account.note_stream(self._stream)
            if direct is not None:
                self._account.note_window(direct.window)
            self._account.close(self.status_code)

    async def _write_in_time(self, send: Send) -> None:
        """Raises: ReaderGone when a send takes longer than ``SEND_LIMIT_S``."""
        try:
            async with asyncio.timeout(None) as limit:
                self._look_at_sends(limit)
                await self._write(send)
        except TimeoutError as error:
            raise ReaderGone from error
        finally:
            if self._looking is not None:
                self._looking.cancel()

    def _look_at_sends(self, limit: asyncio.Timeout) -> None:
        """One timer looks after all sends: one for each would cost about as much as a send."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        late_s = SEND_LIMIT_S + (self._sending_since_s or now_s)
        if late_s <= now_s:
            limit.reschedule(now_s)
        else:
            self._looking = loop.call_at(late_s, self._look_at_sends, limit)

    async def _write(self, send: Send) -> None:
        try:
            await self._write_frames(send)
        except Failure as failure:
            await self._say(failure, send)
        except ReaderGone:
            raise
        except Exception as error:
            log.exception("request.failed", job_id=self._stream.id)
            await self._say(Failure("INTERNAL", type(error).__name__), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_frames(self, send: Send) -> None:
        """Batches that can go straight to the connection come to :meth:`give` meanwhile."""
        opening = self._frames.opening()
        if opening:
            await self._send(send, opening)
        if self._direct is not None:
            self._stream.feed(self)
        try:
            while not self._frames.is_complete:
                batch = await self._stream.next()
                await self._send(send, PING if batch is None else self._render(batch))
        finally:
            self._direct = None
            self._stream.feed(None)

    @property
    def has_room(self) -> bool:
        return self._direct is not None and self._direct.has_room

    def give(self, batch: Batch) -> None:
        """What :meth:`_write_frames` does with a batch, without waking its task."""
        try:
            data = self._render(batch)
        except Exception as error:
            log.exception("request.failed", job_id=self._stream.id)
            raise Failure("INTERNAL", type(error).__name__) from error
        if data and self._direct is not None:
            self._account.note_bytes(len(data))
            self._direct.write(data)

    def _render(self, batch: Batch) -> bytes:
        if batch.place is not None:
            data = queue_event(batch.place)
        else:
            self._account.note_batch(batch)
            data = self._frames.render(batch)
        if self._is_first and data:
            data, self._is_first = b"retry: %d\n%b" % (RETRY_MS, data), False
        return data

    async def _say(self, failure: Failure, send: Send) -> None:
        self._account.note_failure(failure)
        if not (self._is_reconnecting and failure.code == "DRAINING"):
            await self._send(send, self._frames.failure(failure))

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending_since_s = asyncio.get_running_loop().time()
        self._account.note_bytes(len(data))
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since_s = None


class FrameStream(Response):
    """Writes what ``frames`` yields, until its end or until the client leaves or takes nothing any
    more; for what is no answer of a model. ``on_close`` is called once, however it ends.
    """

    def __init__(
        self, frames: Callable[[], AsyncGenerator[bytes]], *, on_close: Callable[[], None]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._frames = frames
        self._on_close = on_close
        self.init_headers(EVENT_STREAM_HEADERS)

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - ASGI's signature
        receive: Receive,
        send: Send,
    ) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        tasks = [asyncio.create_task(self._write(send)), asyncio.create_task(disconnected(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._on_close()

    async def _write(self, send: Send) -> None:
        try:
            async with aclosing(self._frames()) as frames:
                async for data in frames:
                    async with asyncio.timeout(SEND_LIMIT_S):
                        await _send_part(send, data)
        except TimeoutError:
            return
        except Failure as failure:
            await _send_part(send, _error_event(failure))
        except Exception as error:
            log.exception("request.failed", code="INTERNAL")
            await _send_part(send, _error_event(Failure("INTERNAL", type(error).__name__)))
        await _send_part(send, b"", more=False)


async def _send_part(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _error_event(failure: Failure) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(envelope(failure, "openai"))


def wants_queue_events(request: Request, *, or_in_query: bool = False) -> bool:
    """Whether the client asked for events that its API does not know. SDKs would take them for
    answers, so nobody gets them unasked.

    ``or_in_query``: as ``?events=1`` too, for a browser's EventSource, which can send no header.

    Raises: Failure BAD_REQUEST.
    """
    name, text = "X-Stream-Events", request.headers.get("x-stream-events", "")
    if not text and or_in_query:
        name, text = "events", request.query_params.get("events", "")
    if text not in ("", "0", "1"):
        raise Failure("BAD_REQUEST", f"{name} must be 0 or 1", field=name)
    return text == "1"


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def abandoned_on_disconnect(readers: Iterable[Reader], receive: Receive) -> Generator[None]:
    """While this lasts, the client's leaving makes ``next`` raise :class:`ReaderGone`."""

    async def watch() -> None:
        await disconnected(receive)
        for reader in readers:
            reader.abandon()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
