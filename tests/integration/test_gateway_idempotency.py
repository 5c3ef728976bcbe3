"""Idempotency-Key on the wire: the same request sent again reads the answer of the first one."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.scripted_worker import Turn
from tests.support.sse_events import read_all
from tests.support.waiting import wait_until

HEADER = "idempotency-key"
KEY = {"idempotency-key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
STREAMED: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": "hi", "parameters": {"details": True, "do_sample": True}}),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": "hi", "stream": True}),
    ("/v1/responses", {"input": "hi", "stream": True}),
]
WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "hi", "parameters": {"details": True, "do_sample": True}}),
    ("/", {"inputs": "hi"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
]


async def is_idle(stand: Stand) -> bool:
    """Whether nothing waits for a worker."""
    return not sum((await stand.broker.state()).waiting.values())


async def leave(gateway: RunningGateway, asking: "asyncio.Task[httpx.Response]") -> None:
    asking.cancel()
    await wait_until(lambda: gateway.services.relay.num_streams == 0)
    await gateway.services.relay.flush()


def post(
    gateway: RunningGateway, path: str, body: Any, headers: dict[str, str] = KEY
) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(gateway.client.post(path, json=body, headers=headers))


@pytest.mark.parametrize(("path", "body"), STREAMED)
async def test_a_repeated_request_reads_the_running_stream_from_its_beginning(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    """On another gateway, frame for frame; one generation is made, and both clients follow it."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    async with first.client.stream("POST", path, json=body, headers=KEY) as asked:
        turn = await worker.take()
        await turn.say("a", "b")
        async with second.client.stream("POST", path, json=body, headers=KEY) as again:
            assert again.headers["idempotent-replayed"] == "true"
            for name in ("x-headrace-stream-id", "x-stream-retention-seconds"):
                assert again.headers[name] == asked.headers[name]
            assert await is_idle(stand)
            await turn.say("c")
            await turn.end()
            repeated = await read_all(again)
        told = await read_all(asked)
    assert "idempotent-replayed" not in asked.headers
    assert repeated == told
    ended = await post(second, path, body)
    assert ended.headers["idempotent-replayed"] == "true"
    assert ended.text.count("data: ") == len(told)


@pytest.mark.parametrize(("path", "body"), WHOLE)
async def test_a_repeated_request_gets_the_same_whole_answer(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    """Whether it comes while the first one runs or when that has ended."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    asking = post(first, path, body)
    turn = await worker.take()
    await turn.say("a")
    again = post(second, path, body)
    await wait_until(lambda: second.services.relay.num_streams == 1)
    await turn.say("b", finish="length")
    answer, running = await asking, await again
    ended = await post(second, path, body)
    assert answer.json() == running.json() == ended.json()
    assert [it.headers.get("idempotent-replayed") for it in (answer, running, ended)] == [
        None, "true", "true",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_all_choices_are_found_again(stand: Stand, stream: bool) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = CHAT | {"n": 2, "stream": stream}
    asking = post(gateway, "/v1/chat/completions", body)
    turns = sorted([await worker.take(), await worker.take()], key=lambda turn: turn.id)
    await turns[0].say("zero", finish="length")
    await turns[1].say("one", finish="length")
    answer = await asking
    again = await post(gateway, "/v1/chat/completions", body)
    assert again.headers["idempotent-replayed"] == "true"
    assert texts_of(again, stream) == texts_of(answer, stream) == {0: "zero", 1: "one"}


def texts_of(answer: httpx.Response, stream: bool) -> dict[int, str]:
    if not stream:
        return {it["index"]: it["message"]["content"] for it in answer.json()["choices"]}
    texts: dict[int, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for it in json.loads(line.removeprefix("data: "))["choices"]:
                content = it["delta"].get("content", "")
                texts[it["index"]] = texts.get(it["index"], "") + content
    return texts


async def test_all_prompts_are_found_again(stand: Stand) -> None:
    """Several prompts are several requests, which the one key stands for."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = {"prompt": ["x", "y"], "n": 2, "logprobs": 1, "echo": True}
    asking = post(gateway, "/v1/completions", body)
    for turn in [await worker.take() for _ in range(4)]:
        index = turn.id[-1]
        await turn.say(f"{chr(turn.spec.prompt[0])}{index}", finish="length")
    answer = await asking
    again = await post(gateway, "/v1/completions", body)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["x-headrace-stream-id"] == answer.headers["x-headrace-stream-id"]
    assert [it["text"] for it in again.json()["choices"]] == [
        it["text"] for it in answer.json()["choices"]
    ]


async def test_another_body_or_path_under_the_same_key_is_refused(stand: Stand) -> None:
    """Spaces and the order of fields make no other body."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = post(gateway, "/v1/completions", {"prompt": "hi", "max_tokens": 5})
    await (await worker.take()).say("a", finish="length")
    await asking
    same = await gateway.client.post(
        "/v1/completions",
        content=b'{ "max_tokens": 5,\n "prompt": "hi" }',
        headers=KEY | {"content-type": "application/json"},
    )
    assert same.headers["idempotent-replayed"] == "true"
    for path, body in (
        ("/v1/completions", {"prompt": "hi", "max_tokens": 6}),
        ("/v1/chat/completions", CHAT),
    ):
        refused = await post(gateway, path, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            422, "idempotency_conflict",
        )  # fmt: skip
        assert refused.headers["x-should-retry"] == "false"
    assert gateway.services.relay.num_streams == 0


async def test_keys_belong_to_their_tenant(stand: Stand) -> None:
    """Another one's key is no obstacle, and finds nothing of what is not its own."""
    worker = await stand.worker()
    gateway = await stand.gateway(key_pepper=PEPPER)
    answers: dict[str, httpx.Response] = {}
    for tenant in ("a", "b"):
        headers = KEY | bearer(await make_key(stand.broker, tenant))
        asking = post(gateway, "/v1/completions", {"prompt": "hi"}, headers)
        turn = await worker.take()
        assert turn.spec.tenant == tenant
        await turn.say(f"for {tenant}", finish="length")
        answers[tenant] = await asking
        again = await post(gateway, "/v1/completions", {"prompt": "hi"}, headers)
        assert again.json() == answers[tenant].json()
    texts = {tenant: it.json()["choices"][0]["text"] for tenant, it in answers.items()}
    assert texts == {"a": "for a", "b": "for b"}


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("abc", '"abc"', True),
        ('"a b"', '"a b"', True),
        (r'"a\"b"', r'"a\"b"', True),
        ("abc", "abd", False),
        ("ABC", "abc", False),
    ],
)
async def test_a_key_is_a_string_with_or_without_its_quotes(
    stand: Stand, one: str, other: str, is_same: bool
) -> None:
    gateway = await stand.gateway()
    await stand.worker()
    path, body = STREAMED[0]
    async with (
        gateway.client.stream("POST", path, json=body, headers={HEADER: one}) as first,
        gateway.client.stream("POST", path, json=body, headers={HEADER: other}) as second,
    ):
        ids = {it.headers["x-headrace-stream-id"] for it in (first, second)}
    assert len(ids) == (1 if is_same else 2)


