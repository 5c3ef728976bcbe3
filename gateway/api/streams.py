"""``/v1/streams/{request_id}``: any answer again, from any place in it, on any gateway.

``GET`` replays what lies behind ``Last-Event-ID`` (or ``?after=``) in the format of the API that
the request came through, and follows live. 204 after the end, so that a browser's EventSource
stops; 410 when the stream was there and is no longer kept; 404 when it never was, or is another's.
``?events=1`` also tells the place in the queue, in events of the type ``queue``.
``DELETE`` ends the request, all its choices, for everybody. ``POST …/token`` makes a token that
stands in the address of a ``GET``, as ``?token=``, instead of a key.
"""

from dataclasses import replace

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.broker import Attachment
from common.failures import Failure
from common.ids import generation_id, is_request_id
from common.logs import get_logger
from gateway.account import Account
from gateway.answer import event_stream
from gateway.callers import Caller, caller_of
from gateway.collect import Completion
from gateway.cursor import SEPARATOR, Cursor, parse_cursors
from gateway.frames import (
    Frames,
    Interleaved,
    Subject,
    frames_for,
    last_stage,
    needs_pieces,
)
from gateway.middleware import arrival_of
from gateway.responses import ResponseFrames, nothing, read_document, read_log
from gateway.services import Services, services_of
from gateway.sse import EventStream, wants_queue_events
from gateway.stream import Stream

log = get_logger()


