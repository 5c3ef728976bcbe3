"""Tools on the wire: what the model is told and held to, and its calls as both APIs tell them."""

import asyncio
import json
from typing import Any

import pytest

from common.models.chat_template import ChatTemplate
from ops.bench.sse_client import Event
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import ScriptedWorker, Turn, saying
from tests.support.sse_events import events_of

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "WEATHER-WORDS",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
CLOCK: dict[str, Any] = {"name": "now"}
TOOLS = [{"type": "function", "function": it} for it in (WEATHER, CLOCK)]
FLAT_TOOLS = [{"type": "function"} | it for it in (WEATHER, CLOCK)]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
PIECES = [
    "Look", ".\n<tool", "_call>\n{", '"name": "get_weather", "argu', 'ments": {"ci', 'ty": "P',
    'aris"}}\n</tool', '_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
]  # fmt: skip
CALLS = [("get_weather", '{"city": "Paris"}'), ("now", "{}")]


def gathered(events: list[Event], choice: int = 0) -> tuple[str, list[dict[str, Any]], str]:
    """Text, calls and reason, as a client of the stream puts them together."""
    text, calls, reason = "", list[dict[str, Any]](), ""
    for event in events:
        if event.is_done:
            continue
        for shown in event.json["choices"]:
            if shown["index"] != choice:
                continue
            text += shown["delta"].get("content") or ""
            reason = shown["finish_reason"] or reason
            for call in shown["delta"].get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append(call)
                else:
                    function = calls[call["index"]]["function"]
                    function["arguments"] += call["function"]["arguments"]
    return text, calls, reason


