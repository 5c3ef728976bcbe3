"""From engine steps to the log: one record per publish, and what each refusal leads to."""

from collections.abc import AsyncIterator

import pytest

from common.broker import Broker, Publication, connect
from common.clock import monotonic_s
from common.failures import Failure
from common.messages import TokenRecord, chain_next, chain_start, chain_text
from tests.conftest import POOL
from tests.support.event_schema import captured_logs
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.generations import admit
from tests.support.worker_parts import VERSION, Parts, logged, tokens_of
from workers.attempts import Attempt


@pytest.fixture
async def parts(broker: Broker, blocking_broker: Broker) -> AsyncIterator[Parts]:
    parts = Parts(broker, blocking_broker)
    await parts.beat()
    yield parts
    await parts.close()


async def claimed_one(parts: Parts, **fields: int) -> Attempt:
    await admit(parts.broker, **fields)
    [attempt] = await parts.claim()
    return attempt


async def test_what_several_steps_made_goes_out_as_one_record(parts: Parts) -> None:
    """Slower publishing than stepping makes larger records, not a longer queue."""
    attempt = await claimed_one(parts)
    parts.step(attempt, 11)
    parts.step(attempt, 12, 13)
    parts.step(attempt, 14, finish="length")
    await parts.publisher.publish()
    [entry] = await logged(parts.broker, attempt.id)
    assert entry.record.tokens == [11, 12, 13, 14]
    assert entry.record.pieces == [b"t11 ", b"t12 ", b"t13 ", b"t14 "]
    assert entry.record.finish is not None
    assert entry.record.finish.reason == "length"
    assert parts.ledger.running() == []


async def test_each_step_is_one_record_when_publishing_keeps_up(parts: Parts) -> None:
    """The log has an entry per publish, dense and chained."""
    attempt = await claimed_one(parts)
    for token in (21, 22, 23):
        parts.step(attempt, token)
        await parts.publisher.publish()
    entries = await logged(parts.broker, attempt.id)
    assert [entry.record.tokens for entry in entries] == [[21], [22], [23]]


async def test_the_answer_says_how_much_waits_in_the_pool(parts: Parts) -> None:
    """A busy worker learns from its publish that it should claim."""
    attempt = await claimed_one(parts)
    parts.step(attempt, 1)
    assert set((await parts.publisher.publish()).values()) == {0}
    await admit(parts.broker, prompt_tokens=10, max_new_tokens=20)
    await admit(parts.broker, lane="batch", prompt_tokens=10, max_new_tokens=30)
    parts.step(attempt, 2)
    waiting = {"priority": 0, "default": 30, "flex": 0, "batch": 40}
    assert await parts.publisher.publish() == waiting


async def test_a_generation_that_shows_nothing_yet_can_be_cancelled(
    broker: Broker, blocking_broker: Broker
) -> None:
    """A prompt of many steps publishes nothing; Redis is asked about it all the same."""
    now_s = monotonic_s()
    parts = Parts(broker, blocking_broker, clock=lambda: now_s)
    await parts.beat()
    attempt = await claimed_one(parts)
    await parts.publisher.publish()
    assert parts.ledger.running() == [attempt]
    await parts.broker.cancel(attempt.id, "public")
    now_s += 1.0
    await parts.publisher.publish()
    assert parts.ledger.running() == []
    assert parts.engine.cancelled == [attempt.engine_id]
    await parts.close()


async def test_a_cancelled_generation_leaves_the_engine(parts: Parts) -> None:
    """Cancel writes the end; the worker's next publish learns of it and frees the slot."""
    attempt = await claimed_one(parts)
    parts.step(attempt, 1)
    await parts.publisher.publish()
    await parts.broker.cancel(attempt.id, "public")
    parts.step(attempt, 2)
    with captured_logs() as lines:
        await parts.publisher.publish()
    assert parts.engine.cancelled == [attempt.engine_id]
    assert parts.ledger.running() == []
    assert [line["event"] for line in lines] == ["generation.cancelled"]
    assert tokens_of(await logged(parts.broker, attempt.id)) == [1]


async def test_what_was_handed_to_somebody_else_is_dropped(parts: Parts) -> None:
    """A fence that is not ours any more: no token of this attempt reaches the log."""
    attempt = await claimed_one(parts)
    await parts.broker.release(parts.name, [(attempt.id, attempt.fence)])
    parts.step(attempt, 1)
    with captured_logs() as lines:
        await parts.publisher.publish()
    assert parts.engine.cancelled == [attempt.engine_id]
    assert parts.ledger.holding() == []
    assert [(line["event"], line["cause"]) for line in lines] == [("generation.lost", "lost")]


