"""The stage of the stories: real processes, a model directory, and clients for the gateways."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.models.store import ModelStore
from tests.support.processes import Process, Processes, processes
from tests.support.tiny_model import build_tiny_model
from tests.support.waiting import wait_until


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with two models: ``simulated`` and ``tiny`` (seeded random weights)."""
    data_dir = tmp_path_factory.mktemp("data")
    store = ModelStore(data_dir)
    store.add("simulated")
    store.add(str(build_tiny_model(data_dir / "source" / "tiny")), name="tiny")
    return data_dir


@dataclass
class Stage:
    """Starts processes with one model and opens clients to their gateways."""

    processes: Processes
    settings: dict[str, Any]
    clients: AsyncExitStack
    workers: list[Process] = field(default_factory=list[Process])

    async def worker(self, **settings: Any) -> Process:
        worker = self.processes.worker(**(self.settings | settings))
        self.workers.append(worker)
        return await worker.ready()

    async def two_workers(self, **settings: Any) -> None:
        await asyncio.gather(self.worker(**settings), self.worker(**settings))

    async def holder_and_heir(self, stream_id: str) -> tuple[Process, Process]:
        """Of two workers, the one that claimed this stream, and the other."""

        def is_claimed() -> bool:
            return any(w.events("worker.claimed", request_id=stream_id) for w in self.workers)

        await wait_until(is_claimed)
        first, second = self.workers
        if first.events("worker.claimed", request_id=stream_id):
            return first, second
        return second, first

    async def gateway(self, **settings: Any) -> tuple[Process, httpx.AsyncClient]:
        gateway = await self.processes.gateway(**(self.settings | settings)).ready()
        client = httpx.AsyncClient(base_url=gateway.url, timeout=30)
        await self.clients.enter_async_context(client)
        return gateway, client


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with processes(redis_url, tmp_path) as started:
        yield started


@pytest.fixture
async def stage(started: Processes, model_dir: Path) -> AsyncIterator[Stage]:
    """Simulated engine, 20 ms per token: slow enough to interfere, fast enough to wait for."""
    settings: dict[str, Any] = {
        "data_dir": model_dir,
        "model": "simulated",
        "simulated_first_token_ms": 5,
        "simulated_inter_token_ms": 20,
    }
    async with AsyncExitStack() as clients:
        yield Stage(started, settings, clients)
