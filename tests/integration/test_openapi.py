"""The OpenAPI document: it holds every route, real answers have its shapes, and nothing that a
generator makes of it breaks the server.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Mount, Route

from common.settings import GatewaySettings
from gateway.api.openapi import OPERATIONS, document
from tests.support.gateway_app import Stand
from tests.support.processes import Process, Processes
from tests.support.scripted_worker import saying

DOCUMENT = document(GatewaySettings(), "0")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def shape(path: str, method: str = "post", media: str = "application/json") -> dict[str, Any]:
    """The schema of an answer with 200, with all that it refers to."""
    content = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]
    schema = content[media]["schema"]
    if media == "text/event-stream":
        schema = schema["properties"]["data"]["contentSchema"]
    return {"components": DOCUMENT["components"]} | schema


async def test_each_route_is_described_and_each_description_has_a_route(stand: Stand) -> None:
    gateway = await stand.gateway()
    routes = [route for route in gateway.app.routes if isinstance(route, Route)]
    served = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == set(OPERATIONS)
    assert [route.path for route in gateway.app.routes if isinstance(route, Mount)] == ["/ui"]


async def test_the_document_is_served_where_each_client_looks(stand: Stand) -> None:
    gateway = await stand.gateway(max_best_of=7)
    one = (await gateway.client.get("/openapi.json")).json()
    assert (await gateway.client.get("/api-doc/openapi.json")).json() == one
    parameters = one["components"]["schemas"]["Parameters"]["properties"]
    assert parameters["best_of"]["maximum"] == 7, "the limits are those of this server"
    assert parameters["top_p"]["exclusiveMaximum"] == 1
    assert one["openapi"].startswith("3.1")


async def test_the_page_shows_all_of_it_and_loads_nothing_from_elsewhere(stand: Stand) -> None:
    gateway = await stand.gateway()
    page = await gateway.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "style=" not in page.text
    for _, path in OPERATIONS:
        assert f"</b> {path}</code>" in page.text
    targets = re.findall(r'(?:href|src)="([^"]*)"', page.text)
    anchors = set(re.findall(r'id="([^"]*)"', page.text))
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors
    for target in {target for target in targets if not target.startswith("#")}:
        assert target.startswith("/")
        assert (await gateway.client.get(target)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "hi", "parameters": {"details": True, "top_n_tokens": 2}}),
        ("/generate", {"inputs": "hi", "parameters": {"best_of": 2, "details": True,
                                                      "do_sample": True}}),
        ("/generate", {"inputs": "hi", "parameters": {"decoder_input_details": True}}),
        ("/", {"inputs": "hi"}),
        ("/vertex", {"instances": [{"inputs": "hi"}]}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "service_tier": "flex", "n": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "echo": True}),
        ("/tokenize", {"inputs": "hi"}),
        ("/chat_tokenize", CHAT),
    ],
)  # fmt: skip
async def test_a_whole_answer_has_the_shape_that_is_described(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a", "b")):
        answer = await gateway.client.post(path, json=body)
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), shape(path))
    assert fields_of(answer.json()) <= described_fields(), "nothing is answered in silence"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate_stream", {"inputs": "hi", "parameters": {"details": True}}),
        ("/v1/chat/completions", CHAT | {"stream": True, "logprobs": True}),
        ("/v1/chat/completions",
         CHAT | {"stream": True, "stream_options": {"include_usage": True}, "n": 2}),
        ("/v1/completions", {"prompt": "a", "stream": True, "service_tier": "auto"}),
    ],
)  # fmt: skip
async def test_each_event_has_the_shape_that_is_described(
    stand: Stand, path: str, body: dict[str, Any]
) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a", "b")):
        answer = await gateway.client.post(path, json=body)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    assert len(events) >= 3
    for event in events:
        jsonschema.validate(event, shape(path, media="text/event-stream"))
        assert fields_of(event) <= described_fields()


def fields_of(value: Any) -> set[str]:
    """Names of all members, but for those that are tokens' texts."""
    if isinstance(value, list):
        return {name for member in value for name in fields_of(member)}
    if not isinstance(value, dict):
        return set()
    inner = [member for name, member in value.items() if name != "top_logprobs"]
    return set(value) | fields_of(inner)


def described_fields() -> set[str]:
    return {
        name
        for schema in DOCUMENT["components"]["schemas"].values()
        for name in schema.get("properties", {})
    }


# Made from the document --------------------------------------------------------------------------


@pytest.fixture
async def system(started: Processes, simulated_data_dir: Path) -> Process:
    """A gateway and a worker with the simulated engine, as processes."""
    shared: dict[str, Any] = {
        "data_dir": simulated_data_dir,
        "model": "simulated",
        "max_total_tokens": 64,
    }
    fast: dict[str, Any] = {"simulated_first_token_ms": 0, "simulated_inter_token_ms": 0}
    await started.worker(**shared, **fast).ready()
    return await started.gateway(**shared).ready()


def operations() -> Iterator[Any]:
    for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations():
        assert isinstance(result, Ok), "the document is not valid"
        operation = result.ok()
        if operation.path != "/ops/feed":  # it has no end
            yield operation


@pytest.mark.timeout(240)
async def test_what_a_generator_makes_of_the_document_breaks_nothing(system: Process) -> None:
    """Requests that fit the document and requests that do not: every answer has a status, a type
    and a shape that it tells.
    """
    await asyncio.to_thread(play, system.url)
    async with httpx.AsyncClient(base_url=system.url) as client:
        answer = await client.post("/generate", json={"inputs": "still there?"})
    assert answer.status_code == 200
    assert not system.events("request.failed")


def play(url: str) -> None:
    for operation in operations():
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and not operation.body:
                continue
            run(operation.as_strategy(generation_mode=mode), url)


def run(cases: Any, url: str) -> None:
    @seed(20261122)
    @settings(
        max_examples=8,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.large_base_example,
        ],
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=20)

    ask()
