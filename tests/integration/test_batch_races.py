"""Whoever dies, sleeps or is doubled while a batch runs, and whatever Redis forgets meanwhile: each
line has one result.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from common.batches import BatchRecord, index_name, part_name, parts_prefix, result_file_id
from common.broker import BatchStore, keys
from common.files import Files
from common.storage import Storage
from tests.support.batch_stage import BatchStage, kill
from tests.support.batches import line
from tests.support.gateway_app import Stand
from tests.support.redis_server import RawRedis
from tests.support.scripted_worker import saying
from workers.background.steering import Steering

NUM_LINES = 120


@pytest.fixture
async def stage(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BatchStage]:
    """With a worker that answers everybody, and parts of few lines."""
    monkeypatch.setattr("workers.background.running.COMMIT_S", 0.05)
    monkeypatch.setattr("workers.background.running.LOOK_S", 0.3)
    worker = await stand.worker()
    async with worker.acting(saying("well", " then")):
        yield BatchStage(stand, await stand.gateway())


class HaltingStorage(Storage):
    """A storage whose caller is halted where it writes what has a name that begins so.

    ``is_late``: behind the write. It goes on when :attr:`go` is set.
    """

    def __init__(self, storage: Storage, name: str, *, is_late: bool) -> None:
        self.name = name
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self._storage = storage
        self._is_late = is_late

    async def _halt(self, name: str, *, is_late: bool) -> None:
        if self.name and name.startswith(self.name) and is_late == self._is_late:
            self.reached.set()
            await self.go.wait()

    async def put(self, name: str, body: bytes, *, only_if_absent: bool = False) -> bool:
        await self._halt(name, is_late=False)
        has_written = await self._storage.put(name, body, only_if_absent=only_if_absent)
        await self._halt(name, is_late=True)
        return has_written

    async def put_stream(self, name: str, chunks: AsyncIterable[bytes]) -> None:
        await self._halt(name, is_late=False)
        await self._storage.put_stream(name, chunks)
        await self._halt(name, is_late=True)

    async def read(
        self, name: str, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes]:
        async with aclosing(self._storage.read(name, start, end)) as blocks:
            async for block in blocks:
                yield block

    async def list(self, prefix: str, after: str = "") -> Any:
        return await self._storage.list(prefix, after)

    async def delete(self, *names: str) -> None:
        await self._storage.delete(*names)

    async def size(self, name: str) -> int:
        return await self._storage.size(name)

    def close(self) -> None:
        self._storage.close()


def halting(stage: BatchStage, name: str, *, is_late: bool) -> tuple[HaltingStorage, Files]:
    storage = HaltingStorage(stage.storage, name, is_late=is_late)
    return storage, Files(storage, stage.stand.broker.file_store)


def file_name(batch_id: str, kind: Any) -> str:
    return f"files/{result_file_id(batch_id, kind)}"


WRITES = {
    "the index": index_name,
    "the first part": lambda id: part_name(id, 1),
    "the second part": lambda id: part_name(id, 2),
    "the output": lambda id: file_name(id, "output"),
    "the errors": lambda id: file_name(id, "error"),
}
"""What is written while a batch goes from its file to its results."""


def some_lines() -> list[dict[str, Any]]:
    """Every tenth of them is refused."""
    return [line(f"r{i}", n=0 if i % 10 == 9 else 1) for i in range(NUM_LINES)]


async def check_results(stage: BatchStage, record: BatchRecord) -> None:
    """Each line has one result, and the counts say so."""
    output = await stage.content(record.output_file_id)
    errors = await stage.content(record.error_file_id)
    ids = [result["custom_id"] for result in (*output, *errors)]
    assert sorted(ids) == sorted(f"r{i}" for i in range(NUM_LINES))
    counts = record.counts
    assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, len(output), len(errors))
    usages = [result["response"]["body"]["usage"] for result in output]
    assert record.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    assert record.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)


async def halted(storage: HaltingStorage) -> None:
    async with asyncio.timeout(30):
        await storage.reached.wait()


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("what", WRITES)
async def test_a_killed_steerer_is_replaced(stage: BatchStage, what: str, is_late: bool) -> None:
    """Killed before or behind anything that it writes."""
    batch_id = await stage.create(some_lines())
    storage, files = halting(stage, WRITES[what](batch_id), is_late=is_late)
    async with stage.steerer("b1", storage=storage, files=files) as first:
        await halted(storage)
        await kill(first)
    await stage.store.drop_leases([batch_id], "b1")  # as a supervisor does, or time
    async with stage.steerer("b2"):
        record = await stage.ended(batch_id)
    assert record.status == "completed"
    await check_results(stage, record)


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("what", ["a part", "the errors"])
async def test_a_steerer_killed_while_it_cancels_is_replaced(
    stage: BatchStage, what: str, is_late: bool
) -> None:
    """What was finished has its answer, and the rest is said to be cancelled, once."""
    batch_id = await stage.create(some_lines())
    storage, files = halting(stage, part_name(batch_id, 2), is_late=False)
    async with stage.steerer("b1", storage=storage, files=files) as first:
        await halted(storage)
        await stage.gateway.client.post(f"/v1/batches/{batch_id}/cancel")
        names = {"a part": parts_prefix(batch_id), "the errors": file_name(batch_id, "error")}
        storage, files = halting(stage, names[what], is_late=is_late)
        await kill(first)
    await stage.store.drop_leases([batch_id], "b1")
    async with stage.steerer("b2", storage=storage, files=files) as second:
        await halted(storage)
        await kill(second)
    await stage.store.drop_leases([batch_id], "b2")
    async with stage.steerer("b3"):
        record = await stage.ended(batch_id)
    assert record.status == "cancelled"
    await check_results(stage, record)


@pytest.mark.parametrize("what", ["the first part", "the second part", "the output"])
async def test_a_steerer_that_slept_changes_nothing(stage: BatchStage, what: str) -> None:
    """It wakes when another one has finished its batch."""
    batch_id = await stage.create(some_lines())
    storage, files = halting(stage, WRITES[what](batch_id), is_late=False)
    async with stage.steerer("b1", storage=storage, files=files) as sleeper:
        await halted(storage)
        [(_, sleeping)] = sleeper._steered.values()
        await stage.store.drop_leases([batch_id], "b1")
        async with stage.steerer("b2"):
            record = await stage.ended(batch_id)
            storage.go.set()
            await sleeping
    assert await stage.store.get(batch_id) == record
    await check_results(stage, record)


class GreedyStore(BatchStore):
    """For who thinks that every lease is his."""

    async def take_lease(
        self,
        batch_id: str,  # noqa: ARG002 - as it is called
        owner: str,  # noqa: ARG002
        lease_ms: int,  # noqa: ARG002
    ) -> bool:
        return True

    async def unsteered(self, pool: str) -> list[str]:
        return await self.active(pool)


async def test_two_who_steer_one_batch_do_not_harm_it(stage: BatchStage) -> None:
    """The parts are the fence: a lease only saves work."""
    batch_id = await stage.create(some_lines())
    greedy = GreedyStore(stage.stand.broker._redis)
    async with stage.steerer("b1", store=greedy), stage.steerer("b2", store=greedy):
        record = await stage.ended(batch_id)
        assert record.status == "completed"
        await check_results(stage, record)


async def test_a_steerer_steps_down_when_its_lease_is_anothers(
    stage: BatchStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it runs into a part of the other one."""
    monkeypatch.setattr("workers.background.steering._RENEW_S", 0.05)
    batch_id = await stage.create(some_lines())
    storage, files = halting(stage, part_name(batch_id, 1), is_late=False)
    async with stage.steerer("b1", storage=storage, files=files) as first:
        await halted(storage)
        [(_, task)] = first._steered.values()
        redis: RawRedis = stage.stand.broker._redis
        await redis.set(keys.batch_lease(batch_id), "b2", px=60_000)
        async with asyncio.timeout(20):
            await task
        assert not first._steered
    await stage.store.drop_leases([batch_id], "b2")
    async with stage.steerer("b3"):
        await check_results(stage, await stage.ended(batch_id))


