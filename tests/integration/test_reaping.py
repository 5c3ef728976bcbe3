"""The reap task that every process runs."""

import asyncio
from collections.abc import Callable

from common.broker import Broker
from common.reaping import keep_reaping
from tests.support.event_schema import captured_logs
from tests.support.generations import ScriptedClaims, admit
from tests.support.waiting import wait_until


async def reaped_until(
    broker: Broker, condition: Callable[[], bool], may_reap: Callable[[], bool]
) -> None:
    task = asyncio.create_task(keep_reaping(broker, interval_s=0.01, may_reap=may_reap))
    await wait_until(condition, what="the reaping")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_everything_a_dead_worker_held_goes_back(broker: Broker) -> None:
    """One reap is bounded; the task goes on until nothing is left, and says what it moved."""
    claims = ScriptedClaims(broker, lease_ms=1)
    await claims.beat()
    generations = [await admit(broker) for _ in range(40)]
    while len(claims.holding) < len(generations):
        await claims.claim()
    await claims.beat()
    with captured_logs() as lines:
        await reaped_until(broker, lambda: len(lines) >= 41, lambda: True)
    [died] = [line for line in lines if line["event"] == "worker.state"]
    assert (died["worker"], died["to"]) == ("w1", "dead")
    lines.remove(died)
    assert sorted(line["job_id"] for line in lines) == sorted(generations)
    assert {(line["event"], line["worker"], line["cause"]) for line in lines} == {
        ("job.requeued", "w1", "lease")
    }
    assert (await broker.state()).workers == []


async def test_who_may_have_lost_its_own_lease_does_not_reap(broker: Broker) -> None:
    """It must beat first, or it hands back what it holds itself."""
    claims = ScriptedClaims(broker, lease_ms=1)
    await claims.beat()
    await admit(broker)
    await claims.claim_one()
    await claims.beat()
    asked = 0

    def may_reap() -> bool:
        nonlocal asked
        asked += 1
        return False

    with captured_logs() as lines:
        await reaped_until(broker, lambda: asked > 20, may_reap)
    assert lines == []
    assert [worker.name for worker in (await broker.state()).workers] == ["w1"]
