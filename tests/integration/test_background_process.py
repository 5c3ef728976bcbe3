"""The background process: scheduled jobs once per time, reaping, and losses of Redis."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from arq.connections import ArqRedis

from common.broker import Broker, connect
from common.files import Files
from common.settings import BackgroundSettings
from common.storage import open_storage
from tests.support.event_schema import captured_logs
from tests.support.fault_proxy import fault_proxy
from tests.support.generations import ScriptedClaims
from tests.support.processes import Processes
from tests.support.waiting import wait_until
from tests.support.worker_pool import POOL, WorkerPool
from workers import exit_codes
from workers.background.jobs import context, expire_files, measure_pool, scheduled
from workers.background.process import QUEUE, create_queue, create_worker


async def test_it_starts_reaps_and_ends_on_sigterm(pool: WorkerPool, started: Processes) -> None:
    """What a dead worker held goes back although no other worker or gateway is alive."""
    claims = ScriptedClaims(pool.broker, lease_ms=600)
    await claims.beat()
    generation = await pool.admit(5)
    await claims.claim_one()
    background = await started.background().ready()
    moved = await background.saw("job.requeued", job_id=generation)
    assert (moved["cause"], moved["worker"]) == ("lease", "w1")
    background.terminate()
    assert await background.ended() == exit_codes.OK
    assert background.events("background.stopped")
    assert background.errors() == ""


async def test_it_outlives_a_lost_connection(redis_url: str, started: Processes) -> None:
    """arq gives up when Redis is away; the process starts it again."""
    async with fault_proxy(redis_url) as proxy:
        background = await started.background(redis_url=proxy.url).ready()
        await proxy.cut()
        await background.saw("redis.disconnected")
        await proxy.heal()
        await background.saw("redis.reconnected")
        await wait_until(
            lambda: len(background.events("background.ready")) == 2, what="its second start"
        )
        background.terminate()
        assert await background.ended() == exit_codes.OK


async def test_the_list_of_jobs_does_not_outlive_all_processes(redis_url: str) -> None:
    queue = create_queue(BackgroundSettings(redis_url=redis_url))
    await queue.enqueue_job("measure_pool")
    assert await queue.ttl(QUEUE) > 0
    await queue.aclose(close_connection_pool=True)


async def test_an_unreachable_redis_is_one_clear_line(started: Processes) -> None:
    """At the start it is waited for some seconds only."""
    background = started.background(redis_url="redis://127.0.0.1:1/0")
    assert await background.ended() == exit_codes.UNREACHABLE
    assert background.errors().startswith("headrace background: BROKER_UNAVAILABLE")
    assert background.errors().count("\n") == 1


def files_of(broker: Broker, folder: Path) -> Files:
    return Files(open_storage(f"file://{folder}", folder), broker.file_store)


async def test_the_pool_is_measured_once_a_minute(broker: Broker, tmp_path: Path) -> None:
    """One line with what an autoscaler would look at."""
    claims = ScriptedClaims(broker)
    await claims.beat()
    with captured_logs() as lines:
        await measure_pool(context(broker, files_of(broker, tmp_path)))
    [line] = lines
    assert (line["event"], line["pool"], line["workers"]) == ("pool.measured", broker.pool, 1)
    assert line["waiting"] == {"priority": 0, "default": 0, "flex": 0, "batch": 0}
    job = {job.name: job for job in scheduled()}["measure_pool"]
    assert (job.second, job.unique) == (0, True)
    assert job.minute is None, "each minute"


async def test_files_are_removed_at_their_end(broker: Broker, tmp_path: Path) -> None:
    """Each minute those whose time is over, and no others."""
    files = files_of(broker, tmp_path)

    async def rows() -> AsyncIterator[bytes]:
        yield b"rows"

    for life_s in (-1, 3600):
        await files.create("public", "a", "batch", rows(), expires_s=life_s)
    with captured_logs() as lines:
        for _ in range(2):
            await expire_files(context(broker, files))
    assert lines == [{"event": "file.expired", "count": 1, "log_level": "info"}]
    assert len(list((tmp_path / "files").iterdir())) == 1
    job = {job.name: job for job in scheduled()}["expire_files"]
    assert (job.unique, job.minute) == (True, None)


@pytest.fixture
async def jobs(redis_url: str, tmp_path: Path) -> AsyncIterator[ArqRedis]:
    settings = BackgroundSettings(redis_url=redis_url, model=POOL, data_dir=tmp_path)
    broker = Broker(connect(redis_url), POOL)
    ctx = context(broker, files_of(broker, tmp_path))
    worker = create_worker(settings, ctx, handle_signals=False)
    pool = worker.pool
    yield pool
    await cast(Any, pool.connection_pool).disconnect()
    await broker.close()


async def test_jobs_are_stored_as_msgpack(jobs: ArqRedis) -> None:
    """Never pickle: whoever can write to Redis must not run code in this process."""
    job = await jobs.enqueue_job("measure_pool", {"batch": "b1"}, _defer_by=60)
    assert job is not None
    stored = await jobs.get(f"arq:job:{job.job_id}")
    assert stored is not None
    assert msgspec.msgpack.decode(stored)["a"] == [{"batch": "b1"}]
    [queued] = await jobs.queued_jobs()
    assert queued.args == [{"batch": "b1"}]
    await jobs.delete(QUEUE)


async def test_a_redis_that_is_just_being_started_is_waited_for(
    started: Processes, redis_url: str
) -> None:
    """Else everything would be started twice when it all is started at once."""
    async with fault_proxy(redis_url) as proxy:
        await proxy.cut()
        background = started.background(redis_url=proxy.url)
        await background.saw("background.started")
        await proxy.heal()
        await background.ready()
        assert not background.events("background.failed")
