"""Redis comes back without its last moments: workers put back what was theirs, and nothing else."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from common.broker import Broker, Restoration, connect
from common.broker.keys import prefix
from common.clock import awake_or_not_s
from common.failures import Failure
from tests.conftest import POOL
from tests.support.broker_invariants import check_invariants
from tests.support.broker_view import PartitionView
from tests.support.event_schema import captured_logs
from tests.support.generations import ScriptedClaims, admission, admit
from tests.support.going_back import Disk
from tests.support.redis_server import RawRedis, RedisServer
from tests.support.waiting import wait_until
from tests.support.worker_parts import Parts, logged, tokens_of
from workers import publisher
from workers.attempts import Attempt

KEY = prefix(POOL)


@pytest.fixture
async def raw(any_redis_server: RedisServer) -> AsyncIterator[RawRedis]:
    client = Redis.from_url(any_redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture
async def broker(any_redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(connect(any_redis_server.url), POOL)
    await broker.load()
    yield broker
    await broker.close()


@pytest.fixture
async def blocking_broker(any_redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(connect(any_redis_server.url, blocking=True), POOL)
    yield broker
    await broker.close()


@pytest.fixture
async def parts(broker: Broker, blocking_broker: Broker) -> AsyncIterator[Parts]:
    parts = Parts(broker, blocking_broker)
    await parts.beat()
    await broker.beat_gateway("g1")
    yield parts
    await parts.close()


@pytest.fixture
def view(any_redis_server: RedisServer) -> PartitionView:
    return PartitionView(BlockingRedis.from_url(any_redis_server.url), POOL)


async def said(parts: Parts, attempt: Attempt, *tokens: int) -> None:
    parts.step(attempt, *tokens)
    await parts.publisher.publish()


async def come_back(parts: Parts, disk: Disk) -> None:
    await disk.go_back()
    await reconnect(parts)


async def reconnect(parts: Parts) -> None:
    """What a worker does on a new connection: a beat, then all that may be lost."""
    await parts.beat()
    parts.publisher.doubt_ended()
    for attempt in parts.ledger.running():
        attempt.heard_s = 0.0  # as long ago as a restart takes
    for _ in range(2):  # the second call brings what is behind the place that the first found out
        await parts.publisher.publish()


async def test_a_forgotten_claim_is_put_back(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    """It waits again as if nobody had it; the tokens that were shown are those that come back."""
    generation = await admit(parts.broker)
    disk = await Disk.of(raw)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11, 12)
    with captured_logs() as lines:
        await come_back(parts, disk)
    assert [line["event"] for line in lines] == ["generation.restored"]
    assert tokens_of(await logged(parts.broker, generation)) == [11, 12]
    check_invariants(view.look())
    parts.step(attempt, 13, finish="length")
    await parts.publisher.publish()
    entries = await logged(parts.broker, generation)
    assert tokens_of(entries) == [11, 12, 13]
    timing = entries[-1].timing
    assert timing is not None
    assert (timing.attempts, timing.deaths, timing.worker) == (1, 0, parts.name)
    check_invariants(view.look())


async def test_a_forgotten_generation_is_made_again(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    """Not even its admission is known: the worker has all that it takes."""
    disk = await Disk.of(raw)
    request = admission(tenant="acme", lane="flex", gateway="g1", grace_ms=7000)
    await parts.broker.admit(request)
    before = await raw.hgetall(f"{KEY}gen:{request.request_id}.0")
    [attempt] = await parts.claim()
    await said(parts, attempt, 11, 12)
    await come_back(parts, disk)
    assert tokens_of(await logged(parts.broker, attempt.id)) == [11, 12]
    check_invariants(view.look())
    after = await raw.hgetall(f"{KEY}gen:{request.request_id}.0")
    moving = {b"st", b"fence", b"next", b"chain", b"subs", b"epoch", b"ver", b"q", b"own", b"t1"}
    moving |= {b"t2", b"put_back", b"hold", b"died_at", b"fruitless", b"probation_deaths"}
    kept = {name: value for name, value in before.items() if name not in moving}
    assert kept.items() <= after.items()
    assert await parts.broker.read_spec(request.request_id) == request.spec
    attached = await parts.broker.attach("g1", attempt.id, "acme", 0)
    assert attached is not None
    assert attached.presentation == request.presentation
    parts.step(attempt, 13, finish="length")
    await parts.publisher.publish()
    assert tokens_of(await logged(parts.broker, attempt.id)) == [11, 12, 13]
    assert await parts.broker.read_spec(request.request_id) is None, "its prompt goes with its end"
    check_invariants(view.look())


async def test_an_end_that_was_forgotten_is_written_again(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    generation = await admit(parts.broker)
    disk = await Disk.of(raw)
    [attempt] = await parts.claim()
    parts.step(attempt, 11, 12, finish="length")
    await parts.publisher.publish()
    assert parts.ledger.running() == []
    await come_back(parts, disk)
    entries = await logged(parts.broker, generation)
    assert tokens_of(entries) == [11, 12]
    assert entries[-1].record.finish is not None
    check_invariants(view.look())


async def test_what_its_gateway_admitted_again_is_taken_out_of_the_lane(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    disk = await Disk.of(raw)
    request = admission()
    await parts.broker.admit(request)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11)
    await disk.go_back()
    await parts.broker.admit(replace(request, resubmit=True))
    await reconnect(parts)
    assert tokens_of(await logged(parts.broker, attempt.id)) == [11]
    state = await parts.broker.state()
    assert (sum(state.waiting.values()), sum(state.backlog_tokens.values())) == (0, 0)
    check_invariants(view.look())


async def test_choices_that_waited_are_queued_beside_those_put_back(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    disk = await Disk.of(raw)
    request = admission(num_choices=3)
    await parts.broker.admit(request)
    [attempt] = (await ScriptedClaims(parts.broker, "w2").claim(limit=1))[:1]
    assert attempt.claimed.spec is not None
    await disk.go_back()
    put_back = Restoration(
        attempt.id, attempt.claimed.fence, 0, "", "m@1", attempt.claimed.spec, attempt.claimed.head
    )
    assert await parts.broker.restore("w2", [put_back]) == []
    again = await parts.broker.admit(replace(request, resubmit=True))
    assert not again.existing
    assert (await parts.broker.state()).waiting["default"] == 2
    assert (await parts.broker.admit(replace(request, resubmit=True))).existing
    check_invariants(view.look())


async def test_the_tokens_of_an_earlier_attempt_are_put_back_too(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    """Whoever goes on where another worker stopped has read what that one wrote."""
    first = ScriptedClaims(parts.broker, "w0")
    await first.beat()
    generation = await admit(parts.broker)
    begun = await first.claim_one()
    await first.publish(begun.next(11))
    disk = await Disk.of(raw)
    await first.publish(begun.next(12))
    await parts.broker.release("w0", [begun.held])
    [attempt] = await parts.claim()
    await wait_until(lambda: parts.engine.submitted, what="the log to be read")
    await said(parts, attempt, 13)
    await come_back(parts, disk)
    assert tokens_of(await logged(parts.broker, generation)) == [11, 12, 13]
    assert await first.publish(begun.next(99)) == [(generation, "lost")]
    check_invariants(view.look())


async def test_nobody_claims_while_owners_may_come_back(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    generation = await admit(parts.broker)
    disk = await Disk.of(raw)
    await disk.go_back()
    worker = ScriptedClaims(parts.broker, "w2")
    await worker.beat()
    await raw.hincrby(f"{KEY}clock", "settle", 60_000)  # however slow this machine is
    assert await worker.claim() == []
    await disk.end_settling()
    assert [attempt.id for attempt in await worker.claim()] == [generation]


async def test_a_worker_told_to_wait_claims_when_the_wait_is_over(
    parts: Parts, raw: RawRedis
) -> None:
    await admit(parts.broker)
    disk = await Disk.of(raw)
    await disk.go_back()
    assert await parts.claim() == []
    parts.wake.clear()
    await parts.wake.wait()
    assert parts.intake.should_claim({})
    assert len(await parts.claim()) == 1


async def test_a_later_claim_is_left_alone(parts: Parts, raw: RawRedis) -> None:
    """Its owner was away for longer than the others waited: what has begun anew goes on."""
    generation = await admit(parts.broker)
    disk = await Disk.of(raw)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11)
    await disk.go_back()
    other = ScriptedClaims(parts.broker, "w2")
    await other.beat()
    await disk.end_settling()
    begun = await other.claim_one()
    await other.publish(begun.next(77))
    with captured_logs() as lines:
        await said(parts, attempt, 12)
    assert [line["event"] for line in lines] == ["generation.lost"]
    assert tokens_of(await logged(parts.broker, generation)) == [77]
    assert parts.engine.cancelled == [attempt.engine_id]


async def test_another_ones_log_is_never_extended(parts: Parts, raw: RawRedis) -> None:
    """The chain where the log ends must be the worker's own, and is looked at again inside."""
    await admit(parts.broker)
    disk = await Disk.of(raw)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11, 12)
    await disk.go_back()
    wrong = attempt.restoration(0, "")
    assert wrong is not None
    for position, chain in ((1, attempt.chain_at(1)), (0, "00000000")):
        [refused] = await parts.broker.restore(
            parts.name, [replace(wrong, position=position, chain=chain)]
        )
        assert (refused.kind, refused.next, refused.chain) == ("lost", 0, "")
    assert attempt.restoration(1, "00000000") is None