async def read_stream(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, STREAM_EXPIRED, STREAM_DIVERGED; BAD_REQUEST for the cursor."""
    services = services_of(request)
    request_id = _request_id(request)
    field, cursors = _cursors(request)
    streams: list[Stream] = []
    try:
        attachments = await _attach_all(
            services, caller_of(request), request_id, field, cursors, streams
        )
        response = await _resume(services, request, request_id, streams, attachments, cursors)
    except BaseException:
        _close_all(services, streams)
        raise
    if not isinstance(response, EventStream):
        _close_all(services, streams)
    return response


async def _attach_all(
    services: Services,
    caller: Caller,
    request_id: str,
    field: str,
    cursors: list[Cursor],
    streams: list[Stream],
) -> list[Attachment]:
    """Attach a stream for each choice; the first one tells how many there are.

    ``streams`` is filled as they are opened, ``cursors`` if they were none.
    """
    attachments: list[Attachment] = []
    num_choices = 1
    while len(attachments) < num_choices:
        choice = len(attachments)
        cursor = cursors[choice] if cursors else Cursor()
        id = generation_id(request_id, choice)
        streams.append(services.relay.open(id, caller.tenant, cursor, choice))
        attachment = await services.relay.attach(streams[-1])
        if attachment is None:
            raise _not_there(cursor)
        attachments.append(attachment)
        num_choices = attachment.presentation.num_choices
        cursors += [Cursor()] * num_choices if not cursors else []
        if len(cursors) != num_choices:
            raise Failure(
                "BAD_REQUEST", f"{field} must have {num_choices} parts: one per choice", field=field
            )
    return attachments


def _close_all(services: Services, streams: list[Stream]) -> None:
    for stream in streams:
        services.relay.close(stream)


async def _resume(
    services: Services,
    request: Request,
    request_id: str,
    streams: list[Stream],
    attachments: list[Attachment],
    cursors: list[Cursor],
) -> Response:
    tells_place = wants_queue_events(request, or_in_query=True)
    for stream in streams:
        stream.check()
    # Their chains may have been told by the log.
    cursors = [
        replace(cursor, chain=stream.chain) for cursor, stream in zip(cursors, streams, strict=True)
    ]
    shown = attachments[0].presentation
    headers = {
        "x-headrace-stream-id": request_id,
        "x-model-version": attachments[0].model_version or services.model.version,
        "x-stream-retention-seconds": str(attachments[0].retention_ms // 1000),
    }
    if all(map(_is_at_end, attachments, cursors)):
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
    structlog.contextvars.bind_contextvars(request_id=request_id)
    _tell_reader(streams, cursors)
    account = Account(
        services.metrics,
        "resume",
        arrival_of(request),
        stream_id=request_id,
        resumed_from=SEPARATOR.join(map(str, cursors)),
        resumed_api=shown.api,
    )
    return event_stream(
        services,
        streams,
        await _frames(services, subject, cursors),
        account,
        headers=headers,
        is_reconnecting=True,
        tells_place=tells_place,
    )


def _tell_reader(streams: list[Stream], cursors: list[Cursor]) -> None:
    for stream, cursor in zip(streams, cursors, strict=True):
        if cursor.position:
            log.info("stream.resumed", job_id=stream.id, last_event_id=str(cursor))
        else:
            log.info("stream.opened", job_id=stream.id)


async def _frames(
    services: Services, subject: Subject, cursors: list[Cursor]
) -> Frames | Interleaved:
    """The frames behind ``cursors``, in the format of the API that the request came through."""
    tokenizer, request_id = services.model.tokenizer, subject.request_id
    if subject.presentation.api == "response":
        document = await read_document(services.broker, request_id)
        if document is None:
            raise Failure("STREAM_EXPIRED")
        before = await _before(services, generation_id(request_id), cursors[0])
        return ResponseFrames(replace(subject, document=document), tokenizer, cursors[0], before)
    pieces: list[list[bytes]] = []
    if needs_pieces(subject.presentation):
        pieces = [
            (await _before(services, generation_id(request_id, choice), cursor)).pieces
            for choice, cursor in enumerate(cursors)
        ]
    return frames_for(subject, tokenizer, cursors, pieces)


def _is_at_end(attachment: Attachment, cursor: Cursor) -> bool:
    is_read = attachment.state == "T" and cursor.position >= attachment.next
    return is_read and cursor.stage >= last_stage(attachment.presentation)


async def cancel_stream(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, BROKER_UNAVAILABLE."""
    request_id = _request_id(request)
    state = await services_of(request).relay.cancel(request_id, caller_of(request).tenant)
    if state == "unknown":
        raise Failure("NOT_FOUND", "No such stream")
    log.info("generation.cancelled", stream_id=request_id, state=state, cause="asked")
    return JSONResponse({"id": request_id, "object": "stream", "state": state})


async def make_token(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, BROKER_UNAVAILABLE."""
    request_id, caller = _request_id(request), caller_of(request)
    token = await services_of(request).stream_tokens.issue(request_id, caller.tenant, caller.key_id)
    return JSONResponse(
        token.shown(request_id, f"/v1/streams/{request_id}"), headers={"cache-control": "no-store"}
    )


async def _before(services: Services, id: str, cursor: Cursor) -> Completion:
    """What stands before the cursor: a native stream, and a response, repeat the whole text in
    their last event. Where the log is shorter than the cursor says, the stream itself will tell.
    """
    if cursor.position == 0:
        return nothing()
    found = await read_log(services.broker, id, cursor.position)
    if found is None:
        raise Failure("STREAM_EXPIRED")
    return found[0]


def _request_id(request: Request) -> str:
    request_id = request.path_params["request_id"]
    if not is_request_id(request_id):
        raise Failure("NOT_FOUND", "No such stream")
    return request_id


def _cursors(request: Request) -> tuple[str, list[Cursor]]:
    """Where they stood, and what they are; none: the beginning.

    The header is fresher than the query, which a reconnecting EventSource repeats unchanged.
    """
    header = request.headers.get("last-event-id", "")
    if header:
        return "Last-Event-ID", parse_cursors(header, "Last-Event-ID")
    text = request.query_params.get("after", "")
    return "after", parse_cursors(text, "after") if text else []


def _not_there(cursor: Cursor) -> Failure:
    """Who holds a cursor has seen tokens: then the stream was there once."""
    if cursor.position > 0:
        return Failure("STREAM_EXPIRED")
    return Failure("NOT_FOUND", "No such stream")


routes = [
    Route("/v1/streams/{request_id}", read_stream, methods=["GET"]),
    Route("/v1/streams/{request_id}", cancel_stream, methods=["DELETE"]),
    Route("/v1/streams/{request_id}/token", make_token, methods=["POST"]),
]
