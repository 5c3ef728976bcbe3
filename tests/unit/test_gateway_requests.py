"""Requests: TGI's validation rules word by word, OpenAI's parameters, and refusals by name."""

from typing import Any

import msgspec
import pytest

from common.failures import Failure
from common.messages import Sampling
from gateway.api import tgi
from gateway.bodies import read_body
from gateway.errors import envelope, retry_headers, status_of
from gateway.order import AS_LIST, DETAILS, FULL_TEXT, INCLUDE_USAGE, SHOW_TIER
from gateway.services import Services
from tests.support.gateway_bodies import (
    MAX_TOTAL,
    complete,
    converse,
    generate,
    parsing_services,
    request,
)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    return parsing_services(tmp_path_factory.mktemp("data"))


# TGI ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"temperature": -1.5}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -3}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        (
            {"best_of": 2, "do_sample": True, "seed": 1},
            "`seed` must not be set when `best_of` > 1",
        ),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 5. Given: -1"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 99. Given: 0"),
        ({"truncate": 100}, "`truncate` must be strictly positive and less than 99. Given: 100"),
        (
            {"max_new_tokens": 99},
            (
                "`inputs` tokens + `max_new_tokens` must be <= 100. "
                "Given: 2 `inputs` tokens and 99 `max_new_tokens`"
            ),
        ),
    ],
)
async def test_tgi_says_what_is_wrong_in_its_own_words(
    services: Services, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(Failure) as caught:
        await generate(services, {"inputs": "hi", "parameters": parameters})
    failure = caught.value
    assert failure.message == f"Input validation error: {message}"
    assert status_of(failure, "tgi") == 422
    assert envelope(failure, "tgi")["error_type"] == "validation"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"inputs": "a" * 100}, "`inputs` must have less than 99 tokens. Given: 100"),
        # The rules have an order: the first one broken is the one that is told.
        ({"inputs": "", "parameters": {"top_k": 0}}, "`top_k` must be strictly positive"),
        (
            {"inputs": "", "parameters": {"top_k": 0, "temperature": 0}},
            "`temperature` must be strictly positive",
        ),
        ({"inputs": "", "parameters": {"truncate": 0}}, "`inputs` cannot be empty"),
    ],
)
async def test_tgi_tells_the_first_rule_that_is_broken(
    services: Services, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(Failure) as caught:
        await generate(services, body)
    assert caught.value.message == f"Input validation error: {message}"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
async def test_tgi_has_rules_for_streams(
    services: Services, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(Failure) as caught:
        await generate(services, {"inputs": "hi", "parameters": parameters}, stream=True)
    assert caught.value.message == f"Input validation error: {message}"


async def test_tgi_takes_the_nulls_and_neutral_values_that_its_clients_send(
    services: Services,
) -> None:
    """The full set of the old ``text-generation`` client."""
    parameters = {
        "best_of": None, "decoder_input_details": False, "details": True, "do_sample": False,
        "frequency_penalty": None, "grammar": None, "max_new_tokens": 20,
        "repetition_penalty": None, "return_full_text": False, "seed": None, "stop": [],
        "temperature": None, "top_k": None, "top_n_tokens": None, "top_p": None, "truncate": None,
        "typical_p": None, "watermark": False, "adapter_id": None, "something_new": 7,
    }  # fmt: skip
    order = await generate(services, {"inputs": "hi", "parameters": parameters, "extra": {}})
    assert order.flags == DETAILS
    assert not order.sampling.do_sample
    assert order.sampling.max_new_tokens == 20
    assert order.sampling.keep_stop


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "hi", "parameters": None},
        {"inputs": "hi", "parameters": {"do_sample": None}},
        {"inputs": "hi", "parameters": {"watermark": None}},
        {"inputs": "hi", "parameters": {"details": None}},
        {"inputs": "hi", "parameters": {"stop": None}},
        {"inputs": "hi", "stream": None},
        {"inputs": None},
        {"inputs": 7},
        {},
        [],
    ],
)
async def test_tgi_refuses_null_where_its_types_do(services: Services, body: object) -> None:
    with pytest.raises(Failure) as caught:
        await generate(services, body)
    assert caught.value.message.startswith("Failed to deserialize the JSON body")
    assert status_of(caught.value, "tgi") == 422


async def test_tgi_samples_without_parameters_and_not_with_empty_ones(services: Services) -> None:
    assert (await generate(services, {"inputs": "hi"})).sampling.do_sample
    assert not (await generate(services, {"inputs": "hi", "parameters": {}})).sampling.do_sample


@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"do_sample": True}]
)
async def test_tgi_samples_when_a_warper_is_set(
    services: Services, parameters: dict[str, Any]
) -> None:
    order = await generate(services, {"inputs": "hi", "parameters": parameters})
    assert order.sampling.do_sample


async def test_tgi_gives_all_the_room_that_is_left(services: Services) -> None:
    order = await generate(services, {"inputs": "hi", "parameters": {}})
    assert (len(order.prompt), order.sampling.max_new_tokens) == (2, MAX_TOTAL - 2)
    assert order.cost == MAX_TOTAL


