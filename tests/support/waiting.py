"""Wait for a condition instead of sleeping."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def wait_until(
    condition: Callable[[], Awaitable[object] | object],
    *,
    timeout_s: float = 15.0,
    every_s: float = 0.02,
    what: str = "the condition",
) -> None:
    """Return once ``condition()`` is truthy; it may be a coroutine function.

    Raises:
        AssertionError: it was not within ``timeout_s``; ``what`` names it.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        outcome = condition()
        if isinstance(outcome, Awaitable):
            outcome = await outcome
        if outcome:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not hold within {timeout_s} s")
        await asyncio.sleep(every_s)
