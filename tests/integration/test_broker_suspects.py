"""Probation, played out step by step on both servers: a suspect runs alone until it has come
further, so that whoever kills is found, and nobody who stood beside it.
"""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from common.broker import Broker, connect
from common.broker.keys import prefix
from tests.conftest import POOL
from tests.support.generations import Attempt, ScriptedClaims, admit
from tests.support.redis_server import RawRedis, RedisServer
from tests.support.worker_parts import logged, tokens_of

KEY = prefix(POOL)
LONG_AGO_MS = 6000
"""Longer than a suspect waits for a worker that happens to be clear."""


@pytest.fixture
async def broker(any_redis_server: RedisServer) -> AsyncIterator[Broker]:
    broker = Broker(connect(any_redis_server.url), POOL)
    await broker.load()
    await broker.beat_gateway("g1")
    yield broker
    await broker.close()


@dataclass
class Pool:
    """Workers that die of some generations as soon as they run them."""

    broker: Broker
    num_workers: int = 0

    async def worker(self) -> ScriptedClaims:
        self.num_workers += 1
        worker = ScriptedClaims(self.broker, f"w{self.num_workers}")
        await worker.beat()
        return worker

    async def die(self, worker: ScriptedClaims) -> None:
        await self.broker.bury_worker(worker.name)
        while await self.broker.reap():
            pass

    async def die_twice(self) -> None:
        """Of all that waits: two workers in a row."""
        for _ in range(2):
            worker = await self.worker()
            assert await worker.claim()
            await self.die(worker)


@pytest.fixture
async def pool(broker: Broker) -> Pool:
    """With a worker that lives, lest nothing be admitted, and never claims."""
    pool = Pool(broker)
    await pool.worker()
    return pool


async def come_further(worker: ScriptedClaims, attempt: Attempt, num_tokens: int = 8) -> None:
    assert await worker.publish(attempt.next(*range(num_tokens))) == []


async def test_a_suspect_is_claimed_alone_and_nothing_beside_it(broker: Broker, pool: Pool) -> None:
    """Two others died, too, and somebody new waits: they are all left to other workers."""
    generations = {await admit(broker, max_new_tokens=20) for _ in range(3)}
    await pool.die_twice()
    fresh = await admit(broker, max_new_tokens=20)
    worker, other = await pool.worker(), await pool.worker()
    [suspect] = await worker.claim()
    assert suspect.claimed.clear_at == 8
    assert await worker.claim() == []
    [second] = await other.claim()
    assert {suspect.id, second.id} <= generations
    await come_further(worker, suspect, 7)
    assert await worker.claim() == [], "not far enough"
    await come_further(worker, suspect, 1)
    [third] = await worker.claim()
    assert {suspect.id, second.id, third.id} == generations
    await come_further(worker, third)
    assert [attempt.id for attempt in await worker.claim()] == [fresh]


@pytest.mark.parametrize("how", ["finish", "cancel", "release", "forget", "time out"])
async def test_a_suspect_that_is_gone_keeps_its_worker_no_longer(
    broker: Broker, pool: Pool, raw: RawRedis, how: str
) -> None:
    """The pool's only worker serves on."""
    generation = await admit(broker)
    await pool.die_twice()
    fresh = await admit(broker)
    worker = await pool.worker()
    [suspect] = await worker.claim()
    expected = [fresh]
    match how:
        case "finish":
            assert await worker.publish(suspect.next(1, finish="eos_token")) == []
        case "cancel":
            await broker.cancel(generation, "public")
        case "forget":
            worker.holding.clear()  # its claim's answer was lost
            assert await worker.beat() == [generation]
            expected = [generation]
        case "time out":
            await raw.hset(f"{KEY}gen:{generation}", "run_limit", "0")
            await raw.zadd(f"{KEY}due", {generation: 1})
            await broker.reap()
        case _:
            await broker.release(worker.name, [suspect.held])
            expected = [generation]
    assert [attempt.id for attempt in await worker.claim()] == expected


