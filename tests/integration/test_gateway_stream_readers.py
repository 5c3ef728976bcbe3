"""Several readers of one stream, each with a pace and an end of its own; and what leaving does."""

import asyncio
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from ops.bench.sse_client import read_events
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.scripted_worker import Turn, saying
from tests.support.waiting import wait_until

TGI = ("/generate_stream", {"inputs": "hi", "parameters": {"details": True}})
WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "hi"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", {"prompt": "hi"}),
]
STREAMED: list[tuple[str, dict[str, Any]]] = [
    TGI,
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
    ("/v1/completions", {"prompt": "hi", "stream": True}),
]


async def state_of(stand: Stand, generation_id: str) -> str:
    page = await stand.broker.read(generation_id, 0)
    return page.state if page else "absent"


async def ended(stand: Stand, turn: Turn) -> None:
    """Wait until Redis says so."""

    async def is_over() -> bool:
        return await state_of(stand, turn.id) == "T"

    await wait_until(is_over, what="the end of the generation")


async def test_readers_at_different_places_on_two_gateways_do_not_disturb_each_other(
    stand: Stand,
) -> None:
    """Each gets exactly what lies behind its place; one who leaves takes nothing along."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = TGI
    async with first.client.stream("POST", path, json=body) as at_the_start:
        turn = await worker.take()
        await turn.say("a", "b", "c")
        told = read_events(at_the_start)
        seen = [await anext(told) for _ in range(3)]
        url = f"/v1/streams/{at_the_start.headers['x-headrace-stream-id']}"
        async with second.client.stream("GET", url, params={"after": seen[1].id}) as late:
            async with first.client.stream("GET", url) as leaving:
                assert [await anext(read_events(leaving))] == seen[:1]
            await wait_until(lambda: first.services.relay.num_streams == 1)
            await turn.say("d")
            await turn.say("e", finish="length")
            behind = [event async for event in read_events(late)]
        seen += [event async for event in told]
    assert [event.position for event in seen] == [1, 2, 3, 4, 5]
    assert behind == seen[2:]
    assert seen[-1].json["generated_text"] == "abcde"


async def test_a_generation_runs_on_while_anybody_reads_it(stand: Stand) -> None:
    """Who asked has left and would have it cancelled at once; another one, elsewhere, reads on."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = TGI
    headers = {"x-headrace-disconnect": "cancel"}
    async with first.client.stream("POST", path, json=body, headers=headers) as asked:
        turn = await worker.take()
        await turn.say("a")
        url = f"/v1/streams/{asked.headers['x-headrace-stream-id']}"
        other = await second.client.send(second.client.build_request("GET", url), stream=True)
    try:
        await wait_until(lambda: first.services.relay.num_streams == 0)
        await first.services.relay.flush()
        assert not (await turn.say("b")).refusals
    finally:
        await other.aclose()
    await ended(stand, turn)


async def test_a_slow_reader_holds_up_nobody_and_misses_nothing(stand: Stand) -> None:
    """It takes nothing until the others have the end, of far more than any buffer holds."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = TGI
    texts = [f"{index:06d}" + "x" * 994 for index in range(3000)]
    async with gateway.client.stream("POST", path, json=body) as asked:
        turn = await worker.take()
        url = f"/v1/streams/{asked.headers['x-headrace-stream-id']}"
        reader, writer = await ask_slowly(gateway, url)
        watching = asyncio.create_task(gateway.client.get(url))
        await wait_until(lambda: gateway.services.relay.num_streams == 3)
        for start in range(0, len(texts), 60):
            await turn.say(*texts[start : start + 60])
        await turn.say(finish="length")
        told = numbers_in(await asked.aread())
        watched = numbers_in((await watching).content)
    missed = numbers_in(await asyncio.wait_for(reader.read(), 30))
    writer.close()
    assert told == watched == missed == list(range(len(texts)))


async def ask_slowly(
    gateway: RunningGateway, url: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection with small buffers that has asked for a stream and takes nothing of it yet."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    address = urlsplit(gateway.url)
    await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=2048)
    writer.write(f"GET {url} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    return reader, writer


def numbers_in(sent: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb'"text":"(\d{6})x', sent)]


# Leaving -----------------------------------------------------------------------------------------


async def leave(
    stand: Stand, gateway: RunningGateway, path: str, body: dict[str, Any], wish: str
) -> Turn:
    """Ask, and be gone as soon as the first token was made."""
    worker = await stand.worker()
    headers = {"x-headrace-disconnect": wish}
    asking = asyncio.create_task(gateway.client.post(path, json=body, headers=headers))
    turn = await worker.take()
    await turn.say("a")
    asking.cancel()
    await wait_until(lambda: gateway.services.relay.num_streams == 0)
    await gateway.services.relay.flush()
    return turn


@pytest.mark.parametrize(("path", "body"), WHOLE + STREAMED)
async def test_leaving_may_cancel_at_once(stand: Stand, path: str, body: dict[str, Any]) -> None:
    turn = await leave(stand, await stand.gateway(), path, body, "cancel")
    assert [refusal.kind for refusal in (await turn.say("b")).refusals] == ["gone"]


@pytest.mark.parametrize(("path", "body"), WHOLE[:1] + STREAMED[1:2])
async def test_leaving_may_leave_time_to_come_back(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    """Within the grace time it goes on; behind it, it is cancelled, also by another process."""
    turn = await leave(stand, await stand.gateway(), path, body, "0.5")
    assert not (await turn.say("b")).refusals
    await ended(stand, turn)
    assert [refusal.kind for refusal in (await turn.say("c")).refusals] == ["gone"]


@pytest.mark.parametrize(("path", "body"), WHOLE + STREAMED)
async def test_leaving_may_change_nothing(stand: Stand, path: str, body: dict[str, Any]) -> None:
    """It runs to its end, and whoever knows its id can read it then."""
    gateway = await stand.gateway(disconnect_grace_s=0)
    turn = await leave(stand, gateway, path, body, "continue")
    await stand.broker.reap()
    assert not (await turn.say("b", finish="length")).refusals
    read = await gateway.client.get(f"/v1/streams/{turn.spec.request_id}")
    assert re.findall(r'"(?:content|text)":"(\w)"', read.text) == ["a", "b"]


@pytest.mark.parametrize(("path", "body"), WHOLE + STREAMED)
async def test_every_answer_says_how_long_it_is_kept(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway(retention_s=77)
    async with worker.acting(saying("a", "b")):
        answer = await gateway.client.post(path, json=body)
        again = await gateway.client.get(f"/v1/streams/{answer.headers['x-headrace-stream-id']}")
    assert answer.headers["x-stream-retention-seconds"] == "77"
    assert again.headers["x-stream-retention-seconds"] == "77"
