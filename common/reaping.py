"""The reap task: each process looks once a second for what nobody holds any more.

Every worker, gateway and background process runs it; the steps in Redis are idempotent and bounded,
so it does not matter who is first, and the jitter keeps them from always meeting.
"""

import asyncio
import random
from typing import TYPE_CHECKING

from common.failures import Failure
from common.logs import get_logger

if TYPE_CHECKING:
    from common.broker import Broker

log = get_logger()

_MAX_MOVES = 64
"""What one reap may move (protocol 4): an answer this long means that more is due."""


async def keep_reaping(broker: "Broker", *, interval_s: float = 1.0) -> None:
    """Reap about every ``interval_s`` until cancelled; an unreachable Redis only delays it.

    Use a connection without ordered traffic: a reap may take 2 ms of the server.
    """
    while True:
        moved = await _reap_once(broker)
        if moved < _MAX_MOVES:
            await asyncio.sleep(interval_s * random.uniform(0.75, 1.25))


async def _reap_once(broker: "Broker") -> int:
    try:
        moves = await broker.reap()
    except Failure:
        return 0  # whoever publishes or serves on the same Redis reports that it is away
    for moved in moves:
        log.info(
            "generation.moved",
            generation_id=moved.id,
            move=moved.move,
            cause=moved.cause,
            code=moved.code,
        )
    return len(moves)
