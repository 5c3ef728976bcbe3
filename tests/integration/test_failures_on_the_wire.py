"""Every failure code that a gateway answers with is made to come: answer and log are as its row."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from common.failures import KINDS, Failure
from common.keys import Limits
from common.models.chat_template import ChatTemplate
from common.storage import local
from gateway.errors import status_of
from gateway.middleware import MAX_HEAD_BYTES
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.batches import batch_record
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import saying

JSON = {"content-type": "application/json"}
PROMPT = {"prompt": "hi", "max_tokens": 4}
GENERATE = "/generate"
COMPLETIONS = "/v1/completions"
NATIVE = {"inputs": "hi", "parameters": {"max_new_tokens": 4}}

Answer = httpx.Response
Scene = Callable[[Stand], Awaitable[Answer]]

ELSEWHERE = {
    "MODEL_LOAD_FAILED": "ends a start",
    "WEIGHTS_MISMATCH": "ends a start",
    "UNSAFE_FORMAT": "ends a start",
    "INCOMPLETE_GENERATION": "a word of TGI's; here each generation has an end",
}
"""Codes that no gateway answers a request with, and why."""


def asking(path: str, body: Any = None, method: str = "", **settings: Any) -> Scene:
    """One request to a gateway with a worker that nobody asks."""

    async def scene(stand: Stand) -> Answer:
        await stand.worker()
        gateway = await stand.gateway(**settings)
        return await gateway.client.request(method or ("POST" if body else "GET"), path, json=body)

    return scene


def failing(code: str, path: str = COMPLETIONS) -> Scene:
    """What a worker, or Redis in its place, says of a generation."""

    async def scene(stand: Stand) -> Answer:
        worker = await stand.worker()
        gateway = await stand.gateway()
        body = NATIVE if path == GENERATE else PROMPT
        request = asyncio.create_task(gateway.client.post(path, json=body))
        await (await worker.take()).fail(code)
        return await request

    return scene


def with_key(sends: str = "{key}", path: str = COMPLETIONS, **fields: Any) -> Scene:
    """Two requests with a key of these ``fields``; the second one's answer."""

    async def scene(stand: Stand) -> Answer:
        worker = await stand.worker()
        gateway = await stand.gateway(key_pepper=PEPPER)
        key = await make_key(stand.broker, "a", **fields)
        headers = bearer(sends.format(key=key)) if sends else {}
        async with worker.acting(saying("a")):
            await gateway.client.post(path, json=PROMPT, headers=headers)
            return await gateway.client.post(path, json=PROMPT, headers=headers)

    return scene


async def body_timeout(stand: Stand) -> Answer:
    gateway = await stand.gateway(arrival_limit_s=0.3)
    async with gateway.connected() as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n")
        writer.write(b"content-type: application/json\r\n\r\n{")
        head, _, body = (await asyncio.wait_for(reader.read(), 15)).partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    return Answer(int(head.split()[1]), headers=[(name, it) for name, it in lines], content=body)


async def template_error(stand: Stand) -> Answer:
    await stand.worker()
    gateway = await stand.gateway()
    services = gateway.services
    broken = ChatTemplate("{{ raise_exception('never') }}", {})
    services.model = replace(services.model, chat_template=broken)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    return await gateway.client.post("/v1/chat/completions", json=body)


async def unsupported_media_type(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    return await gateway.client.post(
        COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}
    )


async def access_misconfigured(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    key = await make_key(stand.broker, "a")
    return await gateway.client.post(COMPLETIONS, json=PROMPT, headers=bearer(key))


async def idempotency_conflict(stand: Stand) -> Answer:
    worker = await stand.worker()
    gateway = await stand.gateway()
    key = {"idempotency-key": "k"}
    async with worker.acting(saying("a")):
        await gateway.client.post(COMPLETIONS, json=PROMPT, headers=key)
    return await gateway.client.post(COMPLETIONS, json=PROMPT | {"n": 2}, headers=key)


async def stream_diverged(stand: Stand) -> Answer:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a", "b")):
        made = await gateway.client.post(GENERATE + "_stream", json=NATIVE)
    path = f"/v1/streams/{made.headers['x-headrace-stream-id']}"
    return await gateway.client.get(path, params={"after": "1-deadbeef"})


async def queue_full(stand: Stand) -> Answer:
    await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=10)
    async with gateway.client.stream("POST", COMPLETIONS, json=PROMPT | {"stream": True}):
        return await gateway.client.post(COMPLETIONS, json=PROMPT | {"max_tokens": 8})


