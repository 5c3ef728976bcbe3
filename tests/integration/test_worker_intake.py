"""What a worker claims, when, and what it does with a log, a large prompt or a damaged one."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from msgspec import structs
from redis import Redis

from common.broker import Admission, Broker, connect
from common.failures import Failure
from common.ids import generation_id
from common.messages import Finish, Grammar
from common.settings import PrefixCache
from tests.conftest import POOL
from tests.support.broker_view import PartitionView
from tests.support.event_schema import captured_logs
from tests.support.fault_proxy import fault_proxy
from tests.support.generations import ScriptedClaims, admission, admit
from tests.support.grammars import Residues
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.support.worker_parts import Parts, RecordingGrammars, logged, tokens_of
from workers.attempts import Attempt
from workers.engine.grammar import Matcher


@dataclass
class Waiting:
    parts: Parts
    generation: str
    attempt: Attempt
    matcher: asyncio.Future[Matcher]


@pytest.fixture
async def parts(broker: Broker, blocking_broker: Broker) -> AsyncIterator[Parts]:
    parts = Parts(broker, blocking_broker)
    await parts.beat()
    yield parts
    await parts.close()


async def submitted(parts: Parts, count: int = 1) -> None:
    await wait_until(
        lambda: len(parts.engine.submitted) == count, what="the hand-over to the engine"
    )


async def test_a_claim_takes_no_more_slots_than_are_free(parts: Parts) -> None:
    """Six wait, four slots are free: four are taken, and two when two have ended."""
    for _ in range(6):
        await admit(parts.broker)
    attempts = await parts.claim()
    assert len(attempts) == 4
    assert not parts.intake.has_room()
    for attempt in attempts[:2]:
        parts.step(attempt, 1, finish="length")
    assert parts.intake.free()[0] == (2, 1000 - 2 * 12)
    await parts.publisher.publish()
    assert len(await parts.claim()) == 4


async def test_a_claim_takes_no_more_tokens_than_are_free(parts: Parts) -> None:
    """The budget counts prompt and allowed new tokens of all that was claimed before."""
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=500)
    await parts.claim()
    assert parts.intake.free()[0] == (3, 400)
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=301)
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=300)
    attempts = await parts.claim()
    assert [attempt.cost for attempt in attempts] == [600, 400]


async def test_a_busy_worker_claims_only_when_something_waits(parts: Parts) -> None:
    """An idle round trip per step would cost more than it finds."""
    await admit(parts.broker)
    await parts.claim()
    assert not parts.intake.should_claim({})
    assert parts.intake.should_claim({"default": 1})


async def test_what_was_just_too_large_is_not_asked_for_in_each_step(parts: Parts) -> None:
    """Only more room, or the bell, makes another claim worth its round trip."""
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=700)
    [first] = await parts.claim()
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=400)
    assert len(await parts.claim()) == 1
    assert not parts.intake.should_claim({"default": 500})
    assert parts.intake.should_claim({"default": 512}), "somebody else has come"
    parts.step(first, 1, finish="length")
    assert parts.intake.should_claim({"default": 500})


@pytest.mark.parametrize("ends", [False, True])
async def test_nothing_is_asked_for_while_a_suspect_is_on_probation(
    parts: Parts, *, ends: bool
) -> None:
    """Two workers died with it: until it has come 8 tokens further, or has ended, others that wait
    and bells are left to other workers; then this one claims at once.
    """
    await become_suspect(parts.broker)
    waiting = await admit(parts.broker)
    with captured_logs() as lines:
        [suspect] = await parts.claim()
    [told] = [line for line in lines if line["event"] == "worker.claimed"]
    assert (told["job_id"], told["on_probation"]) == (suspect.id, True)
    assert not parts.intake.should_claim({"default": 500})
    assert not parts.intake.has_room(), "bells are not heard"
    parts.step(suspect, *range(4 if ends else 8), finish="length" if ends else "")
    await parts.publisher.publish()
    parts.intake.room_changed()
    assert parts.intake.should_claim({})
    assert waiting in {attempt.id for attempt in await parts.claim()}


async def become_suspect(broker: Broker) -> None:
    id = await admit(broker, max_new_tokens=30)
    for name in ("dead-1", "dead-2"):
        victim = ScriptedClaims(broker, name)
        await victim.beat()
        assert id in {attempt.id for attempt in await victim.claim(limit=1)}
        await broker.bury_worker(name)
        await broker.reap()


async def test_the_bell_wakes_a_worker_with_room(parts: Parts) -> None:
    """An admission is taken up at once, not at the next look."""
    await parts.claim()
    parts.wake.clear()
    parts.spawn(parts.intake.listen())
    await admit(parts.broker)
    async with asyncio.timeout(0.9):  # less than the bell's own time-out
        await parts.wake.wait()
    assert parts.intake.should_claim({})


async def test_a_bell_heard_without_room_is_passed_on(parts: Parts, redis_url: str) -> None:
    """A worker that filled up while it listened must not keep the next one asleep."""
    await parts.claim()
    parts.spawn(parts.intake.listen())
    async with asyncio.timeout(5):
        await parts.wake.wait()  # it listens since at least one look
    for _ in range(4):
        await admit(parts.broker)
    await parts.claim()
    assert not parts.intake.has_room()
    waiting = Broker(connect(redis_url, blocking=True), POOL)
    await admit(parts.broker)
    assert await waiting.wait_for_bell(3)
    await waiting.close()


async def test_room_is_kept_for_a_large_generation_that_has_waited(
    parts: Parts, redis_server: RedisServer
) -> None:
    """Once a large head has waited two seconds, nothing is claimed until its budget is free."""
    await admit(parts.broker, prompt_tokens=100, max_new_tokens=100)
    [small] = await parts.claim()
    large = await admit(parts.broker, prompt_tokens=100, max_new_tokens=800)
    with Redis(port=redis_server.port) as raw:
        PartitionView(raw, POOL).age(large, 3000)
    await parts.intake.claim()
    await admit(parts.broker)
    assert not parts.intake.should_claim({"default": 912})
    parts.step(small, 1, finish="length")
    assert parts.intake.should_claim({"default": 912})
    await parts.publisher.publish()
    assert large in [attempt.id for attempt in await parts.claim()]


async def test_a_continued_generation_brings_the_tokens_of_its_log(
    parts: Parts, broker: Broker, blocking_broker: Broker
) -> None:
    """The next owner prefills prompt and logged tokens and goes on at the next position."""
    await admit(broker, max_new_tokens=600)
    [attempt] = await parts.claim()
    for token in range(300):  # more than one page of the log
        parts.step(attempt, token)
        await parts.publisher.publish()
    await parts.publisher.release([attempt], event="generation.released")

    heir = Parts(broker, blocking_broker, name="w2")
    await heir.beat()
    [continued] = await heir.claim()
    await submitted(heir)
    [request] = heir.engine.submitted
    assert request.logged == list(range(300))
    heir.step(continued, 300, finish="length")
    await heir.publisher.publish()
    assert tokens_of(await logged(broker, continued.id)) == list(range(301))
    await heir.close()


async def test_a_large_prompt_is_read_after_the_claim(parts: Parts) -> None:
    """Its body is not in the claim's answer; meanwhile nothing else is claimed on a guess."""
    large = Parts(parts.broker, parts.broker, name="w2", tokens=100_000)
    await large.beat()
    await admit(parts.broker, prompt_tokens=20_000, max_new_tokens=10)
    await large.claim()
    assert large.intake.free()[0] == (3, 0)
    await submitted(large)
    [request] = large.engine.submitted
    assert request.prompt == list(range(20_000))
    assert large.intake.free()[0] == (3, 100_000 - 20_010)
    await large.close()