async def test_a_drain_on_probation_is_no_death(broker: Broker, pool: Pool, raw: RawRedis) -> None:
    """Handed over by workers that end as they should, again and again, it is still innocent."""
    generation = await admit(broker, max_new_tokens=20)
    await pool.die_twice()
    for _ in range(3):
        worker = await pool.worker()
        [suspect] = await worker.claim()
        await come_further(worker, suspect, 1)
        await broker.leave_worker(worker.name)
    assert await raw.hget(f"{KEY}gen:{generation}", "deaths") == "2"
    worker = await pool.worker()
    [suspect] = await worker.claim()
    assert (suspect.at, suspect.claimed.clear_at) == (3, 8)


async def test_a_suspect_waits_until_nobody_else_may_kill(broker: Broker, pool: Pool) -> None:
    """Beside what has just been claimed it could be taken for the culprit."""
    worker = await pool.worker()
    neighbour_id = await admit(broker, max_new_tokens=20)
    [neighbour] = await worker.claim()
    suspect_id = await admit(broker, max_new_tokens=20)
    await pool.die_twice()
    fresh = await admit(broker, max_new_tokens=20)
    [newcomer] = await worker.claim()
    assert (neighbour.id, newcomer.id) == (neighbour_id, fresh), "others are not kept waiting"
    await come_further(worker, neighbour)
    assert await worker.claim() == []
    await come_further(worker, newcomer)
    assert [attempt.id for attempt in await worker.claim()] == [suspect_id]


async def test_a_suspect_that_waits_for_long_gets_a_worker_of_its_own(
    broker: Broker, pool: Pool, raw: RawRedis
) -> None:
    """A worker that always has somebody new takes nobody until all have come further; one such
    worker is enough, and should it not call again, there is another."""
    busy, other = await pool.worker(), await pool.worker()
    await admit(broker, max_new_tokens=20)
    await admit(broker, max_new_tokens=20)
    [neighbour] = await busy.claim(limit=1)
    await other.claim(limit=1)
    suspect_id = await admit(broker, max_new_tokens=20)
    await pool.die_twice()
    fresh = [await admit(broker, max_new_tokens=20) for _ in range(2)]
    await let_wait(raw, suspect_id, "died_ms")
    assert await busy.claim() == []
    assert [attempt.id for attempt in await other.claim(limit=1)] == fresh[:1]
    await let_wait(raw, suspect_id, "awaits_ms")
    assert await other.claim() == []
    await come_further(busy, neighbour)
    assert [attempt.id for attempt in await busy.claim(limit=1)] == [suspect_id]
    assert [attempt.id for attempt in await other.claim()] == fresh[1:]


async def test_who_does_not_become_clear_gives_up_for_a_while(
    broker: Broker, pool: Pool, raw: RawRedis
) -> None:
    """A neighbour that stands still keeps neither the suspect's worker nor the queue for ever."""
    worker = await pool.worker()
    await admit(broker)
    await worker.claim()
    suspect_id = await admit(broker)
    await pool.die_twice()
    fresh = await admit(broker)
    await let_wait(raw, suspect_id, "died_ms")
    assert await worker.claim() == []
    await let_wait(raw, suspect_id, "awaits_ms")
    assert [attempt.id for attempt in await worker.claim()] == [fresh]


async def let_wait(raw: RawRedis, generation: str, since: str) -> None:
    now = int((await raw.time())[0]) * 1000
    await raw.hset(f"{KEY}gen:{generation}", since, str(now - LONG_AGO_MS))


async def test_a_suspect_of_a_lower_lane_does_not_go_before_others(
    broker: Broker, pool: Pool
) -> None:
    generation = await admit(broker, lane="batch")
    await pool.die_twice()
    fresh = await admit(broker)
    worker, other = await pool.worker(), await pool.worker()
    assert [attempt.id for attempt in await worker.claim()] == [fresh]
    assert [attempt.id for attempt in await other.claim()] == [generation]


async def test_a_suspect_does_not_stand_before_others_that_were_handed_back(
    broker: Broker, pool: Pool
) -> None:
    """It came earlier, and has tokens as they have; who may not take it reaches them."""
    busy = await pool.worker()
    await admit(broker)
    await busy.claim()
    await admit(broker, max_new_tokens=20)
    for num_tokens in (1, 0):
        victim = await pool.worker()
        [suspect] = await victim.claim()
        await come_further(victim, suspect, num_tokens)
        await pool.die(victim)
    other_id = await admit(broker)
    [other] = await busy.claim()
    await come_further(busy, other, 1)
    await broker.release(busy.name, [other.held])
    assert [attempt.id for attempt in await busy.claim()] == [other_id]


