"""The unmodified ``openai`` client keeps its files here: sync and async, from bytes or a path."""

import asyncio
from pathlib import Path

import openai
import pytest
from openai.types import FileObject

from tests.clients.conftest import System

ROWS = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n' * 1000


async def test_the_life_of_a_file(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    made = await client.files.create(
        file=path,
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (made.filename, made.bytes, made.purpose) == ("rows.jsonl", len(ROWS), "batch")
    assert made.status == "processed"
    assert made.expires_at == made.created_at + 7200
    assert await client.files.retrieve(made.id) == made
    assert await client.files.wait_for_processing(made.id) == made
    assert (await client.files.content(made.id)).content == ROWS
    kept = tmp_path / "copy"
    async with client.files.with_streaming_response.content(made.id) as answer:
        await answer.stream_to_file(kept)
    assert kept.read_bytes() == ROWS
    deleted = await client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    for gone in (client.files.retrieve(made.id), client.files.content(made.id)):
        with pytest.raises(openai.NotFoundError, match="No such File"):
            await gone


async def test_a_list_goes_on_page_by_page(client: openai.AsyncOpenAI) -> None:
    made = [
        await client.files.create(file=(f"{number}.jsonl", b"{}\n"), purpose="batch")
        for number in range(5)
    ]
    other = await client.files.create(file=("other", b"{}"), purpose="user_data")
    listed = [file async for file in client.files.list(limit=2, order="asc")]
    assert listed == [*made, other]
    newest: list[FileObject] = [file async for file in client.files.list(purpose="batch", limit=3)]
    assert newest == made[::-1]


async def test_a_refusal_names_its_field(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.files.create(
            file=("a.jsonl", ROWS),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 1},
        )
    assert raised.value.param == "expires_after[seconds]"
    assert raised.value.type == "invalid_request_error"


async def test_the_synchronous_client_does_the_same(system: System) -> None:
    def use() -> bytes:
        with openai.OpenAI(base_url=f"{system.url}/v1", api_key="unused", max_retries=0) as client:
            made = client.files.create(file=("rows.jsonl", ROWS), purpose="batch")
            assert client.files.retrieve(made.id) == made
            assert [file.id for file in client.files.list()] == [made.id]
            content = client.files.content(made.id).read()
            client.files.delete(made.id)
            assert not list(client.files.list())
            return content

    assert await asyncio.to_thread(use) == ROWS
