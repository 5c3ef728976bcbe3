"""A worker's host has a wrong clock: what users are told and what the logs say does not change."""

import asyncio
import time

import pytest
from libfaketime import get_reload_information

from ops.bench.sse_client import Reader
from ops.incident.source import open_logs
from tests.story.conftest import Stage
from tests.support.processes import Process
from tests.support.waiting import wait_until

_NEAR_S = 20.0
"""Far more than a busy machine is late by, far less than the clock is wrong by."""


@pytest.mark.parametrize("ahead_s", [300, -300])
async def test_times_across_processes_are_those_of_one_clock(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, ahead_s: int
) -> None:
    """Two answers of a worker that makes one at a time: the second waits for the first."""
    with monkeypatch.context() as wrong:
        for name, value in get_reload_information()[1].items():
            wrong.setenv(name, value)
        wrong.setenv("FAKETIME", f"{ahead_s:+d}s")
        worker = await stage.worker(max_batch_size=1)
    gateway, client = await stage.gateway()
    began_s = time.time()
    readers = await asyncio.gather(
        *(Reader().read_all(client, text, max_new_tokens=30) for text in ("one", "other"))
    )
    for reader in readers:
        reader.check_whole()
    elapsed_s = time.time() - began_s
    await wait_until(lambda: len(gateway.events("request.finished")) == len(readers))

    assert _is_near(worker.events("clock.sampled")[0]["offset_s"], -ahead_s)
    told = {line["request_id"]: line for line in gateway.events("request.finished")}
    waits = [line["queue_time"] for line in told.values()]
    assert 0 <= min(waits) <= max(waits) <= elapsed_s
    for made in worker.events("worker.finished"):
        finished = told[made["request_id"]]
        assert _is_near(made["queue_time"], finished["queue_time"])
        assert _is_near(made["generation_time"], finished["generation_time"])
        assert _is_near(_waited_s(gateway, worker, made["request_id"]), made["queue_time"])
    first, second = sorted(told.values(), key=lambda line: line["queue_time"])
    assert second["queue_time"] > first["generation_time"] / 2
    _check_order(gateway, worker)


def _waited_s(gateway: Process, worker: Process, request_id: str) -> float:
    """As somebody reads it from two logs: between the lines that say queued and claimed."""
    [queued] = gateway.events("queue.enqueued", request_id=request_id)
    [claimed] = worker.events("worker.claimed", request_id=request_id)
    return (claimed["ts_redis_ms"] - queued["ts_redis_ms"]) / 1000


def _check_order(gateway: Process, worker: Process) -> None:
    """The timeline of an incident has each request's events in the order they happened in."""
    with open_logs([str(gateway.folder), str(worker.folder)]) as logs:
        rows = logs.db.execute(
            "SELECT request_id, event FROM events WHERE event IN ('gateway.accepted',"
            " 'worker.claimed', 'request.finished') ORDER BY request_id, t"
        ).fetchall()
    events = [event for _, event in rows]
    assert events == ["gateway.accepted", "worker.claimed", "request.finished"] * 2


def _is_near(seconds: float, expected_s: float) -> bool:
    return abs(seconds - expected_s) < _NEAR_S
