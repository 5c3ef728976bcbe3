"""Tokens that go straight to the connection are the same bytes, and stay within their request."""

import asyncio
import json

import pytest

from gateway.stream import Stream
from tests.support.gateway_app import Stand

BODY = json.dumps({"inputs": "hi"}).encode()


def _request(path: str, body: bytes = b"") -> bytes:
    method = b"POST" if body else b"GET"
    return (
        b"%b %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (method, path.encode(), len(body), body)
    )


async def test_the_answer_to_a_pipelined_request_waits_for_the_end_of_a_stream(
    stand: Stand,
) -> None:
    """Both came in one piece of the network; tokens must not be taken for the second's body."""
    gateway = await stand.gateway()
    worker = await stand.worker()
    async with gateway.connected() as (reader, writer):
        writer.write(_request("/generate_stream", BODY) + _request("/health"))
        turn = await worker.take()
        for text in ("one", "two", "three"):
            await turn.say(text)
            await asyncio.wait_for(reader.readuntil(b'"text":"%b"' % text.encode()), 10)
        await turn.say(finish="length")
        rest = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\nHTTP/1.1 200 OK\r\n"), 10)
        assert b'"generated_text":"onetwothree"' in rest


async def test_of_a_stream_only_its_ends_wake_a_task(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one token costs must not grow a task switch again without anybody seeing it."""
    taken: list[int] = []
    next_of = Stream.next

    async def counted(stream: Stream) -> object:
        batch = await next_of(stream)
        taken.append(len(batch.tokens) if batch else 0)
        return batch

    monkeypatch.setattr(Stream, "next", counted)
    gateway = await stand.gateway()
    worker = await stand.worker()
    async with gateway.client.stream("POST", "/generate_stream", json={"inputs": "hi"}) as response:
        turn = await worker.take()
        pieces = response.aiter_text()
        for text in "abcdef":
            await turn.say(text)
            assert f'"text":"{text}"' in await anext(pieces)
        await turn.say("g", finish="length")
        assert '"generated_text":"abcdefg"' in "".join([piece async for piece in pieces])
    assert taken == [1]
