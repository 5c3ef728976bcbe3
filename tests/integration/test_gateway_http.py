"""The HTTP surface: whole answers, refusals with real status codes, headers, health and figures."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.models.adapters import AdapterStore
from common.tracing import parse_parent
from tests.support.adapters import write_adapter
from tests.support.expositions import complaints, figures_in
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import EOS, saying
from tests.support.waiting import wait_until

GENERATE = {"inputs": "hi", "parameters": {"details": True, "seed": 7, "temperature": 0.5}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "service_tier": "priority"}


async def ask(stand: Stand, path: str, body: Any, *texts: str, **say: Any) -> httpx.Response:
    """Send a request and have the worker answer it with ``texts``."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = asyncio.create_task(gateway.client.post(path, json=body))
    turn = await worker.take()
    await turn.say(*texts, **say)
    if not say.get("finish"):
        await turn.end()
    return await asking


# Whole answers -----------------------------------------------------------------------------------


async def test_generate_answers_with_details_and_timings(stand: Stand) -> None:
    answer = await ask(stand, "/generate", GENERATE, "Hel", "lo\u2028")
    assert answer.status_code == 200
    body = answer.json()
    assert body["generated_text"] == "Hello\u2028"
    assert body["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 3,
        "seed": 7,
        "prefill": [],
        "tokens": [
            {"id": 65, "text": "Hel", "logprob": -0.5, "special": False},
            {"id": 66, "text": "lo\u2028", "logprob": -0.5, "special": False},
            {"id": EOS, "text": "<|im_end|>", "logprob": -0.5, "special": True},
        ],
    }
    assert body["headrace"]["model_version"] == stand.version
    assert answer.headers["x-prompt-tokens"] == "2"
    assert answer.headers["x-generated-tokens"] == "3"
    assert answer.headers["x-compute-characters"] == "2"
    for name in ("total", "validation", "queue", "inference"):
        assert answer.headers[f"x-{name}-time"].isdigit()
    assert answer.headers["x-time-per-token"].isdigit()
    assert float(answer.headers["x-compute-time"]) > 0
    assert answer.headers["x-compute-type"]


async def test_a_greedy_answer_names_no_seed(stand: Stand) -> None:
    body = {"inputs": "hi", "parameters": {"details": True}}
    answer = await ask(stand, "/generate", body, "a")
    assert answer.json()["details"]["seed"] is None


async def test_the_hub_route_answers_with_a_list_and_the_prompt(stand: Stand) -> None:
    answer = await ask(stand, "/", {"inputs": "Say: "}, "hi")
    assert [item["generated_text"] for item in answer.json()] == ["Say: hi"]
    assert "details" not in answer.json()[0]


async def test_the_hub_route_streams_when_told_to(stand: Stand) -> None:
    body = {"inputs": "Say: ", "stream": True, "parameters": {"return_full_text": False}}
    answer = await ask(stand, "/", body, "hi", finish="length")
    assert answer.headers["content-type"] == "text/event-stream"
    assert '"generated_text":"hi"' in answer.text


async def test_a_chat_answer(stand: Stand) -> None:
    answer = await ask(stand, "/v1/chat/completions", CHAT, "Hel", "lo")
    body = answer.json()
    assert body["id"] == f"chatcmpl-{answer.headers['x-headrace-stream-id']}"
    assert body["object"] == "chat.completion"
    assert body["model"] == "simulated"
    assert body["system_fingerprint"] == stand.version
    assert body["service_tier"] == "priority"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert body["headrace"]["attempts"] == 1


async def test_a_completion(stand: Stand) -> None:
    answer = await ask(stand, "/v1/completions", {"prompt": "hi"}, "a", "b", finish="length")
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/generate", {"inputs": "hi"}, 424, "ENGINE_ERROR"),
        ("/v1/completions", {"prompt": "hi"}, 500, "engine_error"),
    ],
)
async def test_a_failed_generation_is_a_status_code_where_nothing_was_sent(
    stand: Stand, path: str, body: Any, status: int, code: str
) -> None:
    answer = await ask(stand, path, body, finish="failed", code="ENGINE_ERROR")
    assert answer.status_code == status
    told = answer.json()
    assert (told.get("code") or told["error"]["code"]) == code
    assert answer.headers["x-headrace-stream-id"]


