"""What is promised for later is on the disk of Redis before it is promised."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.broker import Broker, broker, connect
from common.failures import Failure
from tests.conftest import POOL
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import Stand, stand_on
from tests.support.redis_server import Kind, RedisServer
from tests.support.scripted_worker import saying
from tests.support.waiting import wait_until

PROMISED = {"input": "Hello", "background": True}


@pytest.fixture
async def own_stand(own_server: RedisServer, simulated_data_dir: Path) -> AsyncIterator[Stand]:
    async with stand_on(own_server.url, simulated_data_dir) as stand:
        yield stand


async def test_a_promise_outlives_a_server_killed_right_after_it(
    own_stand: Stand, own_server: RedisServer
) -> None:
    worker = await own_stand.worker()
    gateway = await own_stand.gateway()
    promised = await gateway.client.post("/v1/responses", json=PROMISED)
    own_server.kill()
    assert promised.status_code == 200, promised.text
    own_server.start()
    await own_stand.broker.close()  # the connections of before
    await worker.beat()
    other = await own_stand.gateway()  # it knows nothing but what Redis holds
    path = f"/v1/responses/{promised.json()['id']}"

    async def is_completed() -> bool:
        return (await other.client.get(path)).json()["status"] == "completed"

    async with worker.acting(saying("Hello")):
        await wait_until(is_completed, what="the answer")


async def test_the_answer_waits_for_the_disk(stand: Stand) -> None:
    await stand.worker()
    async with fault_proxy(stand.redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        waiting = proxy.hold(b"WAITAOF")
        answer = asyncio.create_task(gateway.client.post("/v1/responses", json=PROMISED))
        await waiting.hit.wait()
        assert (await stand.broker.state()).waiting["default"] == 1, "it is queued already"
        assert not answer.done()
        waiting.release()
        assert (await answer).status_code == 200


async def test_without_the_disk_of_a_replica_nothing_is_promised(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told to try again, and nothing runs that nobody was told of."""
    monkeypatch.setattr(broker, "_DISK_LIMIT_MS", 100)
    await stand.worker()
    gateway = await stand.gateway(durable_replicas=1)
    refused = await gateway.client.post("/v1/responses", json=PROMISED)
    assert refused.status_code == 503
    assert "replicas: 0 of 1" in refused.json()["error"]["message"]
    await gateway.services.relay.flush()
    assert sum((await stand.broker.state()).waiting.values()) == 0


async def test_a_replica_with_a_disk_is_waited_for(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    options = ("--replicaof", f"127.0.0.1 {redis_server.port}", "--repl-diskless-sync-delay", "0")
    pool = Broker(connect(redis_server.url), POOL, durable_replicas=1)

    async def is_replicated() -> bool:
        return "replicas" not in await pool.durability_gap()

    with RedisServer("valkey", tmp_path / "replica", options) as replica:
        await wait_until(is_replicated, what="the replica", timeout_s=60)
        assert await pool.durable()
        replica.kill()
        with pytest.raises(Failure, match="replicas: 0 of 1"):
            await pool.durable()
    await pool.close()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_a_server_that_cannot_tell_is_named_and_used(kind: Kind, tmp_path: Path) -> None:
    """Redis 7.0 has no WAITAOF; a server without an append-only file has nothing to wait for."""
    options = ("--appendonly", "no") if kind == "valkey" else ()
    with RedisServer(kind, tmp_path / kind, options) as server:
        pool = Broker(connect(server.url), POOL)
        assert not await pool.durable()
        assert "needs version 7.2" in await pool.durability_gap()
        await pool.close()
