"""Every failure code that a gateway answers with is made to come: answer and log are as its row."""

import asyncio
import resource
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from common.failures import KINDS
from common.keys import Limits
from gateway.app import drain
from gateway.middleware import MAX_HEAD_BYTES
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.batches import batch_record
from tests.support.dead_letters import NUM_DEATHS
from tests.support.failure_rows import check_row, check_witnesses
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.going_back import Disk
from tests.support.scripted_worker import ScriptedWorker, saying
from tests.support.waiting import wait_until

JSON = {"content-type": "application/json"}
PROMPT = {"prompt": "hi", "max_tokens": 4}
GENERATE = "/generate"
_MOST_BYTES = 1024 * 1024
COMPLETIONS = "/v1/completions"
NATIVE = {"inputs": "hi", "parameters": {"max_new_tokens": 4}}

Answer = httpx.Response
Scene = Callable[[Stand], Awaitable[Answer]]

_OF_WORKERS = "integration/test_failures_of_workers.py::test_what_a_worker_refuses_has_its_code"
_OF_STARTS = "integration/test_failures_inside.py::test_a_model_that_is_not_right_ends_the_start"
ELSEWHERE = {
    **dict.fromkeys(
        (
            "ADAPTER_LOAD_FAILED",
            "CUDA_OOM",
            "ENGINE_ERROR",
            "GRAMMAR_REJECTED",
            "NAN_LOGITS",
            "TEMPLATE_ERROR",
            "TOKENIZER_MISMATCH",
        ),
        _OF_WORKERS,
    ),
    "MODEL_LOAD_FAILED": _OF_STARTS,
    "WEIGHTS_MISMATCH": _OF_STARTS,
    "UNSAFE_FORMAT": "integration/test_failures_inside.py"
    "::test_a_model_that_brings_code_is_not_taken",
}
"""Codes for which it takes a model, or that end a start: where they come from their causes."""


def asking(path: str, body: Any = None, method: str = "", **settings: Any) -> Scene:
    """One request to a gateway with a worker that nobody asks."""

    async def scene(stand: Stand) -> Answer:
        await stand.worker()
        gateway = await stand.gateway(**settings)
        return await gateway.client.request(method or ("POST" if body else "GET"), path, json=body)

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
    """Redis forgets a token that was shown, its worker is gone, and the next one says another."""
    redis: Any = Redis.from_url(stand.redis_url)
    first, gateway = await stand.worker(), await stand.gateway()
    async with gateway.client.stream("POST", GENERATE + "_stream", json=NATIVE) as shown:
        turn = await first.take()
        await turn.say("a")
        events = shown.aiter_lines()
        await wait_for_id(events, 1)
        disk = await Disk.of(redis)
        await turn.say("b")
        cursor = await wait_for_id(events, 2)
    await disk.go_back("simulated")
    await stand.broker.reap()  # begins leases anew
    await disk.end_settling("simulated")
    await redis.aclose()
    await stand.broker.bury_worker(first.name)
    other = await stand.worker()
    turn = await other.take()
    await turn.say("c", tokens=[99])
    await turn.end()
    path = f"/v1/streams/{shown.headers['x-headrace-stream-id']}"
    return await gateway.client.get(path, params={"after": cursor})


async def wait_for_id(lines: AsyncIterator[str], position: int) -> str:
    """The id of the event behind so many tokens."""
    async for line in lines:
        if line.startswith(f"id: {position}-"):
            return line.removeprefix("id: ")
    raise AssertionError("the stream ended before that")


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


async def poison_request(stand: Stand) -> Answer:
    """Worker after worker takes it, and is never heard of again."""
    gateway = await stand.gateway()
    async with asyncio.TaskGroup() as tasks:
        request = None
        for _ in range(NUM_DEATHS):
            worker = await stand.worker()
            request = request or tasks.create_task(gateway.client.post(COMPLETIONS, json=PROMPT))
            await worker.take()
            await stand.broker.bury_worker(worker.name)
    assert request is not None
    return request.result()


