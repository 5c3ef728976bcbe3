"""Parameters of a generation: what each API calls them, what they mean, and where they end."""

from pathlib import Path
from typing import Any

import pytest

from common.failures import Failure
from common.messages import Grammar, Watermark
from common.models.adapters import AdapterStore
from gateway.api.grammars import MAX_GRAMMAR_BYTES
from gateway.order import DETAILS, ECHO, LOGPROBS, PREFILL
from gateway.services import Services
from tests.support.adapters import write_adapter
from tests.support.gateway_bodies import (
    complete,
    complete_all,
    converse,
    generate,
    parsing_services,
)

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["b"]}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{},"a":{}},"required":["b"]}'


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    return parsing_services(tmp_path_factory.mktemp("data"))


async def sampling(services: Services, **parameters: Any) -> Any:
    """What TGI's ``parameters`` become."""
    return (await generate(services, {"inputs": "hi", "parameters": parameters})).sampling


async def refusal(services: Services, api: Any, **fields: Any) -> Failure:
    with pytest.raises(Failure) as caught:
        await api(services, **fields)
    return caught.value


# TGI ---------------------------------------------------------------------------------------------


async def test_every_tgi_parameter_reaches_the_sampler(services: Services) -> None:
    told = await sampling(
        services,
        temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.2, top_k=9, top_p=0.9,
        typical_p=0.8, seed=3, max_new_tokens=20, watermark=True, top_n_tokens=4, stop=["x"],
    )  # fmt: skip
    assert (told.temperature, told.repetition_penalty, told.top_k) == (0.7, 1.1, 9)
    assert (told.top_p, told.typical_p, told.seed, told.max_new_tokens) == (0.9, 0.8, 3, 20)
    assert told.watermark == Watermark(0.5, 2.0)
    assert told.top_logprobs == 4
    assert told.relative_frequency_penalty == 0.2, "TGI's own meaning"
    assert told.frequency_penalty == 0.0


async def test_what_tgi_lacks_is_taken_too(services: Services) -> None:
    told = await sampling(
        services,
        min_p=0.1, presence_penalty=0.5, logit_bias={"65": -100}, min_new_tokens=3,
        stop_token_ids=[66], ignore_eos=True,
    )  # fmt: skip
    assert (told.min_p, told.presence_penalty, told.min_new_tokens) == (0.1, 0.5, 3)
    assert (told.logit_bias, told.stop_token_ids, told.ignore_eos) == ({65: -100.0}, (66,), True)
    assert told.do_sample, "min_p is a warper"


async def test_best_of_are_choices_that_differ(services: Services) -> None:
    body = {"inputs": "hi", "parameters": {"best_of": 2, "temperature": 1.0}}
    order = await generate(services, body)
    assert (order.num_choices, order.num_best) == (2, 2)
    assert order.sampling.do_sample
    alone = await generate(services, {"inputs": "hi", "parameters": {"best_of": 0}})
    assert (alone.num_choices, alone.num_best) == (1, 0)


async def test_the_operator_sets_what_tgis_parameters_may_ask_for(tmp_path: Path) -> None:
    strict = parsing_services(
        tmp_path, max_best_of=1, max_top_n_tokens=0, watermark_gamma=0.25, watermark_delta=4.0
    )
    told = await refusal(strict, sampling, best_of=2, do_sample=True)
    assert told.message.endswith("`best_of` != 1 is not allowed for this endpoint")
    assert (await refusal(strict, sampling, top_n_tokens=1)).field == "top_n_tokens"
    assert (await sampling(strict, watermark=True)).watermark == Watermark(0.25, 4.0)


async def test_the_prompts_tokens_are_details(services: Services) -> None:
    body = {"inputs": "hi", "parameters": {"decoder_input_details": True}}
    order = await generate(services, body)
    assert order.flags == DETAILS | PREFILL
    assert order.sampling.prompt_logprobs


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({"type": "json", "value": SCHEMA}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"type": "json", "value": SCHEMA_TEXT}, Grammar("json_schema", SCHEMA_TEXT)),
        (
            {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}},
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        ({"type": "regex", "value": "a+"}, Grammar("regex", "a+")),
        ({"type": "ebnf", "value": 'root: "a"'}, Grammar("ebnf", 'root: "a"')),
        (None, None),
    ],
)
async def test_tgis_grammars(services: Services, grammar: Any, expected: Grammar | None) -> None:
    """The order of a schema's members stays: answers have the same order."""
    assert (await sampling(services, grammar=grammar)).grammar == expected


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "json", "value": 7}, "grammar is not supported"),
        ({"type": "json", "value": "[]"}, "grammar is not supported"),
        ({"type": "json", "value": "{"}, "grammar is not valid"),
        ({"type": "json", "value": {"type": "string"}}, "must have a 'properties' field"),
        ({"type": "json", "value": "{}"}, "must have a 'properties' field"),
        ({"type": "json_schema", "value": {"schema": {}}}, "must have a 'properties' field"),
        ({"type": "json"}, "misses the field `value`"),
        ({"type": "yaml", "value": "a"}, "`grammar.type` must be one of"),
        ("a+", "`grammar.type` must be one of"),
        ({"type": "json_schema", "value": SCHEMA}, "`grammar.value` misses the field `schema`"),
        ({"type": "regex", "value": ""}, "must be a text that is not empty"),
        ({"type": "regex", "value": {}}, "must be a text that is not empty"),
        ({"type": "regex", "value": "a" * (MAX_GRAMMAR_BYTES + 1)}, "at most 256 KiB"),
    ],
)
async def test_a_grammar_of_no_shape_is_refused(
    services: Services, grammar: Any, message: str
) -> None:
    told = await refusal(services, sampling, grammar=grammar)
    assert told.code == "BAD_REQUEST"
    assert told.message.startswith("Input validation error: ")
    assert message in told.message


