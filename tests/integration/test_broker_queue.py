"""Admission and order: caps, estimates, lanes, fairness, and one Cluster slot for all of it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from common.broker import Broker, Room, connect
from common.broker.keys import prefix
from common.failures import Failure
from common.messages import LANES, Lane
from tests.conftest import POOL
from tests.support.generations import ScriptedClaims, admission, admit
from tests.support.redis_server import RawRedis, RedisServer, free_port
from tests.support.waiting import wait_until

KEY = prefix(POOL)


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[RawRedis]:
    client = Redis.from_url(redis_url, decode_responses=True, encoding_errors="replace")
    yield client
    await client.aclose()


@pytest.fixture
async def worker(broker: Broker) -> ScriptedClaims:
    worker = ScriptedClaims(broker)
    await worker.beat()
    return worker


async def age(raw: RawRedis, generation: str, ms: int) -> None:
    """Let a waiting generation have been queued ``ms`` earlier."""
    now = int((await raw.time())[0]) * 1000
    await raw.hset(f"{KEY}gen:{generation}", "t0", str(now - ms))


async def refusal(broker: Broker, **fields: object) -> Failure:
    with pytest.raises(Failure) as refused:
        await admit(broker, **fields)
    return refused.value


async def test_a_pool_without_workers_refuses(broker: Broker) -> None:
    assert (await refusal(broker)).code == "NO_WORKERS"


async def test_a_pool_whose_only_worker_restarts_still_accepts(
    broker: Broker, worker: ScriptedClaims
) -> None:
    await broker.leave_worker("w1")
    assert await admit(broker)


async def test_what_no_worker_could_ever_run_is_refused(
    broker: Broker, worker: ScriptedClaims
) -> None:
    refused = await refusal(broker, prompt_tokens=10_000, max_new_tokens=1)
    assert refused.code == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_lane_is_capped_in_tokens_and_in_bytes(
    broker: Broker, worker: ScriptedClaims
) -> None:
    await admit(broker, lane_cap_tokens=20)
    refused = await refusal(broker, lane_cap_tokens=20)
    assert refused.code == "QUEUE_FULL"
    assert refused.retry_after_ms is not None
    assert (await refusal(broker, prompt_tokens=100, lane_cap_bytes=400)).code == "QUEUE_FULL"
    assert await admit(broker, lane="priority", lane_cap_tokens=20), "another lane has room"


async def test_who_would_wait_too_long_is_refused_with_a_measured_wait(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """The worker says 100 tokens per second and 1,200 tokens wait: that is 12 seconds."""
    for _ in range(100):
        await admit(broker)
    accepted = await broker.admit(admission(queue_limit_ms=20_000))
    assert (accepted.position, accepted.wait_ms) == (100, 12_000)
    refused = await refusal(broker, queue_limit_ms=10_000)
    assert refused.code == "QUEUE_FULL"
    assert refused.retry_after_ms == 12_120 - 10_000


async def test_all_choices_are_admitted_or_none(broker: Broker, worker: ScriptedClaims) -> None:
    """Two choices of 12 tokens do not fit under a cap of 20; neither is queued."""
    assert (await refusal(broker, num_choices=2, lane_cap_tokens=20)).code == "QUEUE_FULL"
    assert await worker.claim() == []
    await broker.admit(admission(num_choices=2))
    assert len(await worker.claim()) == 2


async def test_a_request_is_known_by_any_of_its_choices(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Its first one may have ended and expired: admitted again, the others would begin anew."""
    request = admission(num_choices=2)
    await broker.admit(request)
    await worker.claim()
    await raw.delete(f"{KEY}gen:{request.request_id}.0")
    again = await broker.admit(replace(request, resubmit=True))
    assert again.existing
    assert await worker.claim() == []
    ahead = admission(num_choices=2)
    await broker.cancel(f"{ahead.request_id}.1", ahead.tenant)
    assert (await broker.admit(ahead)).existing, "a cancel that came first wins for all of it"


