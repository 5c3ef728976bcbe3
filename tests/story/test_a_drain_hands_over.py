"""A rolling restart: SIGTERM moves running generations to another worker."""

import time

from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage


async def test_a_drain_hands_over(stage: Stage) -> None:
    """What does not finish in the budget continues elsewhere at once, not after a lease."""
    await stage.two_workers(drain_s=0.2, lease_ms=30_000)
    _, client = await stage.gateway()
    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=100, seed=3) as events:
        await take(events, 10)
        leaving, _ = await stage.holder_and_heir(reader.stream_id)
        leaving.terminate()
        since = time.monotonic()
        async for _ in events:
            pass
    reader.check_whole()
    assert reader.end["headrace"]["attempts"] == 2
    assert await leaving.ended() == 0
    assert time.monotonic() - since < 20, "the lease was 30 s; nobody waited for it"


async def test_short_work_finishes_before_its_worker_leaves(stage: Stage) -> None:
    leaving = await stage.worker(drain_s=10)
    _, client = await stage.gateway()
    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=30, seed=3) as events:
        await take(events, 2)
        leaving.terminate()
        async for _ in events:
            pass
    reader.check_whole()
    assert reader.end["headrace"]["attempts"] == 1
    assert await leaving.ended() == 0
