"""Who is refused anyway is refused before his prompt is worked on.

The prompts here are longer than the model takes: a gateway that had counted their tokens would say
so instead.
"""

from typing import Any

import httpx
import pytest

from common.keys import Limits
from gateway.answer import WORTH_ASKING_BYTES
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import saying

LONG = "a" * (2 * WORTH_ASKING_BYTES)
SAID = [{"role": "user", "content": LONG}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": LONG},
    "/generate_stream": {"inputs": LONG},
    "/": {"inputs": LONG},
    "/invocations": {"prompt": LONG},
    "/vertex": {"instances": [{"inputs": LONG}]},
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": LONG},
    "/v1/responses": {"input": LONG},
}
SHORT = {"prompt": "hi", "max_tokens": 200}


def code_of(answer: httpx.Response) -> str:
    told = answer.json()
    return str(told.get("code") or told["error"]["code"]).upper()


@pytest.mark.parametrize("path", BODIES)
async def test_with_room_the_length_is_told(stand: Stand, path: str) -> None:
    """What the others here rely on."""
    await stand.worker()
    gateway = await stand.gateway()
    answer = await gateway.client.post(path, json=BODIES[path])
    assert code_of(answer) == "CONTEXT_LENGTH_EXCEEDED"


@pytest.mark.parametrize("path", BODIES)
async def test_a_full_lane(stand: Stand, path: str) -> None:
    await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=210)
    async with gateway.client.stream(
        "POST", "/v1/completions", json=SHORT | {"stream": True, "max_tokens": 208}
    ):
        refused = await gateway.client.post(path, json=BODIES[path])
    assert (refused.status_code, code_of(refused)) == (429, "QUEUE_FULL")
    assert int(refused.headers["retry-after-ms"]) >= 1000


async def test_another_lane_has_room_of_its_own(stand: Stand) -> None:
    await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=210)
    busy = SHORT | {"stream": True, "max_tokens": 208, "service_tier": "flex"}
    body = BODIES["/v1/chat/completions"]
    async with gateway.client.stream("POST", "/v1/completions", json=busy):
        flex = await gateway.client.post(
            "/v1/chat/completions", json=body | {"service_tier": "flex"}
        )
        default = await gateway.client.post("/v1/chat/completions", json=body)
    assert [code_of(answer) for answer in (flex, default)] == [
        "QUEUE_FULL",
        "CONTEXT_LENGTH_EXCEEDED",
    ]


@pytest.mark.parametrize("path", BODIES)
async def test_no_worker(stand: Stand, path: str) -> None:
    gateway = await stand.gateway()
    refused = await gateway.client.post(path, json=BODIES[path])
    assert (refused.status_code, code_of(refused)) == (503, "NO_WORKERS")


async def test_a_key_over_its_limits(stand: Stand) -> None:
    """And another key, of the same tenant, is not."""
    worker = await stand.worker()
    gateway = await stand.gateway(key_pepper=PEPPER)
    spent = await make_key(stand.broker, "a", limits=Limits(requests_per_minute=1))
    fresh = await make_key(stand.broker, "a", limits=Limits(requests_per_minute=1))
    async with worker.acting(saying("a")):
        first = await gateway.client.post("/v1/completions", json=SHORT, headers=bearer(spent))
    assert first.status_code == 200
    body = BODIES["/v1/chat/completions"]
    for key, status, code in ((spent, 429, "RATE_LIMIT_EXCEEDED"),
                              (fresh, 400, "CONTEXT_LENGTH_EXCEEDED")):  # fmt: skip
        answer = await gateway.client.post("/v1/chat/completions", json=body, headers=bearer(key))
        assert (answer.status_code, code_of(answer)) == (status, code)
        if status == 429:
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert int(answer.headers["retry-after-ms"]) > 1000


async def test_as_many_open_as_this_gateway_takes(stand: Stand) -> None:
    """Whatever the length, and without asking Redis."""
    await stand.worker()
    gateway = await stand.gateway(max_concurrent_requests=1)
    async with gateway.client.stream("POST", "/v1/completions", json=SHORT | {"stream": True}):
        refused = await gateway.client.post("/v1/completions", json=SHORT | {"temperature": 99})
    assert (refused.status_code, code_of(refused)) == (429, "QUEUE_FULL")


async def test_what_is_known_by_its_key_is_never_turned_away(stand: Stand) -> None:
    """A retry is read, not queued: a full queue is not in its way."""
    worker = await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=WORTH_ASKING_BYTES + 100, max_total_tokens=20_000)
    body = {"prompt": "b" * WORTH_ASKING_BYTES, "max_tokens": 4}
    key = {"idempotency-key": "once"}
    async with worker.acting(saying("a")):
        first = await gateway.client.post("/v1/completions", json=body, headers=key)
    assert first.status_code == 200, first.text
    busy = body | {"stream": True}
    async with gateway.client.stream("POST", "/v1/completions", json=busy):
        refused = await gateway.client.post("/v1/completions", json=body)
        again = await gateway.client.post("/v1/completions", json=body, headers=key)
    assert code_of(refused) == "QUEUE_FULL"
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["choices"] == first.json()["choices"]
