"""Streams on the wire: every API, resumed anywhere, cancelled, left and come back to."""

import asyncio
from typing import Any

import pytest

from ops.bench.sse_client import Event, read_events
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import EOS
from tests.support.sse_events import read_all
from tests.support.waiting import wait_until

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tgi": ("/generate_stream", {"inputs": "hi", "parameters": {"details": True}}),
    "chat": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "completion": ("/v1/completions", {"prompt": "hi", "stream": True}),
}
APIS = list(BODIES)


def text_of(events: list[Event]) -> str:
    """What a person reads."""
    text = ""
    for event in events:
        if event.is_done:
            continue
        if "token" in event.json:
            text += "" if event.json["token"]["special"] else event.json["token"]["text"]
        for choice in event.json.get("choices", []):
            text += choice.get("text", "") or choice.get("delta", {}).get("content", "")
    return text


@pytest.mark.parametrize("api", APIS)
async def test_tokens_come_as_they_are_made(stand: Stand, api: str) -> None:
    """One event per token, each with the cursor behind it, and the end of that API."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES[api]
    async with gateway.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-model-version"] == stand.version
        assert len(response.headers["x-headrace-stream-id"]) == 32
        turn = await worker.take()
        assert turn.spec.request_id == response.headers["x-headrace-stream-id"]
        events = read_events(response)
        for index, text in enumerate(["Hel", "lo ", "wörld"], 1):
            await turn.say(text)
            event = await anext(events)
            assert event.position == index
            assert event.id == f"{index}-{turn.chain}"
            assert text_of([event]) == text
        await turn.end()
        rest = [event async for event in events]
    assert [event.id.partition("-")[0] for event in rest] == ["4"] * len(rest)
    assert rest[-1].is_done == (api != "tgi")
    assert len(rest) == {"tgi": 1, "chat": 4, "completion": 3}[api]


async def test_several_tokens_in_one_record_are_several_events(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES["tgi"]
    async with gateway.client.stream("POST", path, json=body) as response:
        turn = await worker.take()
        await turn.say("a", "b", "c", logprobs=[-0.1, -0.2, -0.3], finish="length")
        events = await read_all(response)
    assert [event.json["token"]["text"] for event in events] == ["a", "b", "c"]
    assert [event.json["token"]["logprob"] for event in events] == [-0.1, -0.2, -0.3]
    assert events[-1].json["details"]["finish_reason"] == "length"
    assert events[-1].json["generated_text"] == "abc"


async def test_the_answer_tells_its_timings(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES["chat"]
    async with gateway.client.stream("POST", path, json=body) as response:
        turn = await worker.take()
        await turn.say("a")
        await turn.end()
        events = await read_all(response)
    told = events[-3].json["headrace"]
    assert told["model_version"] == stand.version
    assert told["attempts"] == 1
    assert told["finish_reason"] == "eos_token"
    assert 0 <= told["queue_time"] <= told["time_to_first_token"] < 20
    assert told["generation_time"] >= 0
    assert told["tokens_per_second"] >= 0


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("by_header", [True, False])
async def test_a_stream_goes_on_at_any_event_on_another_gateway(
    stand: Stand, api: str, by_header: bool
) -> None:
    """Byte for byte what the first connection would have brought, also between the final frames."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = BODIES[api]
    async with first.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a", "b")
        await turn.say("c")
        await turn.say("", tokens=[EOS], finish="eos_token")
        events = await read_all(response)
    for seen in range(len(events)):
        cursor = events[seen - 1].id if seen else ""
        asked: dict[str, Any] = (
            {"headers": {"last-event-id": cursor}}
            if by_header
            else {"params": {"after": cursor} if cursor else {}}
        )
        async with second.client.stream("GET", f"/v1/streams/{stream_id}", **asked) as resumed:
            assert resumed.status_code == 200
            assert await read_all(resumed) == events[seen:]
    done = await second.client.get(
        f"/v1/streams/{stream_id}", headers={"last-event-id": events[-1].id}
    )
    assert done.status_code == 204


async def test_a_resumed_stream_follows_live(stand: Stand) -> None:
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = BODIES["tgi"]
    async with first.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a")
        seen = await anext(read_events(response))
    async with second.client.stream(
        "GET", f"/v1/streams/{stream_id}", params={"after": seen.id}
    ) as resumed:
        events = read_events(resumed)
        await turn.say("b")
        assert text_of([await anext(events)]) == "b"
        await turn.say("c", finish="length")
        last = await anext(events)
    assert last.json["generated_text"] == "abc"


