"""``POST /v1/completions``: a prompt as text or as token ids, OpenAI's parameters."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer
from gateway.api.openai import OpenAiBody, check_supported, order
from gateway.bodies import read_body, unsupported
from gateway.order import Order
from gateway.services import Services, services_of


class CompletionBody(OpenAiBody, kw_only=True):
    prompt: str | list[Any]
    # Known, and supported only with a value that changes nothing:
    echo: Any = None
    suffix: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {"echo": (False,), "logprobs": (), "suffix": ("",)}

_decoder = msgspec.json.Decoder(CompletionBody)


async def completions(request: Request) -> Response:
    body = await read_body(request, _decoder)
    return await answer(request, await _order(services_of(request), body))


async def _order(services: Services, body: CompletionBody) -> Order:
    """Raises: Failure BAD_REQUEST, UNSUPPORTED_PARAMETER, CONTEXT_LENGTH_EXCEEDED."""
    check_supported(body, _NEUTRAL)
    prompt = await _prompt(services, body.prompt)
    return order(services, body, "completion", prompt, max_tokens=body.max_tokens)


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
