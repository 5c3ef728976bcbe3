"""The unmodified ``openai`` client works with responses: whole, streamed, in the background."""

from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.clients.conftest import SILENCE_S, System
from tests.support.waiting import wait_until


async def test_a_response_and_what_follows_on_it(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="m", input="hello", max_output_tokens=8)
    assert first.status in ("completed", "incomplete")
    assert first.output_text
    second = await client.responses.create(
        model="m", input="and now?", previous_response_id=first.id, max_output_tokens=8
    )
    items = [item async for item in client.responses.input_items.list(second.id, limit=1)]
    assert [getattr(item, "role", "") for item in items] == ["user", "assistant", "user"]
    assert (await client.responses.retrieve(second.id)).output_text == second.output_text
    await client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(second.id)


async def test_a_stream_and_its_rest(client: openai.AsyncOpenAI) -> None:
    """The text of the stream is that of the response, and a replay brings the rest of it."""
    stream = await client.responses.create(
        model="m", input="hello", max_output_tokens=12, stream=True
    )
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final: Any = events[-1]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.response.output_text
    again = await client.responses.retrieve(final.response.id, stream=True, starting_after=5)
    assert [event async for event in again] == events[6:]


async def test_the_helper_for_streams(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="m", input="hello") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.output_text
    async with client.responses.stream(response_id=final.id, starting_after=4) as stream:
        rest = [event.type async for event in stream]
    assert rest == kinds[5:]


async def test_in_the_background(client: openai.AsyncOpenAI) -> None:
    promised = await client.responses.create(
        model="m", input="hello", max_output_tokens=8, background=True
    )
    assert promised.status == "queued"
    found: list[Response] = []

    async def has_ended() -> bool:
        found.append(await client.responses.retrieve(promised.id))
        return found[-1].status not in ("queued", "in_progress")

    await wait_until(has_ended, what="the response's end", timeout_s=15 + SILENCE_S)
    assert found[-1].output_text
    endless = await client.responses.create(model="m", input="hello", background=True)
    cancelled = await client.responses.cancel(endless.id)
    assert cancelled.status == "cancelled"


class Answer(BaseModel):
    text: str


async def test_a_parsed_form_is_asked_for(client: openai.AsyncOpenAI, system: System) -> None:
    """The simulated engine obeys no grammar: what comes back is refused by the client's own check,
    or fits; either way the request was understood.
    """
    answer = await client.responses.with_raw_response.parse(
        model="m", input="hello", max_output_tokens=4, text_format=Answer
    )
    assert answer.headers["x-model-version"] == system.model_version
    assert answer.http_response.json()["text"]["format"]["name"] == "Answer"
