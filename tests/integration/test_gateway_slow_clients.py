"""Clients that hold on to a gateway and ask for nothing, or not to the end."""

import asyncio
import json

import pytest

from tests.support.gateway_app import Stand
from tests.support.scripted_worker import saying

PATIENCE_S = 15
HEAD = "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Until the gateway closes the connection."""
    async with asyncio.timeout(PATIENCE_S):
        return await reader.read()


@pytest.mark.parametrize(
    ("path", "code"), [("/generate", "BODY_TIMEOUT"), ("/v1/completions", "body_timeout")]
)
async def test_a_body_that_does_not_come_is_refused(stand: Stand, path: str, code: str) -> None:
    gateway = await stand.gateway(arrival_limit_s=0.3)
    async with gateway.connected() as (reader, writer):
        head = HEAD.format(path=path) + "content-length: 100\r\n\r\n"
        writer.write(head.encode() + b'{"inputs": "h')
        told, _, body = (await rest_of(reader)).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in told
    error = json.loads(body)
    assert code in (error.get("code"), error["error"]["code"] if "/v1" in path else None)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTT", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: b"]
)
async def test_a_head_that_does_not_come_ends_its_connection(stand: Stand, sent: bytes) -> None:
    gateway = await stand.gateway(arrival_limit_s=0.3)
    async with gateway.connected() as (reader, writer):
        writer.write(sent)
        assert await rest_of(reader) == b""


async def test_one_idle_connection_too_many_ends_the_longest_idle(stand: Stand) -> None:
    """One on which an answer is under way is not idle."""
    worker = await stand.worker()
    gateway = await stand.gateway(max_idle_connections=2)
    body = b'{"inputs": "hi"}'
    head = HEAD.format(path="/generate_stream") + f"content-length: {len(body)}\r\n\r\n"
    async with gateway.connected() as (streaming, asking):
        asking.write(head.encode() + body)
        await streaming.readuntil(b"\r\n\r\n")
        async with (
            gateway.connected() as (first, _),
            gateway.connected() as (second, writer),
            gateway.connected(),
        ):
            assert await rest_of(first) == b""
            writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await second.readline()).startswith(b"HTTP/1.1 200")
        async with worker.acting(saying("a", "b")):
            assert b'"generated_text":"ab"' in await streaming.readuntil(b"\r\n0\r\n\r\n")