@pytest.mark.parametrize("key", ["", '""', '"abc', 'a"b', "a b", "x" * 256, '"é"', "a,\tb"])
async def test_a_key_that_is_none_is_refused_by_name(stand: Stand, key: str) -> None:
    gateway = await stand.gateway()
    for path, status in (("/v1/completions", 400), ("/generate", 422)):
        refused = await gateway.client.post(
            path,
            json={"prompt": "hi", "inputs": "hi"},
            headers=[(HEADER.encode(), key.encode())],
        )
        assert refused.status_code == status
        assert "Idempotency-Key" in refused.text
    twice = await gateway.client.post(
        "/v1/completions",
        json={"prompt": "hi"},
        headers=[("idempotency-key", "a"), ("idempotency-key", "b")],
    )
    assert twice.json()["error"]["param"] == "Idempotency-Key"


async def test_a_whole_answer_with_a_key_may_be_taken_up_again(stand: Stand) -> None:
    """Without one it would be cancelled as soon as its client is gone."""
    worker = await stand.worker()
    first, second = await stand.gateway(), await stand.gateway()
    asking = post(first, "/generate", {"inputs": "hi"})
    turn = await worker.take()
    await turn.say("a")
    await leave(first, asking)
    again = post(second, "/generate", {"inputs": "hi"})
    await wait_until(lambda: second.services.relay.num_streams == 1)
    await turn.say("b", finish="length")
    assert (await again).json()["generated_text"] == "ab"


async def test_a_request_that_was_given_up_is_taken_up_again(
    stand: Stand, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis had queued it, its gateway never heard so and said 503: the next one follows it."""
    monkeypatch.setattr("gateway.admission.PATIENCE_S", 0.0)
    worker = await stand.worker()
    async with fault_proxy(redis_url) as proxy:
        first, second = await stand.gateway(redis_url=proxy.url), await stand.gateway()
        proxy.lose_answer(b"_admit")
        refused = await post(first, "/generate", {"inputs": "hi"})
        assert refused.status_code == 503
        turn = await worker.take()
        again = post(second, "/generate", {"inputs": "hi"})
        await wait_until(lambda: second.services.relay.num_streams == 1)
        await wait_until(lambda: not first.services.relay._leaving)
        await turn.say("a", finish="length")
        assert (await again).headers["idempotent-replayed"] == "true"


async def test_a_request_that_was_given_up_and_is_not_asked_for_again_is_cancelled(
    stand: Stand, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.admission.PATIENCE_S", 0.0)
    await stand.worker()
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url, disconnect_grace_s=0)
        proxy.lose_answer(b"_admit")
        assert (await post(gateway, "/generate", {"inputs": "hi"})).status_code == 503
        await wait_until(lambda: is_idle(stand))


async def test_what_was_cancelled_is_made_anew(stand: Stand) -> None:
    """Nobody who asks again gets half an answer for a whole one."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    headers = KEY | {"x-headrace-disconnect": "cancel"}
    asking = post(gateway, "/generate", {"inputs": "hi"}, headers)
    turn = await worker.take()
    await turn.say("a")
    await leave(gateway, asking)
    assert (await turn.say("b")).refusals
    again = post(gateway, "/generate", {"inputs": "hi"}, headers)
    await (await worker.take()).say("c", finish="length")
    answer = await again
    assert answer.json()["generated_text"] == "c"
    assert "idempotent-replayed" not in answer.headers


async def test_a_response_that_was_deleted_is_made_anew(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    path, body = "/v1/responses", {"input": "hi"}
    ids: list[str] = []
    for _ in range(2):
        asking = post(gateway, path, body)
        await (await worker.take()).say("a", finish="length")
        ids.append((await asking).json()["id"])
        assert (await gateway.client.delete(f"{path}/{ids[-1]}")).status_code == 200
    assert ids[0] != ids[1]


async def test_a_failure_is_told_again(stand: Stand) -> None:
    """It would fail again; what could go well the next time is tried anew."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    for code, is_replayed in (("ENGINE_ERROR", False), ("NAN_LOGITS", False), ("", True)):
        asking = post(gateway, "/v1/completions", {"prompt": "hi"})
        if code:
            turn: Turn = await worker.take()
            await turn.fail(code)
        failed = await asking
        assert failed.status_code == 500
        assert ("idempotent-replayed" in failed.headers) == is_replayed
    assert failed.json()["error"]["code"] == "nan_logits"
