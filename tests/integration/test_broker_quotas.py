"""Limits of a key: what an admission holds, what its end gives back, and that nobody overtakes."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from common.broker import Admission, Admitted, Broker, LimitReached, Quota, QuotaState, connect
from common.broker.keys import prefix
from common.failures import Failure
from common.ids import choice_of, generation_id, request_of
from common.keys import Limits
from tests.conftest import POOL
from tests.support.generations import Attempt, ScriptedClaims, admission
from tests.support.redis_server import RawRedis, RedisServer

KEY = prefix(POOL)
PER_MINUTE = 600
"""Ten a second: what a test takes refills a few, which every count below allows for."""
SLACK = 60


@pytest.fixture(params=["valkey", "redis"])
def redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """These tests run on Valkey and on Redis 7.0."""
    servers: dict[str, RedisServer] = {
        "valkey": request.getfixturevalue("valkey_server"),
        "redis": request.getfixturevalue("debian_redis_server"),
    }
    server = servers[request.param]
    server.flush()
    yield server.url
    assert not server.keys_without_ttl()


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[RawRedis]:
    client = Redis.from_url(redis_url, decode_responses=True)
    yield client
    await client.aclose()


@pytest.fixture
async def worker(broker: Broker) -> ScriptedClaims:
    worker = ScriptedClaims(broker, max_cost=1_000_000)
    await worker.beat()
    return worker


def limited(*, key_id: str = "k", num_requests: int = 1, **fields: Any) -> Admission:
    """4 tokens of prompt and 8 to come, of a key with the limits among ``fields``."""
    limits = {name: fields.pop(name) for name in Limits.__struct_fields__ if name in fields}
    return replace(admission(**fields), quota=Quota(key_id, Limits(**limits), num_requests))


async def refusal(broker: Broker, **fields: Any) -> LimitReached:
    with pytest.raises(LimitReached) as refused:
        await broker.admit(limited(**fields))
    return refused.value


def left(admitted: Admitted | LimitReached) -> QuotaState:
    assert admitted.quota
    return admitted.quota


async def finish(worker: ScriptedClaims, attempt: Attempt, num_tokens: int) -> None:
    last = attempt.next(*range(num_tokens), finish="length")
    assert await worker.publish(last) == []


# Requests ----------------------------------------------------------------------------------------


async def test_requests_beyond_those_of_a_minute_wait_for_their_turn(
    broker: Broker, worker: ScriptedClaims
) -> None:
    for expected in (2, 1, 0):
        assert left(await broker.admit(limited(requests_per_minute=3))).requests == expected
    refused = await refusal(broker, requests_per_minute=3)
    assert refused.code == "RATE_LIMITED"
    assert refused.message == "The limit of this API key is reached: 3 requests a minute"
    assert 15_000 < (refused.retry_after_ms or 0) <= 20_000, "a third of a minute for each"
    assert 50_000 < left(refused).requests_full_in_ms <= 60_000
    assert await broker.admit(limited(requests_per_minute=3, key_id="another"))


async def test_what_belongs_to_another_request_counts_as_none(
    broker: Broker, worker: ScriptedClaims
) -> None:
    assert await broker.admit(limited(requests_per_minute=1))
    assert await broker.admit(limited(requests_per_minute=1, num_requests=0))
    assert (await refusal(broker, requests_per_minute=1)).code == "RATE_LIMITED"


async def test_a_bucket_fills_with_time(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    for _ in range(3):
        await broker.admit(limited(requests_per_minute=3))
    at = int(await raw.hget(f"{KEY}quota:k", "at"))
    await raw.hset(f"{KEY}quota:k", "at", at - 40_000)
    assert left(await broker.admit(limited(requests_per_minute=3))).requests == 1
    await raw.hset(f"{KEY}quota:k", "at", at + 3_600_000)
    assert left(await broker.admit(limited(requests_per_minute=3))).requests == 0, "set back: none"


# Tokens ------------------------------------------------------------------------------------------


async def test_tokens_are_held_until_the_end_and_what_was_not_used_comes_back(
    broker: Broker, worker: ScriptedClaims
) -> None:
    held = left(await broker.admit(limited(tokens_per_minute=PER_MINUTE, max_new_tokens=400)))
    assert PER_MINUTE - 404 <= held.tokens <= PER_MINUTE - 404 + SLACK
    await finish(worker, await worker.claim_one(), num_tokens=100)
    after = left(await broker.admit(limited(tokens_per_minute=PER_MINUTE)))
    assert PER_MINUTE - 104 - 12 <= after.tokens <= PER_MINUTE - 104 - 12 + SLACK


async def test_a_prompt_counts_once_however_many_answers_it_has(
    broker: Broker, worker: ScriptedClaims
) -> None:
    request = limited(
        tokens_per_minute=PER_MINUTE, prompt_tokens=100, max_new_tokens=100, num_choices=3
    )
    held = left(await broker.admit(request))
    assert PER_MINUTE - 400 <= held.tokens <= PER_MINUTE - 400 + SLACK
    for attempt in await worker.claim():
        await finish(worker, attempt, num_tokens=10)
    after = left(await broker.admit(limited(tokens_per_minute=PER_MINUTE)))
    assert PER_MINUTE - 130 - 12 <= after.tokens <= PER_MINUTE - 130 - 12 + SLACK


async def test_what_no_worker_began_costs_nothing(broker: Broker, worker: ScriptedClaims) -> None:
    request = limited(tokens_per_minute=PER_MINUTE, max_new_tokens=500)
    await broker.admit(request)
    await broker.cancel(generation_id(request.request_id), "public")
    assert left(await broker.admit(limited(tokens_per_minute=PER_MINUTE))).tokens == PER_MINUTE - 12


async def test_tokens_beyond_those_of_a_minute_wait_and_are_told_how_long(
    broker: Broker, worker: ScriptedClaims
) -> None:
    await broker.admit(limited(tokens_per_minute=1000, max_new_tokens=896))
    refused = await refusal(broker, tokens_per_minute=1000, max_new_tokens=596)
    assert (refused.code, refused.kind.retryable) == ("RATE_LIMITED", True)
    assert 25_000 < (refused.retry_after_ms or 0) <= 30_000, "500 more tokens at 1000 a minute"


async def test_what_no_minute_holds_need_not_be_sent_again(
    broker: Broker, worker: ScriptedClaims
) -> None:
    refused = await refusal(broker, tokens_per_minute=11)
    assert (refused.code, refused.kind.retryable) == ("QUOTA_EXHAUSTED", False)
    assert "which are 11" in refused.message


# Open requests -----------------------------------------------------------------------------------


async def test_so_many_at_once_until_one_ends(broker: Broker, worker: ScriptedClaims) -> None:
    first, second = limited(streams=2), limited(streams=2, num_choices=2)
    await broker.admit(first)
    await broker.admit(second)
    refused = await refusal(broker, streams=2)
    assert (refused.code, refused.retry_after_ms) == ("RATE_LIMITED", 1000)
    assert refused.message == "The limit of this API key is reached: 2 at once"
    await broker.cancel(generation_id(second.request_id, 0), "public")
    await refusal(broker, streams=2)  # its other choice goes on
    await broker.cancel(generation_id(second.request_id, 1), "public")
    await broker.admit(limited(streams=2))
    await finish(worker, await worker.claim_one(), num_tokens=1)
    await broker.admit(limited(streams=2))


async def test_a_gateway_that_dies_keeps_no_place(broker: Broker, worker: ScriptedClaims) -> None:
    """Whoever reaps ends what it read, and with it the place."""
    await broker.beat_gateway("g1", lease_ms=1)
    await broker.admit(limited(streams=1, grace_ms=0))
    await refusal(broker, streams=1)
    moved = [move.move for move in await broker.reap()]
    assert moved == ["closed"]
    await broker.admit(limited(streams=1))


async def test_a_worker_that_dies_changes_nothing(broker: Broker, worker: ScriptedClaims) -> None:
    await broker.admit(limited(streams=1, tokens_per_minute=PER_MINUTE))
    await worker.claim_one()
    await broker.bury_worker(worker.name)
    assert [move.move for move in await broker.reap()] == ["requeued"]
    await refusal(broker, streams=1, tokens_per_minute=PER_MINUTE)
    other = ScriptedClaims(broker, "w2")
    await other.beat()
    await finish(other, await other.claim_one(), num_tokens=8)
    await broker.admit(limited(streams=1, tokens_per_minute=PER_MINUTE))


async def test_an_end_that_was_never_told_holds_no_place_for_ever(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    """As when everything was down until the generation had expired."""
    await broker.admit(limited(streams=1))
    for key in await raw.keys(f"{KEY}gen:*"):
        await raw.delete(key)
    await refusal(broker, streams=1)
    await raw.zadd(f"{KEY}using:k", dict.fromkeys(await raw.zrange(f"{KEY}using:k", 0, -1), 1))
    await broker.admit(limited(streams=1))
    assert await raw.zcard(f"{KEY}using:k") == 1


# Together ----------------------------------------------------------------------------------------


async def test_a_refused_request_is_charged_nothing(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    limits: dict[str, Any] = {"requests_per_minute": 5, "tokens_per_minute": PER_MINUTE}
    refusals: tuple[tuple[dict[str, Any], str], ...] = (
        ({"lane_cap_tokens": 1}, "QUEUE_FULL"),
        ({"max_new_tokens": 2_000_000}, "CONTEXT_LENGTH_EXCEEDED"),
        ({"max_new_tokens": PER_MINUTE}, "QUOTA_EXHAUSTED"),
    )
    for fields, code in refusals:
        with pytest.raises(Failure) as refused:
            await broker.admit(limited(**limits, **fields))
        assert refused.value.code == code
    assert await raw.keys(f"{KEY}quota:*") == await raw.keys(f"{KEY}using:*") == []
    assert left(await broker.admit(limited(**limits))).requests == 4


async def test_a_request_that_is_sent_twice_is_charged_once(
    broker: Broker, worker: ScriptedClaims
) -> None:
    """Its answer was lost, or it came again under its idempotency key."""
    request = limited(requests_per_minute=5, idempotency_key="i", fingerprint="f")
    await broker.admit(request)
    assert left(await broker.admit(request)).requests == 4
    again = limited(requests_per_minute=5, idempotency_key="i", fingerprint="f")
    assert left(await broker.admit(again)).requests == 4


async def test_what_redis_forgot_is_queued_again_whatever_is_left(
    broker: Broker, worker: ScriptedClaims
) -> None:
    await broker.admit(limited(requests_per_minute=1, streams=1))
    forgotten = replace(limited(requests_per_minute=1, streams=1), resubmit=True)
    assert not (await broker.admit(forgotten)).existing


async def test_a_key_without_limits_leaves_nothing_behind(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis
) -> None:
    assert (await broker.admit(admission())).quota is None
    assert await raw.keys(f"{KEY}quota:*") == await raw.keys(f"{KEY}using:*") == []


@pytest.mark.parametrize(
    ("limits", "num_expected"),
    [({"streams": 5}, 5), ({"requests_per_minute": 7}, 7), ({"tokens_per_minute": 40}, 3)],
)
async def test_of_many_at_the_same_moment_no_more_than_the_limit_is_let_in(
    redis_url: str, broker: Broker, worker: ScriptedClaims, limits: Any, num_expected: int
) -> None:
    others = [Broker(connect(redis_url), POOL) for _ in range(4)]
    answers = await asyncio.gather(
        *(others[n % 4].admit(limited(**limits)) for n in range(40)), return_exceptions=True
    )
    for other in others:
        await other.close()
    refused = [answer for answer in answers if isinstance(answer, LimitReached)]
    assert len(answers) - len(refused) == num_expected
    assert {failure.code for failure in refused} == {"RATE_LIMITED"}


class History:
    """What a key's requests went through: any order of admissions, tokens, ends, cancels, releases.

    More than a minute's tokens are never held, so that nothing is refused.
    """

    LIMIT = 20_000

    def __init__(self, broker: Broker, worker: ScriptedClaims, rng: random.Random) -> None:
        self._broker = broker
        self._worker = worker
        self._rng = rng
        self._attempts: dict[str, Attempt] = {}
        self.open: dict[str, set[str]] = {}
        """Choices that have not ended, by request."""

    async def go_on(self) -> None:
        step = self._rng.choice(
            (self.admit, self.claim, self.say, self.say, self.end, self.cancel, self.release)
        )
        await step()

    async def admit(self) -> None:
        request = limited(
            tokens_per_minute=self.LIMIT,
            requests_per_minute=self.LIMIT,
            streams=500,
            prompt_tokens=self._rng.randint(1, 50),
            max_new_tokens=self._rng.randint(20, 60),
            num_choices=self._rng.randint(1, 3),
        )
        await self._broker.admit(request)
        self.open[request.request_id] = {
            generation_id(request.request_id, i) for i in range(request.num_choices)
        }

    async def claim(self) -> None:
        self._attempts |= {found.id: found for found in await self._worker.claim(limit=2)}

    async def say(self, finish: str = "") -> None:
        attempt = self._any_attempt()
        if attempt and attempt.at < 18:
            said = attempt.next(1, 2, finish=finish)
            assert await self._worker.publish(said) == []
            if finish:
                self._forget(attempt.id)

    async def end(self) -> None:
        await self.say(finish="stop")

    async def cancel(self) -> None:
        if self.open:
            id = self._rng.choice(sorted(self._rng.choice(list(self.open.values()))))
            assert await self._broker.cancel(id, "public") == "cancelled"
            self._forget(id)

    async def release(self) -> None:
        attempt = self._any_attempt()
        if attempt:
            await self._broker.release(self._worker.name, [attempt.held])
            del self._attempts[attempt.id]

    def _any_attempt(self) -> Attempt | None:
        return self._attempts[self._rng.choice(sorted(self._attempts))] if self._attempts else None

    def _forget(self, id: str) -> None:
        self._attempts.pop(id, None)
        request = request_of(id)
        self.open[request].discard(id)
        if not self.open[request]:
            del self.open[request]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_no_hold_is_lost_or_given_back_twice(
    broker: Broker, worker: ScriptedClaims, raw: RawRedis, seed: int
) -> None:
    history = History(broker, worker, random.Random(seed))
    await history.admit()
    began_s = time.monotonic()
    for _ in range(150):
        await history.go_on()
        assert set(await raw.zrange(f"{KEY}using:k", 0, -1)) == set(history.open)
    while history.open:
        await history.cancel()
    assert await raw.zcard(f"{KEY}using:k") == 0
    refilled = History.LIMIT * (time.monotonic() - began_s + 0.1) / 60
    taken = History.LIMIT - float(await raw.hget(f"{KEY}quota:k", "tokens"))
    used = await _used(raw)
    assert used > 0
    assert used - refilled <= taken <= used


async def _used(raw: RawRedis) -> int:
    """Tokens of all answers, and of each prompt that a worker read for its first choice."""
    used = 0
    for _, ended in await raw.xrange(f"{KEY}ended"):
        was_read = await raw.hget(f"{KEY}gen:{ended['id']}", "t1") != "0"
        bears_prompt = was_read and choice_of(ended["id"]) == 0
        used += int(ended["out"]) + (int(ended["in"]) if bears_prompt else 0)
    return used