def told(calls: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def test_calls_in_a_whole_answer(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying(*PIECES)):
        answer = await gateway.client.post("/v1/chat/completions", json=ASKED)
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Look.\n"
    assert told(choice["message"]["tool_calls"]) == CALLS
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2
    assert {call["type"] for call in choice["message"]["tool_calls"]} == {"function"}


async def test_calls_in_a_stream_and_from_any_place_in_it(stand: Stand) -> None:
    """The arguments come as they are made; ids are the same on another gateway."""
    worker = await stand.worker()
    gateways = [await stand.gateway() for _ in range(2)]
    async with worker.acting(saying(*PIECES)):
        events = await events_of(
            gateways[0].client, "POST", "/v1/chat/completions", ASKED | {"stream": True}
        )
    text, calls, reason = gathered(events)
    assert (text, told(calls), reason) == ("Look.\n", CALLS, "tool_calls")
    assert events[0].json["choices"][0]["delta"]["role"] == "assistant"
    parts = [
        call["function"]["arguments"]
        for event in events
        if not event.is_done
        for call in event.json["choices"][0]["delta"].get("tool_calls", [])
        if "id" not in call
    ]
    assert len(parts) >= 2
    stream_id = events[0].json["id"].removeprefix("chatcmpl-")
    for index, event in enumerate(events[:-1]):
        path = f"/v1/streams/{stream_id}?after={event.id}"
        again = await events_of(gateways[1].client, "GET", path)
        assert [it.data for it in again] == [it.data for it in events[index + 1 :]]


async def test_text_alone_ends_with_stop(stand: Stand) -> None:
    """What was held back because a call might begin comes with the end."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("a ", "<tool")):
        events = await events_of(
            gateway.client, "POST", "/v1/chat/completions", ASKED | {"stream": True}
        )
        whole = await gateway.client.post("/v1/chat/completions", json=ASKED)
    assert gathered(events) == ("a <tool", [], "stop")
    message = whole.json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "a <tool"}


async def test_a_call_cut_off_by_the_length_says_so(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying(*PIECES[:6], finish="length")):
        answer = await gateway.client.post("/v1/chat/completions", json=ASKED)
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert told(choice["message"]["tool_calls"]) == [("get_weather", '{"city": "P')]


async def test_each_choice_calls_for_itself(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()

    async def script(turn: Turn) -> None:
        await saying(*(PIECES if turn.id.endswith(".1") else ["Hello"]))(turn)

    body = ASKED | {"n": 2}
    async with worker.acting(script):
        events = await events_of(
            gateway.client, "POST", "/v1/chat/completions", body | {"stream": True}
        )
        whole = await gateway.client.post("/v1/chat/completions", json=body)
    assert gathered(events, 0) == ("Hello", [], "stop")
    text, calls, reason = gathered(events, 1)
    assert (text, told(calls), reason) == ("Look.\n", CALLS, "tool_calls")
    assert [choice["finish_reason"] for choice in whole.json()["choices"]] == ["stop", "tool_calls"]


async def asked(stand: Stand, worker: ScriptedWorker, body: dict[str, Any]) -> tuple[str, str]:
    """The prompt and the grammar that reach a worker."""
    gateway = await stand.gateway()
    asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=body))
    turn = await worker.take()
    await turn.end()
    assert (await asking).status_code == 200
    prompt = gateway.services.model.tokenizer.decode(
        [
            int.from_bytes(turn.spec.prompt[i : i + 4], "little")
            for i in range(0, len(turn.spec.prompt), 4)
        ]
    )
    grammar = turn.spec.sampling.grammar
    return prompt, grammar.value if grammar else ""


async def test_a_model_without_tools_in_its_template_is_told_in_words(stand: Stand) -> None:
    worker = await stand.worker()
    conversation = [
        {"role": "system", "content": "SYSTEM-WORDS"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": f"c{i}",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
                }
                for i, city in enumerate(["Paris", "Rome"])
            ],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "SUN"},
        {"role": "tool", "tool_call_id": "c1", "content": "RAIN"},
    ]
    prompt, grammar = await asked(stand, worker, ASKED | {"messages": conversation})
    for words in ("SYSTEM-WORDS", "WEATHER-WORDS", '{"name": "get_weather", "arguments": {"city":'):
        assert words in prompt
    assert prompt.index("SUN") < prompt.index("RAIN")
    assert "<tool_response>" in prompt
    assert '"city"' in grammar


HERMES = (
    "{% if tools %}{% for t in tools %}[{{ t | tojson }}]{% endfor %}{% endif %}"
    "{% for m in messages %}({{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}/{{ m.name }}{% endif %}){% endfor %}"
)


async def test_a_template_that_knows_tools_is_given_them(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(HERMES, {})
    monkeypatch.setattr(ChatTemplate, "load", lambda _path: template)
    worker = await stand.worker()
    function = {"name": "now", "arguments": '{"zone": 1}'}
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "NOON"},
    ]
    prompt, _ = await asked(stand, worker, ASKED | {"messages": conversation})
    assert prompt.startswith('[{"type": "function", "function": {"name": "get_weather"')
    assert prompt.endswith('(user:hi)(assistant:<tool_call>{"zone": 1})(tool:NOON/now)')


CHOICES: dict[str, tuple[Any, list[str], bool]] = {
    "none named": (None, ["get_weather", "now"], True),
    "auto": ("auto", ["get_weather", "now"], True),
    "required": ("required", ["get_weather", "now"], False),
    "a function": ({"type": "function", "function": {"name": "now"}}, ["now"], False),
    "TGI's bare name": ("now", ["now"], False),
    "some of them": (
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [TOOLS[1]]},
        },
        ["now"],
        True,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
async def test_the_choice(stand: Stand, name: str) -> None:
    choice, names, may_talk = CHOICES[name]
    _, grammar = await asked(stand, await stand.worker(), ASKED | {"tool_choice": choice})
    assert [tool for tool in ("get_weather", "now") if f'\\"{tool}\\"' in grammar] == names
    assert ("TEXT" in grammar) == may_talk


async def test_the_choice_of_none_is_no_tools_at_all(stand: Stand) -> None:
    prompt, grammar = await asked(stand, await stand.worker(), ASKED | {"tool_choice": "none"})
    assert "WEATHER-WORDS" not in prompt
    assert grammar == ""


def tool(**changed: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": WEATHER | changed}]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"tools": {}}, "tools"),
    "too many": ({"tools": TOOLS * 65}, "tools"),
    "a kind": ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    "no function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "no name": (tool(name=None), "tools[0].function.name"),
    "a name": (tool(name="a b"), "tools[0].function.name"),
    "twice": ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
    "a description": (tool(description=5), "tools[0].function.description"),
    "parameters": (tool(parameters=[]), "tools[0].function.parameters"),
    "of an array": (tool(parameters={"type": "array"}), "tools[0].function.parameters"),
    "unknown": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "a choice": ({"tool_choice": 5}, "tool_choice"),
    "a mode": (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "x", "tools": TOOLS},
            }
        },
        "tool_choice",
    ),
    "none to choose": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "and a regex": ({"guided_regex": "a+"}, "tools"),
    "a user's call": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}],
                }
            ]
        },
        "messages[0].tool_calls",
    ),
    "arguments": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "now", "arguments": "{"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_is_refused_by_name(stand: Stand, name: str) -> None:
    await stand.worker()
    gateway = await stand.gateway()
    changed, field = BAD[name]
    refused = await gateway.client.post("/v1/chat/completions", json=ASKED | changed)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == field


# Responses ---------------------------------------------------------------------------------------


async def test_calls_are_items_of_a_response(stand: Stand) -> None:
    """Numbers alike on every replay; and the conversation goes on with what the calls brought."""
    worker = await stand.worker()
    gateways = [await stand.gateway() for _ in range(2)]
    body = {"input": "hi", "tools": FLAT_TOOLS, "stream": True}
    async with worker.acting(saying(*PIECES)):
        events = await events_of(gateways[0].client, "POST", "/v1/responses", body)
    assert [event.json["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1].json["response"]
    assert [item["type"] for item in final["output"]] == [
        "message", "function_call", "function_call",
    ]  # fmt: skip
    calls = final["output"][1:]
    assert [(call["name"], call["arguments"]) for call in calls] == CALLS
    assert {call["status"] for call in calls} == {"completed"}
    done = [event.json for event in events if event.json["type"].endswith("arguments.done")]
    assert [(it["name"], it["arguments"]) for it in done] == CALLS
    assert [it["output_index"] for it in done] == [1, 2]
    for after in range(len(events) - 1):
        path = f"/v1/responses/{final['id']}?stream=true&starting_after={after}"
        again = await events_of(gateways[1].client, "GET", path)
        assert [event.json for event in again] == [event.json for event in events[after + 1 :]]
    ids = [event.id for event in events]
    for index in (i for i in range(1, len(ids) - 1) if ids[i] and ids[i] != ids[i - 1]):
        path = f"/v1/streams/{final['id'].removeprefix('resp_')}?after={ids[index]}"
        again = await events_of(gateways[1].client, "GET", path)
        assert [event.json for event in again] == [event.json for event in events[index + 1 :]]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": f"RESULT-{i}"}
        for i, call in enumerate(calls)
    ]
    follow = {"input": results, "previous_response_id": final["id"], "tools": FLAT_TOOLS}
    asking = asyncio.create_task(gateways[1].client.post("/v1/responses", json=follow))
    turn = await worker.take()
    await turn.end()
    assert (await asking).status_code == 200
    items = (
        await gateways[0].client.get(
            f"/v1/responses/{(await asking).json()['id']}/input_items?order=asc"
        )
    ).json()["data"]
    assert [item["type"] for item in items] == [
        "message", "message", "function_call", "function_call",
        "function_call_output", "function_call_output",
    ]  # fmt: skip


async def test_a_response_must_call_what_it_names(stand: Stand) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway()
    body = {
        "input": "hi",
        "tools": FLAT_TOOLS,
        "tool_choice": {"type": "function", "name": "now"},
        "parallel_tool_calls": False,
    }
    asking = asyncio.create_task(gateway.client.post("/v1/responses", json=body))
    turn = await worker.take()
    grammar = turn.spec.sampling.grammar
    assert grammar is not None
    assert "get_weather" not in grammar.value
    assert "TEXT" not in grammar.value
    await turn.end()
    shown = (await asking).json()
    assert shown["tool_choice"] == body["tool_choice"]
    assert shown["tools"] == FLAT_TOOLS
