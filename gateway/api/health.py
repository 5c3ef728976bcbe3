"""``/health``: this process lives. ``/ready``, ``/ping``: it serves. ``/metrics``: its figures."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.broker import PoolState
from common.failures import Failure
from common.instruments import CONTENT_TYPE
from gateway.services import Services, services_of

QUIET_LIMIT_S = 5.0
"""A gateway that has not heard of Redis for so long does not want more requests."""


async def health(_: Request) -> Response:
    """200 with an empty body, as TGI; it says nothing about workers."""
    return Response()


async def ready(request: Request) -> Response:
    """200 when a request sent now would be worked on; else 503 with the reason.

    A worker beats only while its engine makes progress, so a living lease says both.
    """
    services = services_of(request)
    num_ready, reason = await _readiness(services)
    if not num_ready:
        return _not_ready(reason)
    return JSONResponse(
        {"ready": True, "workers": num_ready, "model_version": services.model.version}
    )


async def ping(request: Request) -> Response:
    """As ``/ready`` with an empty body: SageMaker sends requests once this says 200, and TGI has no
    port to ask before its model is loaded.
    """
    num_ready, reason = await _readiness(services_of(request))
    return Response() if num_ready else _not_ready(reason)


async def _readiness(services: Services) -> tuple[int, str]:
    """How many workers would take a request sent now; for none, why."""
    if services.is_draining:
        return 0, "this gateway is draining"
    if not services.relay.joined.is_set() or services.relay.silent_s > QUIET_LIMIT_S:
        return 0, "Redis has not answered for some seconds"
    try:
        pool = await services.broker.state()
    except Failure as failure:
        return 0, failure.message
    return _num_ready(pool), _why_none(pool)


async def metrics(request: Request) -> Response:
    """Of this process; those of the pool are the exporter's."""
    return Response(services_of(request).metrics.text(), media_type=CONTENT_TYPE)


def _num_ready(pool: PoolState) -> int:
    return sum(
        worker.expires_in_ms > 0
        and worker.presence is not None
        and worker.presence.state == "ready"
        for worker in pool.workers
    )


def _why_none(pool: PoolState) -> str:
    states = sorted({worker.presence.state for worker in pool.workers if worker.presence})
    return (
        f"no worker is ready; workers are {', '.join(states)}" if states else "no worker is alive"
    )


def _not_ready(reason: str) -> Response:
    return JSONResponse(
        {"ready": False, "reason": reason, "error": "unhealthy", "error_type": "healthcheck"},
        status_code=503,
        headers={"retry-after": "1"},
    )


routes = [
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
