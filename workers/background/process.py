"""The background process: arq for what has minutes, and the reap task that every process runs.

arq polls Redis and gives up when that is away; here it is started again until Redis is back. Its
jobs are stored as msgpack: pickle would let whoever writes to Redis run code in this process.
"""

import asyncio
import random
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import msgspec
import uvloop
from arq.connections import ArqRedis
from arq.jobs import Job
from arq.worker import Worker
from prometheus_client import CollectorRegistry

from common import logs
from common.broker import BatchStore, BatchWatch, Broker, connect
from common.broker.connection import mapped_errors
from common.failures import Failure
from common.files import Files
from common.ids import new_process_name
from common.instruments import exposition
from common.logs import get_logger
from common.metrics import process_collectors
from common.metrics_port import metrics_port
from common.reaping import keep_reaping
from common.redis_clock import RedisClock
from common.settings import BackgroundSettings
from common.storage import Storage, open_storage
from gateway.lines import load_offer
from workers import exit_codes
from workers.background.batches import Steers
from workers.background.jobs import Context, asked, broker_of, context, scheduled
from workers.background.pool import Ends, Window
from workers.background.post import Poster
from workers.background.running import Means
from workers.background.webhooks import Deliverer, keep_telling

log = get_logger()

QUEUE = "hr:background"
"""Name of arq's queue; the default would be shared with whoever else uses arq on this Redis."""

_QUEUE_LIFE_S = 24 * 3600
_HEALTH_INTERVAL_S = 15
_FINISH_S = 10
"""How long running jobs may take after SIGTERM before they are put back."""
_RETRY_S = 0.5

# Results hold what a job raised as text; an exception object could only travel as pickle.
_encode = msgspec.msgpack.Encoder(enc_hook=repr).encode
_decode = msgspec.msgpack.decode


def run(settings: BackgroundSettings, *, pretty: bool = False) -> int:
    """Run one background process to its end; returns the exit code."""
    name = new_process_name("background")
    logs.configure("background", name, log_dir=settings.log_dir, pretty=pretty)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_run(settings, name))
    logs.flush()
    return code


async def _run(settings: BackgroundSettings, name: str) -> int:
    log.info("background.started", model=settings.model)
    broker = Broker(connect(settings.redis_url), settings.model)
    try:
        await broker.load_patiently()
        with metrics_port(settings, _metrics):
            await _serve(settings, name, broker)
    except Failure as failure:
        log.error(  # noqa: TRY400 - the failure says all, its traceback would hide it
            "background.failed", code=failure.code, message=failure.message
        )
        sys.stderr.write(f"headrace background: {failure}\n")
        return exit_codes.UNREACHABLE
    finally:
        with suppress(Failure):
            await broker.close()
    log.info("background.stopped", exit_code=exit_codes.OK)
    return exit_codes.OK


def _metrics() -> bytes:
    """What is true of any process; what batches do stands in their own records."""
    registry = CollectorRegistry()
    process_collectors(registry)
    return exposition(registry)


async def _serve(settings: BackgroundSettings, name: str, broker: Broker) -> None:
    """Run arq until SIGTERM, over any number of losses of Redis."""
    storage = open_storage(settings.storage_url, settings.data_dir)
    files = Files(storage, broker.file_store)
    async with _steers(settings, name, broker, storage, files) as steers:
        beside = [
            asyncio.create_task(keep_reaping(broker)),
            asyncio.create_task(RedisClock().keep_sampling(broker)),
            asyncio.create_task(keep_telling(broker)),
            asyncio.create_task(_deliverer(settings, broker).run()),
        ]
        try:
            while not await _work(create_worker(settings, context(broker, files, steers))):
                await _until_back(broker)
        finally:
            for task in beside:
                task.cancel()
    storage.close()


@asynccontextmanager
async def _steers(
    settings: BackgroundSettings, name: str, broker: Broker, storage: Storage, files: Files
) -> AsyncGenerator[Steers | None]:
    """What steers batches meanwhile; None where the store has not the model that makes requests of
    their lines.
    """
    try:
        offer = load_offer(settings)
    except Failure as failure:
        log.warning("steering.unavailable", code=failure.code, message=failure.message)
        yield None
        return
    ends_redis, changes_redis = (connect(settings.redis_url, blocking=True) for _ in range(2))
    ends = Ends(Broker(ends_redis, settings.model))
    means = Means(
        name=name,
        broker=broker,
        store=broker.batch_store,
        watch=BatchWatch(BatchStore(changes_redis)),
        storage=storage,
        files=files,
        offer=offer,
        ends=ends,
        window=Window(broker, broker.batch_store),
    )
    steers, queue = Steers(means), create_queue(settings)
    beside = [
        asyncio.create_task(ends.run()),
        asyncio.create_task(steers.keep_sweeping(queue)),
    ]
    try:
        yield steers
        await steers.stop()
    finally:
        for task in beside:
            task.cancel()
        for redis in (ends_redis, changes_redis, queue):
            with suppress(Failure), mapped_errors():
                await redis.aclose()


def _deliverer(settings: BackgroundSettings, broker: Broker) -> Deliverer:
    poster = Poster(allow_private=settings.allow_private_webhooks)
    return Deliverer(broker.webhook_store, poster, settings)


async def _until_back(broker: Broker) -> None:
    while True:
        await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.0))
        with suppress(Failure):
            await broker.state()
            log.info("redis.reconnected")
            return


async def _work(worker: Worker) -> bool:
    """Run one arq worker to its end; True when it was asked to stop, False when Redis is away."""
    asked_to_stop = asyncio.Event()
    worker.on_stop = lambda _: asked_to_stop.set()
    try:
        with mapped_errors():
            await worker.async_run()
    except asyncio.CancelledError:
        if not asked_to_stop.is_set():
            raise
    except Failure as failure:
        log.warning("redis.disconnected", code=failure.code, message=failure.message)
    finally:
        with suppress(Failure), mapped_errors():
            await worker.close()
    return asked_to_stop.is_set()


class JobQueue(ArqRedis):
    """Where jobs are put, by hand and by the clock."""

    async def enqueue_job(self, *args: Any, **kwargs: Any) -> Job | None:
        """As arq's, which would keep its list of jobs for ever when all processes have died."""
        job = await super().enqueue_job(*args, **kwargs)
        await self.expire(self.default_queue_name, _QUEUE_LIFE_S)
        return job


def create_queue(settings: BackgroundSettings) -> ArqRedis:
    """The queue of this process; a URL of its own, or that of everything else."""
    redis_url = settings.background_redis_url or settings.redis_url
    return JobQueue(
        cast(Any, connect(redis_url)).connection_pool,
        job_serializer=_encode,
        job_deserializer=_decode,
        default_queue_name=QUEUE,
    )


def create_worker(
    settings: BackgroundSettings, ctx: Context, *, handle_signals: bool = True
) -> Worker:
    """A worker of arq, set up; it takes SIGTERM and SIGINT, and stops when its jobs have ended."""
    return Worker(
        functions=asked(),
        queue_name=QUEUE,
        redis_pool=create_queue(settings),
        job_serializer=_encode,
        job_deserializer=_decode,
        cron_jobs=scheduled(),
        on_startup=_say_ready,
        handle_signals=handle_signals,
        ctx=ctx,
        health_check_interval=_HEALTH_INTERVAL_S,
        job_completion_wait=_FINISH_S,
        log_results=False,
    )


async def _say_ready(ctx: Context) -> None:
    log.info("background.ready", pool=broker_of(ctx).pool)