async def test_a_lane_is_the_tier_that_was_asked_for(stand: Stand) -> None:
    gateway = await stand.gateway()
    worker = await stand.worker()
    flex = {"prompt": "later", "service_tier": "flex"}
    first = {"prompt": "sooner", "service_tier": "priority"}
    async with asyncio.TaskGroup() as asking:
        asking.create_task(gateway.client.post("/v1/completions", json=flex))
        await wait_until(lambda: gateway.services.relay.num_streams == 1)
        asking.create_task(gateway.client.post("/v1/completions", json=first))

        async def both_wait() -> bool:
            return sum((await stand.broker.state()).waiting.values()) == 2

        await wait_until(both_wait)
        turns = [await worker.take(), await worker.take()]
        assert [len(turn.spec.prompt) // 4 for turn in turns] == [len("sooner"), len("later")]
        for turn in turns:
            await turn.end()


# Refusals ----------------------------------------------------------------------------------------


async def test_a_stream_that_cannot_be_is_refused_before_it_begins(stand: Stand) -> None:
    gateway = await stand.gateway()
    body = {"inputs": "hi", "parameters": {"top_k": 0}}
    refused = await gateway.client.post("/generate_stream", json=body)
    assert refused.status_code == 422
    assert refused.json() == {
        "error": "Input validation error: `top_k` must be strictly positive",
        "error_type": "validation",
        "code": "BAD_REQUEST",
    }


async def test_no_workers_is_503_and_passes(stand: Stand) -> None:
    gateway = await stand.gateway()
    refused = await gateway.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "no_workers"
    assert refused.json()["error"]["type"] == "server_error"
    assert refused.headers["x-should-retry"] == "true"
    assert int(refused.headers["retry-after"]) >= 1
    assert gateway.services.relay.num_streams == 0


async def test_a_full_queue_is_429_with_the_time_to_come_back(stand: Stand) -> None:
    await stand.worker()
    gateway = await stand.gateway(lane_cap_tokens=300)
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 200}}
    async with gateway.client.stream("POST", "/generate_stream", json=body):
        refused = await gateway.client.post("/generate_stream", json=body)
        assert refused.status_code == 429
        assert refused.json()["error_type"] == "overloaded"
        assert refused.headers["x-should-retry"] == "true"
        wait_ms = int(refused.headers["retry-after-ms"])
        assert int(refused.headers["retry-after"]) * 1000 >= wait_ms >= 1000
        openai = await gateway.client.post("/v1/completions", json={"prompt": "hi"})
        assert openai.status_code == 429
        assert openai.json()["error"]["type"] == "rate_limit_error"
        assert openai.json()["error_type"] == "overloaded"


async def test_what_no_worker_could_take_is_refused(stand: Stand) -> None:
    await stand.worker(max_cost=50)
    gateway = await stand.gateway()
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 60}}
    refused = await gateway.client.post("/generate", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "CONTEXT_LENGTH_EXCEEDED")


@pytest.mark.parametrize(
    ("request_kwargs", "status"),
    [
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b'{"inputs": 1}', "headers": {"content-type": "application/json"}}, 422),
        ({"json": {"inputs": "a" * 3000}}, 413),
    ],
)
async def test_bad_bodies_are_refused_in_json(
    stand: Stand, request_kwargs: dict[str, Any], status: int
) -> None:
    gateway = await stand.gateway(payload_limit=2000)
    refused = await gateway.client.post("/generate", **request_kwargs)
    assert refused.status_code == status
    assert refused.json()["error_type"] == "validation"
    assert refused.headers["x-request-id"]


