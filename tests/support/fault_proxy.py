"""A TCP proxy in front of Redis that cuts, delays, stalls, and plays tricks on single calls.

Towards the server the stream is split into whole commands, so that a fault hits one call: its
answer is lost, it is held back until released, a copy of it is kept to be executed late, or the
server is made to answer with an error. Towards the client bytes pass as they come. Both directions
can be delayed or stalled.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlparse

Direction = Literal["to_server", "to_client"]
_BOTH: tuple[Direction, Direction] = ("to_server", "to_client")


@dataclass
class Rule:
    """A fault for the next ``times`` commands that contain ``needle``.

    ``hit`` is set when the first one came by; ``commands`` keeps what was caught, ready for
    :meth:`FaultProxy.send`.
    """

    needle: bytes
    effect: Literal["lose_answer", "hold", "copy", "refuse"]
    times: int
    error: str = ""
    hit: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    commands: list[bytes] = field(default_factory=list[bytes])

    def takes(self, command: bytes) -> bool:
        if len(self.commands) >= self.times or self.needle not in command:
            return False
        self.commands.append(command)
        self.hit.set()
        return True

    def release(self) -> None:
        """Let what was held go on, and nothing be caught any more."""
        self.times = 0
        self.released.set()


class FaultProxy:
    """Listens on ``url``; connections are refused while it is :meth:`cut`."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream = urlparse(upstream_url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._rules: list[Rule] = []
        self._flowing = {direction: asyncio.Event() for direction in _BOTH}
        self.delay_s: dict[Direction, float] = dict.fromkeys(_BOTH, 0.0)
        self.num_connections = 0
        self.flow()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}{self._upstream.path if self._is_tcp else ''}"

    @property
    def _is_tcp(self) -> bool:
        return self._upstream.scheme != "unix"

    # Faults --------------------------------------------------------------------------------------

    async def cut(self) -> None:
        """Reset every connection and refuse new ones until :meth:`heal`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._abort_all()

    async def heal(self) -> None:
        """Listen again, on the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    def stall(self, *directions: Direction) -> None:
        """Let nothing pass any more (both ways when none is named) without closing anything."""
        for direction in directions or _BOTH:
            self._flowing[direction].clear()

    def flow(self) -> None:
        """End every stall."""
        for event in self._flowing.values():
            event.set()

    def lose_answer(self, needle: bytes, times: int = 1) -> Rule:
        """The server executes the call, then the connection breaks before its answer passes."""
        return self._add(Rule(needle, "lose_answer", times))

    def hold(self, needle: bytes, times: int = 1) -> Rule:
        """The call waits in the network until ``rule.release()``."""
        return self._add(Rule(needle, "hold", times))

    def copy(self, needle: bytes, times: int = 1) -> Rule:
        """The call passes; a copy stays in ``rule.commands`` to be sent late."""
        return self._add(Rule(needle, "copy", times))

    def refuse(self, needle: bytes, error: str, times: int = 1) -> Rule:
        """The call is not executed; the server answers it with ``error``, in its turn."""
        return self._add(Rule(needle, "refuse", times, error))

    async def send(self, command: bytes) -> bytes:
        """Execute a caught command now, over a connection of its own; returns the raw answer."""
        reader, writer = await self._connect()
        writer.write(command)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(65536), 5)
        writer.close()
        return answer

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule

    # Life ----------------------------------------------------------------------------------------

    async def close(self) -> None:
        self.flow()
        for rule in self._rules:
            rule.release()
        await self.cut()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self._is_tcp:
            return await asyncio.open_unix_connection(self._upstream.path)
        host, port = self._upstream.hostname or "127.0.0.1", self._upstream.port or 6379
        return await asyncio.open_connection(host, port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._server is None:  # cut between the accept and now
            writer.transport.abort()
            return
        self._links.add(task)
        self._writers.add(writer)
        self.num_connections += 1
        try:
            await self._link(reader, writer)
        finally:
            self._links.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until either side closes it."""
        try:
            server_reader, server_writer = await self._connect()
        except OSError:
            return
        self._writers.add(server_writer)
        losing = asyncio.Event()
        both = (
            asyncio.create_task(self._carry_commands(reader, server_writer, losing)),
            asyncio.create_task(self._carry_answers(server_reader, writer, losing)),
        )
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            self._writers.discard(server_writer)
            server_writer.transport.abort()

    async def _carry_commands(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            async for command in _commands(reader):
                await self._wait_to_pass("to_server")
                rule = next((rule for rule in self._rules if rule.takes(command)), None)
                if rule is not None and rule.effect == "hold":
                    await rule.released.wait()
                if rule is not None and rule.effect == "lose_answer":
                    losing.set()
                if rule is not None and rule.effect == "refuse":
                    writer.write(_erroneous(rule.error))
                else:
                    writer.write(command)
                await writer.drain()

    async def _carry_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if losing.is_set():
                    return  # the command has run; the connection breaks instead of an answer
                await self._wait_to_pass("to_client")
                writer.write(data)
                await writer.drain()

    async def _wait_to_pass(self, direction: Direction) -> None:
        await self._flowing[direction].wait()
        if self.delay_s[direction] > 0:
            await asyncio.sleep(self.delay_s[direction])


@asynccontextmanager
async def fault_proxy(upstream_url: str) -> AsyncGenerator[FaultProxy, None]:
    """A running proxy in front of ``upstream_url`` (``redis://`` or ``unix://``)."""
    proxy = FaultProxy(upstream_url)
    await proxy.heal()
    try:
        yield proxy
    finally:
        await proxy.close()


def _erroneous(error: str) -> bytes:
    """A command that the server answers with just this error."""
    parts = [b"EVAL", b"return redis.error_reply(ARGV[1])", b"0", error.encode()]
    return b"*4\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


async def _commands(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Whole commands as the client sent them: ``*<n>`` and n bulk strings."""
    while True:
        head = await reader.readuntil(b"\r\n")
        parts = [head]
        for _ in range(int(head[1:]) if head.startswith(b"*") else 0):
            length = await reader.readuntil(b"\r\n")
            parts += [length, await reader.readexactly(int(length[1:]) + 2)]
        yield b"".join(parts)
