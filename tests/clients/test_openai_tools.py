"""The unmodified ``openai`` client puts calls of tools together, on both APIs."""

from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam
from openai.types.responses import FunctionToolParam

from tests.support.gateway_app import Stand
from tests.support.gateway_app import stand as stand  # noqa: PLC0414 - a fixture
from tests.support.scripted_worker import saying

NAME, DESCRIPTION = "get_weather", "The weather in a city."
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": NAME, "description": DESCRIPTION, "parameters": PARAMETERS, "strict": True,
    },
}  # fmt: skip
FLAT: FunctionToolParam = {
    "type": "function",
    "name": NAME,
    "description": DESCRIPTION,
    "parameters": PARAMETERS,
    "strict": True,
}
PIECES = ["<tool_call>\n", '{"name": "get_weather", ', '"arguments": {"city": ', '"Paris"}}\n',
          "</tool_call>"]  # fmt: skip


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[openai.AsyncOpenAI]:
    gateway = await stand.gateway()
    worker = await stand.worker()
    async with (
        worker.acting(saying(*PIECES)),
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


async def test_a_chat_that_calls(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], tools=[TOOL]
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == (NAME, '{"city": "Paris"}')
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_a_streamed_chat_that_calls(client: openai.AsyncOpenAI) -> None:
    """The helper parses the arguments of a strict tool by itself."""
    async with client.chat.completions.stream(
        model="m", messages=[{"role": "user", "content": "hi"}], tools=[TOOL]
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == {"city": "Paris"}


async def test_a_streamed_response_that_calls(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="m", input="hi", tools=[FLAT]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    (call,) = final.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == (NAME, '{"city": "Paris"}')
    followed = await client.responses.create(
        model="m",
        previous_response_id=final.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
        tools=[FLAT],
    )
    assert followed.output