_FORGET = """
local gone = 0
for _, kind in ipairs({'gen:*', 'spec:*', 'log:*', 'lane:*', 'held:*', 'due'}) do
  for _, key in ipairs(redis.call('KEYS', 'hr:{simulated/0}:' .. kind)) do
    gone = gone + redis.call('DEL', key)
  end
end
return gone
"""
"""All of the pool's generations at once, as a server does that lost them."""


async def test_redis_may_forget_all_of_a_batch_but_its_record(stage: BatchStage) -> None:
    """What was queued, running or ended is run again; what a part holds is not."""
    batch_id = await stage.create(some_lines())
    redis: RawRedis = stage.stand.broker._redis
    num_forgotten = 0
    async with stage.steerer():
        for num_lines in (10, 40):
            await stage.has_finished(batch_id, num_lines)
            num_forgotten += await redis.eval(_FORGET, 0)
        record = await stage.ended(batch_id)
    assert num_forgotten > 10
    assert record.status == "completed"
    await check_results(stage, record)


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
async def test_a_record_that_went_back_in_time_ends_as_before(
    stage: BatchStage, status: Any
) -> None:
    """Nothing is run again, and the files are the same, byte by byte."""
    batch_id = await stage.create(some_lines())
    async with stage.steerer():
        record = await stage.ended(batch_id)
    content = await stage.gateway.client.get(f"/v1/files/{record.output_file_id}/content")
    back = msgspec.structs.replace(
        record, status=status, num_parts=0, output_file_id=None, error_file_id=None
    )
    await stage.store.change(batch_id, lambda _: back)
    async with stage.steerer():
        again = await stage.ended(batch_id)
    assert again.status == "completed"
    assert again.output_file_id == record.output_file_id
    same = await stage.gateway.client.get(f"/v1/files/{again.output_file_id}/content")
    assert same.content == content.content
    await check_results(stage, again)


async def test_a_batch_whose_record_is_gone_is_nothing_to_steer(stage: BatchStage) -> None:
    """And nobody looks for it any more."""
    batch_id = await stage.create(some_lines())
    redis: RawRedis = stage.stand.broker._redis
    await redis.delete(keys.batch(batch_id))
    async with stage._means("b1") as means:
        await Steering(means, batch_id).run()
    assert await stage.store.active("simulated") == []
