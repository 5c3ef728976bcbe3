"""The unmodified ``huggingface_hub`` client works, as it did against TGI."""

import re
from collections.abc import AsyncIterator, Iterator

import pytest
from huggingface_hub import (
    AsyncInferenceClient,
    ChatCompletionInputJSONSchema,
    ChatCompletionInputResponseFormatJSONSchema,
    InferenceClient,
    TextGenerationInputGrammarType,
    close_session,
    constants,
)
from huggingface_hub.errors import ValidationError

from tests.clients.conftest import System


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In offline mode the client refuses every address, this machine's too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    close_session()


@pytest.fixture
async def client(system: System) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(system.url, provider="hf-inference") as client:
        yield client


async def test_text_generation(client: AsyncInferenceClient) -> None:
    text = await client.text_generation("hello", max_new_tokens=8, return_full_text=False)
    full = await client.text_generation("hello", max_new_tokens=8, return_full_text=True)
    assert text
    assert full == "hello" + text


async def test_text_generation_with_details(client: AsyncInferenceClient) -> None:
    answer = await client.text_generation(
        "hello", max_new_tokens=8, details=True, seed=5, do_sample=True
    )
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert answer.details.finish_reason in ("length", "eos_token")
    assert answer.details.seed == 5
    assert answer.details.prefill == []


async def test_a_stream_with_details(client: AsyncInferenceClient) -> None:
    whole = await client.text_generation("hello", max_new_tokens=8, return_full_text=False)
    stream = await client.text_generation(
        "hello", max_new_tokens=8, stream=True, details=True, return_full_text=False
    )
    events = [event async for event in stream]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    texts = [event.token.text for event in events if not event.token.special]
    assert "".join(texts) == whole
    assert events[-1].generated_text == whole
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == len(events)
    assert all(event.generated_text is None for event in events[:-1])


async def test_everything_that_details_may_hold(client: AsyncInferenceClient) -> None:
    answer = await client.text_generation(
        "hello",
        max_new_tokens=4,
        details=True,
        decoder_input_details=True,
        best_of=2,
        do_sample=True,
        top_n_tokens=3,
        return_full_text=False,
    )
    details = answer.details
    assert details is not None
    assert [token.text for token in details.prefill] == list("hello")
    assert details.prefill[0].logprob is None
    assert details.prefill[1].logprob is not None
    assert details.top_tokens is not None
    assert [len(tops) for tops in details.top_tokens] == [3] * len(details.tokens)
    assert details.best_of_sequences is not None
    [other] = details.best_of_sequences
    assert other.seed != details.seed


async def test_a_stream_with_the_likeliest_tokens(client: AsyncInferenceClient) -> None:
    stream = await client.text_generation(
        "hello", max_new_tokens=4, stream=True, details=True, top_n_tokens=2
    )
    events = [event async for event in stream]
    tops = [event.top_tokens for event in events]
    assert all(top is not None and len(top) == 2 for top in tops)


async def test_every_parameter_that_the_client_knows(client: AsyncInferenceClient) -> None:
    text = await client.text_generation(
        "hello",
        max_new_tokens=6,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        typical_p=0.9,
        truncate=3,
        watermark=True,
        seed=4,
        stop=["never said"],
    )
    assert text


async def test_an_answer_may_have_a_grammar(client: AsyncInferenceClient) -> None:
    grammar = TextGenerationInputGrammarType(type="regex", value="[a-z ]{3,8}")
    text = await client.text_generation(
        "hello", max_new_tokens=20, grammar=grammar, return_full_text=False
    )
    assert re.fullmatch("[a-z ]{3,8}", text)
    bad = TextGenerationInputGrammarType(type="regex", value="(")
    with pytest.raises(ValidationError):
        await client.text_generation("hello", grammar=bad)
    answer = await client.chat_completion(
        [{"role": "user", "content": "hello"}],
        max_tokens=20,
        logprobs=True,
        top_logprobs=2,
        response_format=ChatCompletionInputResponseFormatJSONSchema(
            type="json_schema",
            json_schema=ChatCompletionInputJSONSchema(
                name="s", schema={"type": "object", "properties": {}}
            ),
        ),
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert len(logprobs.content[0].top_logprobs) == 2


def test_the_synchronous_client_streams(system: System) -> None:
    client = InferenceClient(system.url, provider="hf-inference")
    texts = list(client.text_generation("hello", max_new_tokens=5, stream=True))
    assert 1 <= len(texts) <= 5


async def test_chat_completion(client: AsyncInferenceClient) -> None:
    answer = await client.chat_completion(
        [{"role": "user", "content": "hello"}], max_tokens=8, seed=3
    )
    assert answer.choices[0].message.content
    stream = await client.chat_completion(
        [{"role": "user", "content": "hello"}], max_tokens=8, seed=3, stream=True
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


async def test_what_the_client_asks_about_the_server(system: System) -> None:
    client = InferenceClient(provider="hf-inference")
    assert client.health_check(model=system.url)
    info = client.get_endpoint_info(model=system.url)
    assert info["model_id"] == "simulated"


async def test_errors_tell_what_was_wrong(client: AsyncInferenceClient) -> None:
    with pytest.raises(ValidationError, match="must be strictly positive"):
        await client.text_generation("hello", top_k=0)
    with pytest.raises(ValidationError, match="must be strictly positive"):
        async for _ in await client.text_generation("hello", top_k=0, stream=True):
            pass
