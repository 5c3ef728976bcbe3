"""uvicorn's HTTP protocol with an end to a request's head, in bytes and in time, and to how many
connections may be open for nothing; and with a short way for a stream's tokens.

The head: the parser collects one until it is whole, however long that takes; nothing of the
application has seen it by then, so no middleware could refuse it. Here it ends, in bytes and in
time. The short way: ASGI's ``send`` is a chain of coroutines, and who awaits it is a task that had
to be woken. For each token of each stream that would cost more than all else; :class:`DirectBody`
writes to the connection instead.
"""

import asyncio
import json
import weakref
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
)

from common.failures import Failure
from gateway.client_window import ClientWindow
from gateway.errors import envelope

MAX_HEAD_BYTES = 64 * 1024
"""Above the application's own limit, whose answer is the better one; a piece from the network may
be as long again."""
_CONNECTION = "headrace.connection"
"""Name of the ASGI extension by which a request finds its :class:`DirectBody`."""


class IdleConnections:
    """The connections on which no request is being answered, the longest idle first.

    Above ``most`` of them that one is closed: to hold connections open costs a caller nothing.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: dict[BoundedHttp, None] = {}

    def add(self, connection: "BoundedHttp") -> None:
        self._idle.pop(connection, None)
        self._idle[connection] = None
        if len(self._idle) > self._most:
            longest = next(iter(self._idle))
            self.discard(longest)
            longest.transport.close()

    def discard(self, connection: "BoundedHttp") -> None:
        self._idle.pop(connection, None)


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection whose next head is too long, or not there within ``limit_s``."""

    _head_bytes = 0
    _is_in_head = False
    _deadline: asyncio.TimerHandle | None = None
    _direct: "DirectBody | None" = None

    def __init__(self, *args: Any, idle: IdleConnections, limit_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle = idle
        self._limit_s = limit_s

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._idle.add(self)
        self._deadline = self.loop.call_later(self._limit_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.discard(self)
        self._end_deadline()
        super().connection_lost(exc)
        if self._direct is not None:
            self._direct.has_room = False
            self._direct.window.close()
            self._direct = None

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if self._is_in_head and was_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._limit_s, self._give_up)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._end_deadline()
        self._idle.discard(self)
        super().on_headers_complete()
        self.scope["extensions"] = {_CONNECTION: {"is": weakref.ref(self)}}

    def direct_body(self) -> "DirectBody":
        """Of the answer that is being sent; its head is."""
        self._direct = DirectBody(self.transport, has_room=not self.flow.write_paused)
        return self._direct

    def pause_writing(self) -> None:
        super().pause_writing()
        self._open_direct(has_room=False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._open_direct(has_room=True)

    def _open_direct(self, *, has_room: bool) -> None:
        if self._direct is not None:
            self._direct.has_room = has_room

    def on_response_complete(self) -> None:
        if not self.pipeline and not self.transport.is_closing():
            self._idle.add(self)
        super().on_response_complete()

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self) -> None:
        """The same words as any other refusal; there is no request yet to be logged."""
        body = json.dumps(envelope(Failure("HEADER_TOO_LARGE"), "tgi")).encode()
        head = [
            STATUS_LINE[431],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"connection: close\r\n\r\n",
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


class DirectBody:
    """Writes pieces of an answer's body, between those that go through ``send``."""

    __slots__ = ("_write", "has_room", "window")

    def __init__(self, transport: asyncio.Transport, *, has_room: bool) -> None:
        self._write = transport.write
        self.has_room = has_room
        """Whether ``send`` would not wait now."""
        self.window = ClientWindow(transport)
        """How the client takes this answer."""

    def write(self, piece: bytes) -> None:
        """Only while there is room; ``piece`` is not empty, which would end the body."""
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))


def direct_body(scope: Scope) -> DirectBody | None:
    """The short way to the client of a request whose answer has begun, in pieces of any length.

    None where another server runs the application.
    """
    extension = (scope.get("extensions") or {}).get(_CONNECTION)
    connection = extension["is"]() if extension else None
    return None if connection is None else connection.direct_body()
