"""``/v1/batches/{id}/events``: a batch as it is worked off, resumable at every line.

Events are ``batch``, the batch as ``GET`` shows it, whenever it has changed; ``line``, a line just
as it will stand in the output or the error file, whose id is the number of lines up to and with it;
and ``done``, the batch at its end. They are replayed behind ``Last-Event-ID`` (or
``?starting_after=``); ``?lines=0`` leaves the lines out. 204 to who has seen the end, so that a
browser's EventSource stops. ``POST …/token`` makes a token that stands in the address, as
``?token=``, instead of a key.
"""

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from common.parts import Parts
from gateway.api.batches import find_batch
from gateway.batch_tail import END, BatchTail
from gateway.callers import caller_of
from gateway.middleware import arrival_of
from gateway.services import services_of
from gateway.sse import EVENT_STREAM_HEADERS, FrameStream

log = get_logger()

_CURSOR = re.compile(rf"(\d{{1,9}})({END})?")


async def read_events(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, also for another tenant's; STREAM_EXPIRED; BAD_REQUEST."""
    services, record = services_of(request), await find_batch(request)
    position, has_seen_end = _cursor(request)
    shows_lines = _shows_lines(request)
    if has_seen_end and record.is_final:
        return Response(status_code=204)
    if request.method == "HEAD":
        return Response(headers=EVENT_STREAM_HEADERS)
    tail = BatchTail(
        record,
        position,
        store=services.broker.batch_store,
        watch=services.batch_watch,
        parts=Parts(services.storage, record.id),
        shows_lines=shows_lines,
        keep_alive_s=services.settings.keep_alive_s,
        is_stopping=lambda: services.is_draining,
    )
    if record.is_final and shows_lines:
        await tail.check()
    resumed_from, arrived_at = tail.position, arrival_of(request)

    def note_end() -> None:
        log.info(
            "stream.closed",
            reason="ended" if tail.has_ended else "disconnected",
            batch_id=record.id,
            resumed_from=resumed_from,
            position=tail.position,
            duration=round(monotonic_s() - arrived_at, 6),
        )

    return FrameStream(tail.frames, on_close=note_end)


async def make_token(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, BROKER_UNAVAILABLE."""
    record, caller = await find_batch(request), caller_of(request)
    token = await services_of(request).stream_tokens.issue_for_batch(record.id, caller.key_id)
    return JSONResponse(
        token.shown(record.id, f"/v1/batches/{record.id}/events"),
        headers={"cache-control": "no-store"},
    )


def _cursor(request: Request) -> tuple[int, bool]:
    """How many lines were seen, and whether the end was.

    The header is fresher than the query, which a reconnecting EventSource repeats unchanged.

    Raises: Failure BAD_REQUEST.
    """
    field, text = "Last-Event-ID", request.headers.get("last-event-id", "")
    if not text:
        field, text = "starting_after", request.query_params.get("starting_after", "0")
    found = _CURSOR.fullmatch(text.strip())
    if found is None:
        raise Failure(
            "BAD_REQUEST", f"{field} must be the id of an event, as 57: {text[:40]!r}", field=field
        )
    return int(found[1]), found[2] is not None


def _shows_lines(request: Request) -> bool:
    """Raises: Failure BAD_REQUEST."""
    text = request.query_params.get("lines", "1")
    if text not in ("0", "1"):
        raise Failure("BAD_REQUEST", "lines must be 0 or 1", field="lines")
    return text == "1"


routes = [
    Route("/v1/batches/{id}/events", read_events, methods=["GET"]),
    Route("/v1/batches/{id}/token", make_token, methods=["POST"]),
]