async def test_a_spec_that_cannot_be_decoded_ends_as_failed(parts: Parts) -> None:
    """Nobody could ever run it, and its reader gets an answer instead of silence."""
    damaged = await admit_damaged(parts.broker)
    whole = await admit(parts.broker)
    await parts.claim()
    await submitted(parts)
    with captured_logs() as lines:
        await wait_until(lambda: len(parts.ledger.unpublished()) == 1)
        await parts.publisher.publish()
    assert "worker.failed" in [line["event"] for line in lines]
    [end] = await logged(parts.broker, damaged)
    assert end.record.finish is not None
    assert (end.record.finish.reason, end.record.finish.code) == ("failed", "INTERNAL")
    assert [attempt.id for attempt in parts.ledger.running()] == [whole]


async def test_a_prompt_of_no_tokens_ends_as_failed(parts: Parts) -> None:
    """The engine never sees what it could not compute."""
    request = admission()
    empty = msgspec.structs.replace(request.spec, prompt=b"")
    generation = await admit_spec(parts.broker, request, empty)
    await parts.claim()
    await parts.publisher.publish()
    [end] = await logged(parts.broker, generation)
    assert end.record.finish is not None
    assert end.record.finish.reason == "failed"
    assert parts.engine.submitted == []


async def test_a_lost_claim_answer_is_handed_back_by_the_next_beat(
    redis_url: str, broker: Broker, blocking_broker: Broker
) -> None:
    """The claim counts as seen, and the beat that does not name its generations returns them."""
    async with fault_proxy(redis_url) as proxy:
        cut = Broker(connect(proxy.url, single=True), POOL)
        parts = Parts(cut, blocking_broker)
        await parts.beat()
        generation = await admit(broker)
        proxy.lose_answer(b"_claim")
        with pytest.raises(Failure, match="BROKER_UNAVAILABLE"):
            await parts.intake.claim()
        assert parts.ledger.running() == []
        assert await parts.beat() == [generation]
        assert [attempt.id for attempt in await parts.claim()] == [generation]
        await parts.close()
        await cut.close()


