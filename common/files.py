"""Files of tenants: their bytes in storage, written once, and a record of each in Redis.

A file is there for its tenant from the moment that its record is, and until the record goes: at
its end, or when it is deleted. Its bytes come before and go after, so nobody ever finds half a
file; what a crash leaves behind between the two is due for :meth:`Files.expire` within a day.
"""

import hashlib
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from common.clock import wall_ms
from common.failures import Failure
from common.keys import PUBLIC_TENANT
from common.storage import Storage

if TYPE_CHECKING:  # which imports the records of this module
    from common.broker.file_store import FileStore

UploadPurpose = Literal["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]
UPLOAD_PURPOSES: tuple[UploadPurpose, ...] = get_args(UploadPurpose)
"""What OpenAI's API lets a file be uploaded for; here ``batch`` is of use."""
RESULTS: Literal["batch_output"] = "batch_output"
"""Purpose of both files that a batch leaves behind."""
Purpose = Literal[UploadPurpose, "batch_output"]

LIFE_S = 30 * 24 * 3600
MIN_LIFE_S = 3600
MAX_LIFE_S = LIFE_S
"""Of any file; OpenAI's bounds of ``expires_after``."""

_UNFINISHED_S = 24 * 3600
"""Longer than any file takes to be written."""
_DUE_AT_ONCE = 100

_ID = re.compile(r"file-[0-9a-f]{32}")


class FileRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A file as its tenant knows it. Times are in seconds since 1970."""

    id: str
    tenant: str = PUBLIC_TENANT
    filename: str
    purpose: Purpose
    bytes: int
    sha256: str
    """Of all its bytes, as hex digits."""
    created_at: int
    expires_at: int

    def shown(self) -> dict[str, Any]:
        """As OpenAI's API shows a file."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Content(msgspec.Struct, frozen=True):
    """Bytes that were written, and belong to nobody yet."""

    id: str
    bytes: int
    sha256: str


class Files:
    """All methods raise Failure STORAGE_UNAVAILABLE or STORAGE_FULL for what the storage answers,
    and BROKER_UNAVAILABLE or BROKER_FULL for what Redis does.
    """

    def __init__(self, storage: Storage, store: "FileStore") -> None:
        self._storage = storage
        self._store = store

    async def create(
        self,
        tenant: str,
        filename: str,
        purpose: Purpose,
        chunks: AsyncIterable[bytes],
        *,
        expires_s: int = LIFE_S,
        id: str | None = None,
    ) -> FileRecord:
        """Write a file and record it. With an ``id`` that follows from what makes the file this may
        be repeated: the last one stays.
        """
        content = await self.write(chunks, id=id)
        return await self.record(content, tenant, filename, purpose, expires_s=expires_s)

    async def write(self, chunks: AsyncIterable[bytes], *, id: str | None = None) -> Content:
        """Write bytes as they come. Who does not :meth:`record` them has to :meth:`drop` them.

        If ``chunks`` raises or this is cancelled, nothing is left.
        """
        id = id or new_file_id()
        await self._store.begin(id, _now_s() + _UNFINISHED_S)
        measure = _Measure()
        try:
            await self._storage.put_stream(_name(id), measure.of(chunks))
        except BaseException:
            with suppress(Failure):  # then it is found within a day
                await self._store.forget_unrecorded(id)
            raise
        return Content(id, measure.num_bytes, measure.sha256.hexdigest())

    async def record(
        self,
        content: Content,
        tenant: str,
        filename: str,
        purpose: Purpose,
        *,
        expires_s: int = LIFE_S,
        max_tenant_bytes: int = 0,
    ) -> FileRecord:
        """Let what was written be a file of ``tenant`` for the next ``expires_s`` seconds.

        Raises: Failure QUOTA_EXHAUSTED when all its files would be above ``max_tenant_bytes``, and
            then nothing is left of this one. 0: no limit.
        """
        now_s = _now_s()
        record = FileRecord(
            id=content.id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=content.bytes,
            sha256=content.sha256,
            created_at=now_s,
            expires_at=now_s + expires_s,
        )
        num_bytes = await self._store.add(record)
        if 0 < max_tenant_bytes < num_bytes:
            await self._remove(record.id)
            raise _no_room(max_tenant_bytes)
        return record

    async def check_room(self, tenant: str, max_tenant_bytes: int) -> None:
        """Raises: Failure QUOTA_EXHAUSTED when there is no room for another byte (0: no limit)."""
        if max_tenant_bytes and await self._store.bytes_of(tenant) >= max_tenant_bytes:
            raise _no_room(max_tenant_bytes)

    async def drop(self, content: Content) -> None:
        """Remove what was written, and what there may be of a record, as if it had never been."""
        await self._remove(content.id)

    async def get(self, file_id: str, tenant: str) -> FileRecord | None:
        """The file; None: there is no such one, or not any more, or it is another tenant's."""
        if not is_file_id(file_id):
            return None
        record = await self._store.get(file_id)
        if record is None or record.tenant != tenant or record.expires_at <= _now_s():
            return None
        return record

    async def list(
        self,
        tenant: str,
        *,
        limit: int,
        after: str = "",
        purpose: str = "",
        newest_first: bool = True,
    ) -> "tuple[list[FileRecord], bool] | None":
        """Files of a tenant in the order of their creation, behind the file ``after``, and whether
        there are more. None: it has no file ``after``.
        """
        return await self._store.page(
            tenant,
            limit=limit,
            after=after,
            is_wanted=lambda record: (
                record.expires_at > _now_s() and purpose in ("", record.purpose)
            ),
            newest_first=newest_first,
        )

    def read(
        self, file: FileRecord, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes]:
        """Bytes of a file from ``start`` up to and without ``end``, or its own end.

        Raises: FileNotFoundError when it was deleted meanwhile.
        """
        return self._storage.read(_name(file.id), start, end)

    async def delete(self, file_id: str, tenant: str) -> bool:
        """Remove a file; False: the tenant has no such one."""
        if await self.get(file_id, tenant) is None:
            return False
        await self._remove(file_id)
        return True

    async def expire(self) -> int:
        """Remove what is over, and what is no file and never will be. Returns how many."""
        num_removed = 0
        while due := await self._store.due(_now_s(), _DUE_AT_ONCE):
            for file_id in due:
                await self._remove(file_id)
            num_removed += len(due)
        return num_removed

    async def _remove(self, file_id: str) -> None:
        """The record first; if this ends behind it, the bytes are due at once."""
        await self._store.remove(file_id)
        await self._storage.delete(_name(file_id))
        await self._store.forget_unrecorded(file_id)


class _Measure:
    """What can be known of bytes while they pass."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    async def of(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self.num_bytes += len(chunk)
            self.sha256.update(chunk)
            yield chunk


def _no_room(max_tenant_bytes: int) -> Failure:
    return Failure(
        "QUOTA_EXHAUSTED",
        f"All your files together may have at most {max_tenant_bytes} bytes: delete some first.",
        field="file",
    )


def new_file_id() -> str:
    """128 random bits behind OpenAI's prefix."""
    return f"file-{secrets.token_hex(16)}"


def is_file_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def _name(file_id: str) -> str:
    """Of its bytes in storage."""
    return f"files/{file_id}"


def _now_s() -> int:
    return wall_ms() // 1000
