"""The connection: what may interrupt a command, and what that leaves behind."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from common.broker import connect
from tests.support.fault_proxy import fault_proxy
from tests.support.redis_server import RawRedis
from tests.support.waiting import wait_until


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


async def test_answers_reach_those_who_asked(redis_url: str) -> None:
    """Many tasks share one connection, and a refusal among their commands is one of them's."""
    client: RawRedis = connect(redis_url, single=True)

    async def ask(number: int) -> bytes:
        try:
            return await client.execute_command(*(["ECHO", number] if number % 7 else ["NO-SUCH"]))
        except ResponseError:
            return b"refused"

    answers = await asyncio.gather(*map(ask, range(50)))
    assert answers == [b"%d" % n if n % 7 else b"refused" for n in range(50)]
    await client.aclose()


async def test_a_wait_that_was_cancelled_takes_nothing_later(redis_url: str) -> None:
    """The server would else give the next bell to somebody who has gone."""
    client: RawRedis = connect(redis_url, blocking=True)
    other: RawRedis = connect(redis_url, single=True)
    waiting = asyncio.create_task(client.execute_command("BLPOP", "bell", 30))

    async def num_waiting() -> int:
        return int((await other.info("clients"))["blocked_clients"])

    await wait_until(lambda: _is(num_waiting, 1))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await wait_until(lambda: _is(num_waiting, 0))
    await other.rpush("bell", "1")
    assert await client.lpop("bell") == b"1"
    await client.aclose()
    await other.aclose()


async def _is(count: Callable[[], Awaitable[int]], wanted: int) -> bool:
    return await count() == wanted


async def test_a_lost_connection_fails_what_was_asked_and_is_opened_anew(redis_url: str) -> None:
    async with fault_proxy(redis_url) as proxy:
        client: RawRedis = connect(proxy.url, single=True)
        assert await client.echo("before") == b"before"
        proxy.stall("to_client")
        asked = [asyncio.create_task(client.echo(str(number))) for number in range(3)]
        await asyncio.sleep(0)
        await proxy.cut()
        for task in asked:
            with pytest.raises(RedisConnectionError):
                await task
        await proxy.heal()
        proxy.flow()
        assert await client.echo("after") == b"after"
        await client.aclose()