async def test_an_acquitted_suspect_begins_anew(broker: Broker, pool: Pool, raw: RawRedis) -> None:
    """It came further beside whoever kills: the deaths before count no more, but in all."""
    generation = await admit(broker, max_new_tokens=100)
    for number in range(10):
        assert await raw.hget(f"{KEY}gen:{generation}", "st") == "Q"
        worker = await pool.worker()
        [attempt] = await worker.claim()
        if number % 3 == 2:
            await come_further(worker, attempt)
        await pool.die(worker)
    end = await raw.hmget(f"{KEY}gen:{generation}", ["end", "deaths", "probation_deaths"])
    assert end == ["POISON_REQUEST", "10", "0"]


async def test_who_knows_no_probation_finds_nobody_guilty(
    broker: Broker, pool: Pool, raw: RawRedis
) -> None:
    """A worker of an older release claims a suspect beside others: its death tells little."""
    generation = await admit(broker)
    await pool.die_twice()
    for _ in range(3):
        worker = await pool.worker()
        [suspect] = await worker.claim()
        older = suspect.claimed.fence[:-1] + "-"  # claimed again, by functions that note nothing
        await raw.hset(f"{KEY}gen:{generation}", "fence", older)
        await pool.die(worker)
    assert await raw.hget(f"{KEY}gen:{generation}", "st") == "Q"


@dataclass
class Crowd:
    """Workers that take what they get; some generations kill theirs after a few steps."""

    pool: Pool
    rng: random.Random
    poisons: set[str]
    workers: list[ScriptedClaims] = field(default_factory=list[ScriptedClaims])
    attempts: dict[str, list[Attempt]] = field(default_factory=dict[str, list[Attempt]])
    num_deaths: int = 0

    async def turn(self) -> None:
        """One worker claims, then its engine makes a step, or it dies."""
        worker = self.rng.choice(self.workers)
        running = self.attempts.setdefault(worker.name, [])
        running += await worker.claim(limit=12)
        if any(it.id in self.poisons for it in running) and self.rng.random() < 0.4:
            self.num_deaths += 1
            self.workers[self.workers.index(worker)] = await self.pool.worker()
            await self.pool.die(worker)
            return
        made = [it for it in running if it.id not in self.poisons and self.rng.random() < 0.8]
        ended = [it for it in made if it.at >= 17]
        finish = {it.id: "length" for it in ended}
        items = [it.next(*range(it.at, it.at + 3), finish=finish.get(it.id, "")) for it in made]
        assert await worker.publish(*items) == []
        self.attempts[worker.name] = [it for it in running if it not in ended]


@pytest.mark.parametrize("num_poisons", [1, 2, 3])
@pytest.mark.parametrize("seed", [1, 2])
async def test_of_a_crowd_only_the_guilty_are_quarantined(
    broker: Broker, pool: Pool, raw: RawRedis, num_poisons: int, seed: int
) -> None:
    """Three workers, 32 generations: 31 + 1, 30 + 2 and 29 + 3, in an order that the seed draws."""
    rng = random.Random(seed)
    workers = [await pool.worker() for _ in range(3)]
    generations = [await admit(broker, max_new_tokens=30) for _ in range(32)]
    crowd = Crowd(pool, rng, set(rng.sample(generations, num_poisons)), workers)
    for _ in range(2000):
        await crowd.turn()
        if not await raw.exists(f"{KEY}due"):
            break
    ends = {it: await raw.hget(f"{KEY}gen:{it}", "end") for it in generations}
    guilty = {it for it, end in ends.items() if end == "POISON_REQUEST"}
    assert guilty == crowd.poisons, ends
    assert crowd.num_deaths <= 4 * num_poisons
    for innocent in set(generations) - guilty:
        assert ends[innocent] == "length"
        assert tokens_of(await logged(broker, innocent)) == list(range(21))
