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

from common.broker import DeadLetter, Evidence, FailureNote, LiveGeneration, Requeued
from common.clock import monotonic_s
from common.failures import KINDS, Failure
from common.logs import get_logger
from common.overview import Stats, decode
from gateway.callers import caller_of
from gateway.feed import Feed
from gateway.middleware import arrival_of
from gateway.same_site import check_same_site
from gateway.services import services_of
from gateway.sse import EVENT_STREAM_HEADERS, FrameStream

log = get_logger()

MAX_LIVE = 200
MAX_SHOWN_NAME = 60
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


# Workers -----------------------------------------------------------------------------------------


class WorkerAction(msgspec.Struct):
    """``state`` is what the worker will say of itself: it hears of it within two seconds."""

    worker: str
    state: str


async def drain_worker(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    check_same_site(request)
    name = request.path_params["name"]
    if not await services_of(request).broker.drain_worker(name, _who(request)):
        raise _no_worker(name)
    return _shown(WorkerAction(name, "draining"))


async def resume_worker(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    check_same_site(request)
    name = request.path_params["name"]
    if not await services_of(request).broker.resume_worker(name):
        raise _no_worker(name)
    return _shown(WorkerAction(name, "ready"))


def _no_worker(name: str) -> Failure:
    return Failure("NOT_FOUND", f"There is no worker {name[:MAX_SHOWN_NAME]} alive")


def _who(request: Request) -> str:
    """For logs: never what could be a secret."""
    key_id = caller_of(request).key_id
    return f"operator with key {key_id}" if key_id else "operator at the gateway"


# Dead letters ------------------------------------------------------------------------------------


class DeadLetters(msgspec.Struct):
    """The newest first, 200 at most."""

    dead: list[DeadLetter]


class Discarded(msgspec.Struct):
    id: str
    discarded: bool = True


async def list_dead(request: Request) -> Response:
    check_same_site(request)
    found = await services_of(request).broker.dead_letter_store.newest()
    return _shown(DeadLetters(found))


async def show_dead(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    check_same_site(request)
    store = services_of(request).broker.dead_letter_store
    return _shown(await store.get(request.path_params["id"]))


async def requeue_dead(request: Request) -> Response:
    """Raises: Failure NOT_FOUND, STREAM_EXPIRED, QUEUE_FULL, NO_WORKERS."""
    check_same_site(request)
    store = services_of(request).broker.dead_letter_store
    return _shown(await store.requeue(request.path_params["id"], _who(request)))


async def discard_dead(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    check_same_site(request)
    id = request.path_params["id"]
    await services_of(request).broker.dead_letter_store.discard(id, _who(request))
    return _shown(Discarded(id))


# What runs, and what failed ----------------------------------------------------------------------


class LiveStreams(msgspec.Struct):
    """Some of every worker, then those that wait; 200 at most."""

    streams: list[LiveGeneration]


class LastFailures(msgspec.Struct):
    """The newest first; ``commands`` show all that is known of each in the logs."""

    code: str
    meaning: str
    failures: list[FailureNote]
    commands: list[str]
    explain: str


async def list_streams(request: Request) -> Response:
    check_same_site(request)
    return _shown(LiveStreams(await services_of(request).broker.live(MAX_LIVE)))


async def list_errors(request: Request) -> Response:
    """Raises: Failure NOT_FOUND for a code that no table has."""
    check_same_site(request)
    code = request.path_params["code"]
    kind = KINDS.get(code)
    if kind is None:
        raise Failure("NOT_FOUND", f"There is no failure code {code[:MAX_SHOWN_NAME]}")
    found = await services_of(request).broker.failures(code)
    told = LastFailures(
        code,
        kind.meaning,
        found,
        [f"headrace incident show {failure.request_id}" for failure in found],
        f"headrace explain {code}",
    )
    return _shown(told)


def _shown(answer: msgspec.Struct | Evidence | Requeued) -> Response:
    return Response(
        msgspec.json.encode(answer),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


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
    Route("/ops/workers/{name}/drain", drain_worker, methods=["POST"]),
    Route("/ops/workers/{name}/resume", resume_worker, methods=["POST"]),
    Route("/ops/dead", list_dead, methods=["GET"]),
    Route("/ops/dead/{id}", show_dead, methods=["GET"]),
    Route("/ops/dead/{id}/requeue", requeue_dead, methods=["POST"]),
    Route("/ops/dead/{id}/discard", discard_dead, methods=["POST"]),
    Route("/ops/streams", list_streams, methods=["GET"]),
    Route("/ops/errors/{code}", list_errors, methods=["GET"]),
]
