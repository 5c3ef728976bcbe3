"""A worker on a GPU says which one it is and what it takes of it, and gives up a faulty one.

The driver's shared object is stood in for; its bindings, Redis and the worker are the real ones.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from common.broker import Broker, connect
from common.settings import WorkerSettings
from tests.support.event_schema import captured_logs
from tests.support.generations import admit
from tests.support.nvml_library import Card, FakeGpu, NvmlLibrary, install
from tests.support.waiting import wait_until
from tests.support.worker_pool import POOL
from workers import exit_codes, worker
from workers.engine.batching import BatchingEngine
from workers.engine.factory import build_engine

pytestmark = pytest.mark.usefixtures("own_signals")

TOKEN_BYTES = 100


@dataclass
class OnGpu:
    """A worker of this process, and what it logs."""

    broker: Broker
    gpu: FakeGpu
    driver: NvmlLibrary
    run: "asyncio.Task[int]"
    lines: list[dict[str, Any]]

    def line(self, event: str) -> Mapping[str, Any]:
        [line] = [line for line in self.lines if line["event"] == event]
        return line

    async def fail(self, xid: int) -> int:
        """The exit code that follows."""
        self.driver.xids.put((self.gpu, xid))
        return await self.run


@asynccontextmanager
async def on_gpu(
    redis_url: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[OnGpu]:
    gpu = FakeGpu(f"GPU-{uuid4()}")
    driver = NvmlLibrary(gpu)
    install(monkeypatch, driver)

    def build(settings: WorkerSettings, _: object) -> BatchingEngine:
        engine = build_engine(settings)
        assert isinstance(engine, BatchingEngine)
        engine.device = Card(gpu.uuid)
        engine.cache_size = replace(engine.cache_size, token_bytes=TOKEN_BYTES)
        return engine

    monkeypatch.setattr(worker, "build_engine", build)
    settings = WorkerSettings(
        redis_url=redis_url, data_dir=data_dir, model=POOL, engine="simulated", lease_ms=1000
    )
    broker = Broker(connect(redis_url), POOL)
    with captured_logs() as lines:
        run = asyncio.create_task(worker._run("w1", settings))
        try:
            await wait_until(lambda: any(line["event"] == "worker.ready" for line in lines))
            yield OnGpu(broker, gpu, driver, run, lines)
        finally:
            await broker.close()
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)


async def test_a_generation_tells_where_it_ran_and_what_it_took(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole blocks: 20 tokens of prompt and 30 of an answer take four of 16."""
    async with on_gpu(redis_url, tmp_path, monkeypatch) as it:
        await admit(it.broker, prompt_tokens=20, max_new_tokens=30)
        await wait_until(
            lambda: any(line["event"] == "worker.finished" for line in it.lines), what="its end"
        )
        [told] = (await it.broker.census()).workers
        await it.fail(48)
    found = it.line("device.found")
    assert (found["gpu_uuid"], found["unwatched_reason"]) == (it.gpu.uuid, None)
    assert it.line("worker.claimed")["gpu_uuid"] == it.gpu.uuid
    assert it.line("batch.joined")["pad_ratio"] == 0
    finished = it.line("worker.finished")
    assert finished["kv_peak_bytes"] == 4 * 16 * TOKEN_BYTES
    assert finished["gpu_mem_peak_bytes"] == 30
    assert told.presence is not None
    assert (told.presence.gpu_mem_bytes, told.presence.gpu_mem_total_bytes) == (20, 85_000_000_000)


async def test_a_gpu_whose_driver_reports_a_fault_is_given_up(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle as it may be: what it would compute next is not to be trusted."""
    async with on_gpu(redis_url, tmp_path, monkeypatch) as it:
        assert await it.fail(79) == exit_codes.DEVICE_LOST
    fault = it.line("device.fault")
    assert (fault["xid"], fault["action"], fault["gpu_uuid"]) == (
        79,
        "contact_support",
        it.gpu.uuid,
    )
    assert it.line("engine.failed")["code"] == "GPU_HW_FAULT"
