"""``/ops/…``: what the live page is made of, and what an operator may do. ``/v1/stats``: the five
figures of the last minute, five minutes and hour.

All of it is of the whole pool, whoever's requests they are, and none of it shows a text: it needs
the scope ``admin``, ``/v1/stats`` that of metrics.
"""

import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from common.overview import Stats, decode
from gateway.feed import Feed
from gateway.middleware import arrival_of
from gateway.same_site import check_same_site
from gateway.services import services_of
from gateway.sse import EVENT_STREAM_HEADERS, FrameStream

log = get_logger()

MAX_FOLLOWERS = 64
"""Of one gateway's feed at once; each asks Redis a few times a second."""

_EVENT_ID = re.compile(r"\d{1,15}-\d{1,6}")


class PoolStats(Stats, frozen=True, kw_only=True):
    """The five figures over the last minute, and over longer times as far as they are known:
    ``over_s`` tells how far. ``at`` is when, in seconds since 1970; null: nobody looks at the pool.
    """

    at: float | None = None
    windows: dict[str, Stats] = msgspec.field(default_factory=dict[str, Stats])
    """``1m``, ``5m`` and ``1h``."""


async def read_stats(request: Request) -> Response:
    """Raises: Failure BROKER_UNAVAILABLE."""
    services = services_of(request)
    newest = await services.broker.overview_store.newest()
    shown = PoolStats(model_version=services.model.version)
    if newest is not None:
        overview = decode(newest[1])
        windows = {"1m": overview.stats, "5m": overview.stats_5m, "1h": overview.stats_1h}
        figures = msgspec.structs.asdict(overview.stats)
        shown = PoolStats(**figures, at=overview.at, windows=windows)
    return Response(msgspec.json.encode(shown), media_type="application/json")


async def read_feed(request: Request) -> Response:
    """Raises: Failure BAD_REQUEST for an id that is none, DRAINING, QUEUE_FULL with too many."""
    check_same_site(request)
    services, cursor = services_of(request), _cursor(request)
    if request.method == "HEAD":
        return Response(headers=EVENT_STREAM_HEADERS)
    if services.is_draining:
        raise Failure("DRAINING")
    if services.num_followers >= MAX_FOLLOWERS:
        raise Failure("QUEUE_FULL", f"{MAX_FOLLOWERS} follow this gateway's feed already")
    arrived_at = arrival_of(request)
    feed = Feed(
        services.broker.overview_store,
        services.model.name,
        cursor,
        keep_alive_s=services.settings.keep_alive_s,
        is_stopping=lambda: services.is_draining,
    )
    services.num_followers += 1

    def note_end() -> None:
        services.num_followers -= 1
        log.info("feed.closed", resumed=bool(cursor), duration=round(monotonic_s() - arrived_at, 6))

    return FrameStream(feed.frames, on_close=note_end)


def _cursor(request: Request) -> str:
    """The header is fresher than the query, which a reconnecting EventSource repeats unchanged.

    Raises: Failure BAD_REQUEST.
    """
    field, text = "Last-Event-ID", request.headers.get("last-event-id", "").strip()
    if not text:
        field, text = "from", request.query_params.get("from", "")
    if text and not _EVENT_ID.fullmatch(text):
        raise Failure("BAD_REQUEST", f"{field} must be the id of an event", field=field)
    return text


routes = [
    Route("/v1/stats", read_stats, methods=["GET"]),
    Route("/ops/feed", read_feed, methods=["GET"]),
]
