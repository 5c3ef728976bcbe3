"""One `headrace up` as its user starts it: a command of its own on a data directory of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ops import runfile
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

START_S = 60.0
STOP_S = 30.0

Line = dict[str, Any]


class Instance:
    """One `headrace up`, on a data directory, from its start to its end."""

    def __init__(self, data_dir: Path, *options: str, **settings: object) -> None:
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
        chosen = {f"HEADRACE_{name.upper()}": str(value) for name, value in settings.items()}
        self._output = data_dir / "output"
        command = [sys.executable, "-m", "ops.cli", "up", "--engine", "simulated", "--port", "0"]
        with self._output.open("wb") as output:
            self._popen = subprocess.Popen(
                [*command, "--data-dir", str(data_dir), *options],
                cwd=ROOT,
                env=inherited | chosen,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def url(self) -> str:
        return self.process("gateway 1").address

    def log(self, event: str) -> list[Line]:
        """Lines that this supervisor itself logged with that event."""
        path = self.data_dir / "log" / "supervisor.jsonl"
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return [line for line in lines if (line["event"], line["pid"]) == (event, self.pid)]

    def processes(self) -> dict[str, runfile.ProcessState]:
        """What it runs now, by name."""
        state = runfile.read_state(self.data_dir)
        return {process.name: process for process in state.processes} if state else {}

    def process(self, name: str) -> runfile.ProcessState:
        return self.processes()[name]

    async def ready(self) -> "Instance":
        await wait_until(
            lambda: self.log("supervisor.ready") or self._popen.poll() is not None,
            timeout_s=START_S,
            what="ready",
        )
        assert self._popen.poll() is None, self.output
        return self

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        await wait_until(lambda: self._popen.poll() is not None, timeout_s=STOP_S, what="its end")
        return self._popen.wait()

    def send(self, signum: signal.Signals) -> None:
        self._popen.send_signal(signum)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