async def no_workers(stand: Stand) -> Answer:
    return await (await stand.gateway()).client.post(COMPLETIONS, json=PROMPT)


async def generation_timeout(stand: Stand) -> Answer:
    worker = await stand.worker()
    gateway = await stand.gateway(run_limit_s=0.2)
    request = asyncio.create_task(gateway.client.post(COMPLETIONS, json=PROMPT))
    await worker.take()
    return await request


async def protocol_too_new(stand: Stand) -> Answer:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a")):
        made = await gateway.client.post(COMPLETIONS, json=PROMPT)
    request_id = made.headers["x-headrace-stream-id"]
    redis: Any = Redis.from_url(stand.redis_url)
    await redis.hset(f"hr:{{simulated/0}}:gen:{request_id}.0", "v", 99)
    await redis.aclose()
    return await gateway.client.get(f"/v1/streams/{request_id}")


async def broker_unavailable(stand: Stand) -> Answer:
    await stand.worker()
    async with fault_proxy(stand.redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url, api_key="k")
        await proxy.cut()
        try:
            return await gateway.client.post(COMPLETIONS, json=PROMPT, headers=bearer("k"))
        finally:
            await proxy.heal()


async def broker_full(stand: Stand) -> Answer:
    await stand.worker()
    gateway = await stand.gateway()
    redis: Any = Redis.from_url(stand.redis_url)
    try:
        await redis.config_set("maxmemory", 1)
        return await gateway.client.post(COMPLETIONS, json=PROMPT)
    finally:
        await redis.config_set("maxmemory", 0)
        await redis.aclose()


def with_storage(error: OSError) -> Scene:
    """An upload onto a disk that says ``error`` to the first byte."""

    async def scene(stand: Stand) -> Answer:
        gateway = await stand.gateway()
        form = {"file": ("a", b"a"), "purpose": (None, "batch")}
        with patch.object(local._Draft, "write", side_effect=error):
            return await gateway.client.post("/v1/files", files=form)

    return scene


