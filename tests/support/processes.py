"""Real gateway and worker processes: started, watched by their JSON logs, and killed.

Each process gets a log folder of its own. What a test waits for is an event in that log, so that it
sees exactly what an operator would see.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from common.models.store import SIMULATED_MODEL

ROOT = Path(__file__).resolve().parents[2]
_READY_S = 60.0
_WAIT_S = 20.0
_POLL_S = 0.01

Event = dict[str, Any]
T = TypeVar("T")


class Process:
    """One started process of the product, known by its log."""

    def __init__(self, role: str, popen: subprocess.Popen[bytes], folder: Path, url: str) -> None:
        self.role = role
        self.folder = folder
        self.url = url
        self._popen = popen
        self._read: list[Event] = []
        self._read_bytes = 0

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def name(self) -> str:
        """The name of this incarnation in Redis, as its first log line says."""
        return str(self.events()[0]["instance"])

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    def events(self, name: str | None = None, **fields: object) -> list[Event]:
        """The log so far, filtered by event name and fields."""
        self._read_on()
        return [
            line
            for line in self._read
            if (name is None or line["event"] == name) and fields.items() <= line.items()
        ]

    def _read_on(self) -> None:
        """Read what was logged since: whoever waits looks a hundred times a second."""
        path = self.folder / f"{self.role}.jsonl"
        if not path.exists():
            return
        with path.open("rb") as log:
            log.seek(self._read_bytes)
            whole, end, _ = log.read().rpartition(b"\n")
        self._read_bytes += len(whole + end)
        self._read += map(json.loads, whole.splitlines())

    def errors(self) -> str:
        """What the process wrote on standard error: nothing, if all is well."""
        return (self.folder / "stderr").read_text()

    async def saw(self, event: str, *, within_s: float = _WAIT_S, **fields: object) -> Event:
        """Wait for an event in the log and return the newest such line."""
        return (await self._until(lambda: self.events(event, **fields), event, within_s))[-1]

    async def ready(self) -> "Process":
        await self.saw(f"{self.role}.ready", within_s=_READY_S)
        return self

    async def ended(self, within_s: float = _WAIT_S) -> int:
        """Wait for the end; returns the exit code."""

        def exit_code() -> list[int]:
            code = self.exit_code
            return [] if code is None else [code]

        return (await self._until(exit_code, "its end", within_s, needs_life=False))[0]

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def pause(self) -> None:
        """SIGSTOP: as a machine that sleeps."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def _until(
        self,
        look: Callable[[], list[T]],
        what: str,
        within_s: float,
        *,
        needs_life: bool = True,
    ) -> list[T]:
        deadline = time.monotonic() + within_s
        while not (found := look()):
            dead = needs_life and self.exit_code is not None
            if dead and not (found := look()):
                raise AssertionError(f"{self.role} ended with {self.exit_code}\n{self._tail()}")
            if found:
                break
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} of {self.role} in {within_s} s\n{self._tail()}")
            await asyncio.sleep(_POLL_S)
        return found

    def _tail(self) -> str:
        lines = [json.dumps(line) for line in self.events()[-15:]]
        return "\n".join([*lines, self.errors()[-2000:]])


class Processes:
    """Starts processes against one Redis; all of them end with it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.redis_url = redis_url
        self._folder = folder
        self._started: list[Process] = []

    def worker(
        self, *, redis_url: str | None = None, module: str = "workers", **settings: object
    ) -> Process:
        """Start a worker: engine simulated and leases short, unless ``settings`` (the fields of
        WorkerSettings) say otherwise. Await ``ready()`` before relying on it."""
        short = {"engine": "simulated", "model": SIMULATED_MODEL, "lease_ms": 1000, "beat_ms": 300}
        return self._start("worker", module, redis_url, short | settings)

    def background(self, *, redis_url: str | None = None, **settings: object) -> Process:
        chosen = {"model": SIMULATED_MODEL} | settings
        return self._start("background", "workers.background", redis_url, chosen)

    def exporter(self, *, redis_url: str | None = None, **settings: object) -> Process:
        """Start an exporter on a free port; its address is ``.url``."""
        chosen = {"model": SIMULATED_MODEL, "metrics_port": free_port()} | settings
        return self._start("exporter", "ops.exporter", redis_url, chosen)

    def gateway(self, *, redis_url: str | None = None, **settings: object) -> Process:
        """Start a gateway on a free port; its address is ``.url``."""
        return self._start("gateway", "gateway", redis_url, {"port": free_port()} | settings)

    def stop_all(self) -> None:
        """Kill what still runs. What it logged is checked with all else that the test wrote."""
        for process in self._started:
            if process.exit_code is None:
                process.kill()

    def _start(
        self, role: str, module: str, redis_url: str | None, settings: dict[str, object]
    ) -> Process:
        folder = self._folder / f"{role}-{len(self._started)}"
        folder.mkdir(parents=True)
        chosen = {
            "redis_url": redis_url or self.redis_url,
            "log_dir": folder,
            "data_dir": self._folder / "data",
        } | settings
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
        environment = inherited | {f"HEADRACE_{k.upper()}": str(v) for k, v in chosen.items()}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as errors:
            popen = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )
        port = settings.get("port") or settings.get("metrics_port")
        process = Process(role, popen, folder, f"http://127.0.0.1:{port}" if port else "")
        self._started.append(process)
        return process


@contextmanager
def processes(redis_url: str, folder: Path) -> Generator[Processes, None, None]:
    """A place to start processes from; at its end none is left."""
    started = Processes(redis_url, folder)
    try:
        yield started
    finally:
        started.stop_all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
