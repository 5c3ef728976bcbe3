"""`headrace exporter`: one small process that shows the figures of a whole pool.

Gateways and workers show what they know of themselves. What is true of all of them together (what
waits, who lives, how Redis is) is looked at here once a second, so that it is counted once however
many gateways there are, and written down as the overview that pages and commands read. Any number
of exporters may run: a lease in Redis says which one shows and writes, and the others stand by.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
import uvloop
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common import logs
from common.broker import Broker, connect
from common.failures import Failure
from common.ids import new_process_name
from common.instruments import CONTENT_TYPE
from common.logs import get_logger
from common.settings import ExporterSettings, first_error
from common.watching import keep_overview
from gateway.__main__ import listen
from ops.pool_metrics import PoolMetrics

log = get_logger()


def create_app(metrics: PoolMetrics) -> Starlette:
    """``/metrics``, and ``/health``: 200 while Redis answers."""

    async def show(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def health(_: Request) -> Response:
        is_well = metrics.is_redis_up
        return JSONResponse(
            {"redis": is_well, "active": metrics.is_active}, status_code=200 if is_well else 503
        )

    return Starlette(
        routes=[Route("/metrics", show, methods=["GET"]), Route("/health", health, methods=["GET"])]
    )


class _Server(uvicorn.Server):
    """uvicorn, except that it does not raise the signal again that ended it."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        self.should_exit = True


async def serve(settings: ExporterSettings, *, pretty: bool = False) -> None:
    """Serve until a signal comes.

    Raises: Failure BROKER_UNAVAILABLE; OSError when the address is taken. Both before it listens.
    """
    name = new_process_name("exporter")
    logs.configure("exporter", name, log_dir=settings.log_dir, pretty=pretty)
    listener = listen(settings.metrics_host, settings.metrics_port)
    broker = Broker(connect(settings.redis_url), settings.model)
    log.info("exporter.started", model=settings.model)
    try:
        await broker.load_patiently()
        metrics = PoolMetrics(settings.model, settings.metrics_compat)
        config = uvicorn.Config(create_app(metrics), ws="none", log_config=None, access_log=False)
        server = _Server(config)
        async with _beside(keep_overview(broker, name, on_look=metrics.note)):
            url = f"http://{settings.metrics_host}:{listener.getsockname()[1]}"
            log.info("exporter.ready", url=url)
            await server.serve(sockets=[listener])
    finally:
        listener.close()
        await broker.close()
        log.info("exporter.stopped")
        logs.flush()


@asynccontextmanager
async def _beside(*work: Coroutine[None, None, None]) -> AsyncGenerator[None]:
    """What an exporter does all the time, while this lasts; a task that raises ends it."""
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(it) for it in work]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()


def run(settings: ExporterSettings, *, pretty: bool = False) -> int:
    """Run one exporter to its end; returns the exit code, after one clear line when it is not 0."""
    try:
        uvloop.run(serve(settings, pretty=pretty))
    except Failure as failure:
        sys.stderr.write(f"headrace exporter: {failure.message}\n")
        return 1
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        sys.stderr.write(f"headrace exporter: cannot listen on {where}: {error.strerror}\n")
        return 1
    return 0


def main() -> int:
    try:
        settings = ExporterSettings()
    except ValidationError as error:
        sys.stderr.write(f"headrace exporter: {first_error(error)}\n")
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
