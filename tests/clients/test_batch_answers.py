"""Lines of a batch are answered as the same questions asked one by one, also with an adapter."""

from pathlib import Path
from typing import Any

import openai
import pytest

from common.models.adapters import AdapterStore
from common.models.store import ModelStore
from ops.bench.batch_answers import run
from tests.support.adapters import MODULES, write_adapter
from tests.support.processes import processes
from tests.support.tiny_model import build_tiny_model

NUM_LINES = 28


@pytest.mark.timeout(240)
async def test_every_line_is_answered_as_if_it_were_alone(redis_url: str, tmp_path: Path) -> None:
    """On a model in float32, good lines of every kind beside bad ones, through OpenAI's client."""
    data_dir = tmp_path / "data"
    ModelStore(data_dir).add(str(build_tiny_model(tmp_path / "tiny")), name="tiny")
    targets = sorted({module.rpartition(".")[2] for module in MODULES})
    adapter = write_adapter(tmp_path / "mill", seed=1, target_modules=targets)
    AdapterStore.beside(data_dir, "tiny").add(str(adapter), "mill")
    common: dict[str, Any] = {"data_dir": data_dir, "model": "tiny"}
    engine: dict[str, Any] = {"engine": "torch", "dtype": "float32", "num_threads": 1}
    with processes(redis_url, tmp_path) as started:
        gateway, background = started.gateway(**common), started.background(**common)
        worker = started.worker(**common, **engine)
        await worker.saw("worker.ready", within_s=90)
        await gateway.ready()
        await background.ready()
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0
        ) as client:
            reports = [await run(client, NUM_LINES, model) for model in ("tiny", "mill")]
        loaded = worker.events("adapter.loaded")
    for report in reports:
        assert report.batch["status"] == "completed"
        assert report.batch["request_counts"] == {"total": 28, "completed": 24, "failed": 4}
        assert not report.problems
        assert report.has_passed
    assert loaded
