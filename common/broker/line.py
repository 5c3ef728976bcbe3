"""A client with one connection, for what is sent at every engine step: as few instructions as can
be between a command and the socket.

redis-py opens the connection (address, TLS, password) and knows how answers are shaped. Between the
two it would spend a task, a timer and some forty calls on each command: that was measured to be
half of the processor time of a publish in its sender, and of the wait for it in its reader.
"""

import asyncio
from asyncio import Future
from collections import deque
from typing import Any, cast

import hiredis
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError


class OneLine(Redis):
    """Sends all commands through one connection, in their order, opened anew when it was lost.

    Make it by ``from_url``; ``socket_timeout`` limits the wait for each answer. Whose command is
    cancelled need not care for its answer. ``is_blocking`` says that commands may wait on the
    server: one that is cancelled is then taken back from there, by closing the connection.
    """

    is_blocking = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._line: _Line | None = None
        self._opening = asyncio.Lock()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        line = self._line
        if line is None or line.is_lost:
            line = await self._open()
        try:
            answer = await line.ask(args)
        except asyncio.CancelledError:
            if self.is_blocking:
                line.close()
            raise
        shape = self.response_callbacks.get(args[0])
        return shape(answer, **options) if shape else answer

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._line is not None:
            self._line.close()
        await super().aclose(close_connection_pool)

    async def _open(self) -> "_Line":
        async with self._opening:
            if self._line is None or self._line.is_lost:
                connection: Any = self.connection_pool.make_connection()
                await connection.connect()
                self._line = _Line(connection.give_stream(), connection.socket_timeout)
            return self._line


class BlockingLine(OneLine):
    """For a task that sits in BLPOP or XREAD."""

    is_blocking = True


class _Line(asyncio.Protocol):
    """An open connection, taken over from redis-py once server and client have greeted."""

    def __init__(self, stream: asyncio.StreamWriter, limit_s: float) -> None:
        self.is_lost = False
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=ResponseError)
        self._waiting: deque[tuple[Future[Any], float]] = deque()
        """Answers to come, in order, and when they will be late."""
        self._watch: asyncio.TimerHandle | None = None
        self._stream = stream  # kept, because its end would close the transport
        self._transport = cast("asyncio.Transport", stream.transport)
        self._transport.set_protocol(self)

    def ask(self, command: tuple[Any, ...]) -> Future[Any]:
        """Send a command; the future fails with what redis-py would raise."""
        answer: Future[Any] = self._loop.create_future()
        late_s = self._loop.time() + self._limit_s
        self._watch = self._watch or self._loop.call_at(late_s, self._look)
        self._waiting.append((answer, late_s))
        self._transport.write(hiredis.pack_command(command))
        return answer

    def close(self) -> None:
        self._lose(RedisConnectionError("Connection closed."))

    # What the transport calls --------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                answer, _ = self._waiting.popleft()
                if answer.done():
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(reply)
                else:
                    answer.set_result(reply)
        except (InvalidResponse, IndexError) as error:  # not Redis, or not in step with us
            self._lose(RedisConnectionError(f"Redis sent what was not asked for: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(RedisConnectionError(str(exc or "Connection closed by server.")))

    def _look(self) -> None:
        """One timer for all answers: set for the oldest, moved on when it has come."""
        self._watch = None
        if not self._waiting:
            return
        _, late_s = self._waiting[0]
        if late_s > self._loop.time():
            self._watch = self._loop.call_at(late_s, self._look)
        else:
            self._lose(RedisTimeoutError("Redis did not answer in time."))

    def _lose(self, error: Exception) -> None:
        self.is_lost = True
        self._transport.close()
        if self._watch is not None:
            self._watch.cancel()
        for answer, _ in self._waiting:
            if not answer.done():
                answer.set_exception(error)
        self._waiting.clear()
