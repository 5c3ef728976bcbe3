"""``POST /v1/chat/completions``: OpenAI's parameters, TGI's leniency about nulls and model names.

A conversation whose last message is the assistant's is continued, as in TGI.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer, turn_away_early
from gateway.api.openai import OpenAiBody, Wanted, lane_of, num_choices, order
from gateway.api.tools import Said, SaidCall, ToolUse, render, said_call, tool_use
from gateway.bodies import MAX_NEW_TOKENS, check_range, read_body, refuse_unsupported, unsupported
from gateway.order import LOGPROBS, Order
from gateway.services import Offer, services_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Roles that are taken, and what the template is given. No others: a role is text in the prompt."""


MAX_TOP_LOGPROBS = 20


class Part(msgspec.Struct):
    type: str
    text: str = ""
    refusal: str = ""


class CalledFunction(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class ToolCall(msgspec.Struct):
    """A call that the model made before."""

    id: Any = None
    type: str = "function"
    function: CalledFunction | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    # Known, and supported only as null:
    audio: Any = None
    function_call: Any = None


class ChatBody(OpenAiBody, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # Known, and supported only with a value that changes nothing:
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

decoder = msgspec.json.Decoder(ChatBody)


async def chat_completions(request: Request) -> Response:
    return await answer_chat(request, await read_body(request, decoder))


async def answer_chat(request: Request, body: ChatBody) -> Response:
    await turn_away_early(request, lane_of(body.service_tier))
    return await answer(request, await order_of(services_of(request), body))


async def order_of(offer: Offer, body: ChatBody) -> Order:
    """Raises: Failure, for what the caller can put right."""
    refuse_unsupported(body, _NEUTRAL)
    wanted = _wanted(body)
    text = await templated(offer, body)
    prompt = await offer.model.tokenizer.encode_async(text, add_special_tokens=False)
    return order(offer, body, "chat", prompt, wanted, num_prompt_characters=len(text))


async def templated(offer: Offer, body: ChatBody) -> str:
    """The prompt that the model's template makes of a conversation.

    Raises: Failure BAD_REQUEST, UNSUPPORTED_PARAMETER, TEMPLATE_ERROR.
    """
    said = [_said(f"messages[{index}]", message) for index, message in enumerate(body.messages)]
    if not said:
        raise Failure("BAD_REQUEST", "`messages` must not be empty", field="messages")
    continues = said[-1].role == "assistant" and not said[-1].calls
    return await render(offer, said, _tool_use(body), continues=continues)


def _tool_use(body: ChatBody) -> ToolUse | None:
    return tool_use(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)


def _wanted(body: ChatBody) -> Wanted:
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise Failure(
            "BAD_REQUEST",
            "`max_tokens` and `max_completion_tokens` are the same: send one of them",
            field="max_tokens",
        )
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    check_range("max_tokens", max_tokens, 1, MAX_NEW_TOKENS)
    check_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if body.top_logprobs and not body.logprobs:
        raise Failure(
            "BAD_REQUEST", "`top_logprobs` needs `logprobs` to be true", field="top_logprobs"
        )
    return Wanted(
        max_tokens=max_tokens,
        num_choices=num_choices("n", body.n),
        flags=LOGPROBS * bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        tools=_tool_use(body),
    )


def _said(field: str, message: Message) -> Said:
    """A message as the template takes it: a role, plain text, and calls."""
    if message.role not in ROLES:
        raise Failure(
            "BAD_REQUEST",
            f"`{field}.role` must be one of {', '.join(ROLES)}",
            field=f"{field}.role",
        )
    calls = [
        _said_call(f"{field}.tool_calls[{index}]", call)
        for index, call in enumerate(message.tool_calls or [])
    ]
    if calls and message.role != "assistant":
        raise Failure(
            "BAD_REQUEST",
            f"`{field}.tool_calls`: only the assistant calls tools",
            field=f"{field}.tool_calls",
        )
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise unsupported(f"{field}.{name}")
    content = message.refusal if message.content is None else message.content
    if content is None and not calls:
        raise Failure(
            "BAD_REQUEST", f"`{field}.content` must not be null", field=f"{field}.content"
        )
    text = _text(field, content or "")
    return Said(ROLES[message.role], text, calls, message.tool_call_id or "")


def _said_call(field: str, call: ToolCall) -> SaidCall:
    if call.type != "function" or call.function is None:
        raise unsupported(f"{field}.type", f"is {call.type[:80]!r}; only functions are supported")
    return said_call(f"{field}.function", call.id, call.function.name, call.function.arguments)


def _text(field: str, content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "refusal"):
            raise unsupported(f"{field}.content", f"has a part of type {part.type!r}; only text is")
    return "".join(part.text or part.refusal for part in content)


routes = [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
