"""The rows of the protocol's race table, each played out step by step on both servers."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

import pytest

from common.broker import Broker, Reserve, connect
from common.broker.keys import prefix
from common.failures import Failure
from common.messages import FinishReason
from tests.conftest import POOL
from tests.support.generations import ScriptedClaims, admission, admit
from tests.support.redis_server import RawRedis, RedisServer
from tests.support.waiting import wait_until

KEY = prefix(POOL)


@pytest.fixture
async def broker(any_redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(connect(any_redis_server.url), POOL)
    yield broker
    await broker.close()


@pytest.fixture
async def worker(broker: Broker) -> ScriptedClaims:
    worker = ScriptedClaims(broker, "w1")
    await worker.beat()
    await broker.beat_gateway("g1")
    return worker


async def expire(raw: RawRedis, leases: str, process: str) -> None:
    """Let the lease of one process end, as if it had been silent for its length."""
    await raw.zadd(KEY + leases, {process: 1})


async def terminal_ids(raw: RawRedis, generation: str) -> list[str]:
    entries = await raw.xrange(f"{KEY}log:{generation}")
    return [entry_id for entry_id, _ in entries if entry_id.endswith("-1")]


async def test_a_lost_claim_answer_is_handed_back_by_the_next_beat(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """The owner does not know what it owns; its beat names the turn but not the generation."""
    generation = await admit(broker)
    await worker.claim()
    worker.holding.clear()

    assert await worker.beat(seen=worker.turn - 1) == [], "a turn not yet seen is not judged"
    assert await worker.beat() == [generation]
    assert [attempt.id for attempt in await worker.claim()] == [generation]


@pytest.mark.parametrize("is_reaped", [False, True])
async def test_a_claim_under_an_ended_lease_starts_a_new_one(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis, is_reaped: bool
) -> None:
    """Else its death would go unnoticed, or the next reap would count the living as dead."""
    await expire(raw, "leases", "w1")
    if is_reaped:
        await broker.reap()
    generation = await admit(broker)
    await worker.claim_one()
    assert await broker.reap() == []
    await expire(raw, "leases", "w1")
    [moved] = await broker.reap()
    assert (moved.id, moved.move) == (generation, "requeued")


async def test_a_zombie_cannot_publish(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    zombie = await worker.claim_one()
    await worker.publish(zombie.next(1, 2))
    await expire(raw, "leases", "w1")
    [moved] = await broker.reap()
    assert (moved.id, moved.move) == (generation, "requeued")

    other = ScriptedClaims(broker, "w2")
    await other.beat()
    successor = await other.claim_one()
    assert successor.at == 2
    assert await worker.publish(zombie.next(3)) == [(generation, "lost")]
    assert await other.publish(successor.next(9, finish="length")) == []
    page = await broker.read(generation, 0)
    assert page is not None
    assert [t for entry in page.entries for t in entry.record.tokens] == [1, 2, 9]


async def test_the_same_epoch_with_another_nonce_is_lost(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """After a rollback two claims can count alike; the nonce still tells them apart."""
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await raw.hset(f"{KEY}gen:{generation}", "fence", "1.ffffffffffffffff")
    assert await worker.publish(attempt.next(1)) == [(generation, "lost")]


async def test_repeated_publications_change_nothing(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    attempt = await worker.claim_one()
    first, last = attempt.next(1, 2), attempt.next(3, finish="stop_sequence")
    for publication in (first, first, last, last, first):
        refused = await worker.publish(publication)
        assert refused in ([], [(generation, "gone")])
    assert await worker.publish(last) == [], "its own finish again is accepted"
    page = await broker.read(generation, 0)
    assert page is not None
    assert [entry.record.tokens for entry in page.entries] == [[1, 2], [3]]
    assert await terminal_ids(raw, generation) == ["3-1"]


async def test_a_finish_whose_tokens_are_logged_already_is_written(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """The tokens went out in one call, the finish comes with a repeat of them in the next."""
    generation = await admit(broker)
    attempt = await worker.claim_one()
    plain = attempt.next(1)
    await worker.publish(plain)
    attempt.at, attempt.prev, attempt.chain = 0, "", 0
    attempt.__post_init__()
    assert await worker.publish(attempt.next(1, finish="length")) == []
    page = await broker.read(generation, 0)
    assert page is not None
    assert [entry.record.tokens for entry in page.entries] == [[1], []]
    finish = page.entries[-1].record.finish
    assert finish is not None
    assert finish.reason == FinishReason.LENGTH
    assert await terminal_ids(raw, generation) == ["1-1"]


async def test_a_gap_or_another_chain_is_realigned_never_written(
    broker: Broker, worker: ScriptedClaims
) -> None:
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))
    attempt.next(2)
    assert await worker.publish(attempt.next(3)) == [(generation, "realign")], "a gap"

    attempt.at, attempt.prev = 1, "00000000"
    assert await worker.publish(attempt.next(2)) == [(generation, "realign")], "another chain"
    page = await broker.read(generation, 0)
    assert page is not None
    assert page.next == 1


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["publish", "finish", "reap", "cancel", "release"], 2))
)
async def test_whoever_is_second_sees_state_or_fence(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis, order: tuple[str, str]
) -> None:
    """All ordered pairs of steps on one running generation: one end at most, nothing revived."""
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))

    async def play(step: str) -> None:
        if step == "publish":
            await worker.publish(attempt.next(2))
        elif step == "finish":
            await worker.publish(attempt.next(3, finish="length"))
        elif step == "cancel":
            await broker.cancel(generation, "public")
        elif step == "release":
            await broker.release("w1", [attempt.held])
        else:
            await expire(raw, "leases", "w1")
            await broker.reap()

    for step in order:
        await play(step)

    state = await raw.hgetall(f"{KEY}gen:{generation}")
    ends = await terminal_ids(raw, generation)
    if "finish" in order[:1] or "cancel" in order or order == ("publish", "finish"):
        assert (state["st"], len(ends)) == ("T", 1)
    else:
        assert (state["st"], ends) == ("Q", [])
        assert await raw.zscore(f"{KEY}again:m@1", generation) is not None
    assert not await raw.exists(f"{KEY}held:w1")


async def test_cancel_against_the_last_token_leaves_one_end(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Many random timings of both at once: exactly one terminal entry each time."""
    for _ in range(100):
        generation = await admit(broker, gateway="")
        attempt = await worker.claim_one()
        await worker.publish(attempt.next(1))
        calls = [
            worker.publish(attempt.next(2, finish="length")),
            broker.cancel(generation, "public"),
        ]
        random.shuffle(calls)
        await asyncio.gather(*calls)
        assert len(await terminal_ids(raw, generation)) == 1
        assert await raw.zcard(f"{KEY}due") == 0


