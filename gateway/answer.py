"""From a valid order to its answer: the path of every prompt through the gateway."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from common.broker import Presentation
from common.failures import Failure
from common.logs import get_logger
from common.messages import Lane, Sampling
from common.models.tokenizer import Tokenizer
from common.request_metrics import tenant_class_of
from common.spans import Kind
from gateway.account import Account
from gateway.admission import Manner, Ticket, manner_of, pack_tokens, retention_s
from gateway.callers import caller_of, permitted
from gateway.choices import Choices
from gateway.collect import Completion, Reply, body_of, collect_all, reply_of
from gateway.errors import failure_response, rate_limit_headers, status_of, wire_of
from gateway.frames import Frames, Interleaved, Subject, frames_for
from gateway.idempotency import Idempotency, idempotency_of, key_in
from gateway.middleware import arrival_of, client_request_id, own_trace, request_id_of, span_of
from gateway.order import TOOLS, Order
from gateway.responses import ResponseFrames, keep_document, nothing, response_object
from gateway.services import Offer, Services, services_of
from gateway.sse import EventStream, abandoned_on_disconnect, wants_queue_events
from gateway.stream import ReaderGone, Stream

log = get_logger()

CLIENT_LEFT = 499
"""Status in logs only: nobody is left to read it."""
COMPUTE_TYPE = "headrace"
WORTH_ASKING_BYTES = 8 * 1024
"""Some 2,000 tokens, which take some milliseconds to be found; Redis answers in a tenth of one."""

_PRODUCT = re.compile(r"[\w.+-]+(/[\w.+-]+)?", re.ASCII)
"""The first product token of a user agent (RFC 9110, 10.1.5): comments may hold anything."""
_MAX_PRODUCT = 40
_MAX_RETRY_DIGITS = 4
_TOLD_APART = ("do_sample", "max_new_tokens", "seed", "temperature")
"""Parameters that have a field of their own in the log."""


async def answer(request: Request, *orders: Order) -> Response:
    """Queue the orders, follow their token logs, and bring the tokens to the client as they come.

    Several orders, which are several prompts, have one answer, in one piece.

    Raises: Failure, as a real status code: nothing has been sent yet.
    """
    services = services_of(request)
    if services.is_draining:
        raise Failure("DRAINING")
    caller = caller_of(request)
    orders = tuple(permitted(caller, order, services.model.name) for order in orders)
    asked = _tell_accepted(services, request, orders)
    _check_room(services, sum(order.num_choices for order in orders))
    order = orders[0]
    tells_place = wants_queue_events(request)
    idempotency = await idempotency_of(request)
    manner = _manner(services, request, order, resumable=order.stream or idempotency is not None)
    admitted = await _admit_all(services, request, orders, manner, idempotency)
    account = _open_account(services, request, manner, admitted, asked)
    subject = admitted[0].subject
    headers = {
        "x-headrace-stream-id": ", ".join(one.subject.request_id for one in admitted),
        "x-model-version": subject.model_version,
        "x-stream-retention-seconds": str(admitted[0].ticket.retention_s),
    }
    headers |= rate_limit_headers(admitted[-1].ticket.admitted.quota)
    if all(one.ticket.is_replayed for one in admitted):
        headers["idempotent-replayed"] = "true"
    if order.document is not None and order.document.is_background and not order.stream:
        return _promise(services, admitted[0], account, headers)
    if not order.stream:
        return await _whole(services, request, admitted, account, headers)
    streams = admitted[0].ticket.streams
    return event_stream(
        services,
        streams,
        _frames(services, subject),
        account,
        headers=headers | _compute_headers(orders),
        tells_place=tells_place,
    )


async def turn_away_early(request: Request, lane: Lane = "default") -> None:
    """Refuse, before anybody works on a long prompt, what would be refused whatever it holds. The
    body must have been read.

    A short prompt costs less than the question, so it is refused where it is admitted.

    Raises: Failure DRAINING, QUEUE_FULL, NO_WORKERS, RATE_LIMITED.
    """
    services = services_of(request)
    if services.is_draining:
        raise Failure("DRAINING")
    _check_room(services, num_wanted=1)
    if len(await request.body()) < WORTH_ASKING_BYTES:
        return
    caller, key = caller_of(request), key_in(request.headers)
    await services.admissions.foresee(caller, caller.lane_for(lane), key)


def _check_room(services: Services, num_wanted: int) -> None:
    """Raises: Failure QUEUE_FULL, beyond ``max_concurrent_requests``."""
    limit = services.settings.max_concurrent_requests
    if limit and services.relay.num_streams + num_wanted > limit:
        raise Failure("QUEUE_FULL", "Model is overloaded: too many requests are open here")


def _manner(services: Services, request: Request, order: Order, *, resumable: bool) -> Manner:
    """Nobody need wait for what runs in the background."""
    if order.document is not None and order.document.is_background:
        return Manner(None)
    return manner_of(request.headers, resumable=resumable, settings=services.settings)


@dataclass(frozen=True, slots=True)
class _Admitted:
    order: Order
    ticket: Ticket
    subject: Subject


async def _admit_all(
    services: Services,
    request: Request,
    orders: Sequence[Order],
    manner: Manner,
    idempotency: Idempotency | None,
) -> list[_Admitted]:
    """Admit all orders or none."""
    admitted: list[_Admitted] = []
    num_choices = 0
    try:
        first_id, trace = request_id_of(request), own_trace(request)
        for number, order in enumerate(orders):
            request_id = f"{first_id}-{number}" if number else first_id
            sent, began_s = trace.child(), time.time()
            ticket = await services.admissions.admit(
                caller_of(request),
                request_id,
                order,
                manner,
                part_of=first_id,
                trace=sent.parent,
                first_choice=num_choices,
                idempotency=idempotency,
            )
            _tell_enqueued(order, ticket)
            if services.spans is not None:
                services.spans.tell(
                    f"send {services.model.name}",
                    Kind.PRODUCER,
                    sent,
                    parent=trace,
                    began_s=began_s,
                    attributes={
                        "messaging.system": "redis",
                        "messaging.operation.type": "send",
                        "messaging.destination.name": services.model.name,
                        "messaging.message.id": request_id,
                        "headrace.lane": order.lane,
                    },
                )
            version = ticket.admitted.model_version or services.model.version
            subject = subject_of(
                services, order, ticket.admitted.request_id, ticket.presentation, version
            )
            admitted.append(_Admitted(order, ticket, subject))
            if subject.document is not None and not ticket.is_replayed:
                kept_s = retention_s(order, services.settings)
                await keep_document(services, subject.request_id, subject.document, kept_s)
            num_choices += order.num_choices
        if any(order.document and order.document.is_background for order in orders):
            await services.broker.durable()
    except BaseException:
        for one in admitted:
            services.admissions.withdraw(one.ticket)
        raise
    return admitted


def _tell_accepted(services: Services, request: Request, orders: Sequence[Order]) -> dict[str, Any]:
    """One line for a request that is good; returns its fields, which its last line repeats."""
    order, headers = orders[0], request.headers
    sampling = order.sampling
    asked: dict[str, Any] = {
        "stream": order.stream,
        "prompt_tokens": sum(len(order.prompt) for order in orders),
        "max_tokens": sampling.max_new_tokens,
        "prompt_sha256": services.callers.prompt_hash(
            b"".join(pack_tokens(order.prompt) for order in orders)
        ),
        "n": order.num_best or order.num_choices,
        "best_of": order.num_choices if order.num_best else 1,
        "grammar": sampling.grammar.kind if sampling.grammar else None,
        "sampling": "sample" if sampling.do_sample else "greedy",
        "temperature": sampling.temperature if sampling.do_sample else None,
        "seed": sampling.seed,
        **_numbers_of(sampling),
        "adapter": order.adapter,
        "tools": bool(order.flags & TOOLS),
    }
    if product := _PRODUCT.match(headers.get("user-agent", "")):
        asked["user_agent"] = product[0][:_MAX_PRODUCT]
    if (retries := headers.get("x-stainless-retry-count", "")).isdecimal():
        asked["retries"] = int(retries[:_MAX_RETRY_DIGITS])
    if named := client_request_id(headers):
        asked["client_request_id"] = named
    structlog.contextvars.bind_contextvars(lane=order.lane)
    log.info("gateway.accepted", api=order.api, **asked)
    request.scope["headrace.asked"] = asked
    span = span_of(request)
    if span is not None:
        is_chat = order.api in ("chat", "response")
        span |= {
            "gen_ai.operation.name": "chat" if is_chat else "text_completion",
            "gen_ai.provider.name": "headrace",
            "gen_ai.request.model": services.model.name,
            "gen_ai.request.id": request_id_of(request),
            "gen_ai.request.max_tokens": sampling.max_new_tokens,
            "gen_ai.request.temperature": asked["temperature"],
            "gen_ai.request.choice.count": asked["n"],
        }
    return asked


def _numbers_of(sampling: Sampling) -> dict[str, Any]:
    """What else it takes to make the same answer again, as far as it holds no words of a user;
    ``unlogged`` names the rest.
    """
    told = msgspec.to_builtins(sampling).items()
    numbers = {name: v for name, v in told if isinstance(v, bool | int | float)}
    for name in _TOLD_APART:
        numbers.pop(name, None)
    unlogged = [name for name, v in told if not isinstance(v, bool | int | float)]
    shown = {"parameters": numbers, "unlogged": unlogged}
    return {name: value for name, value in shown.items() if value}


def _tell_enqueued(order: Order, ticket: Ticket) -> None:
    if ticket.is_replayed:
        return
    admitted = ticket.admitted
    log.info(
        "queue.enqueued",
        stream_id=admitted.request_id,
        lane=order.lane,
        depth_before=admitted.position,
        est_wait_s=admitted.wait_ms / 1000,
        choices=order.num_choices,
    )


def _frames(services: Services, subject: Subject) -> Frames | Interleaved:
    tokenizer = services.model.tokenizer
    if subject.document is not None:
        return ResponseFrames(subject, tokenizer)
    return frames_for(subject, tokenizer)


def event_stream(
    services: Services,
    streams: Sequence[Stream],
    frames: Frames | Interleaved,
    account: Account,
    *,
    headers: dict[str, str],
    is_reconnecting: bool = False,
    tells_place: bool = False,
) -> EventStream:
    """``streams``, one per choice, as server-sent events; they are closed at its end.

    ``tells_place``: while they wait, of the first one, which is served before the others.
    """
    streams[0].tells_place = tells_place
    reader = streams[0] if len(streams) == 1 else Choices(streams)

    def close() -> None:
        if isinstance(reader, Choices):
            reader.close()
        for stream in streams:
            services.relay.close(stream)

    return EventStream(
        reader,
        frames,
        account,
        on_close=close,
        headers=headers,
        is_reconnecting=is_reconnecting,
    )


def _promise(
    services: Services, admitted: _Admitted, account: Account, headers: dict[str, str]
) -> Response:
    """A response in the background, as it stands when it was queued: nobody waits for its end."""
    for stream in admitted.ticket.streams:
        services.relay.close(stream)
    account.note_promise()
    account.close(200)
    return JSONResponse(
        response_object(admitted.subject, nothing(), services.model.tokenizer, is_waiting=True),
        headers=headers,
    )


async def _whole(
    services: Services,
    request: Request,
    admitted: Sequence[_Admitted],
    account: Account,
    headers: dict[str, str],
) -> Response:
    """The answer in one piece; its timings also stand in TGI's headers."""
    status = 200
    streams = [stream for one in admitted for stream in one.ticket.streams]
    try:
        with abandoned_on_disconnect(streams, request.receive):
            wholes = await collect_all(streams, account.note_batch)
        replies = _replies(admitted, wholes)
        headers |= _compute_headers([one.order for one in admitted])
        headers |= _timing_headers(admitted, wholes, account)
        whole = JSONResponse(whole_body(replies, services.model.tokenizer), headers=headers)
        account.note_bytes(len(whole.body))
        return whole
    except Failure as failure:
        account.note_failure(failure)
        wire = wire_of(request.url.path)
        status = status_of(failure, wire)
        return failure_response(failure, wire, headers=headers)
    except ReaderGone:
        account.note_disconnect()
        status = CLIENT_LEFT
        return Response(status_code=status)
    finally:
        for stream in streams:
            services.relay.close(stream)
        account.close(status)


