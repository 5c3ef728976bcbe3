"""The connection between worker and Redis breaks, stalls or crawls, or Redis itself dies."""

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.broker import Broker, connect
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.processes import processes
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker_parts import tokens_of
from tests.support.worker_pool import POOL, WorkerPool
from workers import exit_codes


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(redis_url) as proxy:
        yield proxy


async def test_a_lost_claim_answer_costs_a_beat(pool: WorkerPool, proxy: FaultProxy) -> None:
    """Nobody knows that it is claimed; the next beat hands it back and it runs, without a death."""
    worker = await pool.worker(redis_url=proxy.url)
    caught = proxy.lose_answer(b"_claim")
    await asyncio.wait_for(caught.hit.wait(), 10)  # an idle look; its answer held nothing
    lost = proxy.lose_answer(b"_claim", times=2)
    generation = await pool.admit(20)
    entries = await pool.end_of(generation, within_s=10)
    assert lost.hit.is_set()
    timing = entries[-1].timing
    assert timing is not None
    assert timing.deaths == 0
    assert timing.attempts == len(worker.events("claim.recovered")) + 1


async def test_lost_publish_answers_repeat_nothing(pool: WorkerPool, proxy: FaultProxy) -> None:
    """Redis has the tokens and the worker does not know: what it sends again changes nothing."""
    worker = await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=10)
    undisturbed = await pool.tokens_of(await pool.admit(100))
    generation = await pool.admit(100)
    await pool.reached(generation, 5)
    for position in (10, 20, 30, 40):
        proxy.lose_answer(b"_publish")
        await pool.reached(generation, position)
    assert await pool.tokens_of(generation) == undisturbed
    assert len(worker.events("redis.disconnected")) >= 3
    assert worker.events("generation.lost") == []


async def test_a_cut_connection_is_a_pause(pool: WorkerPool, proxy: FaultProxy) -> None:
    """Shorter than the lease: the same worker goes on, nothing was handed over."""
    worker = await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=20, lease_ms=10_000)
    undisturbed = await pool.tokens_of(await pool.admit(120))
    generation = await pool.admit(120)
    await pool.reached(generation, 10)
    await proxy.cut()
    await worker.saw("redis.disconnected")
    await proxy.heal()
    await worker.saw("redis.reconnected")
    entries = await pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert (timing.attempts, timing.deaths) == (1, 0)
    assert tokens_of(entries) == undisturbed


async def test_after_a_cut_longer_than_the_lease_the_worker_keeps_its_own(
    pool: WorkerPool, proxy: FaultProxy
) -> None:
    """Nobody else reaped it meanwhile: the first thing it says is a beat, so it does not either."""
    worker = await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=20)
    generation = await pool.admit(200)
    await pool.reached(generation, 10)
    await proxy.cut()
    [shown] = (await pool.broker.state()).workers

    async def is_expired() -> bool:
        return (await pool.broker.state()).workers[0].expires_in_ms < 0

    await wait_until(is_expired, what="the end of the lease")
    await proxy.heal()
    await worker.saw("redis.reconnected")
    assert len(await pool.tokens_of(generation)) == 200
    assert worker.events("job.requeued") == []
    assert worker.events("generation.lost") == []
    assert shown.name == worker.name


async def test_the_engine_waits_when_redis_is_away_for_long(
    pool: WorkerPool, proxy: FaultProxy
) -> None:
    """256 tokens ahead of Redis it pauses; with Redis back it publishes and goes on."""
    worker = await pool.worker(
        redis_url=proxy.url,
        simulated_first_token_ms=0,
        simulated_inter_token_ms=5,
        lease_ms=20_000,
    )
    generation = await pool.admit(900)
    await pool.reached(generation, 10)
    await proxy.cut()
    paused = await worker.saw("engine.paused")
    assert 256 <= paused["unacknowledged"] <= 258
    await proxy.heal()
    await worker.saw("engine.resumed")
    entries = await pool.end_of(generation)
    assert max(len(entry.record.tokens) for entry in entries) >= 256, "sent as one record"


async def test_a_slow_network_makes_larger_records(pool: WorkerPool, proxy: FaultProxy) -> None:
    """With 50 ms each way several steps share a publish: the stream keeps the engine's pace."""
    await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=5, lease_ms=5000)
    proxy.delay_s["to_server"] = proxy.delay_s["to_client"] = 0.05
    entries = await pool.end_of(await pool.admit(150))
    assert sum(len(entry.record.tokens) for entry in entries) == 150
    assert len(entries) < 75


async def test_a_stalled_connection_is_given_up_and_replaced(
    pool: WorkerPool, proxy: FaultProxy
) -> None:
    """No error comes from a link that swallows everything: the command's own limit ends it."""
    worker = await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=20, lease_ms=20_000)
    generation = await pool.admit(150)
    await pool.reached(generation, 10)
    proxy.stall("to_client")
    await worker.saw("redis.disconnected", within_s=15)
    proxy.flow()
    assert len(await pool.tokens_of(generation)) == 150
    assert worker.events("generation.lost") == []