async def test_an_adapter_is_known_by_its_name(tmp_path: Path) -> None:
    adapters = AdapterStore(tmp_path / "adapters", "m")
    version = adapters.add(str(write_adapter(tmp_path / "made")), "polite").version
    services = parsing_services(tmp_path / "data", adapters)
    body = {"inputs": "hi", "parameters": {"adapter_id": "polite"}}
    assert (await generate(services, body)).adapter == version
    assert (await converse(services, model="polite")).adapter == version
    assert (await complete(services, model="polite")).adapter == version
    assert (await converse(services, model="any other name")).adapter == ""
    told = await refusal(services, sampling, adapter_id="rude")
    assert (told.code, told.field) == ("ADAPTER_NOT_FOUND", "adapter_id")


# OpenAI ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", [converse, complete])
async def test_every_openai_parameter_reaches_the_sampler(services: Services, api: Any) -> None:
    order = await api(
        services,
        temperature=0.7, top_p=0.9, top_k=9, min_p=0.1, typical_p=0.8, frequency_penalty=-0.5,
        presence_penalty=0.5, repetition_penalty=1.1, logit_bias={"65": 100, "66": -1.5}, seed=3,
        max_tokens=20, min_tokens=2, stop_token_ids=[65, 66], n=3,
    )  # fmt: skip
    told = order.sampling
    assert (told.temperature, told.top_p, told.top_k, told.min_p) == (0.7, 0.9, 9, 0.1)
    assert (told.typical_p, told.frequency_penalty, told.presence_penalty) == (0.8, -0.5, 0.5)
    assert (told.repetition_penalty, told.logit_bias) == (1.1, {65: 100.0, 66: -1.5})
    assert (told.min_new_tokens, told.stop_token_ids) == (2, (65, 66))
    assert (order.num_choices, order.num_best) == (3, 0)


@pytest.mark.parametrize("api", [converse, complete])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"65": 101}}, "logit_bias.65"),
        ({"logit_bias": {"65": "1"}}, "logit_bias.65"),
        ({"logit_bias": {"65": True}}, "logit_bias.65"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
         "response_format.json_schema"),
        ({"guided_json": 7}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": {"tag": 1}}, "structured_outputs.tag"),
        ({"structured_outputs": "x"}, "structured_outputs"),
    ],
)  # fmt: skip
async def test_what_is_out_of_range_is_named(
    services: Services, api: Any, fields: dict[str, Any], field: str
) -> None:
    told = await refusal(services, api, **fields)
    assert told.field == field
    assert told.kind.status == 400


async def test_a_large_limit_is_written_out(services: Services) -> None:
    told = await refusal(services, converse, max_tokens=-3)
    assert told.message == "`max_tokens` must be between 1 and 4294967295"


async def test_no_top_k_has_two_spellings(services: Services) -> None:
    assert [(await converse(services, top_k=k)).sampling.top_k for k in (0, -1)] == [0, 0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        (
            {"response_format": {"type": "json_object", "value": SCHEMA}},
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        (
            {"response_format": {"type": "json_schema", "value": {"schema": SCHEMA}}},
            Grammar("json_schema", SCHEMA_TEXT),
        ),
        ({"response_format": {"type": "regex", "value": "a|b"}}, Grammar("regex", "a|b")),
        ({"guided_json": SCHEMA}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"guided_json": {"type": "string"}}, Grammar("json_schema", '{"type":"string"}')),
        ({"guided_json": SCHEMA_TEXT}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_grammar": 'root: "a"'}, Grammar("ebnf", 'root: "a"')),
        ({"guided_choice": ["yes", "no (1.5)"]}, Grammar("regex", r"yes|no \(1\.5\)")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SCHEMA_TEXT)),
        ({"structured_outputs": {"choice": ["a"], "regex": None}}, Grammar("regex", "a")),
    ],
)
async def test_the_ways_to_constrain_an_answer(
    services: Services, fields: dict[str, Any], expected: Grammar | None
) -> None:
    assert (await converse(services, **fields)).sampling.grammar == expected
    assert (await complete(services, **fields)).sampling.grammar == expected


async def test_chat_logprobs(services: Services) -> None:
    order = await converse(services, logprobs=True, top_logprobs=20)
    assert (order.flags, order.sampling.top_logprobs) == (LOGPROBS, 20)
    assert (await converse(services, logprobs=True)).sampling.top_logprobs == 0
    assert (await refusal(services, converse, top_logprobs=2)).field == "top_logprobs"
    assert (await refusal(services, converse, logprobs=True, top_logprobs=21)).field


async def test_completion_logprobs_and_echo(services: Services) -> None:
    order = await complete(services, logprobs=0)
    assert (order.flags, order.sampling.prompt_logprobs) == (LOGPROBS, False)
    order = await complete(services, prompt=[104, 105], logprobs=5, echo=True, max_tokens=1)
    assert (order.flags, order.prompt_text) == (LOGPROBS | ECHO, "hi")
    assert (order.sampling.top_logprobs, order.sampling.prompt_logprobs) == (5, True)
    order = await complete(services, echo=True, max_tokens=0)
    assert order.flags == ECHO
    assert (order.sampling.max_new_tokens, order.sampling.prompt_logprobs) == (0, False)


async def test_several_prompts_are_as_many_orders(services: Services) -> None:
    orders = await complete_all(services, prompt=["hi", [104], "you"], n=2, best_of=3)
    assert [order.prompt for order in orders] == [[104, 105], [104], [121, 111, 117]]
    assert {(order.num_choices, order.num_best) for order in orders} == {(3, 2)}
