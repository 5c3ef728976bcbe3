"""The exporter: figures of a whole pool, shown once however many processes look."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.broker import Broker, WorkerPresence, connect
from common.models.simulated import SIMULATED_MODEL
from tests.support.expositions import Figures, complaints, figures_in
from tests.support.generations import admit
from tests.support.processes import Processes, processes
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with processes(redis_url, tmp_path) as started:
        yield started


async def figures_of(url: str) -> Figures:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return figures_in(answer.text)


async def test_what_is_shown_is_as_prometheus_wants_it(started: Processes) -> None:
    """``promtool check metrics`` finds nothing to complain of, with a worker and a queue."""
    broker = Broker(connect(started.redis_url), SIMULATED_MODEL)
    await broker.load()
    await broker.beat_worker(
        "w1", WorkerPresence("m@1", 1000, 100.0), seen=0, holding=[], lease_ms=60_000
    )
    await admit(broker, prompt_tokens=4, max_new_tokens=8)
    exporter = await started.exporter().ready()
    await shown(exporter.url, "headrace_workers", state="ready")
    async with httpx.AsyncClient() as client:
        assert complaints((await client.get(f"{exporter.url}/metrics")).text) == []
    await broker.close()


async def shown(url: str, name: str, **labels: str) -> Figures:
    """Wait for the figure."""
    found: list[Figures] = []

    async def is_there() -> bool:
        figures = await figures_of(url)
        found.append(figures)
        return figures.get(name, **labels) is not None

    await wait_until(is_there, what=name)
    return found[-1]


async def test_it_shows_what_waits_and_who_lives(started: Processes) -> None:
    """Each lane with what waits in it, and each worker with its state."""
    broker = Broker(connect(started.redis_url), SIMULATED_MODEL)
    await broker.load()
    await broker.beat_worker(
        "w1", WorkerPresence("m@1", 1000, 100.0), seen=0, holding=[], lease_ms=60_000
    )
    for lane in ("default", "default", "batch"):
        await admit(broker, lane=lane, prompt_tokens=4, max_new_tokens=96)
    exporter = await started.exporter().ready()
    figures = await shown(exporter.url, "headrace_queue_depth", lane="default", state="ready")
    model = {"model": SIMULATED_MODEL}
    assert figures.get("headrace_queue_depth", lane="default", state="ready", **model) == 2
    assert figures.get("headrace_queue_depth", lane="batch", state="ready", **model) == 1
    assert figures.get("headrace_queue_depth", lane="batch", state="dead", **model) == 0
    assert figures.get("headrace_backlog_tokens", lane="default", **model) == 200
    assert figures.get("headrace_estimated_wait_seconds", lane="batch", **model) == 3.0
    assert figures.get("tgi_queue_size") == 3
    assert figures.get("vllm:num_requests_waiting", engine="queue") == 3
    assert figures.get("headrace_worker_up", worker="w1", **model) == 1
    assert figures.get("headrace_worker_state", worker="w1", state="ready", **model) == 1
    assert figures.get("headrace_worker_state", worker="w1", state="draining", **model) == 0
    assert figures.get("headrace_worker_heartbeat_age_seconds", worker="w1", **model) is not None
    assert figures.get("headrace_redis_up", **model) == 1
    assert figures.total("headrace_redis_memory_bytes", kind="used") > 100_000
    assert figures.total("headrace_redis_rtt_seconds_count", **model) > 0
    assert figures.get("headrace_exporter_is_active", **model) == 1
    await broker.close()


async def test_of_two_one_shows_the_pool_and_the_other_takes_over(started: Processes) -> None:
    """Sums over all exporters are right at any time: the pool is counted once or not at all."""
    first = await started.exporter().ready()
    await shown(first.url, "headrace_queue_depth", lane="default", state="ready")
    second = await started.exporter().ready()
    figures = await shown(second.url, "headrace_redis_rtt_seconds_count")
    assert figures.get("headrace_exporter_is_active", model=SIMULATED_MODEL) == 0
    assert figures.get("tgi_queue_size") is None
    first.terminate()
    assert await first.ended() == 0
    figures = await shown(second.url, "tgi_queue_size")
    assert figures.get("headrace_exporter_is_active", model=SIMULATED_MODEL) == 1


async def test_without_redis_it_shows_no_old_figures(
    own_server: RedisServer, tmp_path: Path
) -> None:
    """It says that Redis is away, and goes on when it is back."""
    with processes(own_server.url, tmp_path) as started:
        exporter = await started.exporter().ready()
        await shown(exporter.url, "tgi_queue_size")
        own_server.kill()

        async def is_gone() -> bool:
            figures = await figures_of(exporter.url)
            is_up = figures.get("headrace_redis_up", model=SIMULATED_MODEL)
            return is_up == 0 and figures.get("tgi_queue_size") is None

        await wait_until(is_gone, what="the end of old figures")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{exporter.url}/health")).status_code == 503
        own_server.start()
        await shown(exporter.url, "tgi_queue_size")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{exporter.url}/health")).status_code == 200
