"""What the background worker does: its jobs, and what each needs.

A job is a coroutine that takes arq's context; what this project put there is read by
:func:`broker_of`. Jobs must be safe to run twice: arq runs one again when its worker died.
"""

from typing import Any, cast

from arq import cron
from arq.cron import CronJob
from arq.worker import Function, func

from common.broker import Broker
from common.files import Files
from common.logs import get_logger
from workers.background.batches import JOB, Steers

log = get_logger()

Context = dict[Any, Any]
"""arq's: a plain dictionary."""

_BROKER = "broker"
_FILES = "files"
_STEERS = "steers"
_STEER_LIMIT_S = 30
"""It takes a lease and begins; what follows is no job."""


def context(broker: Broker, files: Files, steers: Steers | None = None) -> Context:
    """``steers`` is None where there is no model to make requests of the lines of batches with."""
    return {_BROKER: broker, _FILES: files, _STEERS: steers}


def broker_of(ctx: Context) -> Broker:
    return cast(Broker, ctx[_BROKER])


def _steers_of(ctx: Context) -> Steers | None:
    return cast("Steers | None", ctx[_STEERS])


async def measure_pool(ctx: Context) -> None:
    """Write one ``pool.measured`` line: what the autoscaler sees, for whoever has only the logs."""
    state = await broker_of(ctx).state()
    log.info(
        "pool.measured",
        pool=broker_of(ctx).pool,
        workers=len(state.workers),
        gateways=len(state.gateways),
        streams=sum(gateway.streams for gateway in state.gateways),
        running=sum(len(worker.held) for worker in state.workers),
        waiting=state.waiting,
        handed_back=state.handed_back,
        backlog_tokens=state.backlog_tokens,
        oldest_wait_ms=state.oldest_wait_ms,
        drain_rate=state.drain_rate,
    )


async def steer(ctx: Context, batch_id: str) -> None:
    """Steer a batch here from now on."""
    if (steers := _steers_of(ctx)) is not None:
        await steers.take_up(batch_id)


async def expire_files(ctx: Context) -> None:
    """Remove files at their end, and what was begun and never became one."""
    num_removed = await cast(Files, ctx[_FILES]).expire()
    if num_removed:
        log.info("file.expired", count=num_removed)


async def clear_batches(ctx: Context) -> None:
    """Remove the parts of batches that ended a day ago; their files stay."""
    if (steers := _steers_of(ctx)) is not None:
        await steers.clear_folders()


def asked() -> list[Function]:
    """Jobs that somebody asks for."""
    return [func(steer, name=JOB, timeout=_STEER_LIMIT_S, keep_result=0, max_tries=1)]


def scheduled() -> list[CronJob]:
    """Each job runs once per time, however many background workers there are."""
    return [
        cron(measure_pool, name="measure_pool", second=0),
        cron(expire_files, name="expire_files", second=30),
        cron(clear_batches, name="clear_batches", second=45),
    ]
