"""``/v1/streams/{request_id}``: any answer again, from any place in it, on any gateway.

``GET`` replays what lies behind ``Last-Event-ID`` (or ``?after=``) in the format of the API that
the request came through, and follows live. 204 after the end, so that a browser's EventSource
stops; 410 when the stream was there and is no longer kept; 404 when it never was, or is another's.
``DELETE`` ends the generation for everybody.
"""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.broker import Attachment
from common.failures import Failure
from common.ids import generation_id, is_request_id
from common.logs import get_logger
from gateway.account import Account
from gateway.admission import TENANT
from gateway.cursor import Cursor, parse_cursor
from gateway.frames import Subject, frames_for, last_stage
from gateway.middleware import arrival_of
from gateway.services import Services, services_of
from gateway.sse import EventStream
from gateway.stream import Stream

log = get_logger()


async def read_stream(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, STREAM_EXPIRED, STREAM_DIVERGED; BAD_REQUEST for the cursor."""
    services = services_of(request)
    request_id = _request_id(request)
    cursor = _cursor(request)
    stream = services.relay.open(generation_id(request_id), TENANT, cursor)
    try:
        attachment = await services.relay.attach(stream)
        response = await _resume(services, request, request_id, cursor, stream, attachment)
    except BaseException:
        services.relay.close(stream)
        raise
    if not isinstance(response, EventStream):
        services.relay.close(stream)
    return response


async def _resume(
    services: Services,
    request: Request,
    request_id: str,
    cursor: Cursor,
    stream: Stream,
    attachment: Attachment | None,
) -> Response:
    if attachment is None:
        raise _not_there(cursor)
    stream.check()
    cursor = replace(cursor, chain=stream.chain)  # which the log may have told
    shown = attachment.presentation
    headers = {
        "x-headrace-stream-id": request_id,
        "x-model-version": attachment.model_version or services.model.version,
        "x-stream-retention-seconds": str(attachment.retention_ms // 1000),
    }
    at_end = attachment.state == "T" and cursor.position >= attachment.next
    if at_end and cursor.stage >= last_stage(shown):
        services.metrics.resumes.labels("ended").inc()
        return Response(status_code=204, headers=headers)
    if request.method == "HEAD":
        return Response(headers=headers, media_type="text/event-stream")
    services.metrics.resumes.labels("resumed").inc()
    subject = Subject(
        request_id=request_id,
        model=services.model.name,
        model_version=headers["x-model-version"],
        presentation=shown,
    )
    account = Account(
        services.metrics,
        "resume",
        arrival_of(request),
        stream_id=request_id,
        stream=True,
        resumed_from=str(cursor),
        resumed_api=shown.api,
    )
    pieces = await _pieces_before(services, stream.id, cursor) if shown.api == "tgi" else []
    return EventStream(
        stream,
        frames_for(subject, services.model.tokenizer, cursor, pieces),
        account,
        on_close=lambda: services.relay.close(stream),
        headers=headers,
        is_reconnecting=True,
    )


async def cancel_stream(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, BROKER_UNAVAILABLE."""
    request_id = _request_id(request)
    state = await services_of(request).relay.cancel(generation_id(request_id), TENANT)
    if state == "unknown":
        raise Failure("NOT_FOUND", "No such stream")
    log.info("generation.cancelled", stream_id=request_id, state=state, cause="asked")
    return JSONResponse({"id": request_id, "object": "stream", "state": state})


async def _pieces_before(services: Services, id: str, cursor: Cursor) -> list[bytes]:
    """The texts up to the cursor: a native stream repeats the whole text in its last event."""
    pieces: list[bytes] = []
    while len(pieces) < cursor.position:
        page = await services.broker.read(id, len(pieces))
        if page is None:
            raise Failure("STREAM_EXPIRED")
        known = len(pieces)
        for entry in page.entries:
            pieces += entry.record.pieces[len(pieces) - entry.record.start :]
        if len(pieces) == known:
            break  # the log is shorter than the cursor says; the stream itself will tell
    return pieces[: cursor.position]


def _request_id(request: Request) -> str:
    request_id = request.path_params["request_id"]
    if not is_request_id(request_id):
        raise Failure("NOT_FOUND", "No such stream")
    return request_id


def _cursor(request: Request) -> Cursor:
    """The header is fresher than the query, which a reconnecting EventSource repeats unchanged."""
    header = request.headers.get("last-event-id", "")
    if header:
        return parse_cursor(header, "Last-Event-ID")
    text = request.query_params.get("after", "")
    return parse_cursor(text, "after") if text else Cursor()


def _not_there(cursor: Cursor) -> Failure:
    """Who holds a cursor has seen tokens: then the stream was there once."""
    if cursor.position > 0:
        return Failure("STREAM_EXPIRED")
    return Failure("NOT_FOUND", "No such stream")


routes = [
    Route("/v1/streams/{request_id}", read_stream, methods=["GET"]),
    Route("/v1/streams/{request_id}", cancel_stream, methods=["DELETE"]),
]
