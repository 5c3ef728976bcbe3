"""What workers died of: kept as evidence, asked anew once, or discarded; never shown."""

import pytest

from common.broker import Broker
from common.failures import Failure
from common.ids import request_of
from common.messages import Sampling
from common.settings import BackgroundSettings
from ops.incident.recipe import CannotReplay, Logged, find_recipe
from tests.support.dead_letters import PROMPT, Killer, killed
from tests.support.event_schema import captured_logs
from tests.support.generations import ScriptedClaims

WHO = "the test"


@pytest.fixture
async def killer(broker: Broker) -> Killer:
    return await killed(broker)


async def test_it_is_listed_with_its_evidence_and_without_a_word_of_it(killer: Killer) -> None:
    store = killer.broker.dead_letter_store
    [letter] = await store.newest()
    assert (letter.id, letter.deaths, letter.worker) == (killer.id, 4, killer.workers[-1])
    evidence = await store.get(killer.id)
    assert evidence.letter == letter
    assert evidence.workers == killer.workers
    assert evidence.is_kept
    assert evidence.prompt_tokens == 6
    assert evidence.parameters["max_new_tokens"] == 9
    assert evidence.parameters["grammar"] == "regex"
    assert evidence.parameters["num_stop"] == 1
    assert evidence.waited is not None
    assert evidence.lasted is not None
    for words in ("secret", "sesame"):
        assert words not in repr(evidence)


async def test_it_is_asked_anew_once_and_its_end_stands(killer: Killer) -> None:
    broker, store = killer.broker, killer.broker.dead_letter_store
    with captured_logs() as lines:
        first = await store.requeue(killer.id, WHO)
        again = await store.requeue(killer.id, WHO)
    assert not first.is_repeated
    assert (again.request_id, again.is_repeated) == (first.request_id, True)
    [told] = [line for line in lines if line["event"] == "job.revived"]
    assert (told["job_id"], told["request_id"]) == (killer.id, request_of(killer.id))
    assert (told["revived_as"], told["cause"]) == (first.request_id, WHO)
    assert await store.newest() == []
    old = await broker.read(killer.id, 0)
    assert old is not None
    assert old.state == "T", "who read it was told its end"
    heir = ScriptedClaims(broker, "w9")
    await heir.beat()
    claimed = (await heir.claim_one()).claimed
    assert claimed.id == f"{first.request_id}.0"
    assert claimed.deaths == 0
    assert claimed.spec is not None
    assert claimed.spec.prompt == PROMPT
    assert claimed.spec.sampling.seed == 5
    assert claimed.spec.request_id == first.request_id
    evidence = await store.get(killer.id)
    assert evidence.requeued_as == first.request_id
    assert not evidence.is_kept, "its prompt went"


async def test_it_can_be_replayed_while_its_prompt_is_kept(killer: Killer) -> None:
    asked = {"request_id": killer.id[:-2], "code": "POISON_REQUEST"}
    logged = Logged(job_id=killer.id, asked=asked, made={})
    recipe = await find_recipe(logged, killer.broker, BackgroundSettings(), None)
    assert (recipe.prompt, recipe.sampling.seed) == ([7] * 6, 5)
    assert "dead letter" in recipe.origin
    await killer.broker.dead_letter_store.discard(killer.id, WHO)
    with pytest.raises(CannotReplay, match="--prompt-file"):
        await find_recipe(logged, killer.broker, BackgroundSettings(), None)


async def test_a_choice_is_asked_anew_as_itself(broker: Broker) -> None:
    killer = await killed(broker, num_choices=2, choice=1)
    requeued = await broker.dead_letter_store.requeue(killer.id, WHO)
    heir = ScriptedClaims(broker, "w9")
    await heir.beat()
    found = {attempt.id: attempt.claimed for attempt in await heir.claim()}
    spec = found[f"{requeued.request_id}.0"].spec
    assert spec is not None
    assert spec.sampling.seed == Sampling(9, seed=5).of_choice(1).seed


async def test_a_requeue_that_is_refused_can_be_tried_again(broker: Broker) -> None:
    """Here by the lane: no worker is left, and none has beaten for long."""
    killer = await killed(broker)
    view = broker.dead_letter_store
    await broker._redis.delete("hr:{test/0}:versions", "hr:{test/0}:leases")
    with pytest.raises(Failure) as refused:
        await view.requeue(killer.id, WHO)
    assert refused.value.code == "NO_WORKERS"
    assert len(await view.newest()) == 1
    worker = ScriptedClaims(broker, "w9")
    await worker.beat()
    assert not (await view.requeue(killer.id, WHO)).is_repeated


async def test_what_is_discarded_is_gone(killer: Killer) -> None:
    store = killer.broker.dead_letter_store
    with captured_logs() as lines:
        await store.discard(killer.id, WHO)
    [told] = [line for line in lines if line["event"] == "job.discarded"]
    assert (told["job_id"], told["cause"]) == (killer.id, WHO)
    assert await store.newest() == []
    for act in (store.get(killer.id), store.requeue(killer.id, WHO), store.discard(killer.id, WHO)):
        with pytest.raises(Failure) as refused:
            await act
        assert refused.value.code == "NOT_FOUND"


async def test_without_its_prompt_it_can_only_be_discarded(killer: Killer) -> None:
    """The list outlives the prompts."""
    broker, store = killer.broker, killer.broker.dead_letter_store
    await broker._redis.delete(f"hr:{{test/0}}:dead:{killer.id}")
    assert not (await store.get(killer.id)).is_kept
    with pytest.raises(Failure) as refused:
        await store.requeue(killer.id, WHO)
    assert refused.value.code == "STREAM_EXPIRED"
    await store.discard(killer.id, WHO)
    assert await store.newest() == []


async def test_forgetting_a_tenant_takes_its_dead_letters(killer: Killer) -> None:
    broker = killer.broker
    await broker.forget(killer.id, "somebody else")
    assert len(await broker.dead_letter_store.newest()) == 1
    await broker._redis.delete(f"hr:{{test/0}}:gen:{killer.id}")  # it has expired by then
    assert await broker.forget(killer.id, "public")
    assert await broker.dead_letter_store.newest() == []
    assert not await broker._redis.exists(f"hr:{{test/0}}:dead:{killer.id}")
