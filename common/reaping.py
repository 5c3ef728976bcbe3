"""The reap task: each process looks once a second for what nobody holds any more.

Every worker, gateway and background process runs it; the steps in Redis are idempotent and bounded,
so it does not matter who is first, and the jitter keeps them from always meeting.
"""

import asyncio
import random
from collections.abc import Callable, Iterable

from common.broker import Broker, Moved
from common.failures import Failure
from common.logs import get_logger

log = get_logger()

_MORE_S = 0.05
"""Pause after a reap that moved something: it is bounded, so more may be due (protocol 4)."""


async def keep_reaping(
    broker: Broker, *, interval_s: float = 1.0, may_reap: Callable[[], bool] = lambda: True
) -> None:
    """Reap about every ``interval_s`` until cancelled; an unreachable Redis only delays it.

    Use a connection without ordered traffic: a reap may take 2 ms of the server. ``may_reap`` is
    for who has a lease itself: having been away, it must beat first, or it reaps what it holds.
    """
    told_dead: set[str] = set()
    while True:
        moved_any = may_reap() and await reap_once(broker, told_dead)
        await asyncio.sleep(_MORE_S if moved_any else interval_s * random.uniform(0.75, 1.25))


async def reap_once(broker: Broker, told_dead: set[str] | None = None) -> bool:
    """Reap, and tell what moved; whether anything did. An unreachable Redis moves nothing.

    ``told_dead`` are workers that nobody needs to be told of again: it may take several reaps until
    nothing is left of one.
    """
    try:
        moves = await broker.reap()
    except Failure:
        return False  # whoever publishes or serves on the same Redis reports that it is away
    tell_moves(moves)
    told_dead = set() if told_dead is None else told_dead
    for worker in sorted({moved.cause for moved in moves if _has_died(moved)} - told_dead):
        told_dead.add(worker)
        change = {"from": "ready", "to": "dead"}
        log.warning("worker.state", worker=worker, cause="lease", **change)
    return bool(moves)


def tell_moves(moves: Iterable[Moved]) -> None:
    """One line for each generation that reap moved."""
    for moved in moves:
        _tell(moved)


def _has_died(moved: Moved) -> bool:
    """Whether the worker of this generation has: its cause names it then."""
    return moved.move == "requeued" or moved.code == "POISON_REQUEST"


def _tell(moved: Moved) -> None:
    job_id = moved.id
    if moved.move == "requeued":
        log.info("job.requeued", job_id=job_id, cause="lease", worker=moved.cause)
    elif moved.code == "POISON_REQUEST":
        log.warning("job.dead", job_id=job_id, code=moved.code, worker=moved.cause)
    elif moved.move == "detached":
        log.info("generation.detached", job_id=job_id, cause=moved.cause)
    else:
        log.info("job.closed", job_id=job_id, cause=moved.cause, code=moved.code)
