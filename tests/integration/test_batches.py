"""Batches from end to end: taken in by a gateway, steered here, run by a simulated worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.batch_stage import BatchStage, line
from tests.support.gateway_app import Stand
from tests.support.processes import Processes, processes


@pytest.fixture
def started(redis_url: str, tmp_path: Path) -> Iterator[Processes]:
    with processes(redis_url, tmp_path) as started:
        yield started


@pytest.fixture
async def stage(stand: Stand) -> BatchStage:
    return BatchStage(stand, await stand.gateway())


async def worker(stage: BatchStage, started: Processes, **settings: Any) -> None:
    fast: dict[str, Any] = {"simulated_first_token_ms": 1, "simulated_inter_token_ms": 0.5}
    await started.worker(data_dir=stage.stand.data_dir, **fast | settings).ready()


async def test_every_line_is_answered(stage: BatchStage, started: Processes) -> None:
    await worker(stage, started)
    batch_id = await stage.create([line(f"r{i}") for i in range(100)])
    async with stage.steerer():
        record = await stage.ended(batch_id)
    assert record.status == "completed", record
    results = await stage.content(record.output_file_id)
    assert len(results) == 100
