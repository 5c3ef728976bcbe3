"""A pool of simulated workers as a test sees it: admit, wait for the end, check the whole log."""

import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.broker import Broker, connect
from common.ids import generation_id
from common.messages import LogEntry
from common.models.store import SIMULATED_MODEL
from tests.support.generations import admission, admit
from tests.support.processes import Process, Processes, processes
from tests.support.waiting import wait_until
from tests.support.worker_parts import logged, tokens_of

POOL = SIMULATED_MODEL


@dataclass
class WorkerPool:
    """Workers of the simulated model, and a broker to play their gateway with."""

    broker: Broker
    processes: Processes
    model_version: str = ""

    async def worker(self, **settings: Any) -> Process:
        worker = await self.processes.worker(**settings).ready()
        self.model_version = worker.events("worker.ready")[0]["model_version"]
        return worker

    async def admit(self, max_new_tokens: int = 60, **fields: Any) -> str:
        """Admit one generation that nobody needs to read; equal requests have equal tokens."""
        return await admit(
            self.broker, max_new_tokens=max_new_tokens, **{"attached": False} | fields
        )

    async def ask(self, prompt: str, max_new_tokens: int) -> str:
        """Admit one generation of this prompt, whose tokens are its bytes."""
        plain = admission(
            prompt_tokens=len(prompt.encode()), max_new_tokens=max_new_tokens, attached=False
        )
        tokens = struct.pack(f"<{len(prompt.encode())}I", *prompt.encode())
        asked = replace(plain, spec=msgspec.structs.replace(plain.spec, prompt=tokens))
        return generation_id((await self.broker.admit(asked)).request_id)

    async def position(self, generation_id: str) -> int:
        page = await self.broker.read(generation_id, 0)
        return page.next if page else 0

    async def state(self, generation_id: str) -> str:
        page = await self.broker.read(generation_id, 0)
        return page.state if page else ""

    async def reached(self, generation_id: str, position: int, within_s: float = 15) -> None:
        """Wait until the log holds ``position`` tokens."""

        async def is_there() -> bool:
            return await self.position(generation_id) >= position

        await wait_until(is_there, timeout_s=within_s, what=f"token {position}")

    async def end_of(self, generation_id: str, within_s: float = 20) -> list[LogEntry]:
        """Wait for the end and return the log: dense, chained, with one end, checked."""

        async def is_ended() -> bool:
            return await self.state(generation_id) == "T"

        await wait_until(is_ended, timeout_s=within_s, what=f"the end of {generation_id}")
        entries = await logged(self.broker, generation_id, self.model_version)
        assert entries[-1].record.finish is not None
        return entries

    async def tokens_of(self, generation_id: str, within_s: float = 20) -> list[int]:
        entries = await self.end_of(generation_id, within_s)
        finish = entries[-1].record.finish
        assert finish is not None
        assert finish.reason == "length", finish
        return tokens_of(entries)


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with processes(redis_url, tmp_path) as started:
        yield started


@pytest.fixture
async def pool(redis_url: str, started: Processes) -> AsyncIterator[WorkerPool]:
    broker = Broker(connect(redis_url), POOL)
    yield WorkerPool(broker, started)
    await broker.close()
