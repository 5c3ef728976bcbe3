"""From a valid order to its answer: the path of every prompt through the gateway."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from common.failures import Failure
from common.ids import new_request_id
from gateway.account import Account
from gateway.admission import Manner, Ticket, manner_of
from gateway.collect import Completion, body_of, collect
from gateway.errors import failure_response, status_of, wire_of
from gateway.frames import Subject, frames_for
from gateway.middleware import arrival_of, trace_of
from gateway.order import Order
from gateway.services import Services, services_of
from gateway.sse import EventStream, abandoned_on_disconnect
from gateway.stream import ReaderGone

CLIENT_LEFT = 499
"""Status in logs only: nobody is left to read it."""
COMPUTE_TYPE = "headrace"


async def answer(request: Request, order: Order) -> Response:
    """Queue the order, follow its token log, and bring the tokens to the client as they come.

    Raises: Failure, as a real status code: nothing has been sent yet.
    """
    services = services_of(request)
    if services.is_draining:
        raise Failure("DRAINING")
    request_id = new_request_id()
    manner = manner_of(request.headers, stream=order.stream, settings=services.settings)
    ticket = await services.admissions.admit(request_id, order, manner, trace_of(request))
    subject = _subject(services, request_id, order, ticket)
    account = _open_account(services, request, order, manner, ticket, subject)
    headers = {"x-headrace-stream-id": request_id, "x-model-version": subject.model_version}
    if not order.stream:
        return await _whole(services, request, order, ticket, subject, account, headers)
    return EventStream(
        ticket.stream,
        frames_for(subject, services.model.tokenizer),
        account,
        on_close=lambda: services.relay.close(ticket.stream),
        headers=headers | _compute_headers(order),
    )


async def _whole(
    services: Services,
    request: Request,
    order: Order,
    ticket: Ticket,
    subject: Subject,
    account: Account,
    headers: dict[str, str],
) -> Response:
    """The answer in one piece; its timings also stand in TGI's headers."""
    status = 200
    try:
        with abandoned_on_disconnect(ticket.stream, request.receive):
            whole = await collect(ticket.stream, account.note_batch)
        headers |= _compute_headers(order) | _timing_headers(order, whole, account)
        return JSONResponse(body_of(subject, whole, services.model.tokenizer), headers=headers)
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
        services.relay.close(ticket.stream)
        account.close(status)


def _subject(services: Services, request_id: str, order: Order, ticket: Ticket) -> Subject:
    return Subject(
        request_id=request_id,
        model=services.model.name,
        model_version=ticket.admitted.model_version or services.model.version,
        presentation=ticket.presentation,
        prompt_text=order.prompt_text,
        lane=order.lane,
    )


def _open_account(
    services: Services,
    request: Request,
    order: Order,
    manner: Manner,
    ticket: Ticket,
    subject: Subject,
) -> Account:
    return Account(
        services.metrics,
        order.api,
        arrival_of(request),
        stream_id=subject.request_id,
        stream=order.stream,
        lane=order.lane,
        disconnect=manner.text,
        position=ticket.admitted.position,
        prompt_tokens=len(order.prompt),
        max_new_tokens=order.sampling.max_new_tokens,
        do_sample=order.sampling.do_sample,
    )


def _compute_headers(order: Order) -> dict[str, str]:
    if order.api != "tgi":
        return {}
    return {
        "x-compute-type": COMPUTE_TYPE,
        "x-compute-characters": str(order.num_prompt_characters),
    }


def _timing_headers(order: Order, whole: Completion, account: Account) -> dict[str, str]:
    """TGI's headers of an answer that is not streamed: integer milliseconds, one in seconds."""
    num_tokens = len(whole.tokens)
    queue_s = whole.timing.queue_time_s if whole.timing else 0.0
    inference_s = whole.timing.generation_time_s if whole.timing else 0.0
    times_s = {
        "x-total-time": account.age_s,
        "x-validation-time": max(0.0, account.age_s - queue_s - inference_s),
        "x-queue-time": queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / num_tokens if num_tokens else 0.0,
    }
    return {name: str(round(value * 1000)) for name, value in times_s.items()} | {
        "x-compute-time": f"{account.age_s:.6f}",
        "x-prompt-tokens": str(len(order.prompt)),
        "x-generated-tokens": str(num_tokens),
    }
