"""``/health``: this process lives. ``/ready``: send it requests. ``/metrics``: what it measures."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.broker import PoolState
from common.failures import Failure
from common.metrics import CONTENT_TYPE
from gateway.services import services_of

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
    if services.is_draining:
        return _not_ready("this gateway is draining")
    if not services.relay.joined.is_set() or services.relay.silent_s > QUIET_LIMIT_S:
        return _not_ready("Redis has not answered for some seconds")
    try:
        pool = await services.broker.state()
    except Failure as failure:
        return _not_ready(failure.message)
    num_ready = _num_ready(pool)
    if not num_ready:
        return _not_ready(_why_none(pool))
    return JSONResponse(
        {"ready": True, "workers": num_ready, "model_version": services.model.version}
    )


async def metrics(request: Request) -> Response:
    services = services_of(request)
    try:
        services.metrics.show_pool(await services.broker.state())
    except Failure:
        services.metrics.forget_pool()
    return Response(services.metrics.text(), media_type=CONTENT_TYPE)


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
