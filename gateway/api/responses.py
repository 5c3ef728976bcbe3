"""``/v1/responses``: OpenAI's Responses API for text, over the same queue and the same token logs.

A stored response is its token log and a document, kept for a time after its end; while they are
kept, any gateway shows it, streams it again from any event, or takes a conversation on from it.
"""

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import structlog
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.broker import Attachment, Broker
from common.failures import Failure
from common.ids import generation_id, is_request_id, request_of
from common.logs import get_logger
from gateway.account import Account
from gateway.answer import answer, event_stream, turn_away_early
from gateway.api.chat import MAX_TOP_LOGPROBS
from gateway.api.items import items_of, said_by
from gateway.api.lists import is_newest_first, page_limit, shown_page
from gateway.api.openai import OpenAiBody, Wanted, lane_of, order
from gateway.api.tools import Said, ToolUse, chat_form, render, tool_use
from gateway.bodies import (
    MAX_NEW_TOKENS,
    check_range,
    number_in,
    read_body,
    refuse_unsupported,
    unsupported,
)
from gateway.callers import caller_of
from gateway.collect import Completion
from gateway.frames import Subject
from gateway.middleware import arrival_of
from gateway.order import LOGPROBS, Order, ResponseDocument
from gateway.responses import (
    PREFIX,
    ResponseFrames,
    document_of,
    output_items,
    read_document,
    read_log,
    response_object,
    subject_of,
)
from gateway.services import Offer, Services, services_of
from gateway.stream import Stream

log = get_logger()

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_ITEMS_PAGE = 100
DEFAULT_ITEMS_PAGE = 20
MAX_EVENT_NUMBER = 999_999_999

_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = frozenset({_LOGPROBS, "reasoning.encrypted_content"})
"""What ``include`` may name; there is no reasoning here to be encrypted."""


class ResponseBody(OpenAiBody, kw_only=True):
    """Beside its own parameters it takes what the other routes take to choose tokens."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: Any = None
    text: Any = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Any = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    # Known, and supported only with a value that changes nothing:
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    moderation: Any = None
    personality: Any = None
    prompt: Any = None
    reasoning: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background_options": ({}, {"completion_window": "soonest"}),
    "context_management": ([],),
    "conversation": (),
    "max_tokens": (),
    "moderation": (),
    "n": (1,),
    "personality": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "response_format": (),
    "truncation": ("disabled",),
}

decoder = msgspec.json.Decoder(ResponseBody)


async def create_response(request: Request) -> Response:
    services = services_of(request)
    body = await read_body(request, decoder)
    await turn_away_early(request, lane_of(body.service_tier))
    made = await order_of(services, services.broker, caller_of(request).tenant, body)
    if made.document is not None and made.document.is_stored:
        made = replace(made, retention_s=services.settings.response_retention_s)
    return await answer(request, made)


async def order_of(offer: Offer, broker: Broker, tenant: str, body: ResponseBody) -> Order:
    """``broker`` knows the responses of ``tenant`` that this one may follow on.

    Raises: Failure, for what the caller can put right.
    """
    refuse_unsupported(body, _NEUTRAL)
    _check(body)
    tells_logprobs = body.top_logprobs is not None or _LOGPROBS in (body.include or [])
    put_in = await _put_in(offer, broker, tenant, body)
    body.response_format = _format(body.text)
    wanted = Wanted(
        max_tokens=body.max_output_tokens,
        num_choices=1,
        flags=LOGPROBS * tells_logprobs,
        top_logprobs=body.top_logprobs or 0,
        tools=put_in.use,
    )
    made = order(
        offer,
        body,
        "response",
        put_in.prompt,
        wanted,
        num_prompt_characters=put_in.num_characters,
    )
    document = ResponseDocument(
        tenant=tenant,
        echo=_echo(body, made),
        items=put_in.items,
        is_background=bool(body.background),
        is_stored=body.store is not False,
    )
    return replace(made, document=document)


@dataclass(frozen=True, slots=True)
class _PutIn:
    """What a body puts in, and the prompt that it becomes."""

    items: list[dict[str, Any]]
    use: ToolUse | None
    prompt: list[int]
    num_characters: int


async def _put_in(offer: Offer, broker: Broker, tenant: str, body: ResponseBody) -> _PutIn:
    before = await _conversation(offer, broker, tenant, body.previous_response_id)
    items = [*before, *items_of(body.input)]
    use = tool_use(*chat_form(body.tools, body.tool_choice), parallel=body.parallel_tool_calls)
    instructions = [Said("system", body.instructions)] if body.instructions else []
    text = await render(offer, instructions + said_by(items), use, continues=False)
    prompt = await offer.model.tokenizer.encode_async(text, add_special_tokens=False)
    return _PutIn(items, use, prompt, len(text))


async def count_input_tokens(request: Request) -> Response:
    """How many tokens a response would read; nothing is queued.

    Raises: Failure, as a response with this body would.
    """
    services = services_of(request)
    body = await read_body(request, decoder)
    refuse_unsupported(body, _NEUTRAL)
    _check(body)
    put_in = await _put_in(services, services.broker, caller_of(request).tenant, body)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(put_in.prompt)})


def _check(body: ResponseBody) -> None:
    check_range("max_output_tokens", body.max_output_tokens, 1, MAX_NEW_TOKENS)
    check_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if body.input is None:
        raise Failure("BAD_REQUEST", "`input` must not be null", field="input")
    if body.background and body.store is False:
        raise Failure(
            "BAD_REQUEST", "`background` needs `store`: nobody could fetch it", field="background"
        )
    _check_included(body.include or [])
    check_metadata(body.metadata)


def _check_included(names: list[str]) -> None:
    for name in names:
        if name not in _INCLUDED:
            raise unsupported("include", f"names {name[:80]!r}, which is not supported")


def _check_query(query: QueryParams) -> None:
    """What a ``GET`` may ask for beside pages and events; SDKs write a list as ``include[]``."""
    _check_included(query.getlist("include") + query.getlist("include[]"))
    if query.get("include_obfuscation", "false") not in ("false", "0"):
        raise unsupported("include_obfuscation")


def check_metadata(metadata: Any) -> None:
    """Raises: Failure BAD_REQUEST."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise Failure(
            "BAD_REQUEST", f"`metadata` must be an object of up to {MAX_METADATA}", field="metadata"
        )
    for name, value in metadata.items():
        if not isinstance(value, str) or len(value) > MAX_METADATA_VALUE:
            raise Failure(
                "BAD_REQUEST",
                f"`metadata.{name[:MAX_METADATA_KEY]}` must be a text of up to "
                f"{MAX_METADATA_VALUE} characters",
                field="metadata",
            )
        if len(name) > MAX_METADATA_KEY:
            raise Failure(
                "BAD_REQUEST",
                f"a name in `metadata` may have up to {MAX_METADATA_KEY} characters",
                field="metadata",
            )


