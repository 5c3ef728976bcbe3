"""Overload is said before any work is done, with a real status code."""

from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage


async def test_the_queue_is_full(stage: Stage) -> None:
    """429 with Retry-After for who comes too late; who was accepted is served."""
    await stage.worker(max_batch_size=1)
    _, client = await stage.gateway(lane_cap_tokens=100)
    running, waiting = Reader(), Reader()
    async with running.generate(client, "a", max_new_tokens=60) as first:
        await take(first, 1)
        async with waiting.generate(client, "b", max_new_tokens=60) as second:
            body = {"inputs": "c", "parameters": {"max_new_tokens": 60}}
            refused = await client.post("/generate_stream", json=body)
            assert refused.status_code == 429
            assert refused.json()["error_type"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            for events in (first, second):
                async for _ in events:
                    pass
    running.check_whole()
    waiting.check_whole()