async def test_an_id_that_is_held_already_keeps_its_tokens(parts: Parts) -> None:
    """Handed back while this worker slept, and claimed by it again: nothing is computed twice."""
    generation = await admit(parts.broker, max_new_tokens=20)
    [attempt] = await parts.claim()
    parts.step(attempt, 1, 2)
    await parts.publisher.publish()
    parts.step(attempt, 3)
    old_fence = attempt.fence
    await parts.broker.release(parts.name, [(attempt.id, attempt.fence)])

    assert await parts.claim() == [attempt]
    assert attempt.fence != old_fence
    assert parts.engine.cancelled == []
    assert len(parts.engine.submitted) == 1
    await parts.publisher.publish()
    assert tokens_of(await logged(parts.broker, generation)) == [1, 2, 3]


async def test_an_id_whose_log_went_another_way_starts_from_the_log(
    parts: Parts, broker: Broker, blocking_broker: Broker
) -> None:
    """Somebody else continued it meanwhile: our own tokens are worth nothing."""
    generation = await admit(broker, max_new_tokens=20)
    [attempt] = await parts.claim()
    parts.step(attempt, 1)
    await broker.release(parts.name, [(attempt.id, attempt.fence)])
    other = Parts(broker, blocking_broker, name="w2")
    await other.beat()
    [theirs] = await other.claim()
    other.step(theirs, 9)
    await other.publisher.publish()
    await other.publisher.release([theirs], event="generation.released")

    [again] = await parts.claim()
    await submitted(parts, 2)
    assert parts.engine.cancelled == [attempt.engine_id]
    assert parts.engine.submitted[1].logged == [9]
    assert again.engine_id != attempt.engine_id
    parts.step(attempt, 2)  # output of the replaced attempt, late
    assert again.end == 1
    parts.step(again, 10)
    await parts.publisher.publish()
    assert tokens_of(await logged(broker, generation)) == [9, 10]


@pytest.mark.parametrize(
    ("prefix_cache", "scopes"),
    [
        ("tenant", ["tenant public", "tenant public", "tenant acme"]),
        ("shared", ["shared", "shared", "shared"]),
    ],
)
async def test_who_may_share_computed_prompts(
    broker: Broker, blocking_broker: Broker, prefix_cache: PrefixCache, scopes: list[str]
) -> None:
    """Its tenant's generations, unless the setting lets tenants learn of each other."""
    parts = Parts(broker, blocking_broker, prefix_cache=prefix_cache)
    await parts.beat()
    for tenant in ("public", "public", "acme"):
        request = admission()
        await admit_spec(broker, request, structs.replace(request.spec, tenant=tenant))
    await parts.claim()
    await submitted(parts, 3)
    assert [request.cache_scope for request in parts.engine.submitted] == scopes
    await parts.close()


async def test_nobody_shares_when_that_is_switched_off(
    broker: Broker, blocking_broker: Broker
) -> None:
    parts = Parts(broker, blocking_broker, prefix_cache="off")
    await parts.beat()
    for _ in range(3):
        await admit(broker)
    await parts.claim()
    await submitted(parts, 3)
    assert len({request.cache_scope for request in parts.engine.submitted}) == 3
    await parts.close()


async def test_nothing_is_claimed_for_an_engine_that_hangs(parts: Parts) -> None:
    """What waits is better off with another worker; when the engine goes on, so do claims."""
    await admit(parts.broker)
    assert parts.intake.should_claim({"default": 12})
    parts.engine.is_stalled = True
    assert not parts.intake.should_claim({"default": 12})
    parts.engine.is_stalled = False
    assert len(await parts.claim()) == 1


async def admit_with_grammar(broker: Broker, value: str) -> str:
    request = admission()
    sampling = structs.replace(request.spec.sampling, grammar=Grammar("regex", value))
    return await admit_spec(broker, request, structs.replace(request.spec, sampling=sampling))


