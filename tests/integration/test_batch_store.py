"""Records of batches in Redis: compare-and-set, tenants, leases, and word of changes."""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial

import msgspec
import pytest

from common.batches import (
    MAX_ERRORS,
    BatchError,
    BatchRecord,
    Counts,
    Usage,
    new_batch_id,
    result_file_id,
)
from common.broker import BatchStore, BatchWatch, connect
from tests.support.batches import batch_record
from tests.support.fault_proxy import fault_proxy

POOL = "model"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[BatchStore]:
    redis = connect(redis_url)
    yield BatchStore(redis)
    await redis.aclose()


@pytest.fixture
async def blocking_store(redis_url: str) -> AsyncIterator[BatchStore]:
    redis = connect(redis_url, blocking=True)
    yield BatchStore(redis)
    await redis.aclose()


new_record = partial(batch_record, pool=POOL)


def test_ids_are_of_openais_form() -> None:
    """And those of the files of results follow from them."""
    id = new_batch_id()
    assert re.fullmatch("batch_[0-9a-f]{32}", id)
    assert result_file_id(id, "output") == result_file_id(id, "output")
    assert result_file_id(id, "output") != result_file_id(id, "error")


def test_a_record_is_shown_as_openai_shows_a_batch() -> None:
    """Times that have not come are null, and so are files that are not there."""
    shown = new_record(metadata={"night": "1"}).shown()
    assert shown.pop("id").startswith("batch_")
    assert shown == {
        "object": "batch",
        "endpoint": "/v1/completions",
        "model": None,
        "errors": None,
        "input_file_id": "file-1",
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": 1000,
        "in_progress_at": None,
        "expires_at": 1000 + 24 * 3600,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 0,
        },
        "metadata": {"night": "1"},
    }


def test_states_are_left_by_their_own_steps_alone() -> None:
    """Whatever comes late, or twice, finds that it does not apply any more."""
    validating = new_record()
    assert validating.ended(None, None, 5) is None
    assert validating.finalizing(5) is None
    failed = validating.refused([BatchError("empty_file", "It is empty.")] * 200, 5)
    assert failed is not None
    assert failed.is_final
    assert len(failed.errors) == MAX_ERRORS
    assert failed.begun(3, "m", 6) is None
    assert failed.cancelling(6) is None
    running = validating.begun(3, "m", 6)
    assert running is not None
    assert (running.status, running.counts.total, running.in_progress_at) == ("in_progress", 3, 6)
    assert running.begun(4, "m", 7) is None
    cancelling = running.cancelling(7)
    assert cancelling is not None
    assert cancelling.finalizing(8) is None
    cancelled = cancelling.ended("file-o", None, 9)
    assert cancelled is not None
    assert (cancelled.status, cancelled.output_file_id) == ("cancelled", "file-o")
    for is_late, status in ((False, "completed"), (True, "expired")):
        finalizing = running.finalizing(8, is_late=is_late)
        assert finalizing is not None
        assert finalizing.cancelling(9) is None, "there is nothing left to be cancelled"
        ended = finalizing.ended("file-o", "file-e", 9)
        assert ended is not None
        assert ended.status == status
        assert ended.counted(9, Counts(3, 3), Usage()) is None


def test_late_counts_do_not_lower_later_ones() -> None:
    """Parts have an order, and so have the counts behind them."""
    record = new_record(status="in_progress", num_parts=3, counts=Counts(9, 5, 1))
    assert record.counted(3, Counts(9, 4, 1), Usage()) is None
    later = record.counted(4, Counts(9, 7, 1), Usage(5, 0, 7))
    assert later is not None
    assert (later.counts.finished, later.usage.output_tokens) == (8, 7)


async def test_a_batch_is_created_once(store: BatchStore) -> None:
    """The same id again changes nothing."""
    record = new_record(tenant="acme")
    assert await store.create(record) == record
    other = msgspec.structs.replace(record, input_file_id="file-2")
    assert await store.create(other) == record
    assert await store.get(record.id) == record
    assert await store.get(record.id, "acme") == record
    assert await store.get(record.id, "other") is None
    assert await store.active(POOL) == [record.id]
    assert await store.active("another") == []


