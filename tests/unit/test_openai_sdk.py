"""Every parameter that OpenAI's own client knows: it has its effect, or it is refused by name.

The lists are walked as the installed client has them, so what a new version of it adds fails here
until somebody has decided about it.
"""

import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
from openai.types import completion_create_params, responses
from openai.types.chat import (
    ChatCompletionContentPartParam,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolUnionParam,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)
from openai.types.responses import input_token_count_params, response_create_params
from typing_extensions import is_typeddict

from common.failures import Failure
from common.models.adapters import AdapterStore
from gateway.api import responses as responses_api
from gateway.order import Order
from gateway.services import Services
from tests.support.adapters import write_adapter
from tests.support.gateway_bodies import complete, converse, parsing_services

TOOL: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOLS = {"tools": [{"type": "function", "function": TOOL}]}
FLAT_TOOLS = {"tools": [{"type": "function"} | TOOL]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
FLAT_SCHEMA = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
ADAPTER = "tuned"
MAX_TOTAL = 1000
"""Of the model: tools have to be told."""
HINTS = {
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "user": "u",
}
"""Whose request it is, and how its prompt may be kept: no answer hangs on them."""

Ask = Callable[..., Awaitable[Order]]


@dataclass(frozen=True)
class Api:
    """What is decided about the parameters of one method."""

    types: tuple[Any, ...]
    """Where the client lists them."""
    supported: dict[str, Any]
    """With a value that changes what is asked for."""
    refused: dict[str, Any]
    """With a value that is refused."""
    hints: dict[str, Any]
    """With a value that changes nothing, as it should."""
    beside: dict[str, dict[str, Any]]
    """What some need beside them."""

    @property
    def parameters(self) -> set[str]:
        return {name for each in self.types for name in typing.get_type_hints(each)}


SAMPLING: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"65": 1},
    "max_tokens": 5,
    "model": ADAPTER,
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 2,
    "stop": "x",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
}
CHAT = Api(
    types=(
        chat_params.CompletionCreateParamsNonStreaming,
        chat_params.CompletionCreateParamsStreaming,
    ),
    supported=SAMPLING
    | TOOLS
    | {
        "logprobs": True,
        "max_completion_tokens": 5,
        "messages": [{"role": "user", "content": "other"}],
        "parallel_tool_calls": False,
        "response_format": SCHEMA,
        "service_tier": "flex",
        "tool_choice": "required",
        "top_logprobs": 2,
    },
    refused={
        "audio": {"format": "mp3", "voice": "alloy"},
        "function_call": "auto",
        "functions": [TOOL],
        "modalities": ["text", "audio"],
        "moderation": {"model": "m"},
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "high",
        "store": True,
        "verbosity": "high",
        "web_search_options": {},
    },
    hints=HINTS | {"metadata": {"k": "v"}},
    beside={
        "top_logprobs": {"logprobs": True},
        "parallel_tool_calls": TOOLS,
        "tool_choice": TOOLS,
    },
)
COMPLETIONS = Api(
    types=(
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    supported=SAMPLING | {"best_of": 2, "echo": True, "logprobs": 1, "prompt": "other"},
    refused={"suffix": "x"},
    hints={"user": "u"},
    beside={},
)
RESPONSES = Api(
    types=(
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ),
    supported=FLAT_TOOLS
    | {
        "background": True,
        "include": ["message.output_text.logprobs"],
        "input": "other",
        "instructions": "Be brief.",
        "max_output_tokens": 5,
        "metadata": {"k": "v"},
        "model": ADAPTER,
        "parallel_tool_calls": False,
        "service_tier": "flex",
        "store": False,
        "stream": True,
        "temperature": 0.5,
        "text": FLAT_SCHEMA,
        "tool_choice": "required",
        "top_logprobs": 2,
        "top_p": 0.5,
    },
    refused={
        "access_programs": {"x": "y"},
        "background_options": {"completion_window": "2h"},
        "context_management": [{"type": "compaction"}],
        "conversation": "conv_1",
        "moderation": {"model": "m"},
        "previous_response_id": "resp_unknown",
        "prompt": {"id": "p"},
        "reasoning": {"effort": "high"},
        "stream_options": {"include_obfuscation": True},
        "truncation": "auto",
    },
    hints=HINTS
    | {
        "image": {"context_compression": "auto"},  # there are no images
        "max_tool_calls": 1,  # of tools that run in the server
    },
    beside={"parallel_tool_calls": FLAT_TOOLS, "tool_choice": FLAT_TOOLS},
)
APIS = {"chat": CHAT, "completions": COMPLETIONS, "responses": RESPONSES}
NO_OTHER_FIELD = {"personality"}
"""Known to ``responses.input_tokens.count`` alone, and refused."""


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    folder = tmp_path_factory.mktemp("data")
    adapters = AdapterStore(folder / "adapters", "m")
    adapters.add(str(write_adapter(folder / "made")), ADAPTER)
    parts: Any = parsing_services(folder, adapters)
    parts.model = replace(parts.model, max_total_tokens=MAX_TOTAL)
    parts.max_input_tokens = MAX_TOTAL - 1
    return parts


async def respond(services: Services, **fields: Any) -> Order:
    body = msgspec.convert({"input": "hi"} | fields, responses_api.ResponseBody)
    broker: Any = _Nothing()
    return await responses_api.order_of(services, broker, "a", body)


class _Nothing:
    """A broker that has no response."""

    async def read_document(self, _: str) -> None:
        return None


ASK: dict[str, Ask] = {"chat": converse, "completions": complete, "responses": respond}


@pytest.mark.parametrize("name", APIS)
def test_each_parameter_is_decided_about(name: str) -> None:
    api = APIS[name]
    decided = [*api.supported, *api.refused, *api.hints]
    assert sorted(decided) == sorted(api.parameters)


def test_counting_takes_what_answering_takes() -> None:
    told = set(typing.get_type_hints(input_token_count_params.InputTokenCountParams))
    assert told - RESPONSES.parameters == NO_OTHER_FIELD
    assert {field.name for field in msgspec.structs.fields(
        responses_api.ResponseBody
    )} >= NO_OTHER_FIELD  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, it) for name, api in APIS.items() for it in api.supported]
)
async def test_what_is_supported_changes_what_is_asked_for(
    services: Services, name: str, parameter: str
) -> None:
    api = APIS[name]
    beside = {"seed": 1} | api.beside.get(parameter, {})
    plain = await ASK[name](services, **beside)
    changed = await ASK[name](services, **beside | {parameter: api.supported[parameter]})
    assert changed != plain


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, it) for name, api in APIS.items() for it in api.hints]
)
async def test_a_hint_changes_nothing(services: Services, name: str, parameter: str) -> None:
    plain = await ASK[name](services, seed=1)
    hinted = await ASK[name](services, **{"seed": 1, parameter: APIS[name].hints[parameter]})
    assert replace(hinted, document=None) == replace(plain, document=None)


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, it) for name, api in APIS.items() for it in api.refused]
)
async def test_what_is_not_supported_is_refused_by_name(
    services: Services, name: str, parameter: str
) -> None:
    with pytest.raises(Failure) as caught:
        await ASK[name](services, **{parameter: APIS[name].refused[parameter]})
    assert caught.value.kind.status == 400
    assert (caught.value.field or "").split(".")[0] == parameter
    assert f"`{parameter}" in caught.value.message or parameter == "previous_response_id"


