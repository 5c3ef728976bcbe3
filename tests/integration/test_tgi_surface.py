"""TGI's surface on the wire: its routes, its validation rules in order, its nulls, its headers."""

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.support.gateway_app import RunningGateway, Stand
from tests.support.scripted_worker import saying

MAX_TOTAL = 100
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
UNSAMPLED = {"best_of": 2}
SAMPLED = {"best_of": 2, "do_sample": True}
TOO_LONG = "`inputs` tokens + `max_new_tokens` must be <= 100. "

RULES: list[tuple[int, dict[str, Any], str]] = [
    (0, {"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
    (1, UNSAMPLED, "you must use sampling when `best_of` is > 1"),
    (2, {"temperature": 0}, "`temperature` must be strictly positive"),
    (3, {"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    (4, {"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (5, {"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    (5, {"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    (6, {"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    (7, {"top_k": 0}, "`top_k` must be strictly positive"),
    (8, {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    (9, {"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    (10, {**SAMPLED, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    (11, {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (12, {"inputs": ""}, "`inputs` cannot be empty"),
    (13, {"truncate": 0}, "`truncate` must be strictly positive and less than 90. Given: 0"),
    (13, {"truncate": 91}, "`truncate` must be strictly positive and less than 90. Given: 91"),
    (
        15,
        {"max_new_tokens": 99},
        TOO_LONG + "Given: 2 `inputs` tokens and 99 `max_new_tokens`",
    ),
    (
        15,
        {"inputs": "a" * 101},
        TOO_LONG + "Given: 101 `inputs` tokens and 0 `max_new_tokens`",
    ),
    (16, {"inputs": "a" * 91}, "`inputs` must have less than 90 tokens. Given: 91"),
    (
        17,
        {"grammar": {"type": "json", "value": 7}},
        "grammar is not supported: a JSON schema is an object",
    ),
    (
        18,
        {"grammar": {"type": "json", "value": "{"}},
        "grammar is not valid: Input data was truncated",
    ),
]
"""Number in TGI's order of evaluation, what breaks it, what TGI says."""
TOKENIZER_FAILS = 14
"""This rule cannot be broken: what a tokenizer fails on is no JSON."""
STREAM_RULES: list[tuple[int, dict[str, Any], str]] = [
    (0, UNSAMPLED, "`best_of` != 1 is not supported when streaming tokens"),
    (0, {"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
    (
        0,
        {"decoder_input_details": True},
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
]
NOT_OF_STREAMS = [parameters for rule, parameters, _ in RULES if rule in (0, 1, 10)]


def generate_body(broken: dict[str, Any]) -> dict[str, Any]:
    """A body of ``/generate``: ``inputs`` stands outside, all else is a parameter."""
    parameters = {name: value for name, value in broken.items() if name != "inputs"}
    return {"inputs": broken.get("inputs", "hi"), "parameters": parameters}


async def told(client: httpx.AsyncClient, path: str, broken: dict[str, Any], **more: Any) -> Any:
    body: dict[str, Any] = generate_body(broken) | more
    answer = await client.post(path, json={"instances": [body]} if path == "/vertex" else body)
    return answer.status_code, answer.json()


def refused(message: str, code: str) -> tuple[int, dict[str, str]]:
    text = f"Input validation error: {message}"
    return 422, {"error": text, "error_type": "validation", "code": code}


def code_of(rule: int) -> str:
    return "CONTEXT_LENGTH_EXCEEDED" if rule in (15, 16) else "BAD_REQUEST"


async def small_gateway(stand: Stand, **settings: Any) -> RunningGateway:
    return await stand.gateway(max_total_tokens=MAX_TOTAL, max_input_tokens=90, **settings)


def test_no_rule_is_left_out() -> None:
    told = {rule for rule, _, _ in RULES + STREAM_RULES}
    assert told | {TOKENIZER_FAILS} == set(range(19))


@pytest.mark.parametrize("path", ["/generate", "/", "/invocations", "/vertex"])
async def test_each_rule_is_told_in_tgis_words(stand: Stand, path: str) -> None:
    gateway = await small_gateway(stand)
    for rule, broken, message in RULES:
        assert await told(gateway.client, path, broken) == refused(message, code_of(rule)), broken


@pytest.mark.parametrize(
    ("path", "more"),
    [("/generate_stream", {}), ("/", {"stream": True}), ("/invocations", {"stream": True})],
)
async def test_each_rule_of_a_stream_is_told_before_it_begins(
    stand: Stand, path: str, more: dict[str, Any]
) -> None:
    """With a real status code, where TGI says 200 and then sends an error."""
    gateway = await small_gateway(stand)
    rules = STREAM_RULES + [rule for rule in RULES if rule[1] not in NOT_OF_STREAMS]
    for rule, broken, message in rules:
        got = await told(gateway.client, path, broken, **more)
        assert got == refused(message, code_of(rule)), broken


async def test_rules_are_evaluated_in_tgis_order(stand: Stand) -> None:
    """Of two that are broken, the earlier one is told; ``best_of`` of 0 means 1."""
    gateway = await small_gateway(stand)
    alone = [rule for rule in RULES if rule[0] not in (0, 1, 10, 15, 16)]
    for first, second in pairwise(alone):
        if first[1].keys() & second[1].keys():
            continue
        got = await told(gateway.client, "/generate", second[1] | first[1] | {"best_of": 0})
        assert got == refused(first[2], code_of(first[0])), (first, second)


async def test_what_the_operator_allows_is_told(stand: Stand) -> None:
    gateway = await small_gateway(stand, max_best_of=1, disable_grammar_support=True)
    got = await told(gateway.client, "/generate", SAMPLED)
    assert got == refused("`best_of` != 1 is not allowed for this endpoint", "BAD_REQUEST")
    grammar = {"grammar": {"type": "regex", "value": "a+"}}
    got = await told(gateway.client, "/generate", grammar)
    assert got == refused("grammar is not supported", "BAD_REQUEST")
    constrained = CHAT | {"response_format": {"type": "json_object"}}
    answer = await gateway.client.post("/v1/chat/completions", json=constrained)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


async def test_a_prompt_that_no_tokenizer_takes_is_no_json(stand: Stand) -> None:
    gateway = await small_gateway(stand)
    for path in ("/generate", "/tokenize", "/invocations"):
        answer = await gateway.client.post(
            path,
            content=b'{"inputs": "\\ud800"}',
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("Failed to parse the request body as JSON")


async def test_what_all_apis_check_is_told_in_tgis_words_too(stand: Stand) -> None:
    gateway = await small_gateway(stand)
    for broken in (
        {"seed": -1}, {"seed": 2**64}, {"temperature": 1e9}, {"top_k": 2**31}, {"min_p": 2},
        {"presence_penalty": 3}, {"logit_bias": {"x": 1}}, {"stop": [""]}, {"adapter_id": "none"},
        {"stop_token_ids": [-1]}, {"best_of": -1}, {"min_new_tokens": -1},
    ):  # fmt: skip
        [name] = broken
        status, body = await told(gateway.client, "/generate", broken)
        assert status in (404, 422)
        assert body["error"].startswith("Input validation error: ")
        assert f"`{name}" in body["error"]
        assert body["error_type"] == "validation"


async def test_too_many_requests_at_once_are_429(stand: Stand) -> None:
    await stand.worker()
    gateway = await small_gateway(stand, max_concurrent_requests=1)
    body = generate_body({})
    async with gateway.client.stream("POST", "/generate_stream", json=body):
        over = await gateway.client.post("/generate", json=body)
        assert over.status_code == 429
        assert over.json()["error"].startswith("Model is overloaded")
        assert over.json()["error_type"] == "overloaded"
        assert int(over.headers["retry-after"]) >= 1
    two = await gateway.client.post("/generate", json=generate_body(SAMPLED))
    assert two.status_code == 429, "each answer of `best_of` counts"


# Routes ------------------------------------------------------------------------------------------


async def test_sagemaker_asks_in_three_languages(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a", "b")):
        answers = [
            await gateway.client.post("/invocations", json=body)
            for body in ({"inputs": "Say: "}, CHAT, {"prompt": "hi"})
        ]
        streamed = await gateway.client.post("/invocations", json={"inputs": "x", "stream": True})
        chunks = await gateway.client.post("/invocations", json=CHAT | {"stream": True})
    generated, chat, completion = (answer.json() for answer in answers)
    assert [item["generated_text"] for item in generated] == ["Say: ab"]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "ab"}
    assert completion["choices"][0]["text"] == "ab"
    assert '"generated_text":"xab"' in streamed.text
    assert "[DONE]" not in streamed.text
    assert chunks.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/invocations", {}, "SagemakerRequest"),
        ("/invocations", {"input": "hi"}, "SagemakerRequest"),
        ("/vertex", {"instances": [{"prompt": "hi"}]}, "VertexInstance"),
    ],
)
async def test_a_body_of_no_kind_is_told_what_it_lacks(
    stand: Stand, path: str, body: dict[str, Any], kind: str
) -> None:
    gateway = await stand.gateway()
    answer = await gateway.client.post(path, json=body)
    assert answer.status_code == 422
    assert f"did not match any variant of untagged enum {kind}" in answer.json()["error"]
    assert "`inputs`" in answer.json()["error"]


async def test_a_field_of_the_wrong_type_is_named_whatever_the_route(stand: Stand) -> None:
    gateway = await stand.gateway()
    for path, body, where in (
        ("/invocations", {"inputs": "hi", "parameters": {"top_k": "x"}}, "parameters.top_k"),
        ("/invocations", {"messages": 7}, "messages"),
        ("/vertex", {"instances": [{"inputs": 7}]}, "inputs"),
        ("/vertex", {"instances": 7}, "instances"),
        ("/chat_tokenize", {"messages": [{}]}, "messages"),
    ):
        answer = await gateway.client.post(path, json=body)
        assert answer.status_code == 422
        assert where in answer.json()["error"]


async def test_vertex_answers_all_its_instances_in_order(stand: Stand) -> None:
    """With all their parameters, of which TGI takes two."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    instances = [
        {"inputs": "one", "parameters": {"max_new_tokens": 5, "return_full_text": True}},
        CHAT | {"max_tokens": 7, "temperature": 0, "stream": True},
    ]
    seen: list[tuple[int, bool]] = []

    async def script(turn: Any) -> None:
        seen.append((turn.spec.sampling.max_new_tokens, turn.spec.sampling.do_sample))
        await turn.say(f"<{turn.spec.sampling.max_new_tokens}>", finish="length")

    async with worker.acting(script):
        answer = await gateway.client.post("/vertex", json={"instances": instances})
    assert answer.json() == {"predictions": ["one<5>", "<7>"]}
    assert sorted(seen) == [(5, False), (7, False)]
    empty = await gateway.client.post("/vertex", json={"instances": []})
    assert (empty.status_code, empty.json()["error_type"]) == (422, "validation")
    many = [{"inputs": "hi"}] * 33
    assert (await gateway.client.post("/vertex", json={"instances": many})).status_code == 422


async def test_a_conversation_is_shown_as_text_and_tokens(stand: Stand) -> None:
    gateway = await stand.gateway()
    body = CHAT | {"max_tokens": None, "stream": True}
    answer = (await gateway.client.post("/chat_tokenize", json=body)).json()
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.keys() == {"tokenize_response", "templated_text"}
    assert answer["templated_text"] == text
    tokens = answer["tokenize_response"]
    assert tokens[0] == {"id": 257, "text": "<|im_start|>", "start": 0, "stop": 12}
    assert "".join(token["text"] for token in tokens) == text
    empty = await gateway.client.post("/chat_tokenize", json={"messages": []})
    assert (empty.status_code, empty.json()["error_type"]) == (422, "validation")


async def test_tokenize_keeps_the_last_tokens_as_generate_does(stand: Stand) -> None:
    gateway = await stand.gateway()
    body = {"inputs": "abcdef", "parameters": {"truncate": 2}}
    tokens = (await gateway.client.post("/tokenize", json=body)).json()
    assert [token["text"] for token in tokens] == ["e", "f"]
    assert (await gateway.client.post("/tokenize", json={"inputs": ""})).json() == []


async def test_a_long_text_is_tokenized_whole(stand: Stand) -> None:
    gateway = await stand.gateway()
    tokens = (await gateway.client.post("/tokenize", json={"inputs": "ab" * 10_000})).json()
    assert len(tokens) == 20_000
    assert tokens[-1] == {"id": 98, "text": "b", "start": 19_999, "stop": 20_000}


async def test_a_ping_is_answered_once_there_is_somebody_to_work(stand: Stand) -> None:
    """TGI's port is closed until its model is loaded, and SageMaker waits for that."""
    gateway = await stand.gateway()
    early = await gateway.client.get("/ping")
    assert (early.status_code, early.json()["error"]) == (503, "unhealthy")
    assert early.json()["error_type"] == "healthcheck"
    await stand.worker()
    ready = await gateway.client.get("/ping")
    assert (ready.status_code, ready.content) == (200, b"")


async def test_kserve_is_told_as_its_protocol_says(stand: Stand) -> None:
    gateway = await stand.gateway()
    live = await gateway.client.get("/v2/health/live")
    assert (live.status_code, live.json()) == (200, {"live": True})
    early = await gateway.client.get("/v2/health/ready")
    assert (early.status_code, early.json()["ready"]) == (503, False)
    await stand.worker()
    ready = await gateway.client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True})


async def test_a_platform_may_choose_the_routes(stand: Stand) -> None:
    """As Vertex AI does; they are those of ours in all they do, whatever they look like."""
    predict, health = "/v1/endpoints/7:predict", "/v1/endpoints/7"
    gateway = await stand.gateway(predict_route=predict, health_route=health, api_key="secret")
    assert (await gateway.client.get(health)).status_code == 503
    worker = await stand.worker()
    assert (await gateway.client.get(health)).status_code == 200
    body = {"instances": [{"inputs": "hi"}]}
    assert (await gateway.client.post(predict, json=body)).status_code == 401
    key = {"authorization": "Bearer secret"}
    async with worker.acting(saying("a", "b")):
        answer = await gateway.client.post(predict, json=body, headers=key)
    assert answer.json() == {"predictions": ["ab"]}
    refused = await gateway.client.post(predict, json={"instances": []}, headers=key)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert (await gateway.client.get(predict, headers=key)).status_code == 404


# Shapes ------------------------------------------------------------------------------------------


async def test_fields_are_null_or_absent_as_in_tgi(stand: Stand) -> None:
    """``details`` when asked for; ``top_tokens`` and ``best_of_sequences`` when filled."""
    worker = await stand.worker()
    gateway = await stand.gateway()

    async def keys(**parameters: Any) -> tuple[set[str], set[str]]:
        body = generate_body(parameters)
        answer = (await gateway.client.post("/generate", json=body)).json()
        return set(answer) - {"headrace"}, set(answer.get("details", {}))

    plain = {"finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    async with worker.acting(saying("a")):
        assert await keys() == ({"generated_text"}, set())
        assert await keys(details=True) == ({"generated_text", "details"}, plain)
        assert (await keys(decoder_input_details=True))[1] == plain
        assert (await keys(details=True, **SAMPLED))[1] == plain | {"best_of_sequences"}
        streamed = await gateway.client.post("/generate_stream", json=generate_body({}))
    first, *_, last = (
        json.loads(line.removeprefix("data: "))
        for line in streamed.text.splitlines()
        if line.startswith("data: ")
    )
    assert set(first) == {"index", "token", "generated_text", "details"}
    assert first["index"] == 1
    assert (first["generated_text"], first["details"]) == (None, None)
    assert set(first["token"]) == {"id", "text", "logprob", "special"}
    assert (last["generated_text"], last["details"]) == ("a", None)


COMPUTE = {"x-compute-type", "x-compute-characters"}
TIMINGS = {
    "x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time",
    "x-time-per-token", "x-prompt-tokens", "x-generated-tokens",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "characters"),
    [
        ("/generate", {"inputs": "hé"}, 2),
        ("/", {"inputs": "hi"}, 2),
        ("/v1/chat/completions", CHAT, 52),
        ("/v1/completions", {"prompt": ["hi", "you"]}, 5),
        ("/v1/completions", {"prompt": [104, 105]}, 0),
        ("/vertex", {"instances": [{"inputs": "hi"}]}, 2),
    ],
)
async def test_the_headers_of_a_whole_answer(
    stand: Stand, path: str, body: dict[str, Any], characters: int
) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a")):
        answer = await gateway.client.post(path, json=body)
    assert answer.status_code == 200
    assert set(answer.headers) >= COMPUTE | TIMINGS
    assert answer.headers["x-compute-characters"] == str(characters)
    whole = TIMINGS - {"x-compute-time"}
    assert all(answer.headers[name].isdigit() for name in whole)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate_stream", {"inputs": "hi"}),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/completions", {"prompt": "hi", "stream": True}),
    ],
)
async def test_the_headers_of_a_stream(stand: Stand, path: str, body: dict[str, Any]) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a")):
        answer = await gateway.client.post(path, json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "no-cache" in answer.headers["cache-control"]
    assert set(answer.headers) >= COMPUTE
    assert not set(answer.headers) & TIMINGS
