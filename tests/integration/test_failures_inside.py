"""Failures that no request is answered with come from their real causes, and the log says so."""

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.explanations import INSIDE
from common.models.store import ModelStore
from common.settings import WorkerSettings
from tests.support import scripted_worker
from tests.support.command import Headrace, headrace_of
from tests.support.failure_rows import check_witnesses
from tests.support.gateway_app import Stand
from tests.support.waiting import wait_until
from workers import exit_codes, worker

headrace = headrace_of("model")

WITNESSES = {
    "WORKER_LOST": "integration/test_failures_inside.py::test_a_lost_worker_is_named",
    "WORKER_STALLED": "integration/test_worker_process.py::test_a_stuck_step_ends_the_process",
    "CUDA_ERROR": "integration/test_worker_engine_fails.py"
    "::test_an_engine_that_raises_ends_the_worker",
    "GPU_HW_FAULT": "integration/test_worker_gpu.py"
    "::test_a_gpu_whose_driver_reports_a_fault_is_given_up",
    "SLOW_CONSUMER": "integration/test_gateway_relay.py"
    "::test_a_slow_client_costs_little_and_misses_nothing",
    "CANCELLED_BY_CLIENT": "integration/test_failures_inside.py::test_a_client_that_leaves_is_told",
    "INCOMPLETE_GENERATION": "story/test_a_stream_is_resumed.py"
    "::test_a_stream_is_resumed_on_another_gateway",
    "OUTPUT_CORRUPT": "integration/test_failures_of_workers.py"
    "::test_a_corrupt_answer_is_sent_and_flagged",
    "LOG_SINK_BLOCKED": "unit/test_logs.py::test_a_blocked_sink_costs_lines_and_never_time",
    "DISK_FULL": "unit/test_logs.py::test_a_full_disk_is_survived",
    "WEBHOOK_UNDELIVERABLE": "integration/test_webhooks.py"
    "::test_what_nobody_took_is_listed_and_can_be_sent_again",
}
"""Where each cause is brought about."""


def test_no_cause_is_left_out() -> None:
    assert WITNESSES.keys() == INSIDE.keys()
    check_witnesses(WITNESSES)


async def test_a_lost_worker_is_named(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a generation and is never heard of again: who looks first hands it to others."""
    monkeypatch.setattr(scripted_worker, "LEASE_MS", 100)
    lost = await stand.worker()
    gateway = await stand.gateway()
    with capture_logs() as lines:
        request = asyncio.create_task(
            gateway.client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4})
        )
        await lost.beat()
        await lost.take()
        await wait_until(
            lambda: [line for line in lines if line["event"] == "job.requeued"],
            what="the end of its lease",
        )
        monkeypatch.setattr(scripted_worker, "LEASE_MS", 60_000)
        other = await stand.worker()
        async with other.acting(scripted_worker.saying("a")):
            assert (await request).status_code == 200
    [requeued] = [line for line in lines if line["event"] == "job.requeued"]
    assert (requeued["cause"], requeued["worker"]) == ("lease", lost.name)


async def test_a_client_that_leaves_is_told(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway(disconnect_grace_s=0)
    body = {"prompt": "hi", "max_tokens": 4, "stream": True}
    with capture_logs() as lines:
        async with gateway.client.stream("POST", "/v1/completions", json=body) as stream:
            await (await worker.take()).say("a")
            await anext(stream.aiter_lines())
        await wait_until(
            lambda: [line for line in lines if line["event"] == "request.finished"],
            what="the last line of the request",
        )
    [finished] = [line for line in lines if line["event"] == "request.finished"]
    assert finished["code"] == "disconnected"
    assert finished["disconnected_after"] is not None


@pytest.mark.parametrize(
    ("code", "cuts"), [("MODEL_LOAD_FAILED", True), ("WEIGHTS_MISMATCH", False)]
)
async def test_a_model_that_is_not_right_ends_the_start(
    redis_url: str, tmp_path: Path, code: str, *, cuts: bool
) -> None:
    """A file is cut off, or its manifest was changed by hand: the worker ends, and says why."""
    store = ModelStore(tmp_path)
    stored = store.get(store.add_simulated().name)
    copy = Path(shutil.copytree(stored.path, stored.path.parent / "other"))
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "simulated"', '"name": "other"'))
    if cuts:
        os.truncate(copy / "tokenizer.json", 10)
    settings = WorkerSettings(redis_url=redis_url, data_dir=tmp_path, model="other", engine="torch")
    with capture_logs() as lines:
        assert await worker._run("w1", settings) == exit_codes.ENGINE_FAILED
    [crashed] = [line for line in lines if line["event"] == "worker.crashed"]
    assert crashed["code"] == code


def test_a_model_that_brings_code_is_not_taken(tmp_path: Path, headrace: Headrace) -> None:
    """Nothing runs yet that could log: the command says it, with the code, and exits with 1."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    (source / "model.safetensors").write_bytes(b"")
    said = headrace("add", str(source))
    assert said.code == 1
    assert "UNSAFE_FORMAT" in said.err