@pytest.mark.parametrize("name", ["chat", "completions"])
async def test_options_of_a_stream(services: Services, name: str) -> None:
    known = set(typing.get_type_hints(ChatCompletionStreamOptionsParam))
    assert known == {"include_usage", "include_obfuscation"}
    with pytest.raises(Failure) as caught:
        await ASK[name](services, stream=True, stream_options={"include_obfuscation": True})
    assert caught.value.field == "stream_options.include_obfuscation"
    await ASK[name](services, stream=True, stream_options={"include_obfuscation": False})


# What stands inside of them ----------------------------------------------------------------------


def kinds(declared: Any, name: str = "type") -> set[str]:
    """The values of the member ``name`` that tell one shape from another, in all that are allowed.

    A plain text that is allowed counts as its own kind.
    """
    if get_origin(declared) is Literal:
        return set(get_args(declared))
    if is_typeddict(declared):
        return kinds(typing.get_type_hints(declared).get(name), name)
    return {kind for member in get_args(declared) for kind in kinds(member, name)}


Shape = Callable[[str], dict[str, Any]]
SHAPES: dict[str, tuple[str, Any, str, set[str], Shape, str]] = {
    "roles": (
        "chat",
        ChatCompletionMessageParam,
        "role",
        {"developer", "system", "user", "assistant", "tool"},
        lambda role: {"messages": [{"role": role, "content": "x"}]},
        "messages[0].role",
    ),
    "parts": (
        "chat",
        ChatCompletionContentPartParam,
        "type",
        {"text"},
        lambda kind: {"messages": [{"role": "user", "content": [{"type": kind, "text": "x"}]}]},
        "messages[0].content",
    ),
    "tools": (
        "chat",
        ChatCompletionToolUnionParam,
        "type",
        {"function"},
        lambda kind: {"tools": [{"type": kind, "function": TOOL}]},
        "tools[0].type",
    ),
    "choices of a tool": (
        "chat",
        ChatCompletionToolChoiceOptionParam,
        "type",
        {"none", "auto", "required", "function", "allowed_tools"},
        lambda kind: TOOLS | {"tool_choice": choice_of(kind)},
        "tool_choice",
    ),
    "formats": (
        "chat",
        chat_params.ResponseFormat,
        "type",
        {"text", "json_object", "json_schema"},
        lambda kind: {"response_format": {"type": kind, "json_schema": SCHEMA["json_schema"]}},
        "response_format",
    ),
    "items": (
        "responses",
        responses.ResponseInputItemParam,
        "type",
        {"message", "function_call", "function_call_output"},
        lambda kind: {"input": [{"type": kind, **ITEMS.get(kind, {})}]},
        "input[0].type",
    ),
    "parts of a message": (
        "responses",
        responses.ResponseInputContentParam,
        "type",
        {"input_text"},
        lambda kind: {"input": [{"role": "user", "content": [{"type": kind, "text": "x"}]}]},
        "input[0].content[0].type",
    ),
    "tools of a response": (
        "responses",
        responses.ToolParam,
        "type",
        {"function"},
        lambda kind: {"tools": [{"type": kind} | TOOL]},
        "tools[0].type",
    ),
    "choices of a response": (
        "responses",
        response_create_params.ToolChoice,
        "type",
        {"none", "auto", "required", "function", "allowed_tools"},
        lambda kind: FLAT_TOOLS | {"tool_choice": flat_choice_of(kind)},
        "tool_choice",
    ),
    "formats of a response": (
        "responses",
        responses.ResponseFormatTextConfigParam,
        "type",
        {"text", "json_object", "json_schema"},
        lambda kind: {"text": {"format": FLAT_SCHEMA["format"] | {"type": kind}}},
        "text.format",
    ),
}
"""Which method, what the client declares, by which member kinds differ, those that are taken, what
is sent with a kind, and the field that is named where it is refused."""
ITEMS: dict[str, dict[str, Any]] = {
    "message": {"role": "user", "content": "x"},
    "function_call": {"call_id": "c", "name": "f", "arguments": "{}"},
    "function_call_output": {"call_id": "c", "output": "x"},
}


def choice_of(kind: str) -> Any:
    inner = {"mode": "auto", "tools": TOOLS["tools"]}
    return {
        "function": {"type": "function", "function": {"name": "f"}},
        "allowed_tools": {"type": "allowed_tools", "allowed_tools": inner},
        "custom": {"type": "custom", "custom": {"name": "f"}},
    }.get(kind, kind)


def flat_choice_of(kind: str) -> Any:
    return {
        "none": "none",
        "auto": "auto",
        "required": "required",
        "allowed_tools": {"type": kind, "mode": "auto", "tools": FLAT_TOOLS["tools"]},
    }.get(kind, {"type": kind, "name": "f"})


@pytest.mark.parametrize("name", SHAPES)
async def test_each_kind_is_taken_or_refused_by_name(services: Services, name: str) -> None:
    method, declared, member, taken, shape, field = SHAPES[name]
    known = kinds(declared, member)
    assert taken <= known, "the client's own types were read"
    for kind in sorted(taken):
        await ASK[method](services, **shape(kind))
    for kind in sorted(known - taken):
        with pytest.raises(Failure) as caught:
            await ASK[method](services, **shape(kind))
        assert caught.value.field == field, kind
