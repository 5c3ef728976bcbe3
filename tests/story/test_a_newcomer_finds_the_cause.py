"""Somebody who has never seen Headrace is there when a worker dies, and finds out what happened."""

import asyncio
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from ops import runfile
from ops.bench.instance import own_instance
from ops.bench.sse_client import Reader, take

WORKERS = ("worker 1", "worker 2")


@pytest.mark.timeout(180)
async def test_the_banner_names_the_command_whose_report_names_the_dead_worker(
    tmp_path: Path,
) -> None:
    """Start, ask, kill a worker in the middle, read the banner, run what it says, read the report.

    The answer itself is whole.
    """
    with own_instance("--engine", "simulated", "--workers", "2") as (data_dir, [url]):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            reader = Reader()
            async with reader.generate(client, "hello", max_new_tokens=80, seed=3) as events:
                await take(events, 5)
                victims = [process_of(data_dir, name) for name in WORKERS]
                for victim in victims:
                    os.kill(victim.pid, signal.SIGKILL)
                async for _ in events:
                    pass
            reader.check_whole()
            banner = await banner_of(client, "worker_lost")
        assert banner["severity"] == "warning"
        assert any(victim.instance in banner["why"] for victim in victims)
        await run(banner["command"], tmp_path, data_dir)
        report = report_in(tmp_path)
        assert all(victim.instance in report for victim in victims)


def process_of(data_dir: Path, name: str) -> runfile.ProcessState:
    state = runfile.read_state(data_dir)
    assert state is not None
    return next(process for process in state.processes if process.name == name)


async def banner_of(client: httpx.AsyncClient, code: str) -> dict[str, Any]:
    """The first thing that the live page says, once it says ``code``."""
    async with asyncio.timeout(30), client.stream("GET", "/ops/feed") as feed:
        kind = ""
        async for line in feed.aiter_lines():
            kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
            if kind == "overview" and line.startswith("data: "):
                [banner, *_] = json.loads(line.removeprefix("data: "))["diagnosis"]
                if banner["code"] == code:
                    return banner
    raise AssertionError("the feed ended")


async def run(command: str, folder: Path, data_dir: Path) -> None:
    """As typed in a terminal; it found something, so its exit code is 1."""
    [program, *arguments] = shlex.split(command)
    assert program == "headrace"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "ops.cli",
        *arguments,
        cwd=folder,
        env=os.environ | {"HEADRACE_DATA_DIR": str(data_dir)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert process.returncode == 1, (out + errors).decode()


def report_in(folder: Path) -> str:
    [report] = folder.glob("*.html")
    return report.read_text()