def whole_body(replies: Sequence[Reply], tokenizer: Tokenizer) -> Any:
    """The JSON of an answer in one piece, one reply for each prompt."""
    subject = replies[0].subject
    if subject.document is not None:
        return response_object(subject, replies[0].choices[0], tokenizer)
    return body_of(replies, tokenizer)


def _replies(admitted: Sequence[_Admitted], wholes: Sequence[Completion]) -> list[Reply]:
    rest = iter(wholes)
    return [
        reply_of(one.subject, list(islice(rest, one.order.num_choices)), one.order.num_best)
        for one in admitted
    ]


def subject_of(
    offer: Offer, order: Order, request_id: str, presentation: Presentation, model_version: str
) -> Subject:
    """What the answer to ``order`` says beside its tokens."""
    return Subject(
        request_id=request_id,
        model=offer.model.name,
        model_version=model_version,
        presentation=presentation,
        prompt_text=order.prompt_text,
        lane=order.lane,
        prompt=order.prompt,
        document=order.document
        and msgspec.structs.replace(order.document, presentation=presentation),
    )


def _open_account(
    services: Services,
    request: Request,
    manner: Manner,
    admitted: Sequence[_Admitted],
    asked: dict[str, Any],
) -> Account:
    first = admitted[0]
    num_choices = sum(one.order.num_choices for one in admitted)
    several: dict[str, int | bool] = {"choices": num_choices} if num_choices > 1 else {}
    replayed = {"replayed": True} if first.ticket.is_replayed else {}
    return Account(
        services.metrics,
        first.order.api,
        arrival_of(request),
        span=span_of(request),
        lane=first.order.lane,
        tenant_class=tenant_class_of(caller_of(request).key_id, first.order.lane),
        model_version=first.subject.model_version,
        stream_id=first.subject.request_id,
        disconnect=manner.text,
        position=first.ticket.admitted.position,
        **asked,
        **several,
        **replayed,
    )


