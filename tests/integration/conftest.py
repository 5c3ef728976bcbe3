"""Real worker processes, and gateways in the test's own loop, for the tests of this folder."""

import signal
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from tests.support.gateway_app import simulated_data_dir, stand
from tests.support.redis_server import RawRedis, RedisServer
from tests.support.worker_pool import pool, started

__all__ = ["pool", "simulated_data_dir", "stand", "started"]


@pytest.fixture
async def raw(any_redis_server: RedisServer) -> AsyncIterator[RawRedis]:
    """A plain client, to look at keys and to set leases into the past."""
    client = Redis.from_url(any_redis_server.url, decode_responses=True, encoding_errors="replace")
    yield client
    await client.aclose()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A worker takes SIGTERM and SIGINT; give them back to the test run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