async def test_of_two_who_change_a_record_both_are_heard(store: BatchStore) -> None:
    """Nobody overwrites what he has not seen."""
    record = await store.create(new_record(status="in_progress", counts=Counts(100)))

    def add(record: BatchRecord) -> BatchRecord | None:
        counts = replace_counts(record.counts)
        return record.counted(record.num_parts + 1, counts, record.usage + Usage(1))

    def replace_counts(counts: Counts) -> Counts:
        return Counts(counts.total, counts.completed + 1, counts.failed)

    await asyncio.gather(*(store.change(record.id, add) for _ in range(20)))
    changed = await store.get(record.id)
    assert changed is not None
    assert (changed.num_parts, changed.counts.completed, changed.usage.input_tokens) == (20, 20, 20)
    assert await store.change(new_batch_id(), add) is None


async def test_a_tenant_lists_its_batches_the_newest_first(store: BatchStore) -> None:
    """Page by page, and no other tenant's."""
    ids = [(await store.create(new_record(tenant="acme"))).id for _ in range(5)]
    await store.create(new_record(tenant="other"))
    seen: list[str] = []
    while True:
        page = await store.page("acme", limit=2, after=seen[-1] if seen else "")
        assert page is not None
        records, has_more = page
        seen += [record.id for record in records]
        if not has_more:
            break
    assert sorted(seen) == sorted(ids)
    assert await store.page("acme", limit=2, after=new_batch_id()) is None
    assert await store.page("nobody", limit=2) == ([], False)


async def test_one_steers_at_a_time(store: BatchStore) -> None:
    """Until it ends its lease, or has it ended by who saw it die."""
    record = await store.create(new_record())
    assert await store.unsteered(POOL) == [record.id]
    assert await store.take_lease(record.id, "b1", 60_000)
    assert await store.take_lease(record.id, "b1", 60_000), "it is renewed"
    assert not await store.take_lease(record.id, "b2", 60_000)
    assert await store.unsteered(POOL) == []
    await store.drop_leases([record.id], "b2")
    assert not await store.take_lease(record.id, "b2", 60_000)
    await store.drop_leases([record.id], "b1")
    assert await store.take_lease(record.id, "b2", 60_000)


async def test_what_has_ended_is_steered_no_more(store: BatchStore) -> None:
    """Its folder is kept for a while, and who clears it says so."""
    record = await store.create(new_record())
    await store.change(record.id, lambda it: it.refused([BatchError("empty_file", "Empty.")], 5))
    assert await store.unsteered(POOL) == []
    assert await store.ended_before(2**40) == [record.id]
    assert await store.ended_before(5) == []
    await store.note_cleared(record.id)
    assert await store.ended_before(2**40) == []


async def test_who_follows_a_batch_is_woken_by_its_changes(
    store: BatchStore, blocking_store: BatchStore
) -> None:
    """At first, as he may have missed some, and then by each; not by those of another batch."""
    followed, other = await store.create(new_record()), await store.create(new_record())
    watch = BatchWatch(blocking_store)
    async with asyncio.timeout(30), watch.following(followed.id) as changed:
        async with watch.following(other.id) as other_changed:
            changed.clear()
            await changed.wait()  # now it is known what happened before
            for event in (changed, other_changed):
                event.clear()
            await store.change(followed.id, lambda it: it.begun(1, None, 5))
            await changed.wait()
            assert not other_changed.is_set()
        changed.clear()
        await store.change(followed.id, lambda it: it.finalizing(6))
        await changed.wait()


async def test_who_follows_is_woken_again_after_a_loss_of_redis(
    store: BatchStore, redis_url: str
) -> None:
    """What changed meanwhile was missed, so he has to look."""
    record = await store.create(new_record())
    async with fault_proxy(redis_url) as proxy:
        redis = connect(proxy.url, blocking=True)
        async with asyncio.timeout(30), BatchWatch(BatchStore(redis)).following(record.id) as event:
            event.clear()
            await event.wait()
            event.clear()
            await proxy.cut()
            await store.change(record.id, lambda it: it.begun(1, None, 5))
            await proxy.heal()
            await event.wait()
        await redis.aclose()
