"""A client that lost its connection may send its request again: a key says it is the same."""

from contextlib import suppress

import httpx

from ops.bench.sse_client import Reader, take
from tests.story.conftest import Stage

KEY = {"Idempotency-Key": "a1b2c3"}


async def test_a_request_sent_again_after_its_gateway_died_has_the_same_tokens(
    stage: Stage,
) -> None:
    """Nobody chose a seed, so another generation would say something else."""
    await stage.worker()
    first, first_client = await stage.gateway()
    _, second_client = await stage.gateway()
    before, again = Reader(), Reader()
    wish = {"max_new_tokens": 60, "do_sample": True}
    with suppress(httpx.HTTPError):  # a connection may break in several ways
        async with before.generate(first_client, "hello", KEY, **wish) as events:
            await take(events, 10)
            first.kill()
            async for _ in events:
                pass
    async with again.generate(second_client, "hello", KEY, **wish) as events:
        async for _ in events:
            pass
    again.check_whole()
    assert again.headers["idempotent-replayed"] == "true"
    assert again.stream_id == before.stream_id
    assert again.token_ids[: len(before.token_ids)] == before.token_ids
    assert len(again.token_ids) > len(before.token_ids) >= 10