def _format(text: Any) -> Any:
    """``text.format`` as a chat's ``response_format``: there its schema lies one level deeper."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise Failure("BAD_REQUEST", "`text` must be an object", field="text")
    if text.get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity")
    match text.get("format"):
        case {"type": "json_schema", **schema}:
            return {"type": "json_schema", "json_schema": schema}
        case form:
            return form


def _echo(body: ResponseBody, made: Order) -> dict[str, Any]:
    """What a response repeats of its request."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": made.lane,
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | (body.text or {}),
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


# What was made before ----------------------------------------------------------------------------


async def _conversation(
    offer: Offer, broker: Broker, tenant: str, previous_id: str | None
) -> list[dict[str, Any]]:
    """The items before, and the answer to them, where this one follows on a response.

    Raises: Failure BAD_REQUEST, where that cannot be followed on.
    """
    if previous_id is None:
        return []
    field = "previous_response_id"
    try:
        found = await _find(offer, broker, tenant, previous_id)
    except Failure as failure:
        message = f"Previous response with id {previous_id[:80]!r} not found."
        raise Failure("BAD_REQUEST", message, field=field) from failure
    if not found.whole.finish.reason:
        message = f"The response {previous_id[:80]!r} has not ended yet."
        raise Failure("BAD_REQUEST", message, field=field)
    answer = output_items(found.subject, found.whole, offer.model.tokenizer)
    return [*document_of(found.subject).items, *answer]


@dataclass(frozen=True, slots=True)
class _Found:
    subject: Subject
    whole: Completion
    state: str

    def shown(self, services: Services) -> dict[str, Any]:
        return response_object(
            self.subject, self.whole, services.model.tokenizer, is_waiting=self.state == "Q"
        )


async def _find(offer: Offer, broker: Broker, tenant: str, response_id: str) -> _Found:
    """Raises: Failure NOT_FOUND, also for another tenant's and for one that was not stored."""
    request_id, document = await _load(broker, tenant, response_id)
    found = await read_log(broker, generation_id(request_id))
    if found is None:
        raise _not_found(response_id)
    whole, state = found
    return _Found(subject_of(offer, request_id, document), whole, state)


async def _found(request: Request, response_id: str) -> _Found:
    services = services_of(request)
    return await _find(services, services.broker, caller_of(request).tenant, response_id)


async def _loaded(request: Request) -> tuple[str, ResponseDocument]:
    """Of the response that the path names."""
    broker, tenant = services_of(request).broker, caller_of(request).tenant
    return await _load(broker, tenant, request.path_params["id"])


