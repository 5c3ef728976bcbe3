"""The connection: what may interrupt a command, and what that leaves behind."""

import asyncio

import pytest

from common.broker import connect
from tests.support.redis_server import RawRedis


@pytest.mark.parametrize("kind", ["pool", "single", "blocking"])
async def test_a_command_may_be_cancelled_at_any_moment(redis_url: str, kind: str) -> None:
    """Whoever cancels a task sees it end as cancelled, wherever in a command it was: a task told
    to stop must not go on. The client works afterwards, and no answer reaches the wrong command."""
    client: RawRedis = connect(redis_url, blocking=kind == "blocking", single=kind == "single")
    for num_turns in range(40):
        started = asyncio.create_task(client.echo("lost"))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if started.cancel():
            with pytest.raises(asyncio.CancelledError):
                await started
        assert await client.echo(str(num_turns)) == str(num_turns).encode()
    await client.aclose()
