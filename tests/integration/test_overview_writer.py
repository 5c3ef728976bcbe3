"""Who makes the overview: from beats and counts to one picture, the same whoever makes it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.broker import (
    Broker,
    Census,
    CountedGateway,
    CountedLane,
    CountedWorker,
    GatewayPresence,
    Memory,
    WorkerPresence,
)
from common.figures import Figures
from common.ids import new_process_name
from common.messages import LANES
from common.overview import Overview, decode
from common.watching import Look, PoolWatch, keep_overview
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import saying
from tests.support.waiting import wait_until

T0_MS = 1_700_000_000_000


@asynccontextmanager
async def watched(broker: Broker, name: str = "x1") -> AsyncGenerator[None]:
    task = asyncio.create_task(keep_overview(broker, name))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def newest(broker: Broker) -> Overview | None:
    found = await broker.overview_store.newest()
    return decode(found[1]) if found else None


async def overview_with(broker: Broker, is_it: Any) -> Overview:
    found: list[Overview] = []

    async def look() -> bool:
        overview = await newest(broker)
        found[:] = [overview] if overview else []
        return bool(found) and is_it(found[0])

    await wait_until(look, what="the overview")
    return found[0]


async def test_the_picture_shows_who_works_and_what_was_answered(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with watched(stand.broker), worker.acting(saying("a", "b", "c")):
        await overview_with(stand.broker, lambda it: it.gateways and it.gateways[0].up_s > 0)
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 8}}
        for _ in range(3):
            assert (await gateway.client.post("/generate", json=body)).status_code == 200
        refused = await gateway.client.post("/generate", json={"inputs": 7})
        assert refused.status_code == 422
        seen = await overview_with(stand.broker, lambda it: it.requests.ok == 3)
    assert seen.model == "simulated"
    assert seen.model_version == stand.version
    assert [it.name for it in seen.workers] == [worker.name]
    assert [it.name for it in seen.gateways] == [gateway.name]
    assert seen.stats.queue_time is not None
    assert seen.stats.generation_time is not None
    assert seen.latency.ttft.p50 is not None
    assert seen.stats.error_rate == 0.0, "it was the caller's fault"
    assert seen.requests.failed == 1
    assert [(error.code, error.count_1m) for error in seen.errors] == [("BAD_REQUEST", 1)]
    assert seen.redis.is_up
    assert seen.redis.used_bytes > 0
    assert seen.redis.rtt_s > 0
    assert [lane.lane for lane in seen.lanes] == list(LANES)


async def test_one_of_several_writes_and_another_goes_on(stand: Stand) -> None:
    async with watched(stand.broker, "x2"):
        async with watched(stand.broker, "x1"):
            await overview_with(stand.broker, lambda _: True)
        rows = len(await stand.broker.overview_store.rows())

        async def goes_on() -> bool:
            return len(await stand.broker.overview_store.rows()) > rows + 1

        await wait_until(goes_on, what="the other one's overviews")
        times = [row[0] or 0 for row in await stand.broker.overview_store.rows()]
    assert times == sorted(times)


async def test_a_dead_worker_is_told_with_its_name_and_host(stand: Stand) -> None:
    dying = new_process_name("worker")
    presence = WorkerPresence(stand.version, 1000, host="host-b")
    await stand.broker.beat_worker(dying, presence, seen=0, holding=(), lease_ms=60_000)
    leaving = await stand.worker()
    await leaving.leave()
    await stand.broker.bury_worker(dying)
    await stand.broker.reap()
    async with watched(stand.broker):
        seen = await overview_with(stand.broker, lambda it: it.losses)
    assert [(it.role, it.name, it.host, it.cause) for it in seen.losses] == [
        ("worker", dying, "host-b", "seen")
    ], "who takes leave is not lost"
    assert abs(seen.losses[0].at - time.time()) < 30
    codes = [found.code for found in seen.diagnosis]
    assert "worker_lost" in codes


async def test_a_worker_that_somebody_killed_is_told_too(stand: Stand) -> None:
    """What it held bears no blame, but people are to know."""
    killed = await stand.worker()
    await stand.broker.leave_worker(killed.name, has_died=True)
    [lost] = (await stand.broker.census()).lost
    assert (lost.role, lost.name, lost.is_seen) == ("worker", killed.name, True)


async def test_a_worker_that_loads_is_shown_and_nothing_is_queued_for_it(stand: Stand) -> None:
    presence = WorkerPresence("", 0, state="loading", host="host-c")
    await stand.broker.announce_worker("w-loading", presence)
    gateway = await stand.gateway()
    refused = await gateway.client.post("/generate", json={"inputs": "hi"})
    assert refused.json()["code"] == "NO_WORKERS"
    census = await stand.broker.census()
    assert [it.name for it in census.workers] == ["w-loading"]
    assert census.workers[0].presence == presence
    await stand.broker.beat_worker(
        "w-loading", WorkerPresence(stand.version, 100), seen=0, holding=(), lease_ms=60_000
    )
    assert [it.expires_in_ms > 30_000 for it in (await stand.broker.census()).workers] == [True]


# Without Redis ------------------------------------------------------------------------------------


def census(at_s: float, *, gateways: Any = (), workers: Any = ()) -> Look:
    """What is seen so many seconds behind the first look."""
    return Look(
        census=Census(
            at_ms=T0_MS + int(1000 * at_s),
            workers=list(workers),
            gateways=list(gateways),
            lanes={lane: CountedLane(0, 0, 0, 0) for lane in LANES},
            dead_letters=0,
            lost=[],
            drain_rate=0.0,
        ),
        memory=Memory(1, 0, evicts=False, evicted_keys=0),
        rtt_s=0.001,
    )


def gateway(name: str, ok: int, *, failed: int = 0, up_s: float = 1e6) -> CountedGateway:
    figures = Figures({"ok": ok} | ({"CUDA_OOM": failed} if failed else {}))
    return CountedGateway(name, 1000, 0, GatewayPresence("m@1", up_s=up_s, figures=figures))


def worker(name: str, tokens: int) -> CountedWorker:
    presence = WorkerPresence("m@1", 100, generated_tokens=tokens, up_s=1e6)
    return CountedWorker(name, 4000, 100, 3, "", presence)


def test_what_was_counted_before_we_looked_is_no_burst() -> None:
    watch = PoolWatch("m")
    first = watch.note(census(0, gateways=[gateway("g1", 1000)]))
    second = watch.note(census(1, gateways=[gateway("g1", 1004), gateway("g2", 500)]))
    third = watch.note(census(2, gateways=[gateway("g1", 1004), gateway("g2", 501)]))
    assert (first.requests.ok, second.requests.ok, third.requests.ok) == (0, 4, 5)


def test_what_a_gateway_that_is_gone_has_answered_still_counts() -> None:
    watch = PoolWatch("m")
    watch.note(census(0, gateways=[gateway("g1", 0), gateway("g2", 0)]))
    watch.note(census(1, gateways=[gateway("g1", 5), gateway("g2", 7)]))
    seen = watch.note(census(2, gateways=[gateway("g2", 7)]))
    assert seen.requests.ok == 12


@pytest.mark.parametrize(
    ("name", "window_s"), [("stats", 60), ("stats_5m", 300), ("stats_1h", 3600)]
)
def test_each_window_forgets_what_is_older(name: str, window_s: int) -> None:
    watch = PoolWatch("m")
    seen = watch.note(census(0, gateways=[gateway("g1", 0)]))
    for second in range(1, window_s + 130):
        failed = min(second, 10)  # in the first ten seconds all fail, later none
        seen = watch.note(census(second, gateways=[gateway("g1", second - failed, failed=failed)]))
    stats = getattr(seen, name)
    assert stats.error_rate == 0.0
    assert window_s <= stats.over_s <= window_s + 70
    assert seen.errors[0].total == 10, "what the exporter has seen in all"
    assert seen.errors[0].count_1m == 0


def test_a_window_that_is_not_full_says_how_far_it_reaches() -> None:
    watch = PoolWatch("m")
    watch.note(census(0, gateways=[gateway("g1", 0)]))
    seen = watch.note(census(20, gateways=[gateway("g1", 6, failed=2)]))
    assert seen.stats_1h.over_s == 20
    assert seen.stats_1h.error_rate == 0.25
    assert seen.requests.failed == 2


def test_tokens_per_second_are_those_between_beats() -> None:
    watch = PoolWatch("m")
    seen = watch.note(census(0, workers=[worker("w1", 5000)]))
    for second in range(1, 30):
        seen = watch.note(census(second, workers=[worker("w1", 5000 + 40 * second)]))
    assert seen.workers[0].tokens_per_second == pytest.approx(40, rel=0.01)
    assert seen.stats.tokens_per_second == pytest.approx(40, rel=0.01)
    assert seen.requests.running == 3


def test_a_clock_that_was_set_back_does_no_harm() -> None:
    watch = PoolWatch("m")
    watch.note(census(1000, gateways=[gateway("g1", 0)]))
    seen = watch.note(census(0, gateways=[gateway("g1", 3)]))
    assert seen.stats.over_s == 0
    seen = watch.note(census(1, gateways=[gateway("g1", 4)]))
    assert seen.requests.ok == 1
