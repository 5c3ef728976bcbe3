"""Devices that fail under a worker: a lost one ends its process, a full one delays and no more."""

from tests.support.waiting import wait_until
from tests.support.worker_pool import WorkerPool
from workers import exit_codes


async def test_a_lost_device_ends_its_process_and_another_goes_on(pool: WorkerPool) -> None:
    """At once, with a code of its own; what it ran is continued without gap or repeat."""
    victim = await pool.worker(module="tests.support.lost_device")
    generation = await pool.admit(60)
    assert await victim.ended(within_s=10) == exit_codes.DEVICE_LOST
    [line] = victim.events("engine.failed")
    assert "DeviceLostError" in str(line)
    assert victim.errors() == ""

    heir = await pool.worker()
    continued = await pool.tokens_of(generation)
    assert continued == await pool.tokens_of(await pool.admit(60))
    [claimed] = heir.events("worker.claimed", job_id=generation)
    assert 0 < claimed["next"] <= 9


async def test_a_full_device_computes_in_parts_and_nobody_fails(pool: WorkerPool) -> None:
    """More than fit at once get the very tokens that one alone gets."""
    worker = await pool.worker(module="tests.support.full_device")
    alone = await pool.tokens_of(await pool.admit(20))
    generations = [await pool.admit(20) for _ in range(6)]
    for generation in generations:
        assert await pool.tokens_of(generation) == alone
    await wait_until(
        lambda: worker.events("engine.memory_refused"), what="a step that was run in parts"
    )
    assert worker.exit_code is None