async def test_the_prompt_goes_with_the_last_choice(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    request = admission(num_choices=2)
    await broker.admit(request)
    first, second = await worker.claim()
    await worker.publish(first.next(1, finish="length"))
    assert await raw.exists(f"{KEY}spec:{request.request_id}")
    await worker.publish(second.next(1, finish="length"))
    assert not await raw.exists(f"{KEY}spec:{request.request_id}")


async def test_a_colon_makes_no_idempotency_key_anothers(
    broker: Broker, worker: ScriptedClaims
) -> None:
    await admit(broker, tenant="a", idempotency_key="b:c", fingerprint="f")
    other = await broker.admit(admission(tenant="a:b", idempotency_key="c", fingerprint="f"))
    assert not other.existing


async def test_an_idempotency_key_finds_its_request_and_refuses_another_body(
    broker: Broker, worker: ScriptedClaims
) -> None:
    first = await broker.admit(admission(idempotency_key="k", fingerprint="a"))
    again = await broker.admit(admission(idempotency_key="k", fingerprint="a"))
    assert (again.existing, again.request_id) == (True, first.request_id)
    refused = await refusal(broker, idempotency_key="k", fingerprint="b")
    assert refused.code == "IDEMPOTENCY_CONFLICT"
    assert await admit(broker, idempotency_key="k", fingerprint="b", tenant="other")


async def test_lanes_go_by_rank(broker: Broker, worker: ScriptedClaims) -> None:
    order = ["batch", "flex", "default", "priority"]
    ids = {lane: await admit(broker, lane=lane) for lane in order}
    claimed = [attempt.id for attempt in await worker.claim()]
    assert claimed == [ids[lane] for lane in reversed(order)]


async def test_a_starved_lane_gets_one_pick_per_claim(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """After half an hour the head of ``batch`` is taken first, its successors are not."""
    starved = [await admit(broker, lane="batch") for _ in range(2)]
    for generation in starved:
        await age(raw, generation, 31 * 60_000)
    interactive = [await admit(broker) for _ in range(3)]
    claimed = [attempt.id for attempt in await worker.claim(limit=3)]
    assert claimed == [starved[0], *interactive[:2]]


async def test_a_tenant_with_many_requests_does_not_delay_another(
    broker: Broker, worker: ScriptedClaims
) -> None:
    many = [await admit(broker, tenant="many") for _ in range(20)]
    one = await admit(broker, tenant="one")
    claimed = [attempt.id for attempt in await worker.claim(limit=3)]
    assert set(claimed[:2]) == {many[0], one}
    assert claimed[2] == many[1]


async def test_what_is_handed_back_goes_ahead_of_its_lane(
    broker: Broker, worker: ScriptedClaims
) -> None:
    first = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))
    urgent, normal = await admit(broker, lane="priority"), await admit(broker)
    await broker.release("w1", [attempt.held])
    assert [a.id for a in await worker.claim()] == [urgent, first, normal]


async def test_what_showed_nothing_goes_back_to_its_place(
    broker: Broker, worker: ScriptedClaims
) -> None:
    first, second = await admit(broker), await admit(broker)
    attempt = await worker.claim_one()
    await broker.release("w1", [attempt.held])
    assert [a.id for a in await worker.claim()] == [first, second]


