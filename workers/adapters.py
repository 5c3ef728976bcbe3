"""Which LoRA adapters the engine holds: read on first use beside running steps, and given up.

Reading and converting run in a thread of their own, one adapter at a time; the engine takes what is
ready between two steps. An adapter that a generation here still needs is never given up.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

from common.clock import monotonic_s
from common.failures import Failure
from common.logs import get_logger
from workers.engine.port import Adapters

log = get_logger()


class StepBorder(Protocol):
    """Runs commands in the engine thread; see :class:`workers.engine.loop.EngineLoop`."""

    def run_between_steps(self, command: Callable[[], None]) -> None: ...


class HeldAdapters:
    """The adapters of one engine, at most ``max_adapters`` at once; for the event loop only.

    ``needed`` tells the versions that generations need which have not ended here. Without
    ``adapters`` every version counts as held: a simulated engine computes nothing with them.
    """

    def __init__(
        self,
        adapters: Adapters | None,
        engine: StepBorder,
        *,
        max_adapters: int,
        needed: Callable[[], set[str]],
    ) -> None:
        self._adapters = adapters
        self._engine = engine
        self._max_adapters = max_adapters
        self._needed = needed
        self._held: dict[str, None] = {}
        """Versions, the one used last at the end."""
        self._loading = asyncio.Lock()
        self._room_changed = asyncio.Event()

    async def hold(self, version: str) -> None:
        """Have the engine hold ``version`` before anything that is submitted after this returns.

        The caller must be among those that ``needed`` tells of. Waits while all others are.

        Raises:
            Failure: ADAPTER_NOT_FOUND or ADAPTER_LOAD_FAILED, for this version alone.
        """
        if self._adapters is None or self._touch(version):
            return
        async with self._loading:
            if not self._touch(version):
                await self._load(version, self._adapters)

    def room_changed(self) -> None:
        """A generation ended; what it needed may be given up."""
        self._room_changed.set()

    def _touch(self, version: str) -> bool:
        """Whether it is held; from now on it is the one used last."""
        if version not in self._held:
            return False
        self._held[version] = self._held.pop(version)
        return True

    async def _load(self, version: str, adapters: Adapters) -> None:
        await self._make_room(adapters)
        began_s = monotonic_s()
        try:
            adapter = await asyncio.to_thread(adapters.read, version)
        except Failure as failure:
            log.warning("adapter.refused", adapter=version, code=failure.code)
            raise
        self._engine.run_between_steps(partial(adapters.put, version, adapter))
        self._held[version] = None
        log.info("adapter.loaded", adapter=version, load_s=round(monotonic_s() - began_s, 3))

    async def _make_room(self, adapters: Adapters) -> None:
        while len(self._held) >= self._max_adapters:
            needed = self._needed()
            idle = next((version for version in self._held if version not in needed), None)
            if idle is None:
                self._room_changed.clear()
                await self._room_changed.wait()
                continue
            del self._held[idle]
            self._engine.run_between_steps(partial(adapters.drop, idle))
            log.info("adapter.dropped", adapter=idle)