async def test_many_may_read_one_stream(stand: Stand) -> None:
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = BODIES["chat"]
    async with first.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a")
        async with asyncio.TaskGroup() as readers:
            others = [
                readers.create_task(gateway.client.get(f"/v1/streams/{stream_id}"))
                for gateway in (first, first, second)
            ]
            await wait_until(lambda: first.services.relay.num_streams == 3)
            await wait_until(lambda: second.services.relay.num_streams == 1)
            await turn.say("b")
            await turn.end()
        events = await read_all(response)
    bodies = {other.result().text.replace("retry: 500\n", "") for other in others}
    assert len(bodies) == 1
    assert bodies.pop().count("data: ") == len(events)


async def test_a_browser_is_told_when_to_come_back(stand: Stand) -> None:
    """``retry:`` rides on the first event that has data, and only on streams that reconnect."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES["chat"]
    async with gateway.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a", finish="length")
        sent = (await response.aread()).decode()
    resumed = (await gateway.client.get(f"/v1/streams/{stream_id}")).text
    assert "retry:" not in sent
    assert resumed == "retry: 500\n" + sent


@pytest.mark.parametrize("cursor", ["x", "57-", "57-0a1b2c3d.9"])
async def test_a_bad_cursor_is_named(stand: Stand, cursor: str) -> None:
    gateway = await stand.gateway()
    refused = await gateway.client.get(f"/v1/streams/{'a' * 32}", params={"after": cursor})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "after"
    refused = await gateway.client.get(f"/v1/streams/{'a' * 32}", headers={"last-event-id": cursor})
    assert refused.json()["error"]["param"] == "Last-Event-ID"


async def test_an_unknown_stream_and_an_expired_one_are_told_apart(stand: Stand) -> None:
    """Who has a cursor has seen tokens: the stream was there."""
    gateway = await stand.gateway()
    path = f"/v1/streams/{'a' * 32}"
    unknown = await gateway.client.get(path)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    expired = await gateway.client.get(path, params={"after": "5-0a1b2c3d"})
    assert (expired.status_code, expired.json()["error"]["code"]) == (410, "stream_expired")
    assert expired.headers["x-should-retry"] == "false"
    for bad in ("x", "a%20b", "a.0"):
        assert (await gateway.client.get(f"/v1/streams/{bad}")).status_code == 404
    assert gateway.services.relay.num_streams == 0


async def test_a_cursor_of_another_history_is_refused(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES["tgi"]
    async with gateway.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a", "b")
        await turn.say("c", finish="length")
        await read_all(response)
    refused = await gateway.client.get(f"/v1/streams/{stream_id}", params={"after": "2-deadbeef"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "stream_diverged")
    beyond = await gateway.client.get(f"/v1/streams/{stream_id}", params={"after": "9-deadbeef"})
    assert beyond.status_code == 409


async def test_delete_ends_a_generation_for_everybody(stand: Stand) -> None:
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    path, body = BODIES["chat"]
    async with first.client.stream("POST", path, json=body) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a")
        cancelled = await second.client.delete(f"/v1/streams/{stream_id}")
        assert cancelled.json() == {"id": stream_id, "object": "stream", "state": "cancelled"}
        events = await read_all(response)
    assert text_of(events) == "a"
    assert events[1].json["choices"][0]["finish_reason"] == "stop"
    assert events[1].json["headrace"]["finish_reason"] == "cancelled"
    assert events[-1].is_done
    refusals = (await turn.say("b")).refusals
    assert [refusal.kind for refusal in refusals] == ["gone"]
    again = await second.client.delete(f"/v1/streams/{stream_id}")
    assert again.json()["state"] == "ended"
    unknown = await second.client.delete(f"/v1/streams/{'b' * 32}")
    assert unknown.status_code == 404


async def test_a_native_stream_that_is_cancelled_ends_with_what_there_is(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES["tgi"]
    async with gateway.client.stream("POST", path, json=body) as response:
        turn = await worker.take()
        await turn.say("a", "b")
        await gateway.client.delete(f"/v1/streams/{response.headers['x-headrace-stream-id']}")
        events = await read_all(response)
    assert events[-1].json["generated_text"] == "ab"
    assert events[-1].json["details"]["finish_reason"] == "cancelled"


@pytest.mark.parametrize("api", APIS)
async def test_a_generation_that_fails_ends_with_an_error_event(stand: Stand, api: str) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = BODIES[api]
    async with gateway.client.stream("POST", path, json=body) as response:
        turn = await worker.take()
        await turn.say("a")
        await turn.fail("NAN_LOGITS")
        events = await read_all(response)
    error = events[1].json
    assert error["error_type"] == "generation"
    assert "not finite" in str(error["error"])
    assert events[-1].is_done == (api != "tgi")


# Leaving -----------------------------------------------------------------------------------------


async def leave_after_one(stand: Stand, headers: dict[str, str]) -> tuple[Any, Any, str]:
    worker = await stand.worker()
    gateway = await stand.gateway(disconnect_grace_s=0.2)
    path, body = BODIES["tgi"]
    async with gateway.client.stream("POST", path, json=body, headers=headers) as response:
        stream_id = response.headers["x-headrace-stream-id"]
        turn = await worker.take()
        await turn.say("a")
        await anext(read_events(response))
    return gateway, turn, stream_id


async def state_of(stand: Stand, stream_id: str) -> str:
    page = await stand.broker.read(f"{stream_id}.0", 0)
    return page.state if page else "absent"


@pytest.mark.parametrize("headers", [{}, {"x-headrace-disconnect": "0.2"}])
async def test_a_client_that_stays_away_is_cancelled_after_its_grace(
    stand: Stand, headers: dict[str, str]
) -> None:
    _, _, stream_id = await leave_after_one(stand, headers)
    assert await state_of(stand, stream_id) == "R"

    async def has_ended() -> bool:
        return await state_of(stand, stream_id) == "T"

    await wait_until(has_ended)


async def test_a_client_may_ask_to_be_cancelled_at_once(stand: Stand) -> None:
    _, turn, stream_id = await leave_after_one(stand, {"x-headrace-disconnect": "cancel"})

    async def has_ended() -> bool:
        return await state_of(stand, stream_id) == "T"

    await wait_until(has_ended, timeout_s=1)
    assert (await turn.say("b")).refusals[0].kind == "gone"


async def test_a_generation_may_run_on_without_its_client(stand: Stand) -> None:
    gateway, turn, stream_id = await leave_after_one(stand, {"x-headrace-disconnect": "continue"})
    await wait_until(lambda: gateway.services.relay.num_streams == 0)
    await stand.broker.reap()
    await turn.say("b")
    await turn.end()
    resumed = await gateway.client.get(f"/v1/streams/{stream_id}")
    assert '"generated_text":"ab"' in resumed.text


async def test_a_client_that_comes_back_in_time_stops_the_clock(stand: Stand) -> None:
    gateway, turn, stream_id = await leave_after_one(stand, {"x-headrace-disconnect": "30"})
    async with gateway.client.stream("GET", f"/v1/streams/{stream_id}") as resumed:
        await turn.say("b", finish="length")
        assert text_of(await read_all(resumed)) == "ab"


@pytest.mark.parametrize("wish", ["soon", "-1", "nan", "3601", "inf", ""])
async def test_a_wish_that_is_none_is_refused(stand: Stand, wish: str) -> None:
    gateway = await stand.gateway()
    path, body = BODIES["tgi"]
    refused = await gateway.client.post(path, json=body, headers={"x-headrace-disconnect": wish})
    assert refused.status_code == 422
    assert "x-headrace-disconnect" in refused.json()["error"]


async def test_a_whole_answer_is_cancelled_as_soon_as_its_client_leaves(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = asyncio.create_task(gateway.client.post("/generate", json={"inputs": "hi"}))
    turn = await worker.take()
    await turn.say("a")
    asking.cancel()

    async def is_gone() -> bool:
        return bool((await turn.say("b")).refusals)

    await wait_until(is_gone, timeout_s=2)
    await wait_until(lambda: gateway.services.relay.num_streams == 0)


# Keep-alives -------------------------------------------------------------------------------------


async def test_silence_is_filled_with_comments_of_one_newline(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway(keep_alive_s=0.2)
    path, body = BODIES["chat"]
    async with gateway.client.stream("POST", path, json=body) as response:
        chunks = response.aiter_raw()
        assert await asyncio.wait_for(anext(chunks), 5) == b": ping\n"
        turn = await worker.take()
        await turn.say("a", finish="length")
        sent = b"".join([chunk async for chunk in chunks])
    assert b"\n\n: ping\n\n" not in sent
    assert sent.endswith(b"data: [DONE]\n\n")
