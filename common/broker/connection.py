"""Connections to Redis: how they are opened, and what its errors mean to us."""

import asyncio
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from common.broker.line import BlockingLine, OneLine
from common.failures import Failure

Client = Redis
"""What :func:`connect` opens."""

_COMMAND_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 32
_POOL_WAIT_S = 5.0
_UNAVAILABLE = (
    RedisConnectionError,
    RedisTimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    ClusterDownError,
    NoPermissionError,
)
"""What redis-py has classes for; it takes the first word off their text."""
_AWAY_PREFIXES = (
    # It is loading, failing over, or part of a cluster that moves:
    "ASK", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "NOREPLICAS", "READONLY", "TRYAGAIN",
    # It is busy with somebody else's script, cannot write to its disk, or has no connection left:
    "BUSY", "MISCONF", "UNKILLABLE", "max number of clients",
    # It does not know us, does not let us, or is too old:
    "DISABLED", "NOAUTH", "NOPERM", "Protocol error", "WRONGPASS", "unknown command",
)  # fmt: skip
"""How errors begin that are the operator's to end, whatever was asked."""
_PREAMBLE = re.compile(r"(Command # \d+ .* of pipeline caused error: \W*)?(ERR )?", re.DOTALL)
"""What may stand before an error: redis-py names the command of a transaction, with all of it."""


def connect(redis_url: str, *, blocking: bool = False, single: bool = False) -> Client:
    """Open a client for ``redis_url``; nothing is sent before the first command.

    ``blocking`` is for a task that sits in BLPOP or XREAD, shorter than a command may take.
    ``single`` sends everything through one connection in order, as claim, publish and release need.
    Both spend much less processor time on a command than the pool that there is otherwise.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": _COMMAND_TIMEOUT_S,
        "socket_keepalive": not redis_url.startswith("unix:") or None,
        "socket_timeout": _COMMAND_TIMEOUT_S,
    }
    if redis_url.startswith("unix:"):
        del options["socket_connect_timeout"], options["socket_keepalive"]
    if blocking or single:
        client = (BlockingLine if blocking else OneLine).from_url(redis_url, **options)
    else:
        pool = BlockingConnectionPool.from_url(
            redis_url, max_connections=_MAX_CONNECTIONS, timeout=_POOL_WAIT_S, **options
        )
        client = Redis.from_pool(pool)  # the client owns it: closing one closes the other
    _use_our_connections(client.connection_pool)
    return client


class _Connection(AbstractConnection):
    """One whose sends may be cancelled at any moment, and whose stream may be taken over.

    redis-py sends through ``asyncio.wait_for``, which on Python 3.11 swallows a cancellation that
    meets the end of the send: a task told to stop would go on for ever.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        num_before = task.cancelling()
        await super().send_packed_command(command, check_health)
        if task.cancelling() > num_before:
            await self.disconnect(nowait=True)  # the answer will come, and belongs to nobody
            raise asyncio.CancelledError

    def give_stream(self) -> asyncio.StreamWriter:
        """The open stream, as somebody else's; to itself this connection is closed from now on."""
        writer = cast("asyncio.StreamWriter", self._writer)
        self._writer = self._reader = None
        return writer


def _use_our_connections(pool: Any) -> None:
    pool.connection_class = type("Connection", (_Connection, pool.connection_class), {})


def failure_from(error: RedisError | OSError) -> Failure:
    """The failure that an error of Redis or of its connection stands for."""
    text = _PREAMBLE.sub("", str(error), count=1)
    if isinstance(error, OutOfMemoryError) or text.startswith("OOM"):
        return Failure("BROKER_FULL")
    if text.startswith("PROTOCOL_TOO_NEW"):
        return Failure("PROTOCOL_TOO_NEW", text)
    if isinstance(error, (*_UNAVAILABLE, OSError)) or text.startswith(_AWAY_PREFIXES):
        return Failure(
            "BROKER_UNAVAILABLE", f"Redis cannot be reached: {text or type(error).__name__}"
        )
    return Failure("INTERNAL", f"Redis refused a command: {text}")


@contextmanager
def mapped_errors() -> Generator[None]:
    """Turn what redis-py raises into failures; "Function not found" passes, the caller loads it."""
    try:
        yield
    except (RedisError, OSError) as error:
        if isinstance(error, ResponseError) and "Function not found" in str(error):
            raise
        raise failure_from(error) from error