@pytest.fixture
async def waiting(broker: Broker, blocking_broker: Broker) -> AsyncIterator[Waiting]:
    """A worker that has claimed a generation whose grammar is being compiled."""
    grammars = RecordingGrammars()
    parts = Parts(broker, blocking_broker, grammars=grammars)
    await parts.beat()
    generation = await admit_with_grammar(broker, "slow")
    [attempt] = await parts.claim()
    await wait_until(lambda: "slow" in grammars.asked)
    yield Waiting(parts, generation, attempt, grammars.asked["slow"])
    await parts.close()


async def test_nobody_waits_for_the_grammar_of_another(waiting: Waiting) -> None:
    """Its room is promised, so claims go on beside it; it runs when its matcher is there."""
    parts = waiting.parts
    assert parts.intake.free()[0] == (3, 1000 - 12)
    other = await admit(parts.broker)
    await parts.claim()
    assert [request.id for request in parts.engine.submitted] == [engine_id(parts, other)]
    matcher = Residues()
    waiting.matcher.set_result(matcher)
    await submitted(parts, 2)
    assert parts.engine.submitted[1].id == waiting.attempt.engine_id
    assert parts.engine.submitted[1].matcher is matcher
    assert parts.engine.submitted[1].sampling.grammar == Grammar("regex", "slow")


async def test_a_bad_grammar_fails_alone_with_its_reason(waiting: Waiting) -> None:
    parts = waiting.parts
    other = await admit(parts.broker)
    await parts.claim()
    waiting.matcher.set_exception(Failure("GRAMMAR_REJECTED", "grammar is not valid: a reason"))
    await wait_until(lambda: len(parts.ledger.unpublished()) == 1)
    await parts.publisher.publish()
    [end] = await logged(parts.broker, waiting.generation)
    expected = Finish("failed", "GRAMMAR_REJECTED", "grammar is not valid: a reason")
    assert end.record.finish == expected
    assert [attempt.id for attempt in parts.ledger.running()] == [other]
    assert parts.intake.free()[0] == (3, 1000 - 12)


async def test_who_leaves_while_a_grammar_compiles_never_reaches_the_engine(
    waiting: Waiting,
) -> None:
    parts = waiting.parts
    await parts.broker.cancel(waiting.generation, "public")
    async with asyncio.timeout(5):
        while parts.ledger.running():  # what publishes nothing is asked about every 0.25 s
            await parts.publisher.publish()
    waiting.matcher.set_result(Residues())
    other = await admit(parts.broker)
    await parts.claim()
    assert [request.id for request in parts.engine.submitted] == [engine_id(parts, other)]


@pytest.mark.parametrize("is_closed_first", [False, True])
async def test_a_worker_that_leaves_hands_over_what_waits_for_its_grammar(
    waiting: Waiting, broker: Broker, blocking_broker: Broker, is_closed_first: bool
) -> None:
    """Also when what compiles grammars has ended before: that says nothing of the grammar."""
    parts = waiting.parts
    if is_closed_first:
        waiting.matcher.set_exception(Failure("DRAINING"))
        await wait_until(lambda: not parts.intake._reading)
    await parts.intake.stop_reading()
    await parts.publisher.release(parts.ledger.running(), event="generation.released")
    assert parts.engine.submitted == []
    heir = Parts(broker, blocking_broker, name="w2")
    await heir.beat()
    assert [attempt.id for attempt in await heir.claim()] == [waiting.generation]
    await heir.close()


def engine_id(parts: Parts, generation: str) -> str:
    [attempt] = [it for it in parts.ledger.running() if it.id == generation]
    return attempt.engine_id


async def admit_spec(broker: Broker, request: Admission, spec: Any) -> str:
    """Admit a request with a spec that a gateway would not send."""
    await broker.admit(replace(request, spec=spec))
    return generation_id(request.request_id)


class Damaged(msgspec.Struct):
    """Encodes as a map without the fields of a spec."""

    sampling: object


async def admit_damaged(broker: Broker) -> str:
    request = admission()
    return await admit_spec(broker, request, Damaged(request.spec.sampling))


async def test_a_worker_full_of_batch_rows_claims_interactive_ones(parts: Parts) -> None:
    """They pause in their slots, for which some are kept; further ones are not asked for."""
    full = Parts(parts.broker, parts.broker, name="w2", slots=4, spare=2)
    await full.beat()
    for _ in range(6):
        await admit(parts.broker, lane="batch")
    assert len(await full.claim()) == 4
    assert set(full.intake.rooms()) == {"priority", "default", "flex"}
    assert not full.intake.should_claim({"default": 0, "batch": 24})
    interactive = [await admit(parts.broker) for _ in range(2)]
    assert full.intake.should_claim({"default": 24, "batch": 24})
    held = await full.claim()
    assert [attempt.id for attempt in held[4:]] == interactive
    assert await full.make_room() == []
    await full.close()