async def model_version_gone(stand: Stand) -> Answer:
    """It has begun, and the last worker of its version went half a minute ago."""
    worker, redis = await stand.worker(), Redis.from_url(stand.redis_url)
    gateway = await stand.gateway()
    request = asyncio.create_task(gateway.client.post(COMPLETIONS, json=PROMPT))
    turn = await worker.take()
    await turn.say("a")
    await turn.release()
    await worker.leave()
    await ScriptedWorker(stand.broker, "another@1").beat()
    await redis.zadd("hr:{simulated/0}:versions", {stand.version: 1})
    await redis.aclose()
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


async def storage_unavailable(stand: Stand) -> Answer:
    """Where the directory should be lies a file."""
    with tempfile.NamedTemporaryFile() as file:
        gateway = await stand.gateway(storage_url=f"file://{file.name}/files")
        return await upload(gateway, b"a")


async def storage_full(stand: Stand) -> Answer:
    """The system gives no file more room than that."""
    gateway = await stand.gateway()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, limits[1]))
    try:
        return await upload(gateway, b"a" * (_MOST_BYTES + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def upload(gateway: RunningGateway, content: bytes) -> Answer:
    form = {"file": ("a", content), "purpose": (None, "batch")}
    return await gateway.client.post("/v1/files", files=form)


async def batch_ended(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    batch = await stand.broker.batch_store.create(batch_record(status="failed"))
    return await gateway.client.post(f"/v1/batches/{batch.id}/cancel")


async def draining(stand: Stand) -> Answer:
    gateway = await stand.gateway()
    await drain(gateway.services, 0.0)
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
    "BODY_TOO_LARGE": asking(COMPLETIONS, {"prompt": "a" * 200}, payload_limit=100),
    "BODY_TIMEOUT": body_timeout,
    "HEADER_TOO_LARGE": too_large_a_head,
    "UNSUPPORTED_MEDIA_TYPE": unsupported_media_type,
    "CONTEXT_LENGTH_EXCEEDED": asking(COMPLETIONS, PROMPT | {"max_tokens": 10**6}),
    "NOT_FOUND": asking("/nowhere"),
    "METHOD_NOT_ALLOWED": asking(GENERATE),
    "MODEL_NOT_FOUND": asking("/v1/models/other"),
    "ADAPTER_NOT_FOUND": asking(GENERATE, {"inputs": "hi", "parameters": {"adapter_id": "x"}}),
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
    "POISON_REQUEST": poison_request,
    "MODEL_VERSION_GONE": model_version_gone,
    "PROTOCOL_TOO_NEW": protocol_too_new,
    "BROKER_UNAVAILABLE": broker_unavailable,
    "BROKER_FULL": broker_full,
    "STORAGE_UNAVAILABLE": storage_unavailable,
    "STORAGE_FULL": storage_full,
    "BATCH_ENDED": batch_ended,
    "DRAINING": draining,
    "INTERNAL": internal,
}
ALSO_TOLD = {"POISON_REQUEST": "job.dead", "MODEL_VERSION_GONE": "job.closed"}
"""By whom it is that ends a generation in its worker's place."""


def test_no_code_is_left_out() -> None:
    assert sorted([*SCENES, *ELSEWHERE]) == sorted(KINDS)
    check_witnesses(ELSEWHERE)


@pytest.mark.parametrize("code", SCENES)
async def test_a_failure_is_answered_as_its_row_says(stand: Stand, code: str) -> None:
    with capture_logs() as lines:
        answer = await SCENES[code](stand)
        if event := ALSO_TOLD.get(code):
            await wait_until(lambda: told(lines, event, code), what=event)
    check_row(code, answer, lines)


def told(lines: Sequence[Mapping[str, Any]], event: str, code: str) -> bool:
    return [line["code"] for line in lines if line["event"] == event] == [code]
