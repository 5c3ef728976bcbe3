"""``POST /v1/completions``: a prompt as text or as token ids, OpenAI's parameters."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer
from gateway.api.chat import StreamOptions
from gateway.bodies import lane_of, openai_sampling, read_body, refuse_unsupported, unsupported
from gateway.order import INCLUDE_USAGE, SHOW_TIER, Order
from gateway.services import Services, services_of


class CompletionBody(msgspec.Struct):
    """Every optional field may be null."""

    prompt: str | list[Any]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    # Known, and supported only with a value that changes nothing:
    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    ignore_eos: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    min_p: Any = None
    n: Any = None
    presence_penalty: Any = None
    suffix: Any = None
    typical_p: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logit_bias": ({}, []),
    "logprobs": (),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "typical_p": (1,),
}

_decoder = msgspec.json.Decoder(CompletionBody)


async def completions(request: Request) -> Response:
    body = await read_body(request, _decoder)
    return await answer(request, await _order(services_of(request), body))


async def _order(services: Services, body: CompletionBody) -> Order:
    """Raises: Failure BAD_REQUEST, UNSUPPORTED_PARAMETER, CONTEXT_LENGTH_EXCEEDED."""
    refuse_unsupported(body, _NEUTRAL)
    lane = lane_of(body.service_tier)
    prompt = await _prompt(services, body.prompt)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return Order(
        api="completion",
        prompt=prompt,
        sampling=openai_sampling(
            services.model,
            len(prompt),
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            stop=body.stop,
            max_stop_sequences=services.settings.max_stop_sequences,
        ),
        stream=bool(body.stream),
        flags=INCLUDE_USAGE * include_usage | SHOW_TIER * (body.service_tier is not None),
        lane=lane,
    )


async def _prompt(services: Services, prompt: str | list[Any]) -> list[int]:
    """The prompt's tokens. Lists of one prompt are taken, of several not yet."""
    if prompt == []:
        raise Failure(
            "BAD_REQUEST",
            "Empty array detected. Do not use an empty array for the prompt.",
            field="prompt",
        )
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise unsupported("prompt", "with more than one prompt is not supported yet")
        prompt = prompt[0]
    if isinstance(prompt, str):
        tokens = await services.model.tokenizer.encode_async(prompt)
    else:
        tokens = _token_ids(prompt, services.model.tokenizer.vocab_size)
    if not tokens:
        raise Failure("BAD_REQUEST", "`prompt` must not be empty", field="prompt")
    return tokens


def _token_ids(prompt: object, vocab_size: int) -> list[int]:
    is_valid = isinstance(prompt, list) and all(
        type(token) is int and 0 <= token < vocab_size for token in prompt
    )
    if not is_valid:
        raise Failure(
            "BAD_REQUEST",
            f"`prompt` must be text or token ids from 0 to {vocab_size - 1}",
            field="prompt",
        )
    return prompt  # pyright: ignore[reportReturnType] - checked element by element above


routes = [Route("/v1/completions", completions, methods=["POST"])]