def _compute_headers(orders: Sequence[Order]) -> dict[str, str]:
    """TGI's headers of every answer; prompts that came as tokens have no characters."""
    return {
        "x-compute-type": COMPUTE_TYPE,
        "x-compute-characters": str(sum(order.num_prompt_characters for order in orders)),
    }


def _timing_headers(
    admitted: Sequence[_Admitted], wholes: Sequence[Completion], account: Account
) -> dict[str, str]:
    """TGI's headers of an answer that is not streamed: integer milliseconds, one in seconds.

    Several generations run side by side: the longest times count, and the tokens of all.
    """
    num_tokens = sum(len(whole.tokens) for whole in wholes)
    timings = [whole.timing for whole in wholes if whole.timing]
    queue_s = max((timing.queue_time_s for timing in timings), default=0.0)
    inference_s = max((timing.generation_time_s for timing in timings), default=0.0)
    times_s = {
        "x-total-time": account.age_s,
        "x-validation-time": max(0.0, account.age_s - queue_s - inference_s),
        "x-queue-time": queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / num_tokens if num_tokens else 0.0,
    }
    return {name: str(round(value * 1000)) for name, value in times_s.items()} | {
        "x-compute-time": f"{account.age_s:.6f}",
        "x-prompt-tokens": str(sum(len(one.order.prompt) for one in admitted)),
        "x-generated-tokens": str(num_tokens),
    }