async def test_output_of_a_dropped_attempt_is_ignored(parts: Parts) -> None:
    """A step that was under way when its attempt was dropped brings output for nobody."""
    attempt = await claimed_one(parts)
    parts.ledger.forget(attempt)
    parts.step(attempt, 1)
    assert await parts.publisher.publish() == {}
    assert await logged(parts.broker, attempt.id) == []


async def test_another_history_under_our_fence_is_given_back(parts: Parts) -> None:
    """Diverged: the log holds other tokens than we do, so the next attempt starts from the log."""
    attempt = await claimed_one(parts)
    foreign = chain_text(chain_next(chain_start(attempt.id, VERSION), 99))
    record = TokenRecord(0, foreign, [99], [b"x"])
    await parts.broker.publish(
        parts.name, [Publication(attempt.id, attempt.fence, "", record)], lease_ms=5000
    )
    parts.step(attempt, 1)
    parts.step(attempt, 2)
    with captured_logs() as lines:
        await parts.publisher.publish()
    assert "generation.diverged" in [line["event"] for line in lines]
    assert parts.engine.cancelled == [attempt.engine_id]
    [again] = await parts.claim()
    assert again.base == 1
    assert tokens_of(await logged(parts.broker, attempt.id)) == [99]


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def cut_parts(proxy: FaultProxy, blocking_broker: Broker) -> AsyncIterator[Parts]:
    """Parts whose connection to Redis can be broken."""
    broker = Broker(connect(proxy.url, single=True), POOL)
    parts = Parts(broker, blocking_broker)
    await parts.beat()
    yield parts
    await parts.close()
    await broker.close()


async def test_a_lost_publish_answer_repeats_nothing(
    proxy: FaultProxy, cut_parts: Parts, broker: Broker
) -> None:
    """Redis took it, we do not know: sending it again, with more behind it, is exact."""
    attempt = await claimed_one(cut_parts)
    cut_parts.step(attempt, 1)
    cut_parts.step(attempt, 2)
    proxy.lose_answer(b"_publish")
    with pytest.raises(Failure, match="BROKER_UNAVAILABLE"):
        await cut_parts.publisher.publish()
    cut_parts.step(attempt, 3, finish="stop_sequence")
    while attempt.is_unpublished:  # the first answer realigns, the second takes the rest
        await cut_parts.publisher.publish()
    entries = await logged(broker, attempt.id)
    assert [entry.record.tokens for entry in entries] == [[1, 2], [3]]
    assert cut_parts.ledger.running() == []


async def test_a_lost_answer_to_the_end_is_sent_once_more_and_accepted(
    proxy: FaultProxy, cut_parts: Parts, broker: Broker
) -> None:
    """The own end is recognised by its fence: it is no cancellation and no second end."""
    attempt = await claimed_one(cut_parts)
    cut_parts.step(attempt, 1, finish="eos_token")
    proxy.lose_answer(b"_publish")
    with pytest.raises(Failure):
        await cut_parts.publisher.publish()
    with captured_logs() as lines:
        await cut_parts.publisher.publish()
    assert [line["event"] for line in lines] == ["worker.finished"]
    assert len(await logged(broker, attempt.id)) == 1


async def test_a_copy_of_a_publish_that_runs_late_changes_nothing(
    proxy: FaultProxy, cut_parts: Parts, broker: Broker
) -> None:
    """A frame that the network kept and delivers after the end is refused or ignored."""
    attempt = await claimed_one(cut_parts)
    caught = proxy.copy(b"_publish", times=2)
    cut_parts.step(attempt, 1)
    await cut_parts.publisher.publish()
    cut_parts.step(attempt, 2)
    await cut_parts.publisher.publish()
    cut_parts.step(attempt, 3, finish="length")
    await cut_parts.publisher.publish()
    for command in caught.commands:
        await proxy.send(command)
    assert tokens_of(await logged(broker, attempt.id)) == [1, 2, 3]


