"""A bucket as a storage, by obstore: S3 and what speaks like it, Google's and Azure's stores."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from common.failures import Failure
from common.storage.port import Names, Storage, blocks, checked, unavailable

_PART_BYTES = 5 * 1024 * 1024
"""Of an upload; S3 takes 10,000 of them, none but the last below 5 MiB."""
_PARTS_AT_ONCE = 2
_PIECE_BYTES = 2 * 1024 * 1024
"""Of an object, read by one request."""
_CONNECT_LIMIT_S = 5
_CALL_LIMIT_S = 30
_RETRY_LIMIT_S = 20
_NUM_RETRIES = 4


class ObjectStorage(Storage):
    """A bucket, or what lies under a prefix in it.

    ``only_if_absent`` needs conditional writes (``If-None-Match: *``), which all of them have. An
    upload that was broken off is aborted; for those of a killed process let a rule of the bucket
    remove incomplete multipart uploads after some days.
    """

    def __init__(self, url: str) -> None:
        try:
            self._store: Any = from_url(
                url,
                client_options={
                    "connect_timeout": timedelta(seconds=_CONNECT_LIMIT_S),
                    "timeout": timedelta(seconds=_CALL_LIMIT_S),
                    "allow_http": True,  # where the endpoint that was named is one
                },
                retry_config={
                    "max_retries": _NUM_RETRIES,
                    "retry_timeout": timedelta(seconds=_RETRY_LIMIT_S),
                },
            )
        except (BaseError, ValueError) as error:
            raise unavailable(error) from error

    async def put(self, name: str, body: bytes, *, only_if_absent: bool = False) -> bool:
        mode = "create" if only_if_absent else "overwrite"
        with self._mapped_errors():
            try:
                await obstore.put_async(
                    self._store, checked(name), body, mode=mode, use_multipart=False
                )
            except AlreadyExistsError:
                return False
        return True

    async def put_stream(self, name: str, chunks: AsyncIterable[bytes]) -> None:
        """What obstore aborts is an upload whose source raises, not one that is cancelled: so a
        source of our own stands between, which raises when this is.
        """
        handed: asyncio.Queue[bytes | None] = asyncio.Queue(1)

        async def source() -> AsyncIterator[bytes]:
            while block := await handed.get():
                yield block
            if block is None:
                raise _BrokenOffError

        async def uploaded() -> None:
            with self._mapped_errors():
                await obstore.put_async(
                    self._store,
                    checked(name),
                    source(),
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )

        upload = asyncio.create_task(uploaded())
        try:
            async for block in blocks(chunks):
                await _unless_ended(upload, handed.put(block))
            await _unless_ended(upload, handed.put(b""))
            await asyncio.shield(upload)
        except BaseException:
            while not handed.empty():
                handed.get_nowait()
            handed.put_nowait(None)
            with suppress(_BrokenOffError, Failure):
                await asyncio.shield(upload)
            raise

    async def read(
        self, name: str, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes]:
        """In pieces, so that a reader may take longer than a request."""
        size = await self.size(name)
        end = size if end is None else min(end, size)
        while start < end:
            upto = min(start + _PIECE_BYTES, end)
            with self._mapped_errors(reads=True):
                piece = await obstore.get_range_async(self._store, name, start=start, end=upto)
            yield bytes(piece)
            start = upto

    async def get(self, name: str) -> bytes:
        with self._mapped_errors(reads=True):
            result = await obstore.get_async(self._store, checked(name))
            return bytes(await result.bytes_async())

    async def list(self, prefix: str, after: str = "") -> Names:
        within = checked(prefix.rstrip("/")) if prefix else None
        with self._mapped_errors():
            pages = obstore.list(self._store, within, offset=after or None, chunk_size=1000)
            names = [str(found["path"]) async for page in pages for found in page]
        return sorted(name for name in names if name > after)

    async def delete(self, *names: str) -> None:
        paths = [checked(name) for name in names]
        with self._mapped_errors(reads=True), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, paths)

    def close(self) -> None:
        """Nothing here outlives a call."""

    async def size(self, name: str) -> int:
        with self._mapped_errors(reads=True):
            return int((await obstore.head_async(self._store, checked(name)))["size"])

    @contextmanager
    def _mapped_errors(self, *, reads: bool = False) -> Generator[None]:
        """``reads``: what is not there is the object; else it is the bucket."""
        try:
            yield
        except FileNotFoundError as error:
            if reads:
                raise
            raise unavailable(error) from error
        except BaseError as error:
            raise unavailable(error) from error


class _BrokenOffError(Exception):
    """Raised inside an upload that is to end without an object."""


async def _unless_ended(upload: "asyncio.Task[None]", step: Coroutine[Any, Any, None]) -> None:
    """Do ``step``; if the upload ends before that is done, raise why."""
    task = asyncio.ensure_future(step)
    try:
        await asyncio.wait({task, upload}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
    if upload.done():
        upload.result()
