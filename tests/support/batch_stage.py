"""Batches on a stand: a gateway that takes them in, and steerers in the test's own event loop."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from common.batches import BatchRecord
from common.broker import BatchStore, BatchWatch, Broker, connect
from common.files import Files
from common.ids import new_process_name
from common.settings import BackgroundSettings
from common.storage import Storage
from gateway.lines import load_offer
from tests.support.batches import CHAT, asking_for, jsonl
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.waiting import wait_until
from workers.background.batches import Steers
from workers.background.pool import Ends, Window
from workers.background.running import Means


@dataclass
class BatchStage:
    """One gateway, and as many steering processes as a test starts, in miniature."""

    stand: Stand
    gateway: RunningGateway

    @property
    def storage(self) -> Storage:
        return self.gateway.services.storage

    @property
    def files(self) -> Files:
        return self.gateway.services.files

    @property
    def store(self) -> BatchStore:
        return self.stand.broker.batch_store

    @property
    def settings(self) -> BackgroundSettings:
        return BackgroundSettings(
            redis_url=self.stand.redis_url, data_dir=self.stand.data_dir, model="simulated"
        )

    async def upload(self, content: bytes, tenant: str = "public") -> str:
        async def chunks() -> AsyncIterator[bytes]:
            yield content

        return (await self.files.create(tenant, "in.jsonl", "batch", chunks())).id

    async def create(
        self, lines: Iterable[dict[str, Any]] | bytes, endpoint: str = CHAT, **fields: Any
    ) -> str:
        """Create a batch as a client does; returns its id."""
        content = lines if isinstance(lines, bytes) else jsonl(lines)
        body = asking_for(await self.upload(content), endpoint, **fields)
        answer = await self.gateway.client.post("/v1/batches", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def shown(self, batch_id: str) -> dict[str, Any]:
        answer = await self.gateway.client.get(f"/v1/batches/{batch_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def record(self, batch_id: str) -> BatchRecord:
        record = await self.store.get(batch_id)
        assert record is not None
        return record

    async def has_finished(self, batch_id: str, num_lines: int) -> None:
        """Wait until so many of its lines are counted."""

        async def is_so_far() -> bool:
            return (await self.record(batch_id)).counts.finished >= num_lines

        await wait_until(is_so_far, what=f"{num_lines} lines")

    async def reached(self, batch_id: str, *statuses: str, within_s: float = 30) -> BatchRecord:
        """Wait until the batch is in one of these states."""
        found: list[BatchRecord] = []

        async def is_there() -> bool:
            found.append(await self.record(batch_id))
            return found[-1].status in statuses

        await wait_until(is_there, timeout_s=within_s, what=f"a batch that is {statuses}")
        return found[-1]

    async def ended(self, batch_id: str, within_s: float = 60) -> BatchRecord:
        return await self.reached(
            batch_id, "failed", "completed", "expired", "cancelled", within_s=within_s
        )

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of a file of results; none where there is no such file."""
        if file_id is None:
            return []
        answer = await self.gateway.client.get(f"/v1/files/{file_id}/content")
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.content.splitlines()]

    @asynccontextmanager
    async def steerer(self, name: str = "", **changes: Any) -> AsyncGenerator[Steers]:
        """A background process as far as batches go: it takes up all that nobody steers.

        ``changes`` replace parts of what it works with. Leaving ends it in order.
        """
        async with self._means(name or new_process_name("background"), **changes) as means:
            steers = Steers(means)
            sweeping = asyncio.create_task(_sweep(steers, means))
            try:
                yield steers
                await steers.stop()
            finally:
                sweeping.cancel()
                await kill(steers)

    @asynccontextmanager
    async def _means(self, name: str, **changes: Any) -> AsyncGenerator[Means]:
        url, pool = self.stand.redis_url, self.stand.broker.pool
        ends_redis, changes_redis = (connect(url, blocking=True) for _ in range(2))
        ends = Ends(Broker(ends_redis, pool))
        broker = self.stand.broker
        parts: dict[str, Any] = {
            "name": name,
            "broker": broker,
            "store": broker.batch_store,
            "watch": BatchWatch(BatchStore(changes_redis)),
            "storage": self.storage,
            "files": self.files,
            "offer": load_offer(self.settings),
            "ends": ends,
            "window": Window(broker, broker.batch_store),
        }
        hearing = asyncio.create_task(ends.run())
        try:
            yield Means(**parts | changes)
        finally:
            hearing.cancel()
            for redis in (ends_redis, changes_redis):
                await redis.aclose()


async def _sweep(steers: Steers, means: Means) -> None:
    """As arq and the sweep together, without the seconds."""
    while True:
        for batch_id in await means.store.unsteered(means.broker.pool):
            await steers.take_up(batch_id)
        await asyncio.sleep(0.05)


async def kill(steers: Steers) -> None:
    """As SIGKILL: nothing more is written, and the leases stay until they end."""
    steers._is_stopping = True
    tasks = [task for _, task in steers._steered.values()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