async def batch_ended(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    batch = await stand.broker.batch_store.create(batch_record(status="failed"))
    return await gateway.client.post(f"/v1/batches/{batch.id}/cancel")


async def draining(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    gateway.services.is_draining = True
    return await gateway.client.post(COMPLETIONS, json=PROMPT)


async def internal(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    gateway.services.model = None  # pyright: ignore[reportAttributeAccessIssue] - that is the fault
    return await gateway.client.post(COMPLETIONS, json=PROMPT)


async def host_not_allowed(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    return await gateway.client.get("/v1/models", headers={"host": "rebound.example"})


async def too_large_a_head(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    return await gateway.client.get("/info", headers={"x-big": "a" * MAX_HEAD_BYTES})


UNKNOWN_STREAM = "/v1/streams/0123456789abcdef0123456789abcdef"
SCENES: dict[str, Scene] = {
    "BAD_REQUEST": asking(COMPLETIONS, {"prompt": []}),
    "UNSUPPORTED_PARAMETER": asking(COMPLETIONS, PROMPT | {"suffix": "x"}),
    "GRAMMAR_REJECTED": failing("GRAMMAR_REJECTED"),
    "BODY_TOO_LARGE": asking(COMPLETIONS, {"prompt": "a" * 200}, payload_limit=100),
    "BODY_TIMEOUT": body_timeout,
    "HEADER_TOO_LARGE": too_large_a_head,
    "UNSUPPORTED_MEDIA_TYPE": unsupported_media_type,
    "CONTEXT_LENGTH_EXCEEDED": asking(COMPLETIONS, PROMPT | {"max_tokens": 10**6}),
    "TEMPLATE_ERROR": template_error,
    "NOT_FOUND": asking("/nowhere"),
    "METHOD_NOT_ALLOWED": asking(GENERATE),
    "MODEL_NOT_FOUND": asking("/v1/models/other"),
    "ADAPTER_NOT_FOUND": asking(GENERATE, {"inputs": "hi", "parameters": {"adapter_id": "x"}}),
    "ADAPTER_LOAD_FAILED": failing("ADAPTER_LOAD_FAILED"),
    "AUTH_MISSING": with_key(""),
    "AUTH_INVALID": with_key("sk-headrace-000000000000-" + "0" * 43),
    "AUTH_EXPIRED": with_key(expires_s=1),
    "HOST_NOT_ALLOWED": host_not_allowed,
    "SCOPE_DENIED": with_key(scopes=("metrics",)),
    "MODEL_NOT_ALLOWED": with_key(models=("other",)),
    "RATE_LIMITED": with_key(limits=Limits(requests_per_minute=1)),
    "QUOTA_EXHAUSTED": with_key(limits=Limits(tokens_per_minute=2)),
    "ACCESS_MISCONFIGURED": access_misconfigured,
    "IDEMPOTENCY_CONFLICT": idempotency_conflict,
    "STREAM_EXPIRED": asking(f"{UNKNOWN_STREAM}?after=5-00000000"),
    "STREAM_DIVERGED": stream_diverged,
    "QUEUE_FULL": queue_full,
    "NO_WORKERS": no_workers,
    "QUEUE_TIMEOUT": asking(COMPLETIONS, PROMPT, queue_limit_s=0.2),
    "GENERATION_TIMEOUT": generation_timeout,
    "POISON_REQUEST": failing("POISON_REQUEST"),
    "MODEL_VERSION_GONE": failing("MODEL_VERSION_GONE"),
    "PROTOCOL_TOO_NEW": protocol_too_new,
    "NAN_LOGITS": failing("NAN_LOGITS", GENERATE),
    "CUDA_OOM": failing("CUDA_OOM"),
    "ENGINE_ERROR": failing("ENGINE_ERROR", GENERATE),
    "TOKENIZER_MISMATCH": failing("TOKENIZER_MISMATCH"),
    "BROKER_UNAVAILABLE": broker_unavailable,
    "BROKER_FULL": broker_full,
    "STORAGE_UNAVAILABLE": with_storage(OSError(5, "EIO")),
    "STORAGE_FULL": with_storage(OSError(28, "ENOSPC")),
    "BATCH_ENDED": batch_ended,
    "DRAINING": draining,
    "INTERNAL": internal,
}
FINAL_EVENTS = ("gateway.rejected", "request.finished", "request.failed")
"""One of them tells how a request ended."""
OPENAI_WORDS = {
    "AUTH_MISSING": "invalid_api_key",
    "AUTH_INVALID": "invalid_api_key",
    "AUTH_EXPIRED": "invalid_api_key",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUOTA_EXHAUSTED": "insufficient_quota",
}


def test_no_code_is_left_out() -> None:
    assert sorted([*SCENES, *ELSEWHERE]) == sorted(KINDS)


@pytest.mark.parametrize("code", SCENES)
async def test_a_failure_is_answered_as_its_row_says(stand: Stand, code: str) -> None:
    with capture_logs() as lines:
        answer = await SCENES[code](stand)
    told = answer.json()
    openai = isinstance(told["error"], dict)
    wire = "openai" if openai else "tgi"
    kind = KINDS[code]
    if openai:
        assert told["error"]["code"] == OPENAI_WORDS.get(code, code.lower()), answer.text
        assert told["error"]["type"] == kind.openai_type
    else:
        assert told["code"] == code, answer.text
    assert told["error_type"] == kind.tgi_type
    assert answer.status_code == status_of(Failure(code), wire)
    assert answer.headers["x-should-retry"] == ("true" if kind.retryable else "false")
    assert ("retry-after-ms" in answer.headers) == kind.retryable
    assert answer.headers["x-request-id"]
    lines = [line for line in lines if line["event"] in FINAL_EVENTS and line["code"] == code]
    assert {line.get("status", 500) for line in lines} == {answer.status_code}
