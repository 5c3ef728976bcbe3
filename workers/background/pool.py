"""What steering has to know of the pool: what has ended in it, and how much it runs at once.

One reader per process, whatever number of batches it steers.
"""

import asyncio
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from common.broker import BatchStore, Broker
from common.clock import monotonic_s
from common.failures import Failure

MAX_WINDOW = 4096
"""Lines of one batch in Redis at once, however large the pool: some 10 MB."""
MIN_WINDOW = 16
_AHEAD = 6
"""Lines queued or running for each place in a step: workers have enough to do while another process
takes over the steering, which takes seconds."""
_UNSAID_BATCH_SIZE = 32
_KNOWN_S = 1.0
_BLOCK_MS = 1000


@dataclass(frozen=True, slots=True)
class Listener:
    heard: Callable[[str], None]
    """Takes the id of a generation that has ended."""
    missed: Callable[[], None]
    """Some may have ended without being heard."""


class Ends:
    """Tells who runs generations which of them have ended. ``broker`` must be allowed to block."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._listeners: dict[str, Listener] = {}

    @contextmanager
    def told_to(self, prefix: str, listener: Listener) -> Generator[None]:
        """Generations whose ids begin with ``prefix`` and a dash are told to ``listener``."""
        self._listeners[prefix] = listener
        try:
            yield
        finally:
            del self._listeners[prefix]

    async def run(self) -> None:
        """Read until cancelled."""
        after = ""
        while True:
            try:
                if not after:
                    after = await self._broker.last_end()
                    self._tell_missed()
                ended = await self._broker.wait_for_ends(after, _BLOCK_MS)
            except Failure:  # away, or gone back in time: then its ids did, too
                after = ""
                await asyncio.sleep(random.uniform(0.1, 0.5))
                continue
            for end in ended:
                after = end.cursor
                listener = self._listeners.get(end.id.partition("-")[0])
                if listener is not None:
                    listener.heard(end.id)

    def _tell_missed(self) -> None:
        for listener in list(self._listeners.values()):
            listener.missed()


class Window:
    """How many generations of one batch may be queued or running."""

    def __init__(self, broker: Broker, store: BatchStore) -> None:
        self._broker = broker
        self._store = store
        self._known_s = 0.0
        self._size = MIN_WINDOW

    async def size(self) -> int:
        """A few times what the pool runs at once, shared by the batches that it has."""
        now_s = monotonic_s()
        if now_s - self._known_s >= _KNOWN_S:
            self._known_s = now_s
            try:
                self._size = await self._measured()
            except Failure:
                return self._size
        return self._size

    async def _measured(self) -> int:
        workers = (await self._broker.state()).workers
        at_once = sum(
            (worker.presence and worker.presence.max_batch_size) or _UNSAID_BATCH_SIZE
            for worker in workers
        )
        num_batches = max(1, len(await self._store.active(self._broker.pool)))
        return max(MIN_WINDOW, min(MAX_WINDOW, _AHEAD * at_once // num_batches))
