"""What takes a model to go wrong: a real worker, a real gateway, and each failure by its cause."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from tokenizers import Tokenizer as Backend

from common.models.adapters import AdapterStore
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.adapters import write_adapter
from tests.support.failure_rows import check_row, check_worker_line
from tests.support.gateway_app import RunningGateway, running_gateway
from tests.support.tiny_model import build_tiny_model
from tests.support.waiting import wait_until
from workers.engine.batching import BatchingEngine
from workers.engine.factory import build_engine
from workers.grammars import build_grammars
from workers.model.runner import ModelRunner
from workers.worker import Worker

MODEL = "tiny"
DAMAGED, UNREADABLE, HUNGRY = "Z", "X", "Y"
"""Letters: the weights of the first are no numbers, the tokenizer has a defect at the second, and
what holds the third takes more memory than there is."""
NEW_TOKEN = "<|of a newer model|>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


class DefectiveTokenizer(Tokenizer):
    """Raises on one token, as a library with a defect may."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text = super().decode(ids, skip_special_tokens=skip_special_tokens)
        if UNREADABLE in text:
            raise IndexError("out of range")
        return text


class HungryForward:
    """Computes as it should, but asks the system for a petabyte where the letter comes."""

    def __init__(self, forward: Any, hungry: int) -> None:
        self._forward = forward
        self._hungry = hungry
        self.name, self.adapters = forward.name, forward.adapters

    def __call__(self, tokens: list[int], stretches: Any, rows: list[int]) -> torch.Tensor:
        if self._hungry in tokens:
            torch.empty(1 << 50)
        return self._forward(tokens, stretches, rows)


@dataclass
class System:
    """``newer`` has the tokenizer of another version of the model than the worker."""

    gateway: RunningGateway
    newer: RunningGateway
    worker: Worker
    worker_model: Path


def build_model(folder: Path) -> Path:
    """A tiny one whose weights for one letter are no numbers, with a template as Gemma's."""
    build_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    [damaged] = Tokenizer.load(folder).encode(DAMAGED)
    weights["model.embed_tokens.weight"][damaged] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = folder / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace('"chat_template": "', f'"chat_template": "{NO_SYSTEM}')
    )
    return folder


def build_newer(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_tokens([NEW_TOKEN])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def broken_engine(settings: WorkerSettings) -> BatchingEngine:
    """The product's own, but for the two defects."""
    engine = build_engine(settings)
    assert isinstance(engine, BatchingEngine)
    tokenizer = DefectiveTokenizer.load(ModelStore(settings.data_dir).get(MODEL).path)
    object.__setattr__(engine._rules, "tokenizer", tokenizer)
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    [hungry] = tokenizer.encode(HUNGRY)
    runner._forward = HungryForward(runner._forward, hungry)
    return engine


@pytest.fixture
async def system(redis_url: str, tmp_path: Path) -> AsyncIterator[System]:
    data_dir, newer_dir = tmp_path / "data", tmp_path / "newer"
    source = build_model(tmp_path / "source")
    ModelStore(data_dir).add(str(source), name=MODEL)
    ModelStore(newer_dir).add(str(build_newer(source, tmp_path / "newer-source")), name=MODEL)
    adapters = AdapterStore.beside(data_dir, MODEL)
    adapters.add(str(write_adapter(tmp_path / "adapter")), "torn")
    settings = WorkerSettings(
        redis_url=redis_url, data_dir=data_dir, model=MODEL, dtype="float32", num_threads=1,
        engine_way="plain", speculation="off", prefix_cache="off", drain_s=0,
    )  # fmt: skip
    engine = await asyncio.to_thread(broken_engine, settings)
    grammars = build_grammars(settings, vocab_size=engine.vocab_size)
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    worker = Worker("w1", settings, engine, grammars, lost)
    async with AsyncExitStack() as stack:
        running = asyncio.create_task(worker.run())
        stack.push_async_callback(worker.close)
        stack.push_async_callback(partial(asyncio.wait_for, running, 20))
        stack.callback(worker.drain)
        gateway, newer = [
            await stack.enter_async_context(running_gateway(redis_url, folder, model=MODEL))
            for folder in (data_dir, newer_dir)
        ]
        await wait_until(partial(is_ready, gateway), what="the worker")
        [stored] = data_dir.rglob("adapter_model.safetensors")
        stored.write_bytes(stored.read_bytes()[:1000])
        yield System(gateway, newer, worker, ModelStore(data_dir).get(MODEL).path)


async def is_ready(gateway: RunningGateway) -> bool:
    return (await gateway.client.get("/ready")).status_code == 200


def ask(prompt: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GRAMMAR_REJECTED": ask("hi", guided_regex="(unclosed"),
    "ADAPTER_LOAD_FAILED": ask("hi", model="torn"),
    "NAN_LOGITS": ask(f"a {DAMAGED}"),
    "ENGINE_ERROR": ask(f"a {UNREADABLE}"),
    "CUDA_OOM": ask(f"a {HUNGRY}"),
    "TOKENIZER_MISMATCH": ask(f"a {NEW_TOKEN}"),
    "TEMPLATE_ERROR": (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]},
    ),
}
BEFORE_THE_QUEUE = {"TEMPLATE_ERROR"}


async def test_what_a_worker_refuses_has_its_code(system: System) -> None:
    """One after the other on one worker, which serves whoever comes behind them."""
    for code, (path, body) in CASES.items():
        gateway = system.newer if code == "TOKENIZER_MISMATCH" else system.gateway
        with capture_logs() as lines:
            answer = await gateway.client.post(path, json=body)
            if code not in BEFORE_THE_QUEUE:
                await wait_until(partial(has_line, lines), what=f"the worker's line of {code}")
        check_row(code, answer, lines)
        if code not in BEFORE_THE_QUEUE:
            check_worker_line(code, lines)
    answer = await post(system.gateway, *ask("hi"))
    assert answer.status_code == 200
    assert answer.headers["x-model-version"] == await listed_version(system.gateway)


async def test_a_corrupt_answer_is_sent_and_flagged(system: System) -> None:
    """By the worker and, once, by the gateway; and counted by its reason."""
    [byte, _] = Tokenizer.load(system.worker_model).encode("ß")
    with capture_logs() as lines:
        answer = await post(system.gateway, *ask("a", max_tokens=3, logit_bias={str(byte): 100}))
        await wait_until(lambda: len(flagged(lines)) == 2, what="both lines")
    assert answer.status_code == 200
    assert "\ufffd" in answer.json()["choices"][0]["text"]
    assert flagged(lines) == {
        "worker.finished": "invalid_utf8", "request.finished": "invalid_utf8"
    }  # fmt: skip
    text = system.worker.metrics().text().decode()
    assert 'headrace_outputs_flagged_total{reason="invalid_utf8"} 1.0' in text
    assert 'headrace_outputs_flagged_total{reason="repetition"} 0.0' in text
    await post(system.gateway, *ask("a", max_tokens=3))
    assert 'reason="invalid_utf8"} 1.0' in system.worker.metrics().text().decode()


def flagged(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {line["event"]: line["flagged"] for line in lines if "flagged" in line}


def has_line(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any(line["event"] == "worker.failed" for line in lines)


async def post(gateway: RunningGateway, path: str, body: dict[str, Any]) -> httpx.Response:
    return await gateway.client.post(path, json=body)


async def listed_version(gateway: RunningGateway) -> str:
    [model, *_] = (await gateway.client.get("/v1/models")).json()["data"]
    return str(model["model_version"])
