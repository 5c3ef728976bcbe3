"""Clients ask a gateway for answers of a shape; a worker with the real model keeps to it."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from common.models.store import DEFAULT_MODEL
from tests.support.models import smollm2_data_dir
from tests.support.processes import Processes

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 1000},
        "food": {"type": "array", "items": {"enum": ["grass", "meat", "Grütze"]}, "maxItems": 3},
    },
    "required": ["animal", "legs", "food"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "feed", "parameters": SCHEMA}}]
ONE_CALL: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
BOMB = {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{n}}}$"} for n in range(8, 30)]}


@pytest.mark.timeout(300)
async def test_answers_have_the_shape_that_clients_ask_for(started: Processes) -> None:
    """On both kinds of routes; and what no worker can follow is refused with its reason."""
    common: dict[str, Any] = {"data_dir": smollm2_data_dir(), "model": DEFAULT_MODEL}
    worker = started.worker(**common, engine="torch", max_batch_size=8, lease_ms=5000)
    gateway = await started.gateway(**common).ready()
    await worker.saw("worker.ready", within_s=120)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=120) as client:
        answers = await asyncio.gather(
            chat(client, response_format=formatted(SCHEMA), seed=1, temperature=1.5),
            generate(client, {"type": "json", "value": SCHEMA}),
            generate(client, {"type": "regex", "value": "[0-9]{2,4} (legs|Füße)"}),
            chat(client, guided_grammar='root ::= "yes" | "no, " [a-z]{3,5}'),
            chat(client, response_format=formatted(BOMB)),
            generate(client, {"type": "regex", "value": "(unclosed"}),
            chat(client, **ONE_CALL, tool_choice="required", seed=3, temperature=1.5),
            chat(client, **ONE_CALL, messages=[{"role": "user", "content": "Feed a cow."}]),
        )
    of_schema, tgi_json, tgi_regex, of_ebnf, bomb, bad, must_call, may_call = answers
    for text in (content(of_schema), tgi_json.json()["generated_text"]):
        Draft202012Validator(SCHEMA).validate(json.loads(text))
    assert re.fullmatch("[0-9]{2,4} (legs|Füße)", tgi_regex.json()["generated_text"])
    assert re.fullmatch("yes|no, [a-z]{3,5}", content(of_ebnf))
    for answer in (must_call, may_call):
        (choice,) = answer.json()["choices"]
        has_called = choice["finish_reason"] == "tool_calls"  # and is not cut off in the middle
        assert has_called or answer is may_call
        for call in choice["message"]["tool_calls"] if has_called else []:
            assert call["function"]["name"] == "feed"
            Draft202012Validator(SCHEMA).validate(json.loads(call["function"]["arguments"]))
    assert bomb.status_code == 400
    assert bomb.json()["error"]["code"] == "grammar_rejected"
    assert bad.status_code == 422
    assert "grammar is not valid: unclosed group" in bad.json()["error"]


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


async def chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Describe a cow."}],
        "max_tokens": 150,
    }
    return await client.post("/v1/chat/completions", json=body | fields)


async def generate(client: httpx.AsyncClient, grammar: dict[str, Any]) -> httpx.Response:
    parameters = {"max_new_tokens": 150, "grammar": grammar}
    return await client.post("/generate", json={"inputs": "A cow has", "parameters": parameters})


def content(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]
