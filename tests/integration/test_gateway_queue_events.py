"""The place in the queue, as events while a request waits, for clients that ask for them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from common.broker import Broker
from tests.support.gateway_app import Stand
from tests.support.waiting import wait_until

ASK = {"x-stream-events": "1"}
BODIES: dict[str, dict[str, Any]] = {
    "/generate_stream": {"inputs": "hi", "parameters": {"max_new_tokens": 100}},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 100,
    },
    "/v1/completions": {"prompt": "hi", "stream": True, "max_tokens": 100},
}
PATH, BODY = next(iter(BODIES.items()))


async def frames(response: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Fields of each frame, in order."""
    frame: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            frame[name] = value
        elif not line:
            yield frame
            frame = {}


async def next_place(told: AsyncIterator[dict[str, str]]) -> dict[str, Any]:
    frame = await asyncio.wait_for(anext(told), 10)
    assert frame["event"] == "queue"
    assert "id" not in frame
    return json.loads(frame["data"])


@pytest.mark.parametrize("path", list(BODIES)[:2])
async def test_a_client_that_asked_is_told_its_place_until_it_is_served(
    stand: Stand, path: str
) -> None:
    """It moves up as those before it are served; then come the tokens, as without it."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with (
        gateway.client.stream("POST", PATH, json=BODY) as first,
        gateway.client.stream("POST", path, json=BODIES[path], headers=ASK) as second,
    ):
        told = frames(second)
        place = await next_place(told)
        assert (place["state"], place["position"]) == ("waiting", 1)
        assert 0 < place["estimated_wait"] < 1
        await (await worker.take()).say("a", finish="length")
        assert first.status_code == 200
        assert await next_place(told) == {
            "state": "waiting",
            "position": 0,
            "estimated_wait": 0,
        }
        turn = await worker.take()
        assert await next_place(told) == {"state": "running"}
        await turn.say("a", finish="length")
        rest = [frame async for frame in told]
    assert not any("event" in frame for frame in rest)
    assert rest[0]["id"].startswith("1-")


async def test_the_wait_is_the_work_ahead_over_the_rate_of_the_pool(stand: Stand) -> None:
    """Lanes that are served first count whole, the own one up to the place in it."""
    await stand.worker()  # says that it makes 1000 tokens a second
    gateway = await stand.gateway()
    chat = BODIES["/v1/chat/completions"]

    async def enter(tier: str, tokens: int, position: int) -> dict[str, Any]:
        body = chat | {"service_tier": tier, "max_tokens": tokens}
        request = gateway.client.build_request(
            "POST", "/v1/chat/completions", json=body, headers=ASK
        )
        response = await gateway.client.send(request, stream=True)
        told = frames(response)
        place = await next_place(told)
        while place["position"] != position:
            place = await next_place(told)
        waiting.append((response, told))
        return place

    waiting: list[tuple[httpx.Response, AsyncIterator[dict[str, str]]]] = []
    try:
        assert (await enter("priority", 1000, 0))["estimated_wait"] == 0
        first = await enter("default", 2000, 1)
        last = await enter("default", 500, 2)
        assert first["estimated_wait"] == pytest.approx(1.0, rel=0.1)
        # Two of them wait in the lane, 2500 tokens and prompts: half of it counts as ahead.
        assert last["estimated_wait"] == pytest.approx(1.0 + 1.25, rel=0.1)
    finally:
        for response, _ in waiting:
            await response.aclose()


async def test_no_rate_is_no_promise(stand: Stand, broker: Broker) -> None:
    """Before anything is known of the workers' speed the wait is null, not 0."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    await worker.leave()
    async with (
        gateway.client.stream("POST", PATH, json=BODY),
        gateway.client.stream("POST", PATH, json=BODY, headers=ASK) as second,
    ):
        place = await next_place(frames(second))
    assert place == {"state": "waiting", "position": 1, "estimated_wait": None}


async def test_a_browser_asks_in_the_query_as_it_can_send_no_header(stand: Stand) -> None:
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    async with first.client.stream("POST", PATH, json=BODY) as asked:
        url = f"/v1/streams/{asked.headers['x-headrace-stream-id']}?events=1"
        async with second.client.stream("GET", url) as watched:
            told = frames(watched)
            frame = await asyncio.wait_for(anext(told), 10)
            assert frame == {
                "retry": "500",
                "event": "queue",
                "data": '{"state":"waiting","position":0,"estimated_wait":0.0}',
            }
            turn = await worker.take()
            await turn.say("a", finish="length")
            rest = [frame async for frame in told]
    assert rest[-1]["id"].startswith("1-")


async def test_nobody_is_told_who_did_not_ask(stand: Stand) -> None:
    """SDKs would take such an event for a part of the answer."""
    worker = await stand.worker()
    gateway = await stand.gateway(keep_alive_s=0.2)
    async with (
        gateway.client.stream("POST", PATH, json=BODY),
        gateway.client.stream("POST", PATH, json=BODY, headers={"x-stream-events": "0"}) as quiet,
    ):
        chunks = quiet.aiter_raw()
        for _ in range(5):  # longer than a place would take to be told
            assert await asyncio.wait_for(anext(chunks), 5) == b": ping\n"
        for _ in range(2):
            await (await worker.take()).say("a", finish="length")
        rest = b"".join([chunk async for chunk in chunks])
    assert b"event:" not in rest


async def test_one_look_at_redis_serves_all_who_ask(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await stand.gateway()
    await stand.worker()
    looks: list[int] = []
    look = Broker.look

    async def counted(self: Broker, name: str, ids: list[str]) -> Any:
        looks.append(len(ids))
        return await look(self, name, ids)

    monkeypatch.setattr(Broker, "look", counted)
    requests = [
        gateway.client.build_request("POST", PATH, json=BODY, headers=ASK) for _ in range(20)
    ]
    responses = [await gateway.client.send(request, stream=True) for request in requests]
    try:
        told = [frames(response) for response in responses]
        for each in told:
            await next_place(each)
        looks.clear()
        await wait_until(lambda: looks)
        assert looks == [20]
    finally:
        for response in responses:
            await response.aclose()


async def test_who_waits_again_is_told_again(stand: Stand) -> None:
    """Its worker is gone, and what it had shown waits for another one of the same version."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with gateway.client.stream("POST", PATH, json=BODY, headers=ASK) as response:
        told = frames(response)
        turn = await worker.take()
        await turn.say("a")
        while (await anext(told)).get("event"):
            pass
        await turn.release()
        assert (await next_place(told))["state"] == "waiting"


async def test_a_wish_that_is_none_is_refused(stand: Stand) -> None:
    gateway = await stand.gateway()
    refused = await gateway.client.post(
        "/v1/completions", json=BODIES["/v1/completions"], headers={"x-stream-events": "yes"}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Stream-Events")