async def test_the_engine_pauses_when_redis_is_256_tokens_behind(parts: Parts) -> None:
    """What only this process knows is bounded; after a publish the engine goes on."""
    attempt = await claimed_one(parts, max_new_tokens=600)
    for token in range(255):
        parts.step(attempt, token)
    assert not parts.engine.is_paused
    parts.step(attempt, 255)
    assert parts.engine.is_paused
    await parts.publisher.publish()
    assert not parts.engine.is_paused
    assert len(tokens_of(await logged(parts.broker, attempt.id))) == 256


async def test_the_engine_pauses_after_ten_seconds_without_a_publish(
    broker: Broker, blocking_broker: Broker
) -> None:
    """The same limit in time, for a slow engine."""
    now_s = 100.0
    parts = Parts(broker, blocking_broker, clock=lambda: now_s)
    await parts.beat()
    attempt = await claimed_one(parts)
    parts.step(attempt, 1)
    now_s += 9.9
    parts.step(attempt, 2)
    assert not parts.engine.is_paused
    now_s += 0.2
    parts.step(attempt, 3)
    assert parts.engine.is_paused
    await parts.publisher.publish()
    assert not parts.engine.is_paused


async def test_an_end_is_kept_for_three_seconds_and_sent_again_after_a_lost_connection(
    broker: Broker, blocking_broker: Broker
) -> None:
    """Redis may have forgotten its last second: recent ends are told once more, harmlessly."""
    now_s = 100.0
    parts = Parts(broker, blocking_broker, clock=lambda: now_s)
    await parts.beat()
    attempt = await claimed_one(parts)
    parts.step(attempt, 1, finish="length")
    await parts.publisher.publish()
    assert parts.ledger.holding() == [attempt.id]

    parts.publisher.doubt_ended()
    assert attempt.is_unpublished
    await parts.publisher.publish()
    assert not attempt.is_unpublished
    assert len(await logged(broker, attempt.id)) == 1

    now_s += 3.1
    await parts.publisher.publish()
    assert parts.ledger.holding() == []


async def test_the_canonical_line_says_what_a_generation_took(parts: Parts) -> None:
    """One line with times, counts and reason; never a word of the text."""
    attempt = await claimed_one(parts, prompt_tokens=5)
    parts.step(attempt, 1)
    parts.step(attempt, 2, finish="length")
    with captured_logs() as lines:
        await parts.publisher.publish()
    [line] = lines
    assert line["event"] == "worker.finished"
    assert (line["prompt_tokens"], line["completion_tokens"], line["new_tokens"]) == (5, 2, 2)
    assert (line["finish_reason"], line["code"], line["attempt"]) == ("length", None, 1)
    assert line["model_version"] == VERSION
    assert 0 <= line["queue_time"] <= line["ttft"] < 10
    assert line["tokens_per_second"] > 0


async def test_the_time_of_a_generation_is_counted_by_its_parts(
    broker: Broker, blocking_broker: Broker
) -> None:
    """A token's gap is that to the token before; the parts make up the whole."""
    now_s = monotonic_s()
    parts = Parts(broker, blocking_broker, clock=lambda: now_s)
    await parts.beat()
    attempt = await claimed_one(parts)
    for token, later_s in ((1, 0.3), (2, 0.02), (3, 0.04)):
        now_s += later_s
        parts.step(attempt, token, finish="length" if token == 3 else "")
    await parts.publisher.publish()
    figures = parts.figures.generations
    assert figures.inter_token_s.count == 2
    assert figures.inter_token_s.sum == pytest.approx(0.06)
    assert figures.per_token_s.sum == pytest.approx(0.03)
    assert figures.prefill_s.sum == pytest.approx(0.3, abs=0.2)
    assert figures.decode_s.sum == pytest.approx(0.06)
    assert figures.inference_s.sum == pytest.approx(figures.prefill_s.sum + figures.decode_s.sum)
    assert figures.whole_s.sum == pytest.approx(figures.queue_s.sum + figures.inference_s.sum)
    assert figures.finished == {"length": 1}
    assert figures.first_token_s.count == figures.queue_s.count == 1
    await parts.close()


async def test_what_another_attempt_made_is_counted_as_recovered(parts: Parts) -> None:
    """Its first token was not ours, so its time to it is not, either."""
    attempt = await claimed_one(parts)
    parts.step(attempt, 21, 22)
    await parts.publisher.publish()
    await parts.publisher.release([attempt], event="generation.released")
    await parts.claim()
    figures = parts.figures.generations
    assert (figures.num_resumed, figures.recovered_tokens) == (1, 2)
    assert figures.queue_s.count == 1
