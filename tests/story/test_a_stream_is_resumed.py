"""A stream belongs to no gateway: any of them continues it from any position."""

from contextlib import suppress

import httpx

from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage


async def test_a_stream_is_resumed_on_another_gateway(stage: Stage) -> None:
    """The first gateway is killed in mid-stream; the second gives the exact rest."""
    await stage.worker()
    first, first_client = await stage.gateway()
    _, second_client = await stage.gateway()
    whole = await Reader().read_all(second_client, "hello", max_new_tokens=60, seed=3)

    reader = Reader()
    with suppress(httpx.HTTPError):  # a connection may break in several ways
        async with reader.generate(first_client, "hello", max_new_tokens=60, seed=3) as events:
            await take(events, 10)
            first.kill()
            async for _ in events:
                pass
    async with reader.resume(second_client) as events:
        async for _ in events:
            pass
    reader.check_whole()
    assert reader.token_ids == whole.token_ids


async def test_after_the_end_there_is_nothing_to_resume(stage: Stage) -> None:
    """204 tells an EventSource to stop; an unknown stream is 404, a broken cursor 400."""
    await stage.worker()
    _, client = await stage.gateway()
    reader = await Reader().read_all(client, "hello", max_new_tokens=5)
    path = f"/v1/streams/{reader.stream_id}"
    assert (await client.get(path, headers={"Last-Event-ID": reader.cursor})).status_code == 204
    assert (await client.get(f"/v1/streams/{'0' * 32}")).status_code == 404
    broken = await client.get(path, params={"after": "nonsense"})
    assert broken.status_code == 400
    assert "after" in broken.text


async def test_a_stream_can_be_cancelled_by_name(stage: Stage) -> None:
    """DELETE ends it for every reader, with a final event that says so."""
    await stage.worker()
    _, client = await stage.gateway()
    reader = Reader()
    async with reader.generate(client, "hello", max_new_tokens=2000) as events:
        await take(events, 3)
        assert (await client.delete(f"/v1/streams/{reader.stream_id}")).status_code == 200
        async for _ in events:
            pass
    assert reader.end["headrace"]["finish_reason"] == "cancelled"