async def test_who_was_away_for_long_revives_nothing(
    parts: Parts, raw: RawRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds may have ended long ago, and been told and paid for."""
    disk = await Disk.of(raw)
    await admit(parts.broker)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11)
    later_s = awake_or_not_s() + publisher.REVIVE_LIMIT_S + 1
    monkeypatch.setattr(publisher, "awake_or_not_s", lambda: later_s)
    await come_back(parts, disk)
    assert parts.ledger.running() == []
    assert await parts.broker.read(attempt.id, 0) is None


async def test_what_was_deleted_is_not_put_back(parts: Parts) -> None:
    generation = await admit(parts.broker)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11)
    assert await parts.broker.forget(generation, "public", for_good=True)
    assert not await parts.broker.forget(generation, "public"), "it is not there any more"
    assert await parts.broker.cancel(generation, "public") == "unknown"
    await said(parts, attempt, 12)
    assert parts.ledger.holding() == []
    assert await parts.broker.attach("g1", generation, "public", 0) is None


async def test_a_reader_without_a_lease_is_given_one(
    parts: Parts, raw: RawRedis, view: PartitionView
) -> None:
    """Else, should it die now, what it reads would run on for nobody up to its limit."""
    generation = await admit(parts.broker, grace_ms=0)
    await raw.zadd(f"{KEY}gateways", {"g1": 1})
    await parts.broker.reap()
    assert not (await parts.broker.state()).gateways
    other = await admit(parts.broker, gateway="g2", grace_ms=0)
    assert await parts.broker.attach("g3", other, "public", 0)
    assert {it.name for it in (await parts.broker.state()).gateways} == {"g2", "g3"}
    for gateway in ("g2", "g3"):
        assert (await parts.broker.beat_gateway(gateway)).recreated, "all is attached again"
        await raw.zadd(f"{KEY}gateways", {gateway: 1})
    await parts.broker.reap()
    assert not (await parts.broker.state()).waiting["default"], "nobody reads them"
    check_invariants(view.look())
    assert generation != other


async def test_a_full_server_still_lets_its_owner_have_it_back(parts: Parts, raw: RawRedis) -> None:
    """Over its memory limit it refuses what is new; what was there before comes back."""
    await admit(parts.broker)
    disk = await Disk.of(raw)
    [attempt] = await parts.claim()
    await said(parts, attempt, 11)
    await disk.go_back()
    await raw.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(Failure, match="BROKER_FULL"):
            await admit(parts.broker)
        await reconnect(parts)
        assert tokens_of(await logged(parts.broker, attempt.id)) == [11]
    finally:
        await raw.config_set("maxmemory", "0")