async def test_truncate_keeps_the_end_of_the_prompt(services: Services) -> None:
    order = await generate(services, {"inputs": "abcdef", "parameters": {"truncate": 2}})
    assert order.prompt == [ord("e"), ord("f")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("top_k", 2**31),
        ("temperature", 1e9),
        ("repetition_penalty", 1e9),
        ("max_new_tokens", 2**32),
        ("stop", [""]),
        ("stop", ["x" * 1001]),
    ],
)
async def test_numbers_and_texts_have_bounds_on_both_sides(
    services: Services, field: str, value: object
) -> None:
    with pytest.raises(Failure) as caught:
        await generate(services, {"inputs": "hi", "parameters": {field: value}})
    assert caught.value.kind.status == 400


async def test_a_seed_is_drawn_when_none_is_given(services: Services) -> None:
    one = await generate(services, {"inputs": "hi"})
    two = await generate(services, {"inputs": "hi"})
    assert one.sampling.seed != two.sampling.seed
    given = await generate(services, {"inputs": "hi", "parameters": {"seed": 2**64 - 1}})
    assert given.sampling.seed == 2**64 - 1


async def test_the_hub_route_repeats_the_prompt_unless_told_otherwise(services: Services) -> None:
    body = msgspec.convert(
        {"inputs": "hi", "parameters": {"return_full_text": True}}, tgi.GenerateBody
    )
    order = await tgi.order_of(services, body, stream=False, flags=AS_LIST)
    assert (order.flags, order.prompt_text) == (AS_LIST | FULL_TEXT, "hi")


# OpenAI ------------------------------------------------------------------------------------------


async def test_chat_defaults(services: Services) -> None:
    order = await converse(services, model="anything at all")
    assert order.prompt[-len("<assistant") :] != []
    assert order.sampling == Sampling(
        max_new_tokens=MAX_TOTAL - len(order.prompt),
        seed=order.sampling.seed,
        do_sample=True,
        keep_stop=False,
    )
    assert not order.stream
    assert order.flags == 0


async def test_temperature_zero_is_greedy(services: Services) -> None:
    order = await converse(services, temperature=0, top_p=0.5)
    assert not order.sampling.do_sample
    assert (order.sampling.temperature, order.sampling.top_p) == (1.0, 1.0)


async def test_chat_takes_the_nulls_that_clients_send(services: Services) -> None:
    nulls = (
        "max_tokens", "frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty",
        "seed", "stop", "temperature", "tool_choice", "tool_prompt", "tools", "top_logprobs",
        "top_p", "response_format", "stream_options", "stream", "user",
    )  # fmt: skip
    messages = [{"role": "user", "content": "hi", "name": None, "tool_calls": None}]
    order = await converse(services, messages=messages, **dict.fromkeys(nulls))
    assert order.sampling.do_sample


