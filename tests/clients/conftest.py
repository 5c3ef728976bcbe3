"""A running system for real clients: one gateway, one worker with the simulated engine."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.models import simulated
from tests.support.processes import Process, processes

SILENCE_S = float(os.environ.get("TEST_SILENCE_S", "1"))
"""How long the first token takes. 30 is the patience that is promised to clients."""


async def run(
    folder: Path,
    *command: str | Path,
    limit_s: float = 30 + 2 * SILENCE_S,
    expected: int = 0,
    **environment: str,
) -> tuple[str, str]:
    """Standard output and errors of a program that must end with the exit code ``expected``."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(limit_s):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == expected, (out + errors).decode()
    return out.decode(), errors.decode()


@dataclass(frozen=True)
class System:
    url: str
    model_version: str
    gateway: Process
    worker: Process


@pytest.fixture(scope="session")
def simulated_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("simulated-data")
    simulated(data_dir)
    return data_dir


@pytest.fixture
async def system(redis_url: str, tmp_path: Path, simulated_data_dir: Path) -> AsyncIterator[System]:
    """The first token takes a while, filled with keep-alives: clients must bear that."""
    common: dict[str, Any] = {"data_dir": simulated_data_dir, "model": "simulated"}
    with processes(redis_url, tmp_path) as started:
        worker = started.worker(
            **common,
            simulated_first_token_ms=SILENCE_S * 1000,
            simulated_inter_token_ms=2,
            step_timeout_s=20 + SILENCE_S,
        )
        gateway = started.gateway(**common, keep_alive_s=SILENCE_S / 5)
        await worker.ready()
        await gateway.ready()
        version = str(worker.events("worker.ready")[0]["model_version"])
        yield System(gateway.url, version, gateway, worker)


@pytest.fixture
async def client(system: System) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own, which asks once."""
    async with openai.AsyncOpenAI(
        base_url=f"{system.url}/v1", api_key="unused", max_retries=0
    ) as client:
        yield client
