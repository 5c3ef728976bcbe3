"""Who may upload a file now, and how long it may take him.

Whoever may not yet is not read from, so what he sends waits on his side.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from starlette.requests import ClientDisconnect, Request

from common.clock import monotonic_s
from common.failures import Failure

MAX_UPLOADS = 16
"""At once in one gateway: each holds some MB where files go into an object store."""
MAX_TENANT_UPLOADS = 8
"""Of which one tenant has at most so many."""
IDLE_LIMIT_S = 30.0
MIN_RATE_BYTES_S = 16 * 1024
"""What an upload must keep up on average, so that nobody holds a place for ever."""


class UploadPlaces:
    """As many as there may be uploads at once, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.num_taken = 0
        self._all = asyncio.Semaphore(MAX_UPLOADS)
        self._of_tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncGenerator[None]:
        own = self._of_tenants.setdefault(tenant, asyncio.Semaphore(MAX_TENANT_UPLOADS))
        async with own, self._all:
            self.num_taken += 1
            try:
                yield
            finally:
                self.num_taken -= 1


async def paced(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes, as long as it comes.

    Raises: Failure BODY_TIMEOUT when it stops or trickles, BAD_REQUEST when it is broken off.
    """
    began_s, taken = monotonic_s(), 0
    body = request.stream()
    while True:
        left_s = IDLE_LIMIT_S + taken / MIN_RATE_BYTES_S - (monotonic_s() - began_s)
        try:
            async with asyncio.timeout(min(IDLE_LIMIT_S, left_s)):
                piece = await anext(body, None)
        except TimeoutError as error:
            raise Failure("BODY_TIMEOUT") from error
        except ClientDisconnect as error:
            raise Failure("BAD_REQUEST", "The body was not sent completely.") from error
        if piece is None:
            return
        taken += len(piece)
        yield piece
