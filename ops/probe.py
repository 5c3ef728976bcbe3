"""Asks what is there: a gateway over HTTP, a port, a Redis, the kernel's count of OOM kills."""

import asyncio
import contextlib
import re
import socket
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import click

from common.broker import Broker, connect
from common.failures import Failure

_ANSWER_TIMEOUT_S = 3.0


class Unreachable(click.ClickException):
    """The one line that says what can not be reached, and why."""


async def http_status(host: str, port: int, path: str) -> int | None:
    """The status of ``GET path``; None when nothing answers in time."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            return await _get(host, port, path)
    except (OSError, TimeoutError, ValueError, IndexError):
        return None


async def _get(host: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def probe(url: str) -> None:
    """Return if ``GET url`` answers 200.

    Raises: Unreachable.
    """
    target = urlsplit(url)
    host, port = target.hostname or "", target.port or 80
    status = asyncio.run(http_status(host, port, target.path or "/"))
    if status != HTTPStatus.OK:
        raise Unreachable(f"{url} answers {status or 'nothing'}")


def free_ports(host: str, first: int, num_ports: int, *, option: str = "--port") -> list[int]:
    """``first`` and those behind it, each tried now; ``first`` 0: any free ones.

    Raises: Unreachable, naming the port that is in use or not allowed.
    """
    wanted = [first + n if first else 0 for n in range(num_ports)]
    found: list[int] = []
    with contextlib.ExitStack() as held:  # held until all are known, so that no two are the same
        for port in wanted:
            try:
                listener = held.enter_context(_listen(host, port))
            except OSError as error:
                raise Unreachable(
                    f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}; "
                    f"choose another with {option}"
                ) from error
            found.append(listener.getsockname()[1])
    return found


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


async def check_redis(redis_url: str, pool: str) -> None:
    """Load our functions into the server, which shows that it can do what Headrace needs.

    Raises: Unreachable, with the address (without its password) and the cause.
    """
    shown = without_password(redis_url)
    try:
        broker = Broker(connect(redis_url), pool)
    except ValueError as error:
        raise Unreachable(f"--redis-url {shown}: {error}") from error
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await broker.load()
    except TimeoutError as error:
        raise Unreachable(f"Redis at {shown} does not answer") from error
    except Failure as failure:
        raise Unreachable(f"{_complaint(failure)} (Redis at {shown})") from failure
    finally:
        await broker.close()


def count_oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return counts[0] if counts else None


def without_password(redis_url: str) -> str:
    """The URL as it may be shown and logged."""
    return re.sub(r"(?<=://)([^/@]*):[^/@]*@", r"\1:***@", redis_url)


def _complaint(failure: Failure) -> str:
    if "unknown command" in failure.message.lower():
        return "Redis is too old: Headrace needs Redis 7.0, or Valkey"
    return failure.message