async def test_a_body_without_a_length_is_limited_as_it_comes(stand: Stand) -> None:
    gateway = await stand.gateway(payload_limit=2000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"a" * 1000

    refused = await gateway.client.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


async def test_unknown_paths_and_methods_are_json_of_their_wire(stand: Stand) -> None:
    gateway = await stand.gateway()
    missing = await gateway.client.get("/nowhere")
    assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")
    missing = await gateway.client.get("/v1/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await gateway.client.get("/generate")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert "POST" in wrong.headers["allow"]


async def test_a_draining_gateway_refuses_what_is_new_and_says_where_to_go(stand: Stand) -> None:
    await stand.worker()
    gateway = await stand.gateway()
    gateway.services.is_draining = True
    refused = await gateway.client.post("/generate", json=GENERATE)
    assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
    assert refused.headers["connection"] == "close"
    assert refused.headers["x-should-retry"] == "true"


async def test_an_error_of_our_own_is_json_and_does_not_name_its_cause(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await stand.gateway()

    def explode(*_: object) -> None:
        raise ZeroDivisionError("the prompt was hi")

    monkeypatch.setattr("gateway.api.tgi._check_parameters", explode)
    refused = await gateway.client.post("/generate", json=GENERATE)
    assert refused.status_code == 500
    assert refused.json()["code"] == "INTERNAL"
    assert "prompt was" not in refused.text
    assert refused.headers["x-request-id"]


# Headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({"x-request-id": "req-1"}, "req-1"),
        ({"x-amzn-trace-id": "Root=1-67891233"}, "Root=1-67891233"),
        ({"x-request-id": "req-1", "x-amzn-trace-id": "t"}, "req-1"),
        ({"x-request-id": "no spaces"}, None),
        ({"x-request-id": "x" * 201}, None),
        ({}, None),
    ],
)
async def test_every_answer_carries_the_request_id(
    stand: Stand, sent: dict[str, str], expected: str | None
) -> None:
    gateway = await stand.gateway()
    for path in ("/health", "/nowhere", "/v1/models"):
        answer = await gateway.client.get(path, headers=sent)
        got = answer.headers["x-request-id"]
        assert got == expected if expected else re.fullmatch("[0-9a-f]{32}", got)
        assert answer.headers["x-model-version"] == stand.version
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("sent", "trace_id"),
    [
        ({"traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01"}, "a1" * 16),
        ({"x-amzn-trace-id": f"Self=1-2-3;Root=1-{'c' * 8}-{'d' * 24}"}, "c" * 8 + "d" * 24),
        ({"traceparent": f"00-{'0' * 32}-{'b2' * 8}-01"}, None),
        ({"traceparent": "mine"}, None),
        ({}, None),
    ],
    ids=["of the caller", "of Amazon", "of zeros", "not one", "none"],
)
async def test_the_trace_of_the_caller_reaches_the_worker(
    stand: Stand, sent: dict[str, str], trace_id: str | None
) -> None:
    """A trace that the caller began goes on; else a new one begins. The answer names it."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    asking = asyncio.create_task(gateway.client.post("/generate", json=GENERATE, headers=sent))
    turn = await worker.take()
    trace = parse_parent(turn.spec.trace)
    await turn.end()
    answer = await asking
    assert trace is not None
    assert trace_id in (None, trace.trace_id)
    assert trace.span_id != "b2" * 8
    told = parse_parent(answer.headers["traceresponse"])
    assert told is not None
    assert told.trace_id == trace.trace_id


async def test_browsers_of_named_origins_may_call(stand: Stand) -> None:
    gateway = await stand.gateway(cors_allow_origin=("https://app.example",))
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, last-event-id",
    }
    allowed = await gateway.client.options("/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    refused = await gateway.client.options(
        "/v1/chat/completions", headers=asked | {"origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in refused.headers
    answer = await gateway.client.get("/health", headers={"origin": "https://app.example"})
    assert "x-headrace-stream-id" in answer.headers["access-control-expose-headers"]


# What the gateway says of itself -----------------------------------------------------------------


async def test_health_is_life_and_ready_is_a_worker_that_makes_progress(stand: Stand) -> None:
    gateway = await stand.gateway()
    alive = await gateway.client.get("/health")
    assert (alive.status_code, alive.content) == (200, b"")
    waiting = await gateway.client.get("/ready")
    assert (waiting.status_code, waiting.json()["reason"]) == (503, "no worker is alive")
    worker = await stand.worker()
    await worker.beat(state="loading")
    loading = await gateway.client.get("/ready")
    assert loading.status_code == 503
    assert "loading" in loading.json()["reason"]
    await worker.beat()
    ready = await gateway.client.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "workers": 1, "model_version": stand.version}
    gateway.services.is_draining = True
    assert (await gateway.client.get("/ready")).status_code == 503
    assert (await gateway.client.get("/health")).status_code == 200


async def test_the_root_is_a_page_for_browsers_and_health_for_all_others(stand: Stand) -> None:
    gateway = await stand.gateway()
    plain = await gateway.client.get("/")
    assert (plain.status_code, plain.content) == (200, b"")
    browser = await gateway.client.get("/", headers={"accept": "text/html,*/*"})
    assert (browser.status_code, browser.headers["location"]) == (307, "/ui/")
    for path in ("/ui/", "/ops/"):
        page = await gateway.client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    bare = await gateway.client.get("/ops")
    assert (bare.status_code, httpx.URL(bare.headers["location"]).path) == (307, "/ops/")


async def test_models(stand: Stand) -> None:
    gateway = await stand.gateway()
    listed = (await gateway.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("simulated", "model", "simulated")
    assert (await gateway.client.get("/v1/models/simulated")).json() == model
    missing = await gateway.client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_adapters_are_models_with_a_parent(stand: Stand, tmp_path: Path) -> None:
    gateway = await stand.gateway()
    store = AdapterStore(tmp_path / "adapters", "simulated")
    added = store.add(str(write_adapter(tmp_path / "made")), "polite")
    services = gateway.services
    services.model = replace(services.model, adapters=store)
    listed = (await gateway.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["simulated", "polite"]
    assert listed[1]["parent"] == "simulated"
    assert listed[1]["adapter_version"] == added.version
    assert (await gateway.client.get("/v1/models/polite")).json() == listed[1]


async def test_info_has_the_fields_of_tgi(stand: Stand) -> None:
    gateway = await stand.gateway(max_total_tokens=1000)
    told = (await gateway.client.get("/info")).json()
    assert told["model_id"] == "simulated"
    assert told["max_total_tokens"] == 1000
    assert told["max_input_tokens"] == 999
    assert told["max_stop_sequences"] == 4
    assert told["max_best_of"] == 2
    assert told["max_top_n_tokens"] == 5
    assert {
        "model_sha", "model_pipeline_tag", "max_concurrent_requests", "validation_workers",
        "max_client_batch_size", "router", "version", "sha", "docker_label",
    } <= told.keys()  # fmt: skip


async def test_tokenize_counts_bytes(stand: Stand) -> None:
    gateway = await stand.gateway()
    tokens = (await gateway.client.post("/tokenize", json={"inputs": "hé"})).json()
    assert tokens[0] == {"id": 104, "text": "h", "start": 0, "stop": 1}
    assert (tokens[-1]["start"], tokens[-1]["stop"]) == (1, 3)


async def test_metrics_say_what_happened(stand: Stand) -> None:
    gateway = await stand.gateway()
    await gateway.client.post("/generate", json=GENERATE)  # no worker yet
    worker = await stand.worker()
    async with worker.acting(saying("a", "b")):
        await gateway.client.post("/generate_stream", json=GENERATE)
        await gateway.client.post("/v1/chat/completions", json=CHAT)
    scraped = await gateway.client.get("/metrics")
    assert scraped.headers["content-type"].startswith("text/plain; version=0.0.4")
    figures = figures_in(scraped.text)
    seen = {"model": "simulated", "model_version": stand.version, "tenant_class": "anonymous"}
    requests = partial(figures.total, "headrace_requests_total")
    assert requests(api="tgi", code="NO_WORKERS", outcome="rejected") == 1
    assert requests(api="tgi", code="ok", outcome="ok", lane="default", **seen) == 1
    assert requests(api="chat", code="ok", outcome="ok", lane="priority", **seen) == 1
    assert figures.get("headrace_time_to_first_token_seconds_count") == 2
    assert figures.get("headrace_request_duration_seconds_count", api="chat") == 1
    assert figures.get("headrace_queue_time_seconds_count", lane="priority") == 1
    assert figures.get("headrace_tokens_total", kind="generated") == 6
    for phase in ("validate", "queue", "prefill", "decode", "relay"):
        assert figures.get("headrace_request_phase_seconds_count", phase=phase) == 2
    assert figures.get("headrace_stream_subscribers") == 0
    assert figures.total("headrace_model_info", model="simulated", model_version=stand.version) == 1
    assert figures.get("tgi_request_count") == 3
    assert figures.get("tgi_request_success") == 2
    assert figures.get("tgi_request_failure", err="overloaded") == 1
    assert figures.get("tgi_request_generated_tokens_sum") == 6
    assert figures.get("tgi_request_queue_duration_count") == 2
    assert figures.get("vllm:admission_rejections_total") == 1
    assert complaints(scraped.text) == []
    assert "headrace_relay_lag_seconds_count" in scraped.text
    assert "headrace_queue_depth" not in scraped.text, "figures of the pool are the exporter's"


async def test_no_request_can_make_a_series(stand: Stand) -> None:
    gateway = await stand.gateway()
    before = (await gateway.client.get("/metrics")).text.count("\n")
    for index in range(5):
        await gateway.client.get(f"/made-up-{index}")
        await gateway.client.post("/v1/completions", json={"prompt": "x", "model": f"m{index}"})
        await gateway.client.get(f"/v1/streams/{index:032x}")
    after = (await gateway.client.get("/metrics")).text.count("\n")
    assert after - before < 30
