"""A worker that somebody asked to rest: it claims nothing, finishes or hands over what it holds as
at its end, and stays alive until it is asked back. Who asked is told with each beat's answer.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from common.clock import monotonic_s
from workers.attempts import Attempt, Ledger


class Claims(Protocol):
    """What of the intake is closed meanwhile."""

    def close(self) -> None: ...
    def open(self) -> None: ...


class Releases(Protocol):
    """What of the publisher hands over."""

    async def release(
        self, attempts: Sequence[Attempt], *, event: str, **fields: object
    ) -> None: ...


class Standby:
    """``change_state`` is told of the new state and its cause; ``wake`` asks the worker's loop for
    another round, whose part is :meth:`settle`. What runs may end here within ``drain_s``.
    """

    def __init__(
        self,
        ledger: Ledger,
        intake: Claims,
        publisher: Releases,
        *,
        drain_s: float,
        change_state: Callable[[str, str], None],
        wake: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._intake = intake
        self._publisher = publisher
        self._drain_s = drain_s
        self._change_state = change_state
        self._wake = wake
        self._cause = ""
        self._until_s = 0.0
        self._is_drained = False
        self._is_over = False

    def heed(self, cause: str) -> None:
        """What the last beat was told: who wants this worker to rest, or that nobody does."""
        if self._is_over or bool(cause) == bool(self._cause):
            return
        self._cause, self._is_drained = cause, False
        if cause:
            self._until_s = monotonic_s() + self._drain_s
            self._intake.close()
            self._change_state("draining", cause)
            asyncio.get_running_loop().call_later(self._drain_s, self._wake)
        else:
            self._intake.open()
            self._change_state("ready", "resumed")
        self._wake()

    async def settle(self) -> None:
        """Hand over what took too long; say when nothing is left. Raises: Failure, and then is
        called again.
        """
        if not self._cause or self._is_drained or self._is_over:
            return
        if monotonic_s() >= self._until_s:
            await self._publisher.release(self._ledger.running(), event="generation.released")
        if not self._ledger.running():
            self._is_drained = True
            self._change_state("drained", self._cause)

    def end(self) -> None:
        """The process ends: nobody takes it back to work."""
        self._is_over = True
