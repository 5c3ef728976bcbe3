"""``POST /v1/completions``: prompts as text or as token ids, OpenAI's parameters.

Several prompts are as many requests, answered together; that needs an answer in one piece.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer, turn_away_early
from gateway.api.openai import OpenAiBody, Wanted, lane_of, num_choices, order
from gateway.bodies import MAX_NEW_TOKENS, check_range, max_prompt_items, read_body, unsupported
from gateway.order import ECHO, LOGPROBS, Order
from gateway.services import Offer, services_of

MAX_LOGPROBS = 5


class CompletionBody(OpenAiBody, kw_only=True):
    prompt: str | list[Any]
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: Any = None


decoder = msgspec.json.Decoder(CompletionBody)


async def completions(request: Request) -> Response:
    services = services_of(request)
    max_items = max_prompt_items(services.model.max_total_tokens)
    return await answer_completion(request, await read_body(request, decoder, max_items))


async def answer_completion(request: Request, body: CompletionBody) -> Response:
    await turn_away_early(request, lane_of(body.service_tier))
    return await answer(request, *await orders_of(services_of(request), body))


async def orders_of(offer: Offer, body: CompletionBody) -> list[Order]:
    """One for each prompt.

    Raises: Failure BAD_REQUEST, UNSUPPORTED_PARAMETER, CONTEXT_LENGTH_EXCEEDED.
    """
    if body.suffix:
        raise unsupported(
            "suffix", "is not supported and can be achieved by preprocessing the prompt."
        )
    wanted = _wanted(body)
    prompts = _prompts(body.prompt, offer.settings.max_client_batch_size)
    if len(prompts) > 1 and body.stream:
        raise unsupported("stream", "is not supported for more than one prompt")
    return [await _order(offer, body, prompt, wanted) for prompt in prompts]


async def _order(offer: Offer, body: CompletionBody, prompt: Any, wanted: Wanted) -> Order:
    tokenizer = offer.model.tokenizer
    if isinstance(prompt, str):
        tokens = await tokenizer.encode_async(prompt)
    else:
        tokens = _token_ids(prompt, tokenizer.vocab_size)
    if not tokens:
        raise Failure("BAD_REQUEST", "`prompt` must not be empty", field="prompt")
    text = prompt if isinstance(prompt, str) else ""
    echoed = ""
    if body.echo:
        echoed = text or tokenizer.decode(tokens, skip_special_tokens=False)
    return order(
        offer,
        body,
        "completion",
        tokens,
        wanted,
        prompt_text=echoed,
        num_prompt_characters=len(text),
    )


def _wanted(body: CompletionBody) -> Wanted:
    check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    n = num_choices("n", body.n)
    best_of = n if body.best_of is None else num_choices("best_of", body.best_of)
    if best_of < n:
        raise Failure("BAD_REQUEST", "`best_of` must be at least `n`", field="best_of")
    if best_of > n and body.stream:
        raise Failure(
            "BAD_REQUEST", "`best_of` cannot be more than `n` in a stream", field="best_of"
        )
    # Nothing but the prompt, with what the model says of it: that is no stream.
    may_be_none = bool(body.echo) and not body.stream
    check_range("max_tokens", body.max_tokens, 0 if may_be_none else 1, MAX_NEW_TOKENS)
    has_logprobs = body.logprobs is not None
    return Wanted(
        max_tokens=body.max_tokens,
        num_choices=best_of,
        num_best=n if best_of > n else 0,
        flags=LOGPROBS * has_logprobs | ECHO * bool(body.echo),
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=has_logprobs and bool(body.echo),
    )


def _prompts(prompt: str | list[Any], limit: int) -> list[Any]:
    """Each prompt alone: a list of numbers is one, any other list holds several."""
    if prompt == []:
        raise Failure(
            "BAD_REQUEST",
            "Empty array detected. Do not use an empty array for the prompt.",
            field="prompt",
        )
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > limit:
        raise Failure(
            "BAD_REQUEST",
            f"Number of prompts exceeds the maximum allowed batch size of {limit}",
            field="prompt",
        )
    return prompts


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