async def test_a_cancel_that_overtakes_its_admission_wins(
    broker: Broker, worker: ScriptedClaims
) -> None:
    late = admission()
    assert await broker.cancel(f"{late.request_id}.0", "public") == "unknown"
    assert (await broker.admit(late)).existing
    assert await worker.claim() == []


async def test_a_repeated_admission_finds_its_request(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """The answer of an admission was lost, so the gateway sends it again."""
    request = admission()
    assert not (await broker.admit(request)).existing
    assert (await broker.admit(request)).existing
    assert len(await worker.claim()) == 1


async def test_attach_subscribes_and_reads_in_one_step(
    broker: Broker, worker: ScriptedClaims, any_redis_server: RedisServer
) -> None:
    """What is published before the call is in its page, what comes after is in the inbox."""
    generation = await admit(broker, gateway="")
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1, 2))
    beat = await broker.beat_gateway("g2")
    attached = await broker.attach("g2", generation, "public", 1)
    assert attached is not None
    assert [entry.record.end for entry in attached.entries] == [2]
    await worker.publish(attempt.next(3, finish="length"))

    inbox = Broker(connect(any_redis_server.url, blocking=True), POOL)
    _, items = await inbox.read_inbox("g2", beat.last_id or "0", 1000)
    await inbox.close()
    [(delivered, entry)] = items
    assert (delivered, entry.record.tokens) == (generation, [3])
    assert entry.timing is not None
    assert entry.timing.model_version == "m@1"


async def test_attaching_to_an_end_subscribes_nobody(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1, finish="length"))
    attached = await broker.attach("g1", generation, "public", 0)
    assert attached is not None
    assert attached.state == "T"
    assert not await raw.exists(f"{KEY}subs:g1")


