"""Every method of OpenAI's own client for what is served here: it works, or it is refused clearly.

The client is walked as it is installed, so that a method of a new version has to be decided about.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest
from openai.resources import AsyncModels
from openai.resources.chat.completions import AsyncCompletions as AsyncChats
from openai.resources.completions import AsyncCompletions
from openai.resources.responses import AsyncInputItems, AsyncInputTokens, AsyncResponses

from tests.support.gateway_app import Stand
from tests.support.scripted_worker import saying

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
RESOURCES: dict[str, Any] = {
    "chat.completions": AsyncChats,
    "completions": AsyncCompletions,
    "models": AsyncModels,
    "responses": AsyncResponses,
    "responses.input_items": AsyncInputItems,
    "responses.input_tokens": AsyncInputTokens,
}
HELPERS = {
    "chat.completions.parse",
    "chat.completions.stream",
    "responses.parse",
    "responses.stream",
}
"""They use another method, and tests/clients holds answers to them."""

Call = Callable[[openai.AsyncOpenAI, str], Awaitable[Any]]
SERVED: dict[str, Call] = {
    "chat.completions.create": lambda it, _: it.chat.completions.create(model="m", messages=HELLO),
    "completions.create": lambda it, _: it.completions.create(model="m", prompt="hi"),
    "models.list": lambda it, _: it.models.list(),
    "models.retrieve": lambda it, _: it.models.retrieve("simulated"),
    "responses.create": lambda it, _: it.responses.create(model="m", input="hi"),
    "responses.retrieve": lambda it, id: it.responses.retrieve(id),
    "responses.input_items.list": lambda it, id: it.responses.input_items.list(
        id, include=["message.output_text.logprobs"], limit=1, order="asc"
    ),
    "responses.input_tokens.count": lambda it, _: it.responses.input_tokens.count(
        model="m", input="hi"
    ),
    "responses.cancel": lambda it, id: it.responses.cancel(id),
    "responses.delete": lambda it, id: it.responses.delete(id),
}
"""What is done with the id of a response, in an order in which it can be."""
REFUSED: dict[str, Call] = {
    "chat.completions.delete": lambda it, _: it.chat.completions.delete("chatcmpl-1"),
    "chat.completions.list": lambda it, _: it.chat.completions.list(),
    "chat.completions.retrieve": lambda it, _: it.chat.completions.retrieve("chatcmpl-1"),
    "chat.completions.update": lambda it, _: it.chat.completions.update("chatcmpl-1", metadata={}),
    "models.delete": lambda it, _: it.models.delete("simulated"),
    "responses.compact": lambda it, _: it.responses.compact(model="gpt-5.5", input="hi"),
}
SOCKETS = {"responses.connect"}
"""WebSockets, which are not spoken here: the upgrade is not answered."""


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[openai.AsyncOpenAI]:
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with (
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client,
        worker.acting(saying("Hello")),
    ):
        yield client


def test_each_method_is_decided_about() -> None:
    known = {
        f"{name}.{method}"
        for name, resource in RESOURCES.items()
        for method, _ in inspect.getmembers(resource, inspect.isfunction)
        if not method.startswith("_")
    }
    assert known == {*SERVED, *REFUSED, *HELPERS, *SOCKETS}


async def test_what_is_served_works(client: openai.AsyncOpenAI) -> None:
    promised = await client.responses.create(model="m", input="hi", background=True)
    for call in SERVED.values():
        await call(client, promised.id)  # raises, where it is not served
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(promised.id)


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_not_says_so(client: openai.AsyncOpenAI, name: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await REFUSED[name](client, "")
    assert caught.value.status_code in (404, 405)
    assert "is not served here" in caught.value.message


async def test_input_tokens_are_those_of_the_answer(client: openai.AsyncOpenAI) -> None:
    """With all that goes into the prompt: instructions, tools, and the conversation before."""
    first = await client.responses.create(model="m", input="hi", instructions="Be brief.")
    asked: dict[str, Any] = {
        "model": "m",
        "input": "and now?",
        "instructions": "Be long.",
        "previous_response_id": first.id,
        "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": False}],
    }
    counted = await client.responses.input_tokens.count(**asked)
    answer = await client.responses.create(**asked)
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens > 0


async def test_counting_refuses_what_answering_would(client: openai.AsyncOpenAI) -> None:
    for field, value in (("truncation", "auto"), ("personality", "friendly")):
        asked: dict[str, Any] = {"model": "m", "input": "hi", field: value}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.input_tokens.count(**asked)
        assert caught.value.param == field


async def test_what_a_look_may_include_is_checked(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="m", input="hi")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(made.id, include=["file_search_call.results"])
    assert caught.value.param == "include"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(made.id, stream=True, include_obfuscation=True)
    assert caught.value.param == "include_obfuscation"
