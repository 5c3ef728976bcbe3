"""One streamed request, timed: a POST over plain HTTP/1.1, and when each event of the answer came.

The load client shares its cores with the server that it measures, so this is the least that does
it: a protocol on the socket, C parsers for HTTP and JSON, no framework between. How events look is
the dialect's business (:mod:`ops.bench.dialects`).
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson

from common.clock import monotonic_s
from ops.bench.dialects import Event

_MAX_KEPT_ERROR_BYTES = 2000

ReadEvent = Callable[[object], Event]


@dataclass(slots=True)
class Answer:
    """What came back and when; times in seconds of the monotonic clock.

    ``chunk_at_s`` has one entry for each event with text. ``num_tokens`` is the server's own count
    where it gave one, else the number of events: an event is not always one token.
    ``failure`` is "" when the stream was whole.
    """

    began_s: float
    ended_s: float = 0.0
    chunk_at_s: list[float] = field(default_factory=list[float])
    num_tokens: int = 0
    num_prompt_tokens: int | None = None
    is_counted_by_server: bool = False
    failure: str = ""
    detail: str = ""
    """The server's own words on the failure."""


async def post(
    url: str,
    body: dict[str, object],
    read_event: ReadEvent,
    *,
    headers: dict[str, str] | None = None,
    timeout_s: float = 300.0,
    on_chunk: Callable[[], None] = lambda: None,
) -> Answer:
    """POST ``body`` to ``url`` on a connection of its own and time the stream that comes back.

    Never raises for what the server or the network does: that is the answer's ``failure``.
    """
    target = urlsplit(url)
    is_tls = target.scheme == "https"
    exchange = _Exchange(_request(url, body, headers or {}), read_event, on_chunk)
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: exchange,
                target.hostname or "",
                target.port or (443 if is_tls else 80),
                ssl=ssl.create_default_context() if is_tls else None,
            )
            await exchange.ended
    except TimeoutError:
        exchange.fail("timeout")
    except OSError as error:
        exchange.fail("no connection", str(error))
    finally:
        if transport is not None:
            transport.close()
    return exchange.answer


def _request(url: str, body: dict[str, object], headers: dict[str, str]) -> bytes:
    target = urlsplit(url)
    payload = orjson.dumps(body)
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {target.netloc.rpartition('@')[2]}",
        "Connection: close",
        "Accept: text/event-stream",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + payload


class _Exchange(asyncio.Protocol):
    """Sends one request and reads its answer; also what httptools calls back."""

    def __init__(self, request: bytes, read_event: ReadEvent, on_chunk: Callable[[], None]) -> None:
        self.answer = Answer(began_s=monotonic_s())
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._read_event = read_event
        self._on_chunk = on_chunk
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._rest = b""
        self._now_s = 0.0
        self._has_final_event = False

    def fail(self, kind: str, detail: str = "") -> None:
        if not self.answer.failure:
            self.answer.failure, self.answer.detail = kind, detail
        self._end()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now_s = monotonic_s()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail("not HTTP", str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of an answer that names no length; else the server or the network broke off."""
        if self.ended.done():
            return
        if self._has_final_event and exc is None:
            self._end()
        else:
            self.fail("cut off", str(exc or ""))

    # --- httptools

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status != 200:
            self._rest = (self._rest + body)[:_MAX_KEPT_ERROR_BYTES]
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip())

    def on_message_complete(self) -> None:
        if self._status != 200:
            self.fail(f"HTTP {self._status}", self._rest.decode(errors="replace"))
        elif not self._has_final_event:
            self.fail("cut off", "the stream ended without its last event")
        self._end()

    def _take(self, payload: bytes) -> None:
        if payload == b"[DONE]":
            self._has_final_event = True
            return
        try:
            event = self._read_event(orjson.loads(payload))
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            self.fail("not understood", f"{error}: {payload[:200]!r}")
            return
        answer = self.answer
        if event.has_text:
            answer.chunk_at_s.append(self._now_s)
            self._on_chunk()
        if event.num_tokens is not None:
            answer.num_tokens = event.num_tokens
            answer.is_counted_by_server = True
        if event.num_prompt_tokens is not None:
            answer.num_prompt_tokens = event.num_prompt_tokens
        if event.failure:
            self.fail(f"event: {event.failure}", event.detail)
        self._has_final_event |= event.is_final

    def _end(self) -> None:
        if self.ended.done():
            return
        answer = self.answer
        answer.ended_s = monotonic_s()
        if not answer.is_counted_by_server:
            answer.num_tokens = len(answer.chunk_at_s)
        self.ended.set_result(None)
