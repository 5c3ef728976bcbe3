"""Fixtures for all tests: a real server, emptied for each test, and brokers on it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from common import logs
from common.broker import Broker, connect
from tests.support import event_schema
from tests.support.redis_server import RedisServer

POOL = "test"

# How long an example takes is the machine's business, and no failure of ours.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _log_chain() -> None:
    """What is logged in this process goes through the chain of the product."""
    logs.set_up_chain(check=event_schema.note)


@pytest.fixture(autouse=True)
def _events_are_in_the_schema(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each event of a test, in this process or in one that it started, is as the schema says."""
    event_schema.noted()
    yield
    faults = event_schema.noted()
    folder = request.node.funcargs.get("tmp_path")
    if folder is not None:
        for log in [*folder.rglob("*.jsonl"), *folder.rglob("stdout")]:
            faults += event_schema.violations_in(log)
    assert not faults, "not as common/events.schema.json says:\n" + "\n".join(faults)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Valkey, as the embedded default runs it."""
    with RedisServer("valkey", tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def debian_redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Redis 7.0, the oldest server we promise to work on."""
    with RedisServer("redis", tmp_path_factory.mktemp("redis")) as server:
        yield server


def _emptied(server: RedisServer) -> Iterator[RedisServer]:
    server.flush()
    yield server
    leaked = server.keys_without_ttl()
    assert not leaked, f"keys without a time to live: {leaked}"


@pytest.fixture
def redis_server(valkey_server: RedisServer) -> Iterator[RedisServer]:
    """The server of this test: empty at its start; keys without a TTL at its end fail the test."""
    yield from _emptied(valkey_server)


@pytest.fixture(params=["valkey", "redis"])
def any_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """As ``redis_server``, once on Valkey and once on Redis 7.0."""
    name = "valkey_server" if request.param == "valkey" else "debian_redis_server"
    yield from _emptied(request.getfixturevalue(name))


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may kill."""
    with RedisServer("valkey", tmp_path / "own-server") as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    """A broker of the pool ``test``."""
    broker = Broker(connect(redis_url), POOL)
    await broker.load()
    yield broker
    await broker.close()


@pytest.fixture
async def blocking_broker(redis_url: str) -> AsyncIterator[Broker]:
    """The same pool on a connection that may block (bell, inbox)."""
    broker = Broker(connect(redis_url, blocking=True), POOL)
    yield broker
    await broker.close()
