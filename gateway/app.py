"""The application: routes, middleware, and the parts behind them, every one an argument.

:func:`create_app` opens nothing; the relay's tasks live as long as the application's lifespan.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from common import build
from common.batches import MAX_FILE_BYTES
from common.broker import BatchWatch, Broker
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.files import Files
from common.logs import get_logger
from common.metrics import GatewayMetrics
from common.redis_clock import RedisClock
from common.request_metrics import RequestEnd
from common.settings import GatewaySettings
from common.spans import open_spans
from common.storage import open_storage
from gateway.admission import Admissions
from gateway.api import (
    batch_events,
    batches,
    chat,
    completions,
    files,
    health,
    models,
    openapi,
    operations,
    pages,
    platforms,
    responses,
    streams,
    tgi,
)
from gateway.callers import Callers, Identification
from gateway.errors import failure_response, status_of, wire_of
from gateway.loop_watch import LoopWatch
from gateway.middleware import (
    HeadLimit,
    PayloadLimit,
    PlatformRoutes,
    RequestContext,
    arrival_of,
    client_request_id,
    request_id_of,
    span_of,
)
from gateway.recent import RecentAdmissions
from gateway.relay import Relay
from gateway.same_site import HostCheck
from gateway.services import ServedModel, Services, services_of
from gateway.stream_tokens import StreamTokens

log = get_logger()

_HELD_BYTES = 128 * 1024 * 1024
"""Bodies of one gateway that are not answered yet; more where single ones may be larger."""
JOIN_LIMIT_S = 10.0
MAX_SHOWN_PATH = 100
LAST_WORDS_S = 2.0
"""How long streams that a drain ended get to say so."""

_SHARED_HEADERS = [
    "x-request-id",
    "traceresponse",
    "x-headrace-stream-id",
    "x-model-version",
    "x-stream-retention-seconds",
    "idempotent-replayed",
    "x-should-retry",
    "retry-after",
    "retry-after-ms",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]
_TAKEN_HEADERS = [
    "authorization",
    "content-type",
    "last-event-id",
    "x-request-id",
    "traceparent",
    "x-headrace-disconnect",
    "x-stream-events",
    "idempotency-key",
]
_APIS = {
    "/": "tgi",
    "/generate": "tgi",
    "/generate_stream": "tgi",
    "/invocations": "tgi",
    "/vertex": "tgi",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/files": "file",
    "/v1/responses": "response",
}
_APIS_BELOW = {
    "/v1/batches": "batch",
    "/v1/files": "file",
    "/v1/responses": "response",
    "/v1/streams/": "resume",
}
"""For the log, of what is no request for a generation; by how paths begin."""


_CHATS = ("chat", "response")

_FORM_BYTES = 64 * 1024
"""What a form may hold beside its file."""


@dataclass(frozen=True, slots=True)
class Brokers:
    """The pool on four connections, because three of them must not share.

    ``commands`` is any client: a single connection spends least on each of them. ``ordered`` sends
    one command after the other (attach and detach); ``inbox`` and ``changes``, of batches, may
    block.
    """

    commands: Broker
    ordered: Broker
    inbox: Broker
    changes: Broker


def create_app(
    settings: GatewaySettings,
    *,
    name: str,
    brokers: Brokers,
    model: ServedModel,
    metrics: GatewayMetrics | None = None,
) -> Starlette:
    """The ASGI application of the gateway ``name``; its parts hang at ``app.state.services``."""
    metrics = metrics or GatewayMetrics(
        model=model.name,
        model_version=model.version,
        max_tokens=model.max_total_tokens,
        compat=settings.metrics_compat,
    )
    recent = RecentAdmissions(brokers.commands)
    clock = RedisClock()
    relay = Relay(
        name,
        commands=brokers.commands,
        ordered=brokers.ordered,
        inbox=brokers.inbox,
        recent=recent,
        metrics=metrics,
        keep_alive_s=settings.keep_alive_s,
        clock=clock,
    )
    callers = Callers(settings, brokers.commands.key_store)
    tokens = StreamTokens(brokers.commands)
    storage = open_storage(settings.storage_url, settings.data_dir)
    app = Starlette(
        routes=[
            *tgi.routes,
            *chat.routes,
            *completions.routes,
            *platforms.routes,
            *responses.routes,
            *files.routes,
            *streams.routes,
            *batches.routes,
            *batch_events.routes,
            *models.routes,
            *health.routes,
            *operations.routes,
            *openapi.routes_for(settings, build.version()),
            *pages.routes,
        ],
        middleware=[
            *_platform_routes(settings),
            Middleware(
                RequestContext,
                model_version=model.version,
                spans=lambda: app.state.services.spans,
            ),
            Middleware(HeadLimit, refuse=_answer_failure),
            Middleware(HostCheck, settings=settings, callers=callers, refuse=_answer_failure),
            *_cors(settings),
            Middleware(Identification, callers=callers, tokens=tokens, refuse=_answer_failure),
            Middleware(
                PayloadLimit,
                max_bytes=settings.payload_limit,
                max_held_bytes=max(_HELD_BYTES, 8 * settings.payload_limit),
                max_upload_bytes=MAX_FILE_BYTES + _FORM_BYTES,
                limit_s=settings.arrival_limit_s,
            ),
        ],
        exception_handlers={Failure: _answer_failure, HTTPException: _answer_failure},
        lifespan=_lifespan,
    )
    services = app.state.services = Services(
        name=name,
        settings=settings,
        model=model,
        broker=brokers.commands,
        relay=relay,
        callers=callers,
        stream_tokens=tokens,
        storage=storage,
        files=Files(storage, brokers.commands.file_store),
        batch_watch=BatchWatch(brokers.changes.batch_store),
        admissions=Admissions(brokers.commands, relay, recent, settings),
        metrics=metrics,
        version=build.version(),
        spans=open_spans(settings, "gateway", name, clock),
    )
    relay.presence = services.presence
    return app


async def drain(services: Services, limit_s: float) -> None:
    """Refuse new generations and files, let open streams and uploads go on for up to ``limit_s``,
    then end them.

    What is ended that way stays in Redis for its grace time, to be resumed on another gateway.
    """
    services.is_draining = True
    log.info("gateway.draining", streams=services.relay.num_streams, limit_s=limit_s)
    await _until_idle(services, limit_s)
    if services.relay.num_streams:
        services.relay.fail_all(Failure("DRAINING"))
        await _until_idle(services, LAST_WORDS_S)


async def _until_idle(services: Services, limit_s: float) -> None:
    end_at = monotonic_s() + limit_s
    while (services.relay.num_streams or services.upload_places.num_taken) and (
        monotonic_s() < end_at
    ):
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncGenerator[None]:
    """Relay while the application serves; leave in order, so that no lease has to expire."""
    services: Services = app.state.services
    relaying = asyncio.create_task(services.relay.run())
    watching = asyncio.create_task(LoopWatch(services.metrics).run())
    try:
        with suppress(TimeoutError):  # not joined: /ready says so, and the relay goes on trying
            async with asyncio.timeout(JOIN_LIMIT_S):
                await services.relay.joined.wait()
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await services.relay.flush()
        relaying.cancel()
        with suppress(asyncio.CancelledError):
            await relaying
        await services.relay.leave()
        services.storage.close()
        if services.spans is not None:
            await asyncio.to_thread(services.spans.close)


async def _answer_failure(request: Request, error: Exception) -> Response:
    """A refusal before the first byte: a real status code, one log line, one count."""
    wire = wire_of(request.url.path)
    if isinstance(error, HTTPException):
        failure = _unserved(request, error)
        _note_rejection(request, failure, error.status_code)
        return failure_response(failure, wire, status=error.status_code, headers=error.headers)
    failure = error if isinstance(error, Failure) else Failure("INTERNAL")
    _note_rejection(request, failure, status_of(failure, wire))
    return failure_response(failure, wire)


def _unserved(request: Request, error: HTTPException) -> Failure:
    code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code)
    if code is None:
        return Failure("BAD_REQUEST")
    asked = f"{request.method} {request.url.path[:MAX_SHOWN_PATH]}"
    return Failure(code, f"{asked} is not served here; /docs tells what is.")


def _note_rejection(request: Request, failure: Failure, status: int) -> None:
    services = services_of(request)
    path = request.url.path
    api = next((api for prefix, api in _APIS_BELOW.items() if path.startswith(prefix)), "other")
    if api == "resume":
        services.metrics.resumes.labels(failure.code).inc()
    elif request.method == "POST" and path in _APIS:
        api = _APIS[path]
        services.metrics.requests.note_end(RequestEnd(api=api, code=failure.code))
        services.metrics.tally.note_end(
            failure.code, request_id=request_id_of(request), api=api, at_s=wall_ms() / 1000
        )
    known = {"client_request_id": told} if (told := client_request_id(request.headers)) else {}
    asked: dict[str, Any] = request.scope.get("headrace.asked", known)
    span = span_of(request)
    if span is not None and _APIS.get(path, "file") != "file":
        span.setdefault("gen_ai.operation.name", "chat" if api in _CHATS else "text_completion")
        span["error.type"] = failure.code
    log.info(
        "gateway.rejected",
        **asked,
        api=api,
        status=status,
        code=failure.code,
        field=failure.field,
        retry_after_ms=failure.retry_after_ms,
        duration=round(monotonic_s() - arrival_of(request), 6),
    )


def _platform_routes(settings: GatewaySettings) -> list[Middleware]:
    predict, health = settings.predict_route, settings.health_route
    if not predict and not health:
        return []
    return [Middleware(PlatformRoutes, predict=predict, health=health)]


def _cors(settings: GatewaySettings) -> list[Middleware]:
    if not settings.cors_allow_origin:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=_TAKEN_HEADERS,
            expose_headers=_SHARED_HEADERS,
        )
    ]
