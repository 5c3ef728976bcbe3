"""The unmodified ``openai`` client works: whole answers, streams with silences, errors, models."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.clients.conftest import SILENCE_S, System

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


async def test_a_chat_completion(client: openai.AsyncOpenAI, system: System) -> None:
    answer = await client.chat.completions.create(
        model="any-name", messages=HELLO, max_tokens=8, seed=1
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    assert answer.system_fingerprint == system.model_version
    assert answer._request_id


async def test_a_chat_stream_with_usage(client: openai.AsyncOpenAI) -> None:
    """The text of the stream is the text of the whole answer to the same seed."""
    whole = await client.chat.completions.create(model="m", messages=HELLO, max_tokens=12, seed=7)
    stream = await client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_tokens=12,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole.choices[0].finish_reason
    told, expected = chunks[-1].usage, whole.usage
    assert told is not None
    assert expected is not None
    # The second prompt may have been found computed; all else is the same.
    told.prompt_tokens_details = expected.prompt_tokens_details
    assert told == expected
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_synchronous_client_streams(system: System) -> None:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="unused") as client:
        stream = client.chat.completions.create(
            model="m",
            messages=HELLO,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 5


async def test_the_stream_helper_accumulates(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="m", messages=HELLO, max_tokens=6) as stream:
        pieces = [event.delta async for event in stream if event.type == "content.delta"]
        with pytest.raises(openai.LengthFinishReasonError) as caught:
            await stream.get_final_completion()
    assert caught.value.completion.choices[0].message.content == "".join(pieces)


async def test_a_completion_and_its_stream(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="m", prompt="hello", max_tokens=9, seed=3)
    stream = await client.completions.create(
        model="m", prompt="hello", max_tokens=9, seed=3, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_choices_and_their_stream(client: openai.AsyncOpenAI) -> None:
    """The choices differ, and a stream interleaves the same ones."""
    whole = await client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=150, seed=7, n=3
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) == 3
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 450
    stream = await client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=150, seed=7, n=3, stream=True
    )
    streamed = dict.fromkeys(texts, "")
    async for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=4, seed=7, logprobs=True, top_logprobs=2
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == whole.choices[0].message.content
    for entry in logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 2
    stream = await client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_tokens=4,
        seed=7,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    told = [
        entry
        async for chunk in stream
        for choice in chunk.choices
        for entry in (choice.logprobs.content if choice.logprobs else None) or []
    ]
    assert told == logprobs.content


async def test_every_parameter_that_the_client_knows(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_completion_tokens=6,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"65": -100},
        temperature=0.7,
        top_p=0.9,
        stop=["never said"],
        extra_body={"top_k": 40, "min_p": 0.05, "min_tokens": 2, "stop_token_ids": [0]},
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_an_answer_may_have_a_format(client: openai.AsyncOpenAI, kind: str) -> None:
    schema = {"name": "s", "schema": {"type": "object", "properties": {"a": {"type": "null"}}}}
    asked: dict[str, object] = {"type": kind}
    if kind == "json_schema":
        asked["json_schema"] = schema
    answer = await client.chat.completions.create(
        model="m",
        messages=HELLO,
        max_tokens=30,
        response_format=asked,  # pyright: ignore[reportArgumentType] - one of several shapes
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


async def test_an_evaluation_harness_scores_a_prompt(client: openai.AsyncOpenAI) -> None:
    """As lm-evaluation-harness does: of an echoed prompt it adds up what stands behind a context,
    without the one token that was made, and compares it with the likeliest tokens.
    """
    contexts = [[104, 101], [104]]
    prompts = [[104, 101, 108, 108, 111], [104, 105, 33]]
    answer = await client.completions.create(
        model="m", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, context, prompt in zip(answer.choices, contexts, prompts, strict=True):
        told = choice.logprobs
        assert told is not None
        assert told.token_logprobs is not None
        assert told.top_logprobs is not None
        scored = told.token_logprobs[len(context) : -1]
        likeliest = told.top_logprobs[len(context) : -1]
        assert len(scored) == len(prompt) - len(context)
        assert sum(scored) < 0
        assert all(score == max(top.values()) for score, top in zip(scored, likeliest, strict=True))
        assert choice.text.startswith(bytes(prompt).decode())
    alone = await client.completions.create(
        model="m", prompt=prompts[0], max_tokens=0, logprobs=1, echo=True
    )
    assert alone.choices[0].text == "hello"
    assert alone.choices[0].logprobs is not None
    assert answer.choices[0].logprobs is not None
    told_all = answer.choices[0].logprobs.token_logprobs or []
    assert alone.choices[0].logprobs.token_logprobs == told_all[:-1]
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0


async def test_models(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["simulated"]
    assert (await client.models.retrieve("simulated")).id == "simulated"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_errors_are_the_classes_that_programs_catch(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="m", messages=HELLO, n=17)
    assert (caught.value.code, caught.value.param) == ("bad_request", "n")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="m", prompt="hello", max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


async def test_a_cancelled_stream_ends_without_an_exception(
    client: openai.AsyncOpenAI, system: System
) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="m", messages=HELLO, max_tokens=2000, stream=True
    )
    stream_id = raw.headers["x-headrace-stream-id"]
    stream = raw.parse()
    chunks: list[ChatCompletionChunk] = []
    async for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == 3:
            await client.delete(f"/streams/{stream_id}", cast_to=object)
    last = chunks[-1]
    assert last.choices[0].finish_reason == "stop"
    assert last.model_extra is not None
    assert last.model_extra["headrace"]["finish_reason"] == "cancelled"


async def test_an_error_in_mid_stream_is_raised(client: openai.AsyncOpenAI, system: System) -> None:
    """The gateway stops and its drain is over: never a stream that just ends."""
    stream = await client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=2000, stream=True
    )

    async def read() -> None:
        async for _ in stream:
            if system.gateway.exit_code is None and not system.gateway.events("gateway.draining"):
                system.gateway.terminate()
                await system.gateway.saw("gateway.draining")
                system.gateway.terminate()

    with pytest.raises(openai.APIError) as caught:
        await asyncio.wait_for(read(), 30 + SILENCE_S)
    assert caught.value.code == "draining"