async def test_chat_takes_neutral_values(services: Services) -> None:
    await converse(
        services, n=1, presence_penalty=0, frequency_penalty=0.0, tools=[], tool_choice="auto",
        logprobs=False, top_logprobs=0, logit_bias={}, response_format={"type": "text"},
        modalities=["text"], parallel_tool_calls=True, metadata={}, store=False, user="someone",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("service_tier", "scale"),
        ("reasoning_effort", "high"),
    ],
)
async def test_chat_parameters_to_come_are_refused_by_name(
    services: Services, field: str, value: object
) -> None:
    with pytest.raises(Failure) as caught:
        await converse(services, **{field: value})
    failure = caught.value
    assert (failure.code, failure.field) == ("UNSUPPORTED_PARAMETER", field)
    told = envelope(failure, "openai")["error"]
    assert (told["code"], told["param"]) == ("unsupported_parameter", field)
    assert told["type"] == "invalid_request_error"
    assert status_of(failure, "openai") == 400
    assert retry_headers(failure) == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"messages": []}, "BAD_REQUEST", "messages"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "BAD_REQUEST",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "<|im_start|>", "content": ""}]},
            "BAD_REQUEST",
            "messages[0].role",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "UNSUPPORTED_PARAMETER",
            "messages[0].content",
        ),
        ({"temperature": 2.1}, "BAD_REQUEST", "temperature"),
        ({"temperature": "hot"}, "BAD_REQUEST", "temperature"),
        ({"top_p": -0.1}, "BAD_REQUEST", "top_p"),
        ({"max_tokens": 0}, "BAD_REQUEST", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "BAD_REQUEST", "max_tokens"),
        ({"max_tokens": 99}, "CONTEXT_LENGTH_EXCEEDED", "messages"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "BAD_REQUEST", "stop"),
        ({"stop": ""}, "BAD_REQUEST", "stop"),
        ({"seed": 2**64}, "BAD_REQUEST", "seed"),
    ],
)
async def test_chat_refusals_name_the_field(
    services: Services, fields: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(Failure) as caught:
        await converse(services, **fields)
    assert (caught.value.code, caught.value.field) == (code, field)


async def test_chat_options(services: Services) -> None:
    order = await converse(
        services,
        stop="END",
        seed=-1,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        service_tier="flex",
        max_completion_tokens=7,
        top_k=3,
    )
    assert order.stream
    assert order.flags == INCLUDE_USAGE | SHOW_TIER
    assert order.lane == "flex"
    assert order.sampling.stop == ("END",)
    assert order.sampling.seed == 2**64 - 1
    assert (order.sampling.max_new_tokens, order.sampling.top_k) == (7, 3)


async def test_a_generation_may_run_on_behind_its_end(services: Services) -> None:
    assert (await converse(services, ignore_eos=True)).sampling.ignore_eos
    assert (await complete(services, ignore_eos=True)).sampling.ignore_eos
    assert not (await converse(services, ignore_eos=None)).sampling.ignore_eos


async def test_text_parts_are_joined_and_the_developer_is_the_system(services: Services) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one = await converse(services, messages=[{"role": "developer", "content": parts}])
    other = await converse(services, messages=[{"role": "system", "content": "ab"}])
    assert one.prompt == other.prompt


async def test_an_answer_that_was_begun_is_continued(services: Services) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    order = await converse(services, messages=messages)
    assert order.prompt[-5:] == [ord(character) for character in "Well,"]


async def test_a_completion_takes_text_one_text_or_tokens(services: Services) -> None:
    texts: list[Any] = ["hi", ["hi"], [104, 105], [[104, 105]]]
    assert [(await complete(services, prompt=prompt)).prompt for prompt in texts] == [
        [104, 105]
    ] * 4


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"prompt": ["a"] * 33}, "BAD_REQUEST", "prompt"),
        ({"prompt": ["a", "b"], "stream": True}, "UNSUPPORTED_PARAMETER", "stream"),
        ({"prompt": ["a", [1]], "stream": False, "suffix": "x"}, "UNSUPPORTED_PARAMETER", "suffix"),
        ({"prompt": []}, "BAD_REQUEST", "prompt"),
        ({"prompt": ""}, "BAD_REQUEST", "prompt"),
        ({"prompt": [1, -2]}, "BAD_REQUEST", "prompt"),
        ({"prompt": [1, 10**9]}, "BAD_REQUEST", "prompt"),
        ({"prompt": [[1, "a"]]}, "BAD_REQUEST", "prompt"),
        ({"prompt": [None]}, "BAD_REQUEST", "prompt"),
        ({"suffix": "x"}, "UNSUPPORTED_PARAMETER", "suffix"),
        ({"logprobs": 6}, "BAD_REQUEST", "logprobs"),
        ({"n": 17}, "BAD_REQUEST", "n"),
        ({"best_of": 17}, "BAD_REQUEST", "best_of"),
        ({"n": 3, "best_of": 2}, "BAD_REQUEST", "best_of"),
        ({"best_of": 2, "stream": True}, "BAD_REQUEST", "best_of"),
        ({"max_tokens": 0}, "BAD_REQUEST", "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "BAD_REQUEST", "max_tokens"),
    ],
)
async def test_completion_refusals_name_the_field(
    services: Services, fields: dict[str, Any], code: str, field: str
) -> None:
    with pytest.raises(Failure) as caught:
        await complete(services, **fields)
    assert (caught.value.code, caught.value.field) == (code, field)


# Bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type", "code", "tgi_status"),
    [
        (b'{"inputs": "hi"}', "text/plain", "UNSUPPORTED_MEDIA_TYPE", 415),
        (b'{"inputs": "hi",}', "application/json", "BAD_REQUEST", 400),
        (b"", "application/json", "BAD_REQUEST", 400),
        (b'{"inputs": "\xff"}', "application/json", "BAD_REQUEST", 400),
        (b'{"inputs": "\\ud800"}', "application/json", "BAD_REQUEST", 400),
        (b'{"inputs": 1}', "application/json; charset=utf-8", "BAD_REQUEST", 422),
        (
            b'{"inputs": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "application/json",
            "BODY_TOO_LARGE",
            413,
        ),
        (
            b'{"inputs": "hi", "parameters": {"temperature": 1e999}}',
            "application/json",
            "BAD_REQUEST",
            422,
        ),
    ],
)
async def test_bodies_that_are_no_request(
    body: bytes, content_type: str, code: str, tgi_status: int
) -> None:
    with pytest.raises(Failure) as caught:
        await read_body(request(body, content_type), tgi.decoder)
    assert caught.value.code == code
    assert status_of(caught.value, "tgi") == tgi_status


def test_refusals_that_pass_say_when_to_come_back() -> None:
    failure = Failure("QUEUE_FULL", retry_after_ms=1500)
    assert retry_headers(failure) == {
        "x-should-retry": "true",
        "retry-after-ms": "1500",
        "retry-after": "2",
    }
    assert envelope(failure, "tgi")["error_type"] == "overloaded"
    assert status_of(failure, "tgi") == 429