async def _load(broker: Broker, tenant: str, response_id: str) -> tuple[str, ResponseDocument]:
    """The request that made a response, and its document.

    Raises: Failure NOT_FOUND, also for another tenant's and for one that was not stored.
    """
    request_id = response_id.removeprefix(PREFIX)
    if response_id.startswith(PREFIX) and is_request_id(request_id):
        document = await read_document(broker, request_id)
        if document and document.is_stored and document.tenant == tenant:
            return request_id, document
    raise _not_found(response_id)


def _not_found(response_id: str) -> Failure:
    return Failure("NOT_FOUND", f"Response with id {response_id[:80]!r} not found.")


async def show_response(request: Request) -> Response:
    """The response as it is now, or, with ``?stream=true``, its events behind ``starting_after``.

    Raises: Failure NOT_FOUND, BAD_REQUEST.
    """
    query = request.query_params
    _check_query(query)
    if query.get("stream") in ("true", "1"):
        return await _stream(request, _event_number(query))
    found = await _found(request, request.path_params["id"])
    return JSONResponse(found.shown(services_of(request)))


async def _stream(request: Request, after: int) -> Response:
    services = services_of(request)
    request_id, document = await _loaded(request)
    stream = services.relay.open(generation_id(request_id), caller_of(request).tenant)
    try:
        attachment = await _attach(services, stream)
    except BaseException:
        services.relay.close(stream)
        raise
    services.metrics.resumes.labels("resumed").inc()
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if after < 0:
        log.info("stream.opened", job_id=stream.id)
    else:
        log.info("stream.resumed", job_id=stream.id, last_event_id=str(after))
    account = Account(
        services.metrics,
        "resume",
        arrival_of(request),
        stream_id=request_id,
        resumed_from=str(after + 1),
        resumed_api="response",
    )
    subject = subject_of(services, request_id, document)
    frames = ResponseFrames(subject, services.model.tokenizer, after=after)
    return event_stream(services, [stream], frames, account, headers=_headers(attachment))


async def _attach(services: Services, stream: Stream) -> Attachment:
    attachment = await services.relay.attach(stream)
    if attachment is None:
        raise _not_found(PREFIX + request_of(stream.id))
    stream.check()
    return attachment


def _headers(attachment: Attachment) -> dict[str, str]:
    return {
        "x-model-version": attachment.model_version,
        "x-stream-retention-seconds": str(attachment.retention_ms // 1000),
    }


def _event_number(query: QueryParams) -> int:
    """The last event that the client has seen; -1: none."""
    text = query.get("starting_after")
    return -1 if text is None else number_in("starting_after", text, 0, MAX_EVENT_NUMBER)


async def list_input_items(request: Request) -> Response:
    """All that was put in, conversation included; the newest first, as OpenAI lists it.

    Raises: Failure NOT_FOUND, BAD_REQUEST.
    """
    _, document = await _loaded(request)
    query = request.query_params
    _check_query(query)
    limit = page_limit(query, default=DEFAULT_ITEMS_PAGE, most=MAX_ITEMS_PAGE)
    items = document.items[::-1] if is_newest_first(query) else document.items
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise Failure("BAD_REQUEST", "`after` must be the id of an item", field="after")
        items = items[ids.index(after) + 1 :]
    return shown_page(items[:limit], has_more=len(items) > limit)


async def cancel_response(request: Request) -> Response:
    """End a response in the background; one that has ended stays as it is.

    Raises: Failure NOT_FOUND, BAD_REQUEST, BROKER_UNAVAILABLE.
    """
    services = services_of(request)
    request_id, document = await _loaded(request)
    if not document.is_background:
        raise Failure("BAD_REQUEST", "Only a response in the background can be cancelled.")
    state = await services.relay.cancel(request_id, document.tenant)
    log.info("generation.cancelled", stream_id=request_id, state=state, cause="asked")
    found = await _found(request, PREFIX + request_id)
    return JSONResponse(found.shown(services))


async def delete_response(request: Request) -> Response:
    """End a response, if it has not ended, and remove all that is kept of it.

    Raises: Failure NOT_FOUND, BROKER_UNAVAILABLE.
    """
    services = services_of(request)
    request_id, document = await _loaded(request)
    await services.broker.forget(generation_id(request_id), document.tenant, for_good=True)
    log.info("response.deleted", stream_id=request_id)
    return JSONResponse({"id": PREFIX + request_id, "object": "response", "deleted": True})


routes = [
    Route("/v1/responses", create_response, methods=["POST"]),
    Route("/v1/responses/input_tokens", count_input_tokens, methods=["POST"]),
    Route("/v1/responses/{id}", show_response, methods=["GET"]),
    Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
    Route("/v1/responses/{id}/cancel", cancel_response, methods=["POST"]),
    Route("/v1/responses/{id}/input_items", list_input_items, methods=["GET"]),
]