async def test_the_least_to_compute_again_is_handed_back_for_interactive_ones(
    parts: Parts, redis_server: RedisServer
) -> None:
    """Without a death, and behind the last token that it has shown; its slot is free at once."""
    full = Parts(parts.broker, parts.broker, name="w2", slots=3, spare=1)
    await full.beat()
    for lane in ("batch", "batch", "flex"):
        await admit(parts.broker, lane=lane, max_new_tokens=50)
    flex, longer, shorter = await full.claim()
    for attempt, tokens in ((longer, range(9)), (shorter, range(4)), (flex, range(2))):
        full.step(attempt, *tokens)
    await full.publisher.publish()
    for _ in range(3):
        await admit(parts.broker)
    assert len(await full.claim()) == 6
    assert await full.make_room() == [shorter.id, longer.id]
    assert full.engine.cancelled == [shorter.engine_id, longer.engine_id]
    assert "batch" not in full.intake.rooms()

    heir = Parts(parts.broker, parts.broker, name="w3")
    await heir.beat()
    await heir.claim()
    await submitted(heir, 2)
    logged = sorted(request.logged for request in heir.engine.submitted)
    assert logged == [[0, 1, 2, 3], [*range(9)]]
    with Redis(port=redis_server.port) as raw:
        view = PartitionView(raw, POOL).look()
        assert {view.generations[id]["deaths"] for id in (shorter.id, longer.id)} == {"0"}
    await full.close()
    await heir.close()


async def test_tokens_promised_to_batch_rows_are_no_obstacle(parts: Parts) -> None:
    """An eighth is kept for who comes next; beyond it somebody is handed back."""
    full = Parts(parts.broker, parts.broker, name="w2", slots=4, spare=1, tokens=800)
    await full.beat()
    for _ in range(3):
        await admit(parts.broker, lane="batch", prompt_tokens=100, max_new_tokens=250)
    assert len(await full.claim()) == 2
    await admit(parts.broker, prompt_tokens=50, max_new_tokens=40)
    assert len(await full.claim()) == 3
    assert await full.make_room() == []
    await admit(parts.broker, prompt_tokens=50, max_new_tokens=40)
    assert len(await full.claim()) == 4
    assert len(await full.make_room()) == 1
    await full.close()


async def test_a_large_batch_generation_takes_what_it_needs_when_nobody_else_is_there(
    parts: Parts,
) -> None:
    """Nothing is kept free against somebody who would else never run."""
    large = await admit(parts.broker, lane="batch", prompt_tokens=100, max_new_tokens=900)
    assert [attempt.id for attempt in await parts.claim()] == [large]


async def test_room_kept_for_a_large_batch_generation_is_not_kept_from_interactive_ones(
    parts: Parts, redis_server: RedisServer
) -> None:
    await admit(parts.broker, lane="batch", prompt_tokens=100, max_new_tokens=100)
    [small] = await parts.claim()
    large = await admit(parts.broker, lane="batch", prompt_tokens=100, max_new_tokens=800)
    with Redis(port=redis_server.port) as raw:
        PartitionView(raw, POOL).age(large, 3000)
    await parts.claim()
    await admit(parts.broker, lane="batch")
    interactive = await admit(parts.broker)
    assert not parts.intake.should_claim({"batch": 912})
    assert parts.intake.should_claim({"default": 12, "batch": 912})
    held = {attempt.id: attempt for attempt in await parts.claim()}
    assert set(held) == {small.id, interactive}
    assert not parts.intake.should_claim({"batch": 912}), "it is still kept"
    for attempt in held.values():
        parts.step(attempt, 1, finish="length")
    await parts.publisher.publish()
    assert large in [attempt.id for attempt in await parts.claim()]


async def test_a_worker_full_of_batch_rows_hears_of_interactive_ones(
    broker: Broker, blocking_broker: Broker
) -> None:
    """And leaves the bell of the others to workers with room for them."""
    full = Parts(broker, blocking_broker, slots=1, spare=1)
    await full.beat()
    await admit(broker, lane="batch")
    await full.claim()
    full.wake.clear()
    full.spawn(full.intake.listen())
    generation = await admit(broker)
    async with asyncio.timeout(5):
        while generation not in [attempt.id for attempt in full.ledger.running()]:
            await full.wake.wait()
            full.wake.clear()
            if full.intake.should_claim({}):
                await full.intake.claim()
    await full.close()
