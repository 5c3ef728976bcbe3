"""A gateway in the test's own event loop, served by a real uvicorn on a free port.

In front of it a scripted worker and raw brokers on the same pool, so that a test says when each
token comes and looks at Redis afterwards.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from common.broker import Broker, connect
from common.ids import new_process_name
from common.settings import GatewaySettings
from gateway.__main__ import listen, load_model
from gateway.app import Brokers, create_app
from gateway.http_server import BoundedHttp, IdleConnections
from gateway.services import Services
from tests.support.models import simulated
from tests.support.scripted_worker import ScriptedWorker
from tests.support.waiting import wait_until

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class RunningGateway:
    url: str
    client: httpx.AsyncClient
    app: Starlette

    @property
    def services(self) -> Services:
        return self.app.state.services

    @property
    def name(self) -> str:
        return self.services.name

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[Connection]:
        """A bare connection, for what no client would send."""
        address = httpx.URL(self.url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            yield reader, writer
        finally:
            writer.close()


@dataclass
class Stand:
    """One pool on one server: gateways, a scripted worker, and a broker for looking."""

    redis_url: str
    data_dir: Path
    stack: AsyncExitStack
    broker: Broker
    version: str
    brokers: list[Broker] = field(default_factory=list[Broker])

    async def worker(self, **options: Any) -> ScriptedWorker:
        """A live worker that says what the test tells it to."""
        worker = ScriptedWorker(self.broker, self.version, **options)
        await worker.beat()
        return worker

    async def gateway(self, *, redis_url: str | None = None, **settings: Any) -> RunningGateway:
        """Start a gateway; ``redis_url`` may lead through a proxy."""
        return await self.stack.enter_async_context(
            running_gateway(redis_url or self.redis_url, self.data_dir, **settings)
        )


@asynccontextmanager
async def running_gateway(
    redis_url: str, data_dir: Path, **settings: Any
) -> AsyncGenerator[RunningGateway]:
    named: dict[str, Any] = {"model": "simulated"} | settings
    chosen = GatewaySettings(redis_url=redis_url, data_dir=data_dir, port=0, **named)
    model = load_model(chosen)
    brokers = Brokers(
        commands=Broker(
            connect(redis_url, single=True), model.name, durable_replicas=chosen.durable_replicas
        ),
        ordered=Broker(connect(redis_url, single=True), model.name),
        inbox=Broker(connect(redis_url, blocking=True), model.name),
        changes=Broker(connect(redis_url, blocking=True), model.name),
    )
    app = create_app(chosen, name=new_process_name("gateway"), brokers=brokers, model=model)
    async with _served(app, chosen) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        yield RunningGateway(url, client, app)
        # What still streams is cut off, as by a client that leaves.
    for broker in (brokers.commands, brokers.ordered, brokers.inbox, brokers.changes):
        await broker.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """The test process keeps its own signals."""
        yield


@asynccontextmanager
async def _served(app: Callable[..., Any], settings: GatewaySettings) -> AsyncGenerator[str]:
    listener = listen("127.0.0.1", 0)
    idle = IdleConnections(settings.max_idle_connections)
    http: Any = partial(BoundedHttp, idle=idle, limit_s=settings.arrival_limit_s)
    config = uvicorn.Config(app, http=http, ws="none", log_config=None, timeout_graceful_shutdown=2)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await wait_until(lambda: server.started or serving.done(), what="the server's start")
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture(scope="session")
def simulated_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("simulated-data")
    simulated(data_dir)
    return data_dir


@asynccontextmanager
async def stand_on(redis_url: str, data_dir: Path) -> AsyncGenerator[Stand]:
    """A pool named ``simulated`` with nothing in it yet."""
    manifest = simulated(data_dir).manifest
    async with AsyncExitStack() as stack:
        broker = Broker(connect(redis_url), manifest.name)
        await broker.load()
        yield Stand(redis_url, data_dir, stack, broker, manifest.version)
        await stack.aclose()
        await broker.close()


@pytest.fixture
async def stand(redis_url: str, simulated_data_dir: Path) -> AsyncIterator[Stand]:
    async with stand_on(redis_url, simulated_data_dir) as stand:
        yield stand
