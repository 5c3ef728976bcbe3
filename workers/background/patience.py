"""Waiting for what is away for a while, where nobody waits for an answer."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.failures import Failure

T = TypeVar("T")

PASSING = frozenset(
    {
        "BROKER_FULL",
        "BROKER_UNAVAILABLE",
        "DRAINING",
        "NO_WORKERS",
        "PROTOCOL_TOO_NEW",
        "QUEUE_FULL",
        "STORAGE_FULL",
        "STORAGE_UNAVAILABLE",
    }
)
"""Codes of what says nothing of the request: it is tried again as long as there is time."""
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 3.0


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The result of ``call``, however often it fails with a code of :data:`PASSING`.

    Raises: Failure of any other code.
    """
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await call()
        except Failure as failure:
            if failure.code not in PASSING:
                raise
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
