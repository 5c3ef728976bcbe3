"""Workers that are killed or put to sleep: another one goes on, and nobody's tokens change."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ops.bench.incidents.worker import ORDERS, Orders
from tests.support.waiting import wait_until
from tests.support.worker_pool import WorkerPool


async def test_a_killed_worker_is_continued_without_gap_or_repeat(pool: WorkerPool) -> None:
    """SIGKILL mid-stream: the log goes on behind its last entry with the very same tokens."""
    victim = await pool.worker(simulated_inter_token_ms=30)
    heir = await pool.worker(simulated_inter_token_ms=5)
    undisturbed = await pool.tokens_of(await pool.admit(150))
    generations = [await pool.admit(150) for _ in range(6)]
    for generation in generations:
        await pool.reached(generation, 5)
    before = heir.events("worker.claimed")
    victim.kill()
    for generation in generations:
        assert await pool.tokens_of(generation) == undisturbed
    taken_over = [
        line for line in heir.events("worker.claimed") if line not in before and line["deaths"]
    ]
    assert all(line["next"] >= 5 for line in taken_over)
    ended = [(await pool.end_of(generation))[-1].timing for generation in generations]
    assert {timing.worker for timing in ended if timing} == {heir.name}


async def test_everything_is_continued_after_a_kill(pool: WorkerPool) -> None:
    """The lease of the dead ends once; all that it held goes back in one go, counted as a death."""
    victim = await pool.worker(simulated_inter_token_ms=30)
    generations = [await pool.admit(100) for _ in range(20)]
    for generation in generations:
        await pool.reached(generation, 1)
    victim.kill()
    heir = await pool.worker(simulated_inter_token_ms=2)
    results = [await pool.tokens_of(generation) for generation in generations]
    assert all(tokens == results[0] for tokens in results)
    timings = [(await pool.end_of(generation))[-1].timing for generation in generations]
    assert {(timing.attempts, timing.deaths) for timing in timings if timing} == {(2, 1)}
    moved = [line["job_id"] for line in heir.events("job.requeued")]
    assert sorted(moved) == sorted(generations)


async def test_a_zombie_is_fenced_and_works_on_as_a_stranger_would(pool: WorkerPool) -> None:
    """Asleep for longer than its lease, and than a step may take: what it still says is refused,
    then it serves again."""
    zombie = await pool.worker(simulated_inter_token_ms=30, step_timeout_s=1)
    generation = await pool.admit(120)
    await pool.reached(generation, 5)
    zombie.pause()
    heir = await pool.worker(simulated_inter_token_ms=30)
    claimed = await heir.saw("worker.claimed", job_id=generation)
    assert claimed["next"] >= 5
    zombie.resume()
    lost = await zombie.saw("generation.lost", job_id=generation)
    assert lost["cause"] == "lost"

    entries = await pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert timing.worker == heir.name
    heir.kill()
    again = await pool.admit(120)
    assert await pool.tokens_of(again) == await pool.tokens_of(generation)
    await zombie.saw("worker.finished", job_id=again)


async def test_a_request_that_kills_four_workers_is_quarantined(pool: WorkerPool) -> None:
    """The second death on probation ends it with an error, not a fifth try."""
    worker = await pool.worker(simulated_first_token_ms=10_000)
    generation = await pool.admit(200)
    for is_suspect in (False, False, True, True):
        claimed = await worker.saw("worker.claimed", job_id=generation)
        assert claimed.get("on_probation", False) == is_suspect
        worker.kill()
        worker = await pool.worker(simulated_first_token_ms=10_000)
    entries = await pool.end_of(generation)
    finish, timing = entries[-1].record.finish, entries[-1].timing
    assert finish is not None
    assert timing is not None
    assert (finish.reason, finish.code, timing.deaths) == ("failed", "POISON_REQUEST", 4)


@pytest.mark.timeout(180)
async def test_three_prompts_that_crash_workers_are_quarantined_and_nobody_else(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 requests at once on three workers: each of the 30 others ends as it should, once."""
    (tmp_path / "orders").write_bytes(msgspec.json.encode(Orders(crash_on="hemlock")))
    monkeypatch.setenv(ORDERS, str(tmp_path / "orders"))
    misled: dict[str, Any] = {"module": "ops.bench.incidents.worker", "max_batch_size": 16}
    workers = [await pool.worker(**misled) for _ in range(3)]
    ids: dict[str, list[str]] = {"hemlock": [], "nettles": []}
    for number in range(33):
        word = "hemlock" if number % 11 == 5 else "nettles"
        ids[word].append(await pool.ask(f"a cup of {word}", 30))

    async def have_ended() -> bool:
        for i, worker in enumerate(workers):
            if worker.exit_code is not None:
                await pool.broker.bury_worker(worker.name)
                workers[i] = pool.processes.worker(**misled)
        return {await pool.state(id) for id in ids["hemlock"] + ids["nettles"]} == {"T"}

    await wait_until(have_ended, timeout_s=120, what="the end of all")
    results = [await pool.tokens_of(id) for id in ids["nettles"]]
    assert all(tokens == results[0] for tokens in results)
    for id in ids["hemlock"]:
        end = (await pool.end_of(id))[-1]
        assert end.record.finish is not None
        assert end.timing is not None
        assert (end.record.finish.code, end.timing.deaths) == ("POISON_REQUEST", 4)


async def test_generations_without_a_worker_wait_for_the_next(pool: WorkerPool) -> None:
    """The pool's only worker dies: nothing fails, everything starts again with the next one."""
    worker = await pool.worker(simulated_inter_token_ms=50)
    generation = await pool.admit(60)
    await pool.reached(generation, 3)
    worker.kill()
    waiting = await pool.admit(60)

    async def is_handed_back() -> bool:
        await pool.broker.reap()
        return await pool.state(generation) == "Q"

    await wait_until(is_handed_back, what="the end of the lease")
    await pool.worker(simulated_inter_token_ms=2)
    assert await pool.tokens_of(generation) == await pool.tokens_of(waiting)
