"""A client that goes away stops its generation, unless it asked otherwise."""

from common.broker import Broker, connect
from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage
from tests.support.waiting import wait_until


async def test_a_client_leaves_and_its_slot_is_free_within_a_step(
    stage: Stage, redis_url: str
) -> None:
    """One slot only: the next request can start because the first was really given up."""
    worker = await stage.worker(max_batch_size=1)
    _, client = await stage.gateway()
    gone = Reader()
    headers = {"x-headrace-disconnect": "cancel"}
    async with gone.generate(client, "first", headers=headers, max_new_tokens=2000) as events:
        await take(events, 3)

    await worker.saw("generation.cancelled", within_s=5)
    reader = await Reader().read_all(client, "second", max_new_tokens=5)
    reader.check_whole()
    assert reader.end["headrace"]["queue_time"] < 1.0
    line = worker.events("generation.cancelled")[-1]
    assert line["job_id"] == f"{gone.stream_id}.0"


async def test_a_dropped_connection_may_come_back_within_its_grace_time(stage: Stage) -> None:
    """By default a client has some seconds; it continues behind its last event."""
    await stage.worker()
    _, client = await stage.gateway()
    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=40) as events:
        await take(events, 5)
    async with reader.resume(client) as events:
        async for _ in events:
            pass
    reader.check_whole()


async def test_a_generation_may_run_on_without_its_client(stage: Stage, redis_url: str) -> None:
    """``x-headrace-disconnect: continue``: the answer waits in Redis until it is fetched."""
    await stage.worker()
    _, client = await stage.gateway()
    reader = Reader()
    headers = {"x-headrace-disconnect": "continue"}
    async with reader.generate(client, "hello", headers=headers, max_new_tokens=30) as events:
        await take(events, 1)

    broker = Broker(connect(redis_url), "simulated")

    async def has_ended() -> bool:
        page = await broker.read(f"{reader.stream_id}.0", 0)
        return page is not None and page.state == "T"

    await wait_until(has_ended)
    await broker.close()
    async with reader.resume(client) as events:
        async for _ in events:
            pass
    reader.check_whole()