async def test_another_tenant_cannot_attach_or_cancel(
    broker: Broker, worker: ScriptedClaims
) -> None:
    generation = await admit(broker, tenant="a")
    assert await broker.attach("g1", generation, "b", 0) is None
    assert await broker.cancel(generation, "b") == "unknown"
    assert len(await worker.claim()) == 1


async def test_a_trimmed_inbox_shows_as_a_gap_that_the_log_closes(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))
    await raw.xtrim(f"{KEY}inbox:g1", maxlen=0, approximate=False)
    await worker.publish(attempt.next(2))
    page = await broker.read(generation, 0)
    assert page is not None
    assert [entry.record.tokens for entry in page.entries] == [[1], [2]]


async def test_a_dead_gateway_starts_the_grace_time_and_redis_ends_it(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Nobody keeps a timer that could die: the moment stands in ``due``."""
    generation = await admit(broker, grace_ms=200)
    await worker.claim_one()
    await expire(raw, "gateways", "g1")
    moved = await broker.reap()
    assert [(m.id, m.move) for m in moved] == [(generation, "detached")]

    async def is_cancelled() -> bool:
        await broker.reap()
        return await raw.hget(f"{KEY}gen:{generation}", "end") == "cancelled"

    await wait_until(is_cancelled, timeout_s=5)


async def test_a_reader_who_comes_back_in_time_keeps_the_generation(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker, grace_ms=60_000)
    await worker.claim_one()
    await broker.detach("g1", generation)
    short = await raw.zscore(f"{KEY}due", generation)
    assert await broker.attach("g2", generation, "public", 0) is not None
    long = await raw.zscore(f"{KEY}due", generation)
    assert short is not None
    assert long is not None
    assert long > short + 100_000


async def test_a_claim_does_not_forget_that_nobody_reads(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """A client leaves while it waits; the claim in between must not lengthen its grace time."""
    generation = await admit(broker, grace_ms=1000)
    await broker.detach("g1", generation)
    before = await raw.zscore(f"{KEY}due", generation)
    await worker.claim_one()
    assert await raw.zscore(f"{KEY}due", generation) == before


async def test_a_detached_generation_runs_on_without_readers(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker, attached=False)
    await worker.claim_one()
    await broker.detach("g1", generation)
    await broker.reap()
    assert await raw.hget(f"{KEY}gen:{generation}", "st") == "R"


async def test_nobody_dies_of_a_sleeping_machine(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """All leases have ended, but nobody looked at the clock either: they start again."""
    await admit(broker)
    await worker.claim_one()
    await expire(raw, "leases", "w1")
    await expire(raw, "gateways", "g1")
    now = int((await raw.time())[0]) * 1000
    await raw.hset(f"{KEY}clock", "seen", str(now - 10_000))
    assert await broker.reap() == []
    assert await raw.zscore(f"{KEY}leases", "w1") > now


async def test_nobody_dies_of_a_clock_that_was_set_back(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    await admit(broker)
    await worker.claim_one()
    await expire(raw, "leases", "w1")
    now = int((await raw.time())[0]) * 1000
    await raw.hset(f"{KEY}clock", "seen", str(now + 300_000))
    assert await broker.reap() == []


async def test_the_second_death_on_probation_quarantines_with_evidence(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    for _ in range(4):
        assert await raw.hget(f"{KEY}gen:{generation}", "st") == "Q"
        await die_after(broker, worker, raw, 0)
    page = await broker.read(generation, 0)
    assert page is not None
    finish = page.entries[-1].record.finish
    assert finish is not None
    assert (finish.reason, finish.code) == ("failed", "POISON_REQUEST")
    [(_, evidence)] = await raw.xrange(f"{KEY}dead")
    assert (evidence["id"], evidence["deaths"]) == (generation, "4")


async def die_after(broker: Broker, worker: ScriptedClaims, raw: RawRedis, num_tokens: int) -> None:
    """One claim that shows some tokens; then its worker dies."""
    await worker.beat()
    attempt = await worker.claim_one()
    for _ in range(num_tokens):
        await worker.publish(attempt.next(1))
    worker.holding.clear()
    await expire(raw, "leases", "w1")
    await broker.reap()


async def test_who_comes_further_each_time_is_not_to_blame(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Workers die around it by chance, three times and more; the limit is far."""
    generation = await admit(broker, max_new_tokens=200)
    for _ in range(9):
        await die_after(broker, worker, raw, 8)
        assert await raw.hget(f"{KEY}gen:{generation}", "st") == "Q"
    await die_after(broker, worker, raw, 8)
    assert await raw.hget(f"{KEY}gen:{generation}", "end") == "POISON_REQUEST"


async def test_who_kills_at_the_same_token_again_and_again_is_to_blame(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker, max_new_tokens=200)
    for num_tokens in (20, 7, 7, 7):
        await die_after(broker, worker, raw, num_tokens)
    assert await raw.hget(f"{KEY}gen:{generation}", "end") == "POISON_REQUEST"


async def test_a_worker_that_was_seen_to_die_is_not_waited_for(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """Its supervisor ends the lease; without one it would have ended by itself."""
    generation = await admit(broker)
    await worker.claim_one()
    await broker.bury_worker("w1")
    await broker.bury_worker("never-heard-of")
    [moved] = await broker.reap()
    assert (moved.id, moved.move) == (generation, "requeued")


async def test_a_large_generation_at_the_head_gets_a_worker_emptied(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Small ones may pass it for two seconds; then the worker takes nothing until it has room."""
    large = await admit(broker, prompt_tokens=500, max_new_tokens=500)
    small = await admit(broker, tenant="other")
    assert [a.id for a in await worker.claim(budget=100)] == [small]
    now = int((await raw.time())[0]) * 1000
    await raw.hset(f"{KEY}gen:{large}", "t0", str(now - 3000))
    await admit(broker, tenant="other")
    answer = await broker.claim(
        "w1", "0" * 16, 9, budget=100, max_generations=8, model_version="m@1"
    )
    assert (answer.generations, answer.reserve) == ([], Reserve(1000, "default", False))
    [first, _] = await worker.claim(budget=5000)
    assert first.id == large


async def test_over_the_memory_limit_streams_go_on_and_admission_is_refused(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await raw.config_set("maxmemory", "1")
    try:
        assert await worker.publish(attempt.next(1)) == []
        with pytest.raises(Failure) as refused:
            await admit(broker)
        assert refused.value.code == "BROKER_FULL"
        assert await worker.publish(attempt.next(2, finish="length")) == []
        await worker.beat()
    finally:
        await raw.config_set("maxmemory", "0")
    page = await broker.read(generation, 0)
    assert page is not None
    assert page.state == "T"


async def test_a_stream_that_is_no_longer_kept_says_gone(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """A bare read of an expired log looks like 'nothing yet'; ours can tell."""
    generation = await admit(broker)
    attempt = await worker.claim_one()
    await worker.publish(attempt.next(1))
    await raw.delete(f"{KEY}log:{generation}")
    assert await broker.read(generation, 0) is None
    assert await broker.attach("g1", generation, "public", 0) is None
    assert await worker.publish(attempt.next(2)) == [(generation, "gone")], "never over a hole"


async def test_state_of_a_newer_protocol_is_refused(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    generation = await admit(broker)
    await raw.hset(f"{KEY}gen:{generation}", "v", "2")
    with pytest.raises(Failure) as refused:
        await broker.read(generation, 0)
    assert refused.value.code == "PROTOCOL_TOO_NEW"


async def test_a_library_that_was_flushed_is_loaded_again(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    await raw.function_flush("SYNC")
    assert await admit(broker)


async def test_what_a_version_began_only_that_version_continues(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """Shown tokens are never continued by another model version; unshown work goes to any."""
    shown, unshown = await admit(broker), await admit(broker)
    old = await worker.claim()
    await worker.publish(next(a for a in old if a.id == shown).next(1))
    await broker.release("w1", [attempt.held for attempt in old])

    newer = ScriptedClaims(broker, "w2", version="m@2")
    await newer.beat()
    assert [attempt.id for attempt in await newer.claim()] == [unshown]
    await raw.zadd(f"{KEY}versions", {"m@1": 1})
    [moved] = await broker.reap()
    assert (moved.id, moved.code) == (shown, "MODEL_VERSION_GONE")
