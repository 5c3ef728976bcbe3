"""``POST /v1/chat/completions``: OpenAI's parameters, TGI's leniency about nulls and model names.

Temperature 0 is greedy, everything else samples (default 1.0). A conversation whose last message is
the assistant's is continued, as in TGI. Beside OpenAI's, ``top_k`` and ``repetition_penalty`` are
taken, as TGI and vLLM do.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer
from gateway.bodies import lane_of, openai_sampling, read_body, refuse_unsupported, unsupported
from gateway.order import INCLUDE_USAGE, SHOW_TIER, Order
from gateway.services import Services, services_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Roles that are taken, and what the template is given. No others: a role is text in the prompt."""


class Part(msgspec.Struct):
    type: str
    text: str = ""


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatBody(msgspec.Struct):
    """Every optional field may be null. ``model`` may be any name: there is one model here."""

    messages: list[Message]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
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
    audio: Any = None
    best_of: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    ignore_eos: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    min_p: Any = None
    modalities: Any = None
    n: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    typical_p: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logit_bias": ({}, []),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_decoder = msgspec.json.Decoder(ChatBody)


async def chat_completions(request: Request) -> Response:
    body = await read_body(request, _decoder)
    return await answer(request, await _order(services_of(request), body))


async def _order(services: Services, body: ChatBody) -> Order:
    """Raises: Failure, for what the caller can put right."""
    refuse_unsupported(body, _NEUTRAL)
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise Failure(
            "BAD_REQUEST",
            "`max_tokens` and `max_completion_tokens` are the same: send one of them",
            field="max_tokens",
        )
    lane = lane_of(body.service_tier)
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    if not messages:
        raise Failure("BAD_REQUEST", "`messages` must not be empty", field="messages")
    continues = messages[-1]["role"] == "assistant"
    text = await services.model.chat_template.render_async(
        messages, add_generation_prompt=not continues, continue_final_message=continues
    )
    prompt = await services.model.tokenizer.encode_async(text, add_special_tokens=False)
    max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return Order(
        api="chat",
        prompt=prompt,
        sampling=openai_sampling(
            services.model,
            len(prompt),
            max_tokens=max_tokens,
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
        num_prompt_characters=len(text),
        lane=lane,
    )


def _message(index: int, message: Message) -> dict[str, str]:
    """A message as the template takes it: a role and plain text."""
    field = f"messages[{index}]"
    if message.role not in ROLES:
        raise Failure(
            "BAD_REQUEST",
            f"`{field}.role` must be one of {', '.join(ROLES)}",
            field=f"{field}.role",
        )
    if message.tool_calls:
        raise unsupported(f"{field}.tool_calls")
    if message.content is None:
        raise Failure(
            "BAD_REQUEST", f"`{field}.content` must not be null", field=f"{field}.content"
        )
    return {"role": ROLES[message.role], "content": _text(field, message.content)}


def _text(field: str, content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text":
            raise unsupported(f"{field}.content", f"has a part of type {part.type!r}; only text is")
    return "".join(part.text for part in content)


routes = [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
