"""``python -m gateway``: settings, Redis, the model's tokenizer, then serve until told to stop.

SIGTERM (or Ctrl-C) starts the drain: ``/ready`` fails, new generations are refused with 503, the
listener goes on so that open streams are served and others resumed, for up to ``drain_s``. A second
signal ends it at once.
"""

import asyncio
import gc
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import uvicorn
import uvloop
from pydantic import ValidationError

from common import logs
from common.broker import Broker, connect
from common.failures import Failure
from common.ids import new_process_name
from common.settings import GatewaySettings, first_error
from gateway.app import Brokers, create_app, drain
from gateway.http_server import BoundedHttp, IdleConnections
from gateway.services import Services, load_model

log = logs.get_logger()

STOPPED, CANNOT_START, USAGE = 0, 1, 2
"""Exit codes."""
KEEP_ALIVE_S = 75
"""Idle connections outlive the 60 s of common load balancers, which so never send a request into
one that is just being closed."""
CLOSE_LIMIT_S = 5
"""After the drain: how long connections may take to close."""
BACKLOG = 2048
HELPER_THREADS = 2
"""For what is long to compute: each more takes the interpreter from the event loop as often."""
SWITCH_S = 0.001
"""How soon a helper gives the interpreter back when the event loop asks for it."""
YOUNG_OBJECTS = 2000
"""So many more objects than before start a collection of the young ones, which takes some 2 ms."""
COLLECT_S = 30.0
BUSY_STREAMS = 100
MAX_PUT_OFF = 20
"""Full collections: each ``COLLECT_S`` while fewer streams are open, else after so many times."""


class Server(uvicorn.Server):
    """uvicorn, except that the first signal drains before anything is closed."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """Runs in a signal handler, so it only hands over to the loop."""
        self._loop.call_soon_threadsafe(self._begin_exit)

    def _begin_exit(self) -> None:
        if self._draining is None:
            self._draining = self._loop.create_task(self._drain_and_exit())
        else:
            self._services.relay.fail_all(Failure("DRAINING"))
            self.should_exit = True

    async def _drain_and_exit(self) -> None:
        await drain(self._services, self._services.settings.drain_s)
        self.should_exit = True


async def serve(settings: GatewaySettings, *, pretty: bool = False) -> None:
    """Serve until a signal has come and the drain is over.

    Raises: Failure MODEL_NOT_FOUND, MODEL_LOAD_FAILED, BROKER_UNAVAILABLE; OSError when the address
        is taken. All before it listens.
    """
    name = new_process_name("gateway")
    logs.configure("gateway", name, log_dir=settings.log_dir, pretty=pretty)
    model = load_model(settings)
    listener = listen(settings.host, settings.port)
    url = f"http://{settings.host}:{listener.getsockname()[1]}"
    logs.note(model=model.name, model_version=model.version)
    log.info("gateway.started", url=url)
    _share_interpreter()
    brokers = Brokers(
        commands=Broker(
            connect(settings.redis_url, single=True),
            model.name,
            durable_replicas=settings.durable_replicas,
        ),
        ordered=Broker(connect(settings.redis_url, single=True), model.name),
        inbox=Broker(connect(settings.redis_url, blocking=True), model.name),
        changes=Broker(connect(settings.redis_url, blocking=True), model.name),
    )
    try:
        await brokers.commands.load_patiently()
        app = create_app(settings, name=name, brokers=brokers, model=model)
        await app.state.services.callers.check()
        if gap := await brokers.commands.durability_gap():
            log.warning("durability.missing", reason=gap)
        server = Server(_uvicorn_config(app, settings), app.state.services)
        beside = [
            asyncio.create_task(_announce(server, url)),
            asyncio.create_task(_collect_garbage(app.state.services)),
        ]
        await server.serve(sockets=[listener])
        for task in beside:
            task.cancel()
    finally:
        listener.close()
        for broker in (brokers.commands, brokers.ordered, brokers.inbox, brokers.changes):
            await broker.close()
        log.info("gateway.stopped")
        logs.flush()


def _share_interpreter() -> None:
    """The event loop relays all streams, so helpers wait for it and not the other way round."""
    helpers = ThreadPoolExecutor(HELPER_THREADS, thread_name_prefix="helper")
    asyncio.get_running_loop().set_default_executor(helpers)
    sys.setswitchinterval(SWITCH_S)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: OSError, when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def run(settings: GatewaySettings, *, pretty: bool = False) -> int:
    """Serve in a loop of its own; returns the exit code, after one clear line when it is not 0."""
    try:
        uvloop.run(serve(settings, pretty=pretty))
    except Failure as failure:
        sys.stderr.write(f"headrace gateway: {failure.message}\n")
        return CANNOT_START
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        sys.stderr.write(f"headrace gateway: cannot listen on {where}: {error.strerror}\n")
        return CANNOT_START
    return STOPPED


def main() -> int:
    try:
        settings = GatewaySettings()
    except ValidationError as error:
        sys.stderr.write(f"headrace gateway: {first_error(error)}\n")
        return USAGE
    return run(settings)


def _uvicorn_config(app: object, settings: GatewaySettings) -> uvicorn.Config:
    idle = IdleConnections(settings.max_idle_connections)
    http = partial(BoundedHttp, idle=idle, limit_s=settings.arrival_limit_s)
    return uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType] - uvicorn names ASGI types of its own
        http=http,  # pyright: ignore[reportArgumentType] - called like the class it wants
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_LIMIT_S,
        backlog=BACKLOG,
    )


async def _announce(server: uvicorn.Server, url: str) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    log.info("gateway.ready", url=url)


async def _collect_garbage(services: Services) -> None:
    """Take full collections out of the way of tokens.

    One looks at all objects there are: 0.3 s without a token, with 2,000 streams open, and Python
    would start one whenever their number has grown by a quarter. A stream that ended leaves nothing
    to collect, so it can wait until few are open. Modules, routes and types, there by now, are left
    out of it for good.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 1_000_000)
    while True:
        for _ in range(MAX_PUT_OFF):
            await asyncio.sleep(COLLECT_S)
            if services.relay.num_streams < BUSY_STREAMS:
                break
        gc.collect()


if __name__ == "__main__":
    sys.exit(main())
