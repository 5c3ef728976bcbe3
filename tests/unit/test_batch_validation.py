"""What is found in the input of a batch, and where its lines lie."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from common.batches import MAX_ERRORS, MAX_LINES, Endpoint
from tests.support.batches import CHAT, jsonl, line
from workers.background.line_index import LineIndex, LineReader
from workers.background.validation import Validation, read_line, validate

MAX_BODY = 10_000


async def found_in(
    data: bytes, endpoint: Endpoint = CHAT, *, block_bytes: int = 700, **options: Any
) -> Validation:
    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), block_bytes):
            yield data[start : start + block_bytes]

    return await validate(blocks(), endpoint, **{"max_body_bytes": MAX_BODY} | options)


async def test_lines_are_found_again_whatever_stands_between_them() -> None:
    """Empty lines count, ends may be of two kinds, and the last may be missing."""
    lines = [json.dumps(line(f"r{i}")).encode() for i in range(4)]
    data = lines[0] + b"\r\n\n" + lines[1] + b"\n \n" + lines[2] + b"\n" + lines[3]
    found = await found_in(data)
    assert found.errors == []
    places = [found.index[i] for i in range(len(found.index))]
    assert [place.number for place in places] == [1, 3, 5, 6]
    assert [data[p.offset : p.offset + p.length] for p in places] == lines


INVALID = {
    "no json": (b"{", "invalid_json_line", None),
    "no object": (b"[1]", "invalid_json_line", None),
    "no utf-8": (b'{"custom_id": "\xff"}', "invalid_json_line", None),
    "no id": ({"custom_id": None}, "missing_required_parameter", "custom_id"),
    "an empty id": ({"custom_id": ""}, "invalid_custom_id", "custom_id"),
    "a number as id": ({"custom_id": 7}, "invalid_custom_id", "custom_id"),
    "a long id": ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
    "no method": ({"method": None}, "missing_required_parameter", "method"),
    "another method": ({"method": "GET"}, "invalid_method", "method"),
    "no url": ({"url": None}, "missing_required_parameter", "url"),
    "another url": ({"url": "/v1/completions"}, "url_mismatch", "url"),
    "no body": ({"body": ...}, "missing_required_parameter", "body"),
    "null as body": ({"body": None}, "invalid_body", "body"),
    "a list as body": ({"body": []}, "invalid_body", "body"),
    "an id again": ({"custom_id": "good"}, "duplicate_custom_id", "custom_id"),
    "another model": ({"body": {"model": "b"}}, "model_mismatch", "body.model"),
}


@pytest.mark.parametrize("name", INVALID)
async def test_what_is_wrong_with_a_line_is_said_with_its_number(name: str) -> None:
    """By OpenAI's codes where it has one."""
    change, code, param = INVALID[name]
    if isinstance(change, dict):
        made = line("bad") | change
        change = json.dumps({k: v for k, v in made.items() if v is not ...}).encode()
    found = await found_in(jsonl([line("good", model="a")]) + change)
    [error] = found.errors
    assert (error.code, error.param, error.line) == (code, param, 2)


async def test_a_file_without_lines_is_refused() -> None:
    for data in (b"", b"\n\n \n"):
        [error] = (await found_in(data)).errors
        assert (error.code, error.line) == ("empty_file", None)


async def test_of_many_errors_the_first_are_told() -> None:
    found = await found_in(b"x\n" * 3 * MAX_ERRORS)
    assert [error.line for error in found.errors] == list(range(1, MAX_ERRORS + 1))


async def test_a_line_too_many_is_refused() -> None:
    lines = jsonl(line(f"r{i}") for i in range(MAX_LINES))
    assert len((await found_in(lines, block_bytes=2**18)).index) == MAX_LINES
    found = await found_in(lines + jsonl([line("one"), line("two")]), block_bytes=2**18)
    assert [(error.code, error.line) for error in found.errors] == [
        ("too_many_tasks", MAX_LINES + 1)
    ]


@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_a_line_longer_than_any_body_ends_the_validation(end: bytes) -> None:
    """So that the memory does not hang on who sends no end of line."""
    long = json.dumps(line("long", padding="x" * 3 * MAX_BODY)).encode()
    found = await found_in(jsonl([line("good")]) + long + end + b"x\n" * 10)
    assert [(error.code, error.line) for error in found.errors] == [("line_too_long", 2)]


async def test_lines_that_begin_alike_are_run_together() -> None:
    """In the order of the first of each; all others stay where they are."""
    systems = {name: {"role": "system", "content": name * 300} for name in "ab"}
    lines = [
        line(f"{i}{name}", messages=[systems[name], {"role": "user", "content": str(i)}])
        if name in systems
        else line(f"{i}{name}")
        for i, name in enumerate("abxaby")
    ]
    data = jsonl(lines)
    index = LineIndex.decode((await found_in(data)).index.encode())
    reads: list[tuple[int, int]] = []

    async def read(start: int, end: int) -> AsyncGenerator[bytes]:
        reads.append((start, end))
        for at in range(start, end, 100):
            yield data[at : min(end, at + 100)]

    reader = LineReader(index, read)
    order = [read_line(await reader.line(i)).custom_id for i in range(len(index))]
    assert order == ["0a", "3a", "1b", "4b", "2x", "5y"]


async def test_neighbours_are_read_together() -> None:
    data = jsonl(line(f"r{i}") for i in range(500))
    index = (await found_in(data)).index
    num_reads = 0

    async def read(start: int, end: int) -> AsyncGenerator[bytes]:
        nonlocal num_reads
        num_reads += 1
        yield data[start:end]

    reader = LineReader(index, read)
    for i in range(500):
        assert read_line(await reader.line(i)).custom_id == f"r{i}"
    assert num_reads == 1
