"""A worker as a process: it serves, says what it holds, drains, and ends with a telling code."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.failures import Failure
from tests.support.generations import admit
from tests.support.processes import Processes
from tests.support.waiting import wait_until
from tests.support.worker_pool import WorkerPool
from workers import exit_codes


async def test_a_worker_answers_with_a_dense_chained_log(pool: WorkerPool) -> None:
    """Claimed by the bell, one record per step, one end with its timing."""
    worker = await pool.worker()
    generation = await pool.admit(30)
    entries = await pool.end_of(generation)
    assert sum(len(entry.record.tokens) for entry in entries) == 30
    timing = entries[-1].timing
    assert timing is not None
    assert timing.worker == worker.name
    assert timing.queue_time_s < 0.9, "the bell, not the one-second look, brought it"
    line = await worker.saw("worker.finished", job_id=generation)
    assert line["completion_tokens"] == 30
    assert line["finish_reason"] == "length"
    assert line["generation_time"] > 0
    assert worker.errors() == ""


async def test_generations_share_a_batch(pool: WorkerPool) -> None:
    """Three take little longer than one, because each step serves them all."""
    worker = await pool.worker()
    generations = [await pool.admit(60) for _ in range(3)]
    results = [await pool.tokens_of(generation) for generation in generations]
    assert results[0] == results[1] == results[2]
    spans = [line["generation_time"] for line in worker.events("worker.finished")]
    assert len(spans) == 3
    assert sum(spans) > 2 * max(spans), "they ran side by side"


async def test_its_presence_says_what_it_is_and_what_it_holds(pool: WorkerPool) -> None:
    """What `headrace status` and /ready show comes from the beat."""
    worker = await pool.worker(max_batch_total_tokens=500)
    generation = await pool.admit(100)
    await pool.reached(generation, 1)

    async def is_counted() -> bool:
        [shown] = (await pool.broker.state()).workers
        presence = shown.presence
        return presence is not None and presence.free_tokens == 500 - 104 and presence.steps > 0

    await wait_until(is_counted, what="a beat that counts the claimed tokens")
    [shown] = (await pool.broker.state()).workers
    assert shown.name == worker.name
    assert shown.held == [generation]
    assert shown.presence is not None
    assert (shown.presence.pid, shown.presence.state) == (worker.pid, "ready")
    assert shown.presence.model_version == pool.model_version


async def test_cancel_frees_its_slot_within_a_step(pool: WorkerPool) -> None:
    """The only slot is taken; after cancel the next generation starts at once."""
    worker = await pool.worker(max_batch_size=1, simulated_inter_token_ms=50)
    first = await pool.admit(200)
    await pool.reached(first, 2)
    second = await pool.admit(5)
    assert await pool.broker.cancel(first, "public") == "cancelled"
    assert len(await pool.tokens_of(second)) == 5
    cancelled = await worker.saw("generation.cancelled", job_id=first)
    assert cancelled["completion_tokens"] < 50
    assert (await pool.end_of(first))[-1].record.finish is not None


async def test_sigterm_lets_running_generations_finish(pool: WorkerPool) -> None:
    """Within its budget a draining worker claims nothing and ends what it runs."""
    worker = await pool.worker(drain_s=10)
    generation = await pool.admit(60)
    await pool.reached(generation, 2)
    worker.terminate()
    await worker.saw("worker.draining")
    late = await pool.admit(5)
    assert len(await pool.tokens_of(generation)) == 60
    assert await worker.ended() == exit_codes.OK
    assert await pool.state(late) == "Q"
    assert (await pool.broker.state()).workers == [], "its lease and presence left with it"


async def test_sigterm_hands_over_what_does_not_finish_in_time(pool: WorkerPool) -> None:
    """The heir continues at once, behind the last token, and nobody counts a death."""
    worker = await pool.worker(drain_s=0, simulated_inter_token_ms=40)
    generation = await pool.admit(150)
    await pool.reached(generation, 10)
    heir = await pool.worker()
    worker.terminate()
    assert await worker.ended() == exit_codes.OK
    entries = await pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert (timing.attempts, timing.deaths, timing.worker) == (2, 0, heir.name)
    released = await worker.saw("generation.released", job_id=generation)
    claimed = await heir.saw("worker.claimed", job_id=generation)
    assert claimed["next"] == released["completion_tokens"]
    again = await pool.admit(150)
    assert await pool.tokens_of(again) == await pool.tokens_of(generation)


async def test_a_second_sigterm_ends_it_at_once(pool: WorkerPool) -> None:
    """An operator in a hurry: the lease ends what was not handed over."""
    worker = await pool.worker(drain_s=30, simulated_inter_token_ms=100)
    generation = await pool.admit(200)
    await pool.reached(generation, 1)
    worker.terminate()
    await worker.saw("worker.draining")
    worker.terminate()
    assert await worker.ended(within_s=2) == exit_codes.NOT_HANDED_OVER


async def test_a_stuck_step_ends_the_process(pool: WorkerPool) -> None:
    """No beat lives on over an engine that hangs; the exit code says what it was."""
    worker = await pool.worker(simulated_first_token_ms=30_000, step_timeout_s=0.5)
    generation = await pool.admit(5)
    assert await worker.ended(within_s=10) == exit_codes.STALLED
    [line] = worker.events("engine.stalled")
    assert line["holding"] == [generation]

    heir = await pool.worker()
    assert len(await pool.tokens_of(generation)) == 5
    assert heir.events("worker.claimed")[0]["deaths"] == 1


async def test_a_step_longer_than_the_lease_keeps_it(pool: WorkerPool) -> None:
    """A long prefill publishes nothing; the beat is a task of its own, so nobody takes over."""
    worker = await pool.worker(simulated_first_token_ms=2500, lease_ms=1000, beat_ms=300)
    generation = await pool.admit(5)
    await pool.worker()
    timing = (await pool.end_of(generation))[-1].timing
    assert timing is not None
    assert (timing.attempts, timing.deaths, timing.worker) == (1, 0, worker.name)


async def test_what_waited_before_it_came_is_taken_at_once(pool: WorkerPool) -> None:
    """A worker that starts looks before it listens for a bell."""
    former = await pool.worker()
    former.terminate()
    await former.ended()
    generation = await pool.admit(5)
    await pool.broker.wait_for_bell(1)  # somebody else heard it
    worker = await pool.worker()
    await pool.end_of(generation)
    ready, claimed = worker.events("worker.ready")[0], worker.events("worker.claimed")[0]
    waited_s = datetime.fromisoformat(claimed["ts"]) - datetime.fromisoformat(ready["ts"])
    assert waited_s < timedelta(seconds=0.9)


async def test_what_can_never_fit_is_refused_at_admission(pool: WorkerPool) -> None:
    """The cache, not only the model, limits what a worker says it could take."""
    await pool.worker(max_batch_total_tokens=100, max_total_tokens=4096)
    with pytest.raises(Failure, match="CONTEXT_LENGTH_EXCEEDED"):
        await pool.admit(97)
    assert len(await pool.tokens_of(await pool.admit(96))) == 96


async def test_a_house_full_of_batch_rows_serves_who_comes_at_once(pool: WorkerPool) -> None:
    """Some of them pause and some are handed back; whatever happens to them, they say the same.

    Three come where one place is kept: they end before anything of the batch does, although all of
    it came before them. Then the worker is killed, and another one ends what is left.
    """
    settings: dict[str, Any] = {"max_batch_size": 3, "simulated_inter_token_ms": 20, "beat_ms": 300}
    worker = await pool.worker(lease_ms=1000, **settings)
    batch = [await pool.admit(150, lane="batch") for _ in range(5)]
    for generation in batch[:3]:
        await pool.reached(generation, 5)
    interactive = [await pool.admit(10) for _ in range(3)]
    ends = [(await pool.end_of(generation))[-1] for generation in interactive]
    assert [await pool.position(generation) < 150 for generation in batch] == [True] * 5
    assert {end.timing.attempts for end in ends if end.timing} == {1}
    assert 1 <= len(worker.events("generation.yielded")) <= 2
    worker.kill()
    await pool.worker(max_batch_size=8)
    answers = [await pool.tokens_of(generation) for generation in batch]
    assert answers == [answers[0]] * 5
    deaths = [(await pool.end_of(one))[-1].timing.deaths for one in batch]  # pyright: ignore[reportOptionalMemberAccess]
    assert max(deaths) == 1, "only the kill was one"


async def test_an_unreachable_redis_is_one_clear_line(started: Processes) -> None:
    """At the start it is waited for some seconds only: then it is said, and that is the end."""
    worker = started.worker(redis_url="redis://127.0.0.1:1/0")
    assert await worker.ended() == exit_codes.UNREACHABLE
    assert worker.errors().startswith(
        "headrace worker: BROKER_UNAVAILABLE: Redis cannot be reached"
    )
    assert worker.errors().count("\n") == 1


async def test_a_wrong_setting_is_one_clear_line(started: Processes) -> None:
    """The line names the setting as an option and as a variable."""
    worker = started.worker(max_batch_size=0)
    assert await worker.ended() == exit_codes.USAGE
    assert "max_batch_size (HEADRACE_MAX_BATCH_SIZE)" in worker.errors()
    assert worker.errors().count("\n") == 1


async def test_an_unknown_model_is_one_clear_line(started: Processes) -> None:
    """The model is missed at the start, not at the first request."""
    worker = started.worker(model="nobody-added-me")
    assert await worker.ended() == exit_codes.ENGINE_FAILED
    assert worker.errors().startswith("headrace worker: MODEL_NOT_FOUND")


async def test_no_log_line_holds_the_prompt_or_the_answer(pool: WorkerPool, tmp_path: Path) -> None:
    """Counts and times, never words: not in the log, not on standard error."""
    worker = await pool.worker()
    generation = await admit(pool.broker, prompt_tokens=64, max_new_tokens=40, attached=False)
    entries = await pool.end_of(generation)
    await worker.saw("worker.finished")
    text = b"".join(piece for entry in entries for piece in entry.record.pieces).decode()
    log = (worker.folder / "worker.jsonl").read_text() + worker.errors()
    assert text[:20] not in log
    assert "62, 63" not in log
    assert tmp_path in worker.folder.parents


async def test_a_full_lane_does_not_starve_behind_one_slot(pool: WorkerPool) -> None:
    """Ten wait for one slot; each is claimed as soon as the one before has ended."""
    await pool.worker(max_batch_size=1, simulated_inter_token_ms=1, simulated_first_token_ms=1)
    generations = [await pool.admit(10) for _ in range(10)]
    for generation in generations:
        assert len(await pool.tokens_of(generation, within_s=5)) == 10


async def test_a_pool_without_workers_refuses(pool: WorkerPool) -> None:
    """Before the first beat there is nobody to admit for."""
    with pytest.raises(Failure, match="NO_WORKERS"):
        await pool.admit(5)