async def test_sigterm_without_redis_ends_at_once(pool: WorkerPool, proxy: FaultProxy) -> None:
    """There is nobody to hand over to; the lease ends it."""
    worker = await pool.worker(redis_url=proxy.url, simulated_inter_token_ms=50, drain_s=30)
    generation = await pool.admit(200)
    await pool.reached(generation, 2)
    await proxy.cut()
    await worker.saw("redis.disconnected")
    worker.terminate()
    assert await worker.ended(within_s=5) == exit_codes.NOT_HANDED_OVER


@pytest.fixture
async def own_pool(own_server: RedisServer, tmp_path: Path) -> AsyncIterator[WorkerPool]:
    broker = Broker(connect(own_server.url), POOL)
    with processes(own_server.url, tmp_path / "processes") as started:
        yield WorkerPool(broker, started)
    await broker.close()


async def test_redis_is_killed_and_comes_back(
    own_pool: WorkerPool, own_server: RedisServer
) -> None:
    """A pause, and then the same attempt goes on: no death, no gap, the same tokens."""
    worker = await own_pool.worker(simulated_inter_token_ms=20)
    undisturbed = await own_pool.tokens_of(await own_pool.admit(150))
    generation = await own_pool.admit(150)
    await own_pool.reached(generation, 10)
    own_server.kill()
    await worker.saw("redis.disconnected")
    await start_again(own_pool, own_server)
    await worker.saw("redis.reconnected")
    entries = await own_pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert timing.deaths == 0
    assert tokens_of(entries) == undisturbed


async def test_redis_comes_back_without_its_last_second(
    own_pool: WorkerPool, own_server: RedisServer, tmp_path: Path
) -> None:
    """Acknowledged tokens and an end are gone: the worker still has them and sends them again."""
    worker = await own_pool.worker(simulated_inter_token_ms=20)
    undisturbed = await own_pool.tokens_of(await own_pool.admit(150))
    longer, ending = await own_pool.admit(150), await own_pool.admit(40)
    await own_pool.reached(ending, 20)
    saved = tmp_path / "saved"
    await copy_when_written(own_pool, own_server, saved)
    await own_pool.end_of(ending)
    forgotten = await own_pool.position(longer)

    own_server.kill()
    shutil.rmtree(own_server.directory)
    shutil.copytree(saved, own_server.directory)
    await start_again(own_pool, own_server)
    await worker.saw("redis.reconnected")
    assert await own_pool.tokens_of(ending) == undisturbed[:40]
    assert await own_pool.tokens_of(longer) == undisturbed
    assert forgotten > 20
    timings = [(await own_pool.end_of(it))[-1].timing for it in (ending, longer)]
    assert [timing.attempts for timing in timings if timing] == [1, 1], "nothing was run again"
    assert worker.events("generation.realigned") != []
    assert worker.events("generation.lost") == []


async def test_a_server_without_memory_is_told_what_runs(tmp_path: Path) -> None:
    """It comes back empty: the worker has prompt, tokens and all else, and goes on with them."""
    with (
        RedisServer("valkey", tmp_path / "forgetful", ("--appendonly", "no")) as server,
        processes(server.url, tmp_path / "processes") as started,
    ):
        pool = WorkerPool(Broker(connect(server.url), POOL), started)
        worker = await pool.worker(simulated_inter_token_ms=20)
        undisturbed = await pool.tokens_of(await pool.admit(150))
        generation = await pool.admit(150)
        await pool.reached(generation, 20)
        server.kill()
        await worker.saw("redis.disconnected")
        await start_again(pool, server)
        await worker.saw("generation.restored", position=0)
        entries = await pool.end_of(generation)
        timing = entries[-1].timing
        assert timing is not None
        assert (timing.attempts, timing.deaths) == (1, 0)
        assert tokens_of(entries) == undisturbed
        after = await pool.tokens_of(await pool.admit(30))
        assert after == undisturbed[:30], "what comes later is served as ever"
        await pool.broker.close()


async def start_again(pool: WorkerPool, server: RedisServer) -> None:
    """Start the server, and let the test's own broker connect anew."""
    await pool.broker.close()
    server.start()


async def copy_when_written(pool: WorkerPool, server: RedisServer, to: Path) -> None:
    """Copy the server's files as they are on disk now, the claims of the test among them."""
    client = connect(server.url)
    await client.execute_command("WAITAOF", 1, 0, 5000)
    await client.aclose()
    shutil.copytree(server.directory, to)
    assert await pool.broker.state()


async def test_a_redis_that_slept_costs_no_worker_its_lease(
    own_pool: WorkerPool, own_server: RedisServer
) -> None:
    """SIGSTOP of the server beyond every lease: nobody has died of that."""
    worker = await own_pool.worker(simulated_inter_token_ms=30)
    generation = await own_pool.admit(100)
    await own_pool.reached(generation, 5)
    assert own_server.process is not None
    own_server.process.send_signal(signal.SIGSTOP)
    awake_s = time.monotonic() + 6
    await worker.saw("redis.disconnected", within_s=15)
    await wait_until(lambda: time.monotonic() > awake_s, what="a sleep of six seconds")
    own_server.process.send_signal(signal.SIGCONT)
    entries = await own_pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert (timing.attempts, timing.deaths) == (1, 0)
