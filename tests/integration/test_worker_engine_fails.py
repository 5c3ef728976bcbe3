"""An engine that raises ends its worker, with a code that says so and a log line that says why."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.broker import Broker, connect
from common.settings import WorkerSettings
from tests.support.event_schema import captured_logs
from tests.support.generations import admit
from tests.support.waiting import wait_until
from tests.support.worker_parts import VERSION
from tests.support.worker_pool import POOL
from workers import exit_codes, worker
from workers.engine.factory import build_engine
from workers.engine.port import (
    CacheSize,
    DeviceLostError,
    EngineLoad,
    EngineRequest,
    StepOutput,
    StepWork,
)

pytestmark = pytest.mark.usefixtures("own_signals")


class BrokenEngine:
    """Loads, takes a generation, and has no device any more at its first step."""

    model_version = VERSION
    max_cost = 1000
    vocab_size = 512
    adapters = None
    last_step = StepWork()
    cache_size = CacheSize(1000, 16)
    device = None

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.requests: list[EngineRequest] = []

    def submit(self, request: EngineRequest) -> None:
        self.requests.append(request)

    def cancel(self, id: str) -> None:
        pass

    def step(self) -> list[StepOutput]:
        raise self.error

    def load(self) -> EngineLoad:
        return EngineLoad(0, len(self.requests), free_tokens=1000, free_slots=4)


async def is_alive(broker: Broker) -> bool:
    return bool((await broker.state()).workers)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("nobody thought of this"), exit_codes.ENGINE_FAILED),
        (DeviceLostError(), exit_codes.DEVICE_LOST),
    ],
)
async def test_an_engine_that_raises_ends_the_worker(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    """What it held is left to the lease: whatever broke the device counts as a death."""
    settings = WorkerSettings(
        redis_url=redis_url, data_dir=tmp_path, model=POOL, engine="simulated", lease_ms=1000
    )

    def build_broken(settings: WorkerSettings, _: object) -> BrokenEngine:
        build_engine(settings)  # so that its model is there
        return BrokenEngine(error)

    monkeypatch.setattr(worker, "build_engine", build_broken)
    broker = Broker(connect(redis_url), POOL)
    with captured_logs() as lines:
        run = asyncio.create_task(worker._run("w1", settings))
        await wait_until(lambda: is_alive(broker), what="the first beat")
        generation = await admit(broker)
        assert await run == code
    assert [line["event"] for line in lines][-2:] == ["engine.failed", "worker.stopped"]
    assert lines[-2]["exc_info"] is error
    assert lines[-2]["code"] == ("CUDA_ERROR" if isinstance(error, DeviceLostError) else None)
    page = await broker.read(generation, 0)
    assert page is not None
    assert page.state == "R"
    await broker.close()


@pytest.mark.parametrize("is_built", [False, True])
async def test_a_device_that_is_lost_beside_any_step_ends_the_worker(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_built: bool
) -> None:
    """While a model loads and when nothing runs: the thread that waits for it is left behind."""
    settings = WorkerSettings(
        redis_url=redis_url, data_dir=tmp_path, model=POOL, engine="simulated", lease_ms=1000
    )
    error, ended = DeviceLostError("Rank 1 has ended."), threading.Event()

    def build_and_lose(
        settings: WorkerSettings, on_lost: Callable[[Exception], None]
    ) -> BrokenEngine:
        build_engine(settings)
        if is_built:
            threading.Timer(0.2, on_lost, [error]).start()
        else:
            on_lost(error)
            assert ended.wait(10)
        return BrokenEngine(error)

    monkeypatch.setattr(worker, "build_engine", build_and_lose)
    with captured_logs() as lines:
        assert await worker._run("w1", settings) == exit_codes.DEVICE_LOST
    ended.set()
    events = [line["event"] for line in lines]
    assert events[-2:] == ["engine.failed", "worker.stopped"]
    assert ("worker.ready" in events) == is_built
