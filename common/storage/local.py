"""A directory as a storage, by the standard library: private to its user, and durable."""

import asyncio
import os
import stat
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar

from common.failures import Failure
from common.logs import get_logger
from common.storage.port import Names, Storage, blocks, checked, unavailable

log = get_logger()

T = TypeVar("T")

_READ_BYTES = 256 * 1024
_THREADS = 4
"""A disk is not faster with more, and each holds a block."""
_ABANDONED_S = 24 * 3600
"""Age at which a draft belongs to nobody any more: its process was killed."""


class LocalStorage(Storage):
    """A directory of this user alone. An object is written beside its place, synced, and then
    linked or renamed into it; several processes, also over a shared file system, may do so at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._drafts = root / ".drafts"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")
        self._is_ready = False

    async def put(self, name: str, body: bytes, *, only_if_absent: bool = False) -> bool:
        return await self._run(self._put, checked(name), body, only_if_absent)

    async def put_stream(self, name: str, chunks: AsyncIterable[bytes]) -> None:
        checked(name)
        draft = _Draft(self._drafts)
        try:
            await self._run(draft.open)
            async for block in blocks(chunks):
                await self._run(draft.write, block)
            await self._run(self._publish, draft, name, False)
        finally:
            # Not through `_run`: who is cancelled meanwhile must not keep it from being done.
            await asyncio.shield(
                asyncio.get_running_loop().run_in_executor(self._threads, draft.discard)
            )

    async def read(
        self, name: str, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes]:
        opening = asyncio.ensure_future(self._run(self._open, checked(name), reads=True))
        try:
            file = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unread)
            raise
        try:
            left = None if end is None else end - start
            await self._run(file.seek, start)
            while left is None or left > 0:
                block = await self._run(
                    file.read, _READ_BYTES if left is None else min(left, _READ_BYTES)
                )
                if not block:
                    return
                left = left if left is None else left - len(block)
                yield block
        finally:
            await asyncio.shield(
                asyncio.get_running_loop().run_in_executor(self._threads, file.close)
            )

    async def list(self, prefix: str, after: str = "") -> Names:
        return await self._run(self._list, checked(prefix.rstrip("/")) if prefix else "", after)

    async def delete(self, *names: str) -> None:
        await self._run(self._delete, [self.root / checked(name) for name in names])

    async def size(self, name: str) -> int:
        return await self._run(self._size, checked(name), reads=True)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def _run(self, call: Callable[..., T], *arguments: object, reads: bool = False) -> T:
        """In a thread of ours: a disk may take its time."""
        with _mapped_os_errors(reads=reads):
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, partial(self._in_place, call, *arguments)
            )

    # In threads:

    def _in_place(self, call: Callable[..., T], *arguments: object) -> T:
        """Who never keeps a file needs no directory, and so may have one that cannot be made."""
        if not self._is_ready:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            for directory in (self.root, self._drafts):
                directory.mkdir(mode=0o700, exist_ok=True)
            self._sweep()
            self._is_ready = True
        return call(*arguments)

    def _open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def _size(self, name: str) -> int:
        found = (self.root / name).stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(name)
        return found.st_size

    def _put(self, name: str, body: bytes, only_if_absent: bool) -> bool:
        draft = _Draft(self._drafts)
        try:
            draft.open()
            draft.write(body)
            return self._publish(draft, name, only_if_absent)
        finally:
            draft.discard()

    def _publish(self, draft: "_Draft", name: str, only_if_absent: bool) -> bool:
        """Let the draft's bytes appear under the name; False: it was there and had to be absent."""
        draft.sync()
        path = self.root / name
        while True:
            self._make(path.parent)
            try:
                if only_if_absent:
                    path.hardlink_to(draft.path)
                else:
                    draft.path.replace(path)
            except FileExistsError:
                _sync_directory(path.parent)  # whoever made it may not have come to this yet
                return False
            except FileNotFoundError:  # another one's `delete` emptied and removed the directory
                if not draft.path.exists():
                    raise
                continue
            _sync_directory(path.parent)
            return True

    def _make(self, directory: Path) -> None:
        """The directory and those above it, each so that it outlasts a power cut."""
        if directory.is_dir():
            return
        self._make(directory.parent)
        with suppress(FileNotFoundError):  # one above was removed again: `_publish` comes back
            directory.mkdir(mode=0o700, exist_ok=True)
            _sync_directory(directory.parent)

    def _list(self, prefix: str, after: str) -> Names:
        found: list[str] = []
        for directory, below, names in os.walk(self.root / prefix, onerror=_unless_missing):
            below[:] = [name for name in below if not name.startswith(".")]
            at = Path(directory).relative_to(self.root).as_posix()
            found += names if at == "." else [f"{at}/{name}" for name in names]
        return sorted(name for name in found if name > after)

    def _delete(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with suppress(NotADirectoryError):
                path.unlink(missing_ok=True)
        for directory in {path.parent for path in paths}:
            self._remove_empty(directory)

    def _remove_empty(self, directory: Path) -> None:
        with suppress(OSError):  # it is not empty, or not there
            while directory != self.root:
                directory.rmdir()
                directory = directory.parent

    def _sweep(self) -> None:
        """Remove drafts of processes that were killed."""
        for path in self._drafts.iterdir():
            with suppress(FileNotFoundError):  # another process sweeps too, or published it
                if path.stat().st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()


class _Draft:
    """Bytes that are no object yet. Whoever is cancelled leaves a call running in its thread:
    :meth:`discard` waits for that, and is the last that does anything.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Any = None
        self._turn = Lock()
        self._is_discarded = False
        self.path = directory

    def open(self) -> None:
        with self._turn:
            if not self._is_discarded:
                # For this user alone, as the standard library makes them.
                fd, path = tempfile.mkstemp(dir=self._directory)
                self._file = os.fdopen(fd, "wb")
                self.path = Path(path)

    def write(self, block: bytes) -> None:
        with self._turn:
            self._file.write(block)

    def sync(self) -> None:
        with self._turn:
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        with self._turn:
            self._is_discarded = True
            if self._file is None:
                return
            with suppress(OSError):  # the disk is full: what could not be written goes, too
                self._file.close()
            self.path.unlink(missing_ok=True)


def _close_unread(opening: "asyncio.Future[BinaryIO]") -> None:
    """Whoever asked for the file has left while it was opened."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _sync_directory(path: Path) -> None:
    """Make the names in a directory outlast a power cut."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # emptied and removed by a `delete` since
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


@contextmanager
def _mapped_os_errors(*, reads: bool = False) -> Generator[None]:
    """``reads``: what is not there is the object; else it is the directory."""
    try:
        yield
    except OSError as error:
        if reads and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            raise FileNotFoundError(error.filename) from error
        if error.errno in (ENOSPC, EDQUOT, EFBIG):
            log.warning("storage.failed", error=str(error))
            raise Failure("STORAGE_FULL") from error
        raise unavailable(error) from error
