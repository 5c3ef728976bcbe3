"""The Responses API on the wire: events and their numbers, what is kept, and conversations."""

import asyncio
from typing import Any

import pytest

from common.broker import Broker
from ops.bench.sse_client import Event, read_events
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.redis_server import RawRedis
from tests.support.scripted_worker import ScriptedWorker, saying
from tests.support.sse_events import events_of
from tests.support.waiting import wait_until

HELLO: dict[str, Any] = {"model": "any", "input": "hi"}
OPENING = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
]
CLOSING = [
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
DELTA = "response.output_text.delta"


def kinds(events: list[Event]) -> list[str]:
    return [event.json["type"] for event in events]


def numbers(events: list[Event]) -> list[int]:
    return [event.json["sequence_number"] for event in events]


async def status_of(gateway: RunningGateway, response_id: str) -> str:
    return (await gateway.client.get(f"/v1/responses/{response_id}")).json()["status"]


async def test_a_whole_response(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    asked = HELLO | {"metadata": {"k": "v"}, "instructions": "Be brief.", "temperature": 0.5}
    async with worker.acting(saying("Hel", "lo")):
        answer = await gateway.client.post("/v1/responses", json=asked)
    body = answer.json()
    assert answer.status_code == 200
    assert body["id"] == f"resp_{answer.headers['x-headrace-stream-id']}"
    assert (body["object"], body["status"], body["background"]) == ("response", "completed", False)
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    ]
    assert body["usage"]["output_tokens"] == 3
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 3
    assert body["metadata"] == {"k": "v"}
    assert body["instructions"] == "Be brief."
    assert body["temperature"] == 0.5
    assert body["error"] is None
    assert body["incomplete_details"] is None
    assert body["headrace"]["finish_reason"] == "eos_token"


async def test_each_event_has_its_number(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("Hel", "lo")):
        events = await events_of(gateway.client, "POST", "/v1/responses", HELLO | {"stream": True})
        whole = await gateway.client.post("/v1/responses", json=HELLO | {"stream": True})
    assert kinds(events) == [*OPENING, DELTA, DELTA, DELTA, *CLOSING]
    assert numbers(events) == list(range(len(events)))
    named = [line for line in whole.text.splitlines() if line.startswith("event: ")]
    assert named == [f"event: {kind}" for kind in kinds(events)]
    assert "".join(event.json.get("delta", "") for event in events) == "Hello"
    assert events[0].json["response"]["status"] == "in_progress"
    assert events[0].json["response"]["output"] == []
    final = events[-1].json["response"]
    assert final["status"] == "completed"
    assert final["output"][0]["content"][0]["text"] == "Hello"
    assert events[2].json["item"]["id"] == final["output"][0]["id"] == events[4].json["item_id"]


async def test_created_is_said_before_a_worker_has_it(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = HELLO | {"stream": True}
    async with gateway.client.stream("POST", "/v1/responses", json=body) as response:
        events = read_events(response)
        first, second = await anext(events), await anext(events)
        turn = await worker.take()
        await turn.end()
        rest = [event async for event in events]
    assert kinds([first, second, *rest]) == [*OPENING, DELTA, *CLOSING]


@pytest.mark.parametrize("after", [-1, 0, 3, 4, 5, 7, 9, 10, 11])
async def test_a_replay_numbers_alike_from_any_event(stand: Stand, after: int) -> None:
    """On another gateway."""
    worker = await stand.worker()
    gateways = [await stand.gateway() for _ in range(2)]
    body = HELLO | {"stream": True, "top_logprobs": 1}
    async with worker.acting(saying("Hel", "lo")):
        events = await events_of(gateways[0].client, "POST", "/v1/responses", body)
    id = events[0].json["response"]["id"]
    path = f"/v1/responses/{id}?stream=true" + (f"&starting_after={after}" if after >= 0 else "")
    again = await events_of(gateways[1].client, "GET", path)
    assert [event.json for event in again] == [event.json for event in events[after + 1 :]]
    shown = (await gateways[1].client.get(f"/v1/responses/{id}")).json()
    assert shown == events[-1].json["response"]


async def test_a_stream_is_resumed_by_its_last_id(stand: Stand) -> None:
    """As any other stream, at each place that has an ``id:``."""
    worker = await stand.worker()
    gateways = [await stand.gateway() for _ in range(2)]
    async with worker.acting(saying("Hel", "lo")):
        events = await events_of(
            gateways[0].client, "POST", "/v1/responses", HELLO | {"stream": True}
        )
    stream_id = events[0].json["response"]["id"].removeprefix("resp_")
    for index, event in enumerate(events):
        if not event.id or index == len(events) - 1:
            continue
        if event.id == (events[index - 1].id if index else ""):
            continue  # ids are sticky: this event has none of its own
        path = f"/v1/streams/{stream_id}?after={event.id}"
        again = await events_of(gateways[1].client, "GET", path)
        assert [it.json for it in again] == [it.json for it in events[index + 1 :]]
    end = await gateways[1].client.get(f"/v1/streams/{stream_id}?after={events[-1].id}")
    assert end.status_code == 204


async def test_in_the_background(stand: Stand) -> None:
    """The answer comes at once, the work goes on without a reader, any gateway shows it."""
    worker = await stand.worker()
    gateways = [await stand.gateway() for _ in range(2)]
    body = HELLO | {"background": True}
    promised = (await gateways[0].client.post("/v1/responses", json=body)).json()
    assert (promised["status"], promised["background"]) == ("queued", True)
    assert (promised["output"], promised["usage"]) == ([], None)
    assert await status_of(gateways[1], promised["id"]) == "queued"
    turn = await worker.take()
    await turn.say("Hel")
    shown = (await gateways[1].client.get(f"/v1/responses/{promised['id']}")).json()
    assert shown["status"] == "in_progress"
    assert shown["output"][0]["status"] == "in_progress"
    assert shown["output"][0]["content"][0]["text"] == "Hel"
    await turn.end()
    assert await status_of(gateways[1], promised["id"]) == "completed"
    path = f"/v1/responses/{promised['id']}?stream=true"
    events = await events_of(gateways[1].client, "GET", path)
    opening = [OPENING[0], "response.queued", *OPENING[1:]]
    assert kinds(events) == [*opening, DELTA, DELTA, *CLOSING]
    assert numbers(events) == list(range(len(events)))


async def test_cancel(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = HELLO | {"background": True}
    promised = (await gateway.client.post("/v1/responses", json=body)).json()
    turn = await worker.take()
    await turn.say("Hel")
    for _ in range(2):  # again: it stays as it is
        cancelled = await gateway.client.post(f"/v1/responses/{promised['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        assert cancelled.json()["output"][0]["status"] == "incomplete"
    path = f"/v1/responses/{promised['id']}?stream=true"
    events = await events_of(gateway.client, "GET", path)
    assert kinds(events)[-1] == "response.incomplete"
    assert events[-1].json["response"]["status"] == "cancelled"


async def test_only_the_background_is_cancelled(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("Hello")):
        body = (await gateway.client.post("/v1/responses", json=HELLO)).json()
    refused = await gateway.client.post(f"/v1/responses/{body['id']}/cancel")
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


async def test_the_length_ends_it_incomplete(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = HELLO | {"stream": True, "max_output_tokens": 1}
    async with worker.acting(saying("Hel", finish="length")):
        events = await events_of(gateway.client, "POST", "/v1/responses", body)
    assert kinds(events)[-1] == "response.incomplete"
    shown = events[-1].json["response"]
    assert (shown["status"], shown["max_output_tokens"]) == ("incomplete", 1)
    assert shown["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("texts", [(), ("Hel",)])
async def test_a_failure_is_its_last_event(
    stand: Stand, texts: tuple[str, ...], *, background: bool
) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = HELLO | {"stream": True, "background": background}
    async with gateway.client.stream("POST", "/v1/responses", json=body) as response:
        turn = await worker.take()
        for text in texts:
            await turn.say(text)
        await turn.fail("NAN_LOGITS")
        events = [event async for event in read_events(response)]
    assert kinds(events)[-1] == "response.failed"
    assert numbers(events) == list(range(len(events)))
    shown = events[-1].json["response"]
    assert (shown["status"], shown["error"]["code"]) == ("failed", "server_error")
    assert shown["error"]["headrace_code"] == "nan_logits"


async def test_a_conversation_goes_on(stand: Stand) -> None:
    """The template is given what both sides said before, and only the new instructions."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("Hello")):
        first = await gateway.client.post(
            "/v1/responses", json=HELLO | {"instructions": "OLD-RULE"}
        )
        follow = {"input": "and now?", "previous_response_id": first.json()["id"]}
        second = await gateway.client.post("/v1/responses", json=follow)
    assert second.json()["previous_response_id"] == first.json()["id"]
    prompts = second.json()["usage"]["input_tokens"], first.json()["usage"]["input_tokens"]
    assert prompts[0] > prompts[1] - len("OLD-RULE")
    path = f"/v1/responses/{second.json()['id']}/input_items"
    listed = (await gateway.client.get(path + "?order=asc")).json()
    said = [(item["role"], item["content"][0]["text"]) for item in listed["data"]]
    assert said == [("user", "hi"), ("assistant", "Hello"), ("user", "and now?")]
    page = (await gateway.client.get(path + "?limit=1")).json()
    assert page["data"][0]["content"][0]["text"] == "and now?"
    assert page["has_more"]
    rest = (await gateway.client.get(f"{path}?after={page['last_id']}")).json()
    assert [item["id"] for item in rest["data"]] == [
        item["id"] for item in listed["data"][:2][::-1]
    ]


async def keys_of(broker: Broker, request_id: str) -> list[str]:
    found = await broker._redis.keys(f"*{request_id}*")  # pyright: ignore[reportPrivateUsage]
    return [key.decode() for key in found]


async def test_what_is_deleted_is_gone(stand: Stand) -> None:
    """Also while it runs; its worker is told, and nothing of it is left but that it was deleted."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = HELLO | {"background": True}
    promised = (await gateway.client.post("/v1/responses", json=body)).json()
    turn = await worker.take()
    await turn.say("Hel")
    deleted = await gateway.client.delete(f"/v1/responses/{promised['id']}")
    assert deleted.json() == {"id": promised["id"], "object": "response", "deleted": True}
    assert (await turn.say("lo")).refusals
    [tombstone] = await keys_of(stand.broker, promised["id"].removeprefix("resp_"))
    redis: RawRedis = stand.broker._redis  # pyright: ignore[reportPrivateUsage]
    left = await redis.hgetall(tombstone)
    assert {name: value for name, value in left.items() if value not in (b"", b"0")} == {
        b"v": b"1",
        b"st": b"T",
        b"tenant": b"public",
        b"end": b"forgotten",
    }
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        gone = await gateway.client.request(method, f"/v1/responses/{promised['id']}{path}")
        assert gone.status_code == 404


async def test_what_is_not_stored_is_not_shown(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("Hello")):
        body = (await gateway.client.post("/v1/responses", json=HELLO | {"store": False})).json()
    assert body["store"] is False
    assert (await gateway.client.get(f"/v1/responses/{body['id']}")).status_code == 404
    follow = HELLO | {"previous_response_id": body["id"]}
    refused = await gateway.client.post("/v1/responses", json=follow)
    assert refused.json()["error"]["param"] == "previous_response_id"


async def test_retention(stand: Stand) -> None:
    """A stored response is kept longer than a stream is, and then all of it goes."""
    worker = await stand.worker()
    gateway = await stand.gateway(
        retention_s=0.1, response_retention_s=1.0, queue_limit_s=0.5, run_limit_s=1.0
    )
    async with worker.acting(saying("Hello")):
        answer = await gateway.client.post("/v1/responses", json=HELLO)
    assert answer.headers["x-stream-retention-seconds"] == "1"
    id = answer.json()["id"]
    assert await status_of(gateway, id) == "completed"

    async def is_gone() -> bool:
        return (await gateway.client.get(f"/v1/responses/{id}")).status_code == 404

    await wait_until(is_gone, what="the end of its retention")

    async def is_clean() -> bool:
        return await keys_of(stand.broker, id.removeprefix("resp_")) == []

    await wait_until(is_clean, what="its keys to go")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    "a call's output": (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "x"}]}]},
        "input[0].output[0].type",
    ),
    "whose output": ({"input": [{"type": "function_call_output"}]}, "input[0].call_id"),
    "a call": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
        "input[0].arguments",
    ),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "a role": ({"input": [{"role": "root", "content": "x"}]}, "input[0].role"),
    "content": ({"input": [{"role": "user"}]}, "input[0].content"),
    "background unstored": ({"background": True, "store": False}, "background"),
    "room": ({"max_output_tokens": 0}, "max_output_tokens"),
    "chat's room": ({"max_tokens": 5}, "max_tokens"),
    "choices": ({"n": 2}, "n"),
    "metadata": ({"metadata": {"a": 1}}, "metadata"),
    "too much metadata": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "a long name": ({"metadata": {"n" * 65: ""}}, "metadata"),
    "include": ({"include": ["file_search_call.results"]}, "include"),
    "a tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "text": ({"text": "x"}, "text"),
    "verbosity": ({"text": {"verbosity": "high"}}, "text.verbosity"),
    "before": ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
    "temperature": ({"temperature": 3}, "temperature"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_is_refused_by_name(stand: Stand, name: str) -> None:
    await stand.worker()
    gateway = await stand.gateway()
    changed, field = BAD[name]
    refused = await gateway.client.post("/v1/responses", json=HELLO | changed)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == field


@pytest.mark.parametrize("path", ["resp_nothing", "resp_" + "0" * 32, "x", "resp_" + "a" * 500])
async def test_an_unknown_response(stand: Stand, path: str) -> None:
    gateway = await stand.gateway()
    answer = await gateway.client.get(f"/v1/responses/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_schema_constrains_it(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    asking = asyncio.create_task(
        gateway.client.post("/v1/responses", json=HELLO | {"text": {"format": form}})
    )
    turn = await worker.take()
    assert turn.spec.sampling.grammar is not None
    assert '"integer"' in turn.spec.sampling.grammar.value
    await turn.end()
    assert (await asking).json()["text"]["format"] == form


async def test_it_runs_in_the_tier_it_names(stand: Stand) -> None:
    worker: ScriptedWorker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("Hello")):
        answer = await gateway.client.post("/v1/responses", json=HELLO | {"service_tier": "flex"})
    assert answer.json()["service_tier"] == "flex"
