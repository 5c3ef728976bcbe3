"""The unmodified ``openai`` client hands over a batch and fetches its results."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch
from openai.types.chat import ChatCompletion

from tests.support.batches import jsonl, line
from tests.support.processes import processes

NUM_LINES = 200


@pytest.fixture
async def client(
    redis_url: str, tmp_path: Path, simulated_data_dir: Path
) -> AsyncIterator[openai.AsyncOpenAI]:
    """Of a system with a background worker, where no line takes long."""
    common: dict[str, Any] = {"data_dir": simulated_data_dir, "model": "simulated"}
    with processes(redis_url, tmp_path) as started:
        gateway, background = started.gateway(**common), started.background(**common)
        worker = started.worker(**common, simulated_first_token_ms=1, simulated_inter_token_ms=1)
        for process in (gateway, background, worker):
            await process.ready()
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0
        ) as client:
            yield client


def rows(num_lines: int, **body: Any) -> bytes:
    """Every fifth is refused when it runs."""
    asked: list[dict[str, Any]] = [
        {"model": "simulated", "max_tokens": 0 if i % 5 == 4 else 4} | body
        for i in range(num_lines)
    ]
    return jsonl(line(f"r{i}", **each) for i, each in enumerate(asked))


async def created(client: openai.AsyncOpenAI, content: bytes) -> Batch:
    file = await client.files.create(file=("rows.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"night": "1"},
    )


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(60):
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            await asyncio.sleep(0.1)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    return [json.loads(line) for line in text.splitlines()]


async def test_good_and_bad_lines(client: openai.AsyncOpenAI) -> None:
    batch = await created(client, rows(NUM_LINES))
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"night": "1"})
    batch = await ended(client, batch)
    assert (batch.status, batch.errors, batch.model) == ("completed", None, "simulated")
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (200, 160, 40)
    assert batch.usage is not None
    assert batch.usage.output_tokens == 160 * 4
    answers = await lines_of(client, batch.output_file_id)
    errors = await lines_of(client, batch.error_file_id)
    assert {it["custom_id"] for it in answers} == {f"r{i}" for i in range(200) if i % 5 != 4}
    assert {it["custom_id"] for it in errors} == {f"r{i}" for i in range(200) if i % 5 == 4}
    for answer in answers:
        body = answer["response"]["body"]
        shaped = ChatCompletion.model_validate(body)
        assert shaped.choices[0].finish_reason == "length"
    assert {it["response"]["body"]["error"]["param"] for it in errors} == {"max_tokens"}
    assert [it.id async for it in client.batches.list(limit=1)] == [batch.id]


async def test_a_file_that_can_not_be_run(client: openai.AsyncOpenAI) -> None:
    batch = await ended(client, await created(client, rows(1) + b"{\n"))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    [error] = batch.errors.data
    assert (error.code, error.line) == ("invalid_json_line", 2)


async def test_a_batch_is_cancelled(client: openai.AsyncOpenAI) -> None:
    batch = await created(client, rows(NUM_LINES, max_tokens=400))
    batch = await client.batches.cancel(batch.id)
    assert batch.status == "cancelling"
    batch = await ended(client, batch)
    assert (batch.status, batch.cancelled_at is not None) == ("cancelled", True)
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        await client.batches.cancel("batch_0")
