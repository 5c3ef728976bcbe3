"""A worker whose model is spread over two processes: one answer, one life, one death."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.broker import Broker, connect
from common.models.store import ModelStore
from tests.support.greedy import generate
from tests.support.processes import Process, Processes
from tests.support.tiny_model import build_tiny_model
from tests.support.waiting import wait_until
from tests.support.worker_pool import WorkerPool
from workers import exit_codes

PROMPT = [0, 1, 2, 3]
"""That the pool admits."""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    store = ModelStore(tmp_path / "store")
    store.add(str(build_tiny_model(tmp_path / "tiny")), "tiny")
    return tmp_path / "store"


@pytest.fixture
async def tiny_pool(redis_url: str, started: Processes) -> AsyncIterator[WorkerPool]:
    broker = Broker(connect(redis_url), "tiny")
    yield WorkerPool(broker, started)
    await broker.close()


def follower_of(worker: Process) -> psutil.Process:
    [line] = worker.events("follower.started")
    return psutil.Process(line["child_pid"])


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.timeout(300)  # four processes import torch, two after two
async def test_a_group_answers_as_one_process_and_dies_as_one(
    tiny_pool: WorkerPool, data_dir: Path
) -> None:
    """A follower that is killed ends its worker; another group goes on; and it dies at its head."""
    settings: dict[str, Any] = {
        "engine": "torch",
        "model": "tiny",
        "data_dir": data_dir,
        "dtype": "float32",
        "device": "cpu",
        "tensor_parallel": 2,
    }
    victim = await tiny_pool.worker(**settings)
    [selected] = victim.events("engine.selected")
    assert (selected["num_ranks"], selected["way"]) == (2, "modules")
    assert tiny_pool.model_version.endswith("+tp2")
    expected = generate(data_dir.parent / "tiny", PROMPT, 400)
    assert await tiny_pool.tokens_of(await tiny_pool.admit(40)) == expected[:40]

    generation = await tiny_pool.admit(400)
    await tiny_pool.reached(generation, 3)
    follower_of(victim).kill()
    assert await victim.ended() == exit_codes.DEVICE_LOST
    [lost] = victim.events("follower.lost")
    assert lost["exit_code"] == -signal.SIGKILL
    assert victim.events("engine.failed")

    heir = await tiny_pool.worker(**settings)
    assert await tiny_pool.tokens_of(generation) == expected
    [claimed] = heir.events("worker.claimed", job_id=generation)
    assert 3 <= claimed["next"] < 400
    follower = follower_of(heir)
    heir.kill()
    await wait_until(lambda: has_ended(follower), what="the end of the follower")
