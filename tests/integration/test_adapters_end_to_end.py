"""Clients ask a gateway for an adapter; real workers answer as peft does, whoever of them dies."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.models.adapters import AdapterStore
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from tests.support.adapters import MODULES, write_adapter
from tests.support.processes import Process, Processes
from tests.support.tiny_model import EOS_TOKEN_IDS, build_tiny_model
from tests.support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""peft asks transformers by an old name."""

PROMPT = "The mill at the ford"
LENGTH, SHOWN = 256, 3


@pytest.mark.timeout(240)
async def test_answers_are_those_of_peft_also_behind_a_death(
    started: Processes, tmp_path: Path
) -> None:
    """Two adapters and the model alone, at once; the worker that has most of it to do is killed,
    and the other loads the adapter and goes on.
    """
    source, data_dir = build_tiny_model(tmp_path / "tiny"), tmp_path / "data"
    ModelStore(data_dir).add(str(source), name="tiny")
    store = AdapterStore.beside(data_dir, "tiny")
    targets = sorted({module.rpartition(".")[2] for module in MODULES})
    folders = {
        name: write_adapter(tmp_path / name, seed=seed, target_modules=targets)
        for seed, name in enumerate("ab")
    }
    for name, folder in folders.items():
        store.add(str(folder), name)
    common: dict[str, Any] = {"data_dir": data_dir, "model": "tiny"}
    settings: dict[str, Any] = common | {"engine": "torch", "dtype": "float32", "num_threads": 1}
    workers = [started.worker(**settings) for _ in range(2)]
    gateway = started.gateway(**common)
    prompt = Tokenizer.load(source).encode(PROMPT)
    expected = {name: of_peft(source, folder, prompt) for name, folder in folders.items()}
    expected[""] = of_peft(source, None, prompt)
    assert len({tuple(tokens[:12]) for tokens in expected.values()}) == 3
    for worker in workers:
        await worker.saw("worker.ready", within_s=90)
    await gateway.ready()

    async with httpx.AsyncClient(base_url=gateway.url, timeout=90) as client:
        short = await asyncio.gather(*(generate(client, name, 12) for name in expected))
        assert short == [tokens[:12] for tokens in expected.values()]
        stream = tokens_of(client, "b")
        shown = [await anext(stream) for _ in range(SHOWN)]
        victim, heir = await by_claim(workers)
        victim.kill()
        shown += [token async for token in stream]
    assert shown == expected["b"]
    [taken_over] = heir.events("worker.claimed", deaths=1)
    assert SHOWN <= taken_over["next"] < LENGTH


def of_peft(source: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    """What transformers answers greedily, with ``adapter`` put on by peft."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        answer = model.generate(
            input_ids=ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=list(EOS_TOKEN_IDS)
        )
    return answer[0, len(prompt) :].tolist()


def body(adapter: str, max_new_tokens: int) -> dict[str, Any]:
    asked = {"max_new_tokens": max_new_tokens, "details": True, "do_sample": False}
    return {"inputs": PROMPT, "parameters": asked | {"adapter_id": adapter or None}}


async def generate(client: httpx.AsyncClient, adapter: str, max_new_tokens: int) -> list[int]:
    response = await client.post("/generate", json=body(adapter, max_new_tokens))
    assert response.status_code == 200, response.text
    return [token["id"] for token in response.json()["details"]["tokens"]]


async def tokens_of(client: httpx.AsyncClient, adapter: str) -> AsyncGenerator[int]:
    async with client.stream("POST", "/generate_stream", json=body(adapter, LENGTH)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))["token"]["id"]


async def by_claim(workers: list[Process]) -> tuple[Process, Process]:
    """Who runs the one generation that goes on, and the other."""

    def running(worker: Process) -> set[str]:
        claimed = {line["job_id"] for line in worker.events("worker.claimed")}
        return claimed - {line["job_id"] for line in worker.events("worker.finished")}

    await wait_until(lambda: any(map(running, workers)), what="a claim")
    first, second = workers
    return (first, second) if running(first) else (second, first)
