"""A worker that is asked to rest: it finishes or hands over, stays alive, and comes back."""

from tests.support.processes import Process
from tests.support.waiting import wait_until
from tests.support.worker_pool import WorkerPool


async def says(pool: WorkerPool, worker: Process, state: str) -> None:
    async def is_said() -> bool:
        census = await pool.broker.census()
        told = {it.name: it.presence.state for it in census.workers if it.presence}
        return told.get(worker.name) == state

    await wait_until(is_said, what=f"{worker.name} {state}")


async def test_a_resting_worker_takes_nothing_and_comes_back(pool: WorkerPool) -> None:
    worker = await pool.worker()
    assert await pool.broker.drain_worker(worker.name, "a test")
    await says(pool, worker, "drained")
    generation = await pool.admit(10)
    await says(pool, worker, "drained")
    assert await pool.state(generation) == "Q", "it waits for somebody who works"
    assert await pool.broker.resume_worker(worker.name)
    await pool.end_of(generation)
    await says(pool, worker, "ready")
    assert worker.exit_code is None
    states = [(line["from"], line["to"], line["cause"]) for line in worker.events("worker.state")]
    assert states[1:] == [
        ("ready", "draining", "a test"),
        ("draining", "drained", "a test"),
        ("drained", "ready", "resumed"),
    ]


async def test_what_it_has_begun_it_finishes(pool: WorkerPool) -> None:
    worker = await pool.worker(simulated_inter_token_ms=20)
    generation = await pool.admit(60)
    await pool.reached(generation, 1)
    await pool.broker.drain_worker(worker.name, "a test")
    await says(pool, worker, "draining")
    entries = await pool.end_of(generation)
    assert entries[-1].timing is not None
    assert entries[-1].timing.attempts == 1
    await says(pool, worker, "drained")


async def test_what_would_take_too_long_is_handed_over_without_a_death(pool: WorkerPool) -> None:
    worker = await pool.worker(drain_s=0.5, simulated_inter_token_ms=50)
    generation = await pool.admit(200)
    await pool.reached(generation, 1)
    other = await pool.worker(simulated_inter_token_ms=1)
    await pool.broker.drain_worker(worker.name, "a test")
    entries = await pool.end_of(generation)
    timing = entries[-1].timing
    assert timing is not None
    assert (timing.worker, timing.attempts, timing.deaths) == (other.name, 2, 0)
    await says(pool, worker, "drained")


async def test_a_resting_worker_ends_when_it_is_told_to(pool: WorkerPool) -> None:
    worker = await pool.worker()
    await pool.broker.drain_worker(worker.name, "a test")
    await says(pool, worker, "drained")
    worker.terminate()
    assert await worker.ended() == 0
    assert not await pool.broker.drain_worker(worker.name, "a test"), "it is gone"
    assert worker.errors() == ""


async def test_a_worker_that_loads_can_be_seen(pool: WorkerPool) -> None:
    """Its model is there at once, so what is left to see is that it is not counted twice."""
    worker = await pool.worker()
    await says(pool, worker, "ready")
    census = await pool.broker.census()
    assert [it.name for it in census.workers] == [worker.name]
    assert census.workers[0].presence is not None
    assert census.workers[0].presence.rss_bytes > 0
    assert census.workers[0].presence.up_s > 0
