"""Hosts whose clocks disagree: what two processes compare is on Redis' clock."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from common.models.store import ModelStore
from ops.bench.incidents.worker import ORDERS
from tests.support.processes import Event, Processes, processes

AHEAD_S = 300.0


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    ModelStore(tmp_path / "data").add_simulated()
    with processes(redis_url, tmp_path) as started:
        yield started


async def test_a_worker_whose_clock_is_wrong_measures_right(
    started: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five minutes ahead, its lines say so, and find their place among all others all the same."""
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps({"clock_s": AHEAD_S}))
    monkeypatch.setenv(ORDERS, str(orders))
    worker = await started.worker(module="ops.bench.incidents.worker").ready()
    sampled = await worker.saw("clock.sampled")
    assert sampled["offset_s"] == pytest.approx(-AHEAD_S, abs=1)
    gateway = await started.gateway(model="simulated").ready()
    await gateway.saw("clock.sampled")

    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as client:
        body = {"inputs": "A river", "parameters": {"max_new_tokens": 5}}
        assert (await client.post("/generate", json=body)).status_code == 200

    finished = await worker.saw("worker.finished")
    whole = await gateway.saw("request.finished")
    [enqueued], [claimed] = gateway.events("queue.enqueued"), worker.events("worker.claimed")
    assert finished["queue_time"] == whole["queue_time"] == claimed["claim_lag_s"]
    assert 0 <= whole["queue_time"] <= whole["duration"]
    assert 0 <= whole["relay_lag_p99"] <= whole["duration"]
    # Within the request, as far as lines are written when their step has been answered.
    for line in (claimed, finished, enqueued):
        assert 0 <= whole["ts_redis_ms"] - line["ts_redis_ms"] + 50 < 1000 * whole["duration"] + 100
    assert said_at(claimed) - said_at(enqueued) == pytest.approx(AHEAD_S, abs=30)


def said_at(line: Event) -> float:
    """On the clock of who said it."""
    return datetime.fromisoformat(line["ts"]).timestamp()
