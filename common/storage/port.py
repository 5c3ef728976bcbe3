"""What a storage does: named objects of bytes, each written once and whole.

A name is words of ``A-Z a-z 0-9 . _ -`` joined by ``/``, none of which begins with a dot: so no
name leads out of its place, and every storage sorts them alike. Nothing here knows whose an object
is.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from common.failures import Failure
from common.logs import get_logger

log = get_logger()

Names = list[str]
"""For a class that has a method of that name."""

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_BLOCK_BYTES = 256 * 1024
"""What is written in one go: large enough that a hop to a thread costs little of it."""


class Storage(ABC):
    """All methods raise Failure STORAGE_UNAVAILABLE or STORAGE_FULL for what the place answers, and
    ValueError for what is no name.
    """

    @abstractmethod
    async def put(self, name: str, body: bytes, *, only_if_absent: bool = False) -> bool:
        """Write an object, durably; False: it was there and ``only_if_absent``. Of several who
        write at once, only if absent, exactly one gets True.

        An object store may say False to who wrote it himself, when the answer to his first attempt
        was lost.
        """

    @abstractmethod
    async def put_stream(self, name: str, chunks: AsyncIterable[bytes]) -> None:
        """Write an object, durably, as its bytes come. It appears when all are there, in the place
        of what had its name; if ``chunks`` raises or this is cancelled, nothing of it is left.
        """

    @abstractmethod
    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes]:
        """The object's bytes from ``start`` up to and without ``end``, or its own end, in blocks.

        Who does not read to the end closes it (``contextlib.aclosing``).

        Raises: FileNotFoundError.
        """

    @abstractmethod
    async def list(self, prefix: str, after: str = "") -> Names:
        """Sorted full names of all objects under ``prefix`` (whole words: ``a/b``, or ``a/b/``, has
        ``a/b/c`` under it, not ``a/bc``; empty: everything), those behind the full name ``after``.
        """

    @abstractmethod
    async def delete(self, *names: str) -> None:
        """Remove objects; those that are not there count as removed."""

    @abstractmethod
    async def size(self, name: str) -> int:
        """Bytes of an object.

        Raises: FileNotFoundError.
        """

    async def get(self, name: str) -> bytes:
        """A whole object, of a size that memory bears.

        Raises: FileNotFoundError.
        """
        return b"".join([block async for block in self.read(name)])

    @abstractmethod
    def close(self) -> None:
        """End what belongs to this process; nothing may be asked any more."""


def checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def unavailable(error: Exception) -> Failure:
    """What keeps the storage from answering is the operator's, not the caller's to read."""
    said = str(error).partition("\n")[0]
    log.warning("storage.failed", error=f"{type(error).__name__}: {said}"[:500])
    return Failure("STORAGE_UNAVAILABLE")


async def blocks(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are worth a hop to a thread."""
    gathered = bytearray()
    async for chunk in chunks:
        gathered += chunk
        if len(gathered) >= _BLOCK_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
