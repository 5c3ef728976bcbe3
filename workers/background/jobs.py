"""What the background worker does: its scheduled jobs, and what each needs.

A job is a coroutine that takes arq's context; what this project put there is read by
:func:`broker_of`. Jobs must be safe to run twice: arq runs one again when its worker died.
"""

from typing import Any, cast

from arq import cron
from arq.cron import CronJob

from common.broker import Broker
from common.files import Files
from common.logs import get_logger

log = get_logger()

Context = dict[Any, Any]
"""arq's: a plain dictionary."""

_BROKER = "broker"
_FILES = "files"


def context(broker: Broker, files: Files) -> Context:
    return {_BROKER: broker, _FILES: files}


def broker_of(ctx: Context) -> Broker:
    return cast(Broker, ctx[_BROKER])


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


async def expire_files(ctx: Context) -> None:
    """Remove files at their end, and what was begun and never became one."""
    num_removed = await cast(Files, ctx[_FILES]).expire()
    if num_removed:
        log.info("file.expired", count=num_removed)


def scheduled() -> list[CronJob]:
    """Each job runs once per time, however many background workers there are."""
    return [
        cron(measure_pool, name="measure_pool", second=0),
        cron(expire_files, name="expire_files", second=30),
    ]