async def test_who_gives_way_takes_no_room_from_others(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """A lane has the room of its rank, and loses what goes to those it gives way to."""
    for lane in LANES:
        for _ in range(3):
            await admit(broker, lane=lane)
    rooms: dict[Lane, Room] = {
        "priority": Room(2, 10_000),
        "default": Room(2, 10_000),
        "flex": Room(4, 10_000),
        "batch": Room(3, 10_000),
    }
    claimed = await worker.claim(rooms=rooms)
    lanes = [attempt.claimed.lane for attempt in claimed]
    assert lanes == ["priority", "priority", "flex", "flex"]
    rooms |= {"priority": Room(0, 0), "default": Room(0, 0)}
    again = await worker.claim(rooms=rooms)
    assert [attempt.claimed.lane for attempt in again] == ["flex", "batch", "batch"]


async def test_one_free_slot_at_a_time_is_not_all_for_the_starved(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Of two lanes that share their room, the starved one has every second place."""
    starved = [await admit(broker) for _ in range(3)]
    for generation in starved:
        await age(raw, generation, 6000)
    urgent = [await admit(broker, lane="priority") for _ in range(3)]
    claimed = [(await worker.claim_one()).id for _ in range(6)]
    assert claimed == [starved[0], urgent[0], starved[1], urgent[1], starved[2], urgent[2]]


async def test_a_deadline_that_passed_in_the_queue_ends_it(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    await raw.hset(f"{KEY}gen:{generation}", "deadline", "1")
    assert await worker.claim() == []
    page = await broker.read(generation, 0)
    assert page is not None
    [end] = page.entries
    assert end.record.finish is not None
    assert end.record.finish.code == "QUEUE_TIMEOUT"


async def test_the_drain_rate_is_measured_while_something_waits(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    for _ in range(4):
        await admit(broker)
    await worker.claim(limit=1)
    window = float((await raw.hget(f"{KEY}backlog", "since")) or 0)
    await raw.hset(f"{KEY}backlog", "since", f"{window - 2000:.0f}")
    await worker.claim(limit=1)
    measured = (await broker.state()).drain_rate
    assert 3 < measured <= 6, "12 tokens in a little over two seconds"


async def test_a_large_prompt_is_read_behind_the_claim(
    broker: Broker, worker: ScriptedClaims
) -> None:
    request = admission(prompt_tokens=9_000)
    await broker.admit(request)
    attempt = await worker.claim_one()
    assert attempt.claimed.spec is None
    assert attempt.claimed.body_bytes > 36_000
    assert await broker.read_spec(request.request_id) == request.spec


async def test_the_bell_wakes_a_waiting_worker(
    broker: Broker, blocking_broker: Broker, worker: ScriptedClaims
) -> None:
    waiting = asyncio.create_task(blocking_broker.wait_for_bell(10))
    await admit(broker)
    assert await waiting == "default"
    assert not await blocking_broker.wait_for_bell(0.01)


async def test_a_bell_is_heard_only_by_who_has_room_for_its_lane(
    broker: Broker, blocking_broker: Broker, worker: ScriptedClaims
) -> None:
    await admit(broker, lane="batch")
    assert not await blocking_broker.wait_for_bell(0.01, ("priority", "default", "flex"))
    assert await blocking_broker.wait_for_bell(5, LANES) == "batch"


async def test_a_page_of_the_log_is_bounded(broker: Broker, worker: ScriptedClaims) -> None:
    generation = await admit(broker, max_new_tokens=600)
    attempt = await worker.claim_one()
    for _ in range(3):
        await worker.publish(*(attempt.next(token) for token in range(200)))
    pages, cursor = [], 0
    while (page := await broker.read(generation, cursor)) and page.entries[-1].record.end > cursor:
        pages.append(len(page.entries))
        cursor = page.entries[-1].record.end
    assert cursor == 600
    assert max(pages) <= 256


async def test_idle_tenants_are_forgotten(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """A finish tag that its lane has passed says nothing; it must not stay for ever."""
    await admit(broker, tenant="gone")
    await worker.claim()
    for _ in range(3):
        await admit(broker, tenant="busy")
    await worker.claim()
    await broker.reap()
    assert await raw.hexists(f"{KEY}tenants", "t.default.busy")
    assert not await raw.hexists(f"{KEY}tenants", "t.default.gone")


@pytest.fixture(scope="module")
def cluster_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server in Cluster mode: it refuses a script that leaves its slot."""
    directory = tmp_path_factory.mktemp("cluster")
    bus = ("--cluster-port", str(free_port()))  # by default its port + 10,000: perhaps too high
    with RedisServer("valkey", directory, ("--cluster-enabled", "yes", *bus)) as server:
        yield server


async def test_every_step_stays_in_one_cluster_slot(cluster_server: RedisServer) -> None:
    raw: RawRedis = Redis.from_url(cluster_server.url)
    await raw.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")

    async def is_serving() -> bool:
        return b"cluster_state:ok" in await raw.execute_command("CLUSTER", "INFO")

    await wait_until(is_serving)
    broker = Broker(connect(cluster_server.url), "a/model", 3)
    worker = ScriptedClaims(broker)
    await worker.beat()
    beat = await broker.beat_gateway("g1")
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))
    await broker.release("w1", [attempt.held])
    attempt = await worker.claim_one()
    await broker.attach("g2", generation, "public", 0)
    await broker.detach("g2", generation)
    await worker.publish(attempt.next(2, finish="length"))
    await broker.cancel(await admit(broker), "public")
    await broker.look("g1", [generation])
    await broker.reap()
    await broker.state()
    reader = Broker(connect(cluster_server.url, blocking=True), "a/model", 3)
    _, items = await reader.read_inbox("g1", beat.last_id, 1000)
    assert [entry.record.end for _, entry in items][:2] == [1, 2]
    slots = {await raw.execute_command("CLUSTER", "KEYSLOT", key) for key in await raw.keys("*")}
    assert len(slots) == 1
    await raw.aclose()
    await broker.close()
    await reader.close()


async def test_a_server_that_slept_counts_nobody_as_dead(
    broker: Broker, worker: ScriptedClaims, redis_server: RedisServer, raw: RawRedis
) -> None:
    """SIGSTOP for longer than the lease, SIGCONT: the generation is still its worker's."""
    generation = await admit(broker)
    await worker.claim_one()
    assert redis_server.process is not None
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    await asyncio.sleep(6.5)  # longer than the lease and than SLEPT_MS: the fault itself
    os.kill(redis_server.process.pid, signal.SIGCONT)
    assert await broker.reap() == []
    assert await raw.hget(f"{KEY}gen:{generation}", "st") == "R"
