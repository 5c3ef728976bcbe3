"""The records of files in Redis, and when each file is due to be removed.

All keys lie in one slot, beside the pools. ``due`` holds every file from before its first byte is
written until after its last one is removed, so that nothing in storage is ever forgotten.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.broker.records import page_of
from common.clock import wall_ms
from common.files import MAX_LIFE_S, FileRecord

_KEPT_MS = 2 * MAX_LIFE_S * 1000
"""How long what names files outlives the newest of them: background workers may be away so long."""

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(FileRecord).decode


class FileStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client) -> None:
        self._redis: Any = redis

    async def begin(self, file_id: str, due_s: int) -> None:
        """Bytes are going to be written; unless they become a file they go at ``due_s``."""
        with mapped_errors():
            pipe = self._redis.pipeline(transaction=True)
            # What is a file already stays one, also while it is written again.
            pipe.zadd(keys.FILES_DUE, {file_id: due_s}, nx=True)
            pipe.pexpire(keys.FILES_DUE, _KEPT_MS)
            await pipe.execute()

    async def add(self, record: FileRecord) -> int:
        """Record a file, in the place of what had its id. Returns the bytes of its tenant's files,
        this one among them.
        """
        of_tenant = keys.files_of(record.tenant)

        async def replace(pipe: Any) -> None:
            before = await pipe.get(keys.file(record.id))
            pipe.multi()
            num_bytes = record.bytes - (_unpack(before).bytes if before else 0)
            pipe.set(keys.file(record.id), _pack(record), px=_KEPT_MS)
            pipe.zadd(of_tenant, {record.id: wall_ms()}, nx=True)
            pipe.pexpire(of_tenant, _KEPT_MS)
            pipe.zadd(keys.FILES_DUE, {record.id: record.expires_at})
            pipe.pexpire(keys.FILES_DUE, _KEPT_MS)
            pipe.incrby(keys.file_bytes(record.tenant), num_bytes)
            pipe.pexpire(keys.file_bytes(record.tenant), _KEPT_MS)

        with mapped_errors():
            answers = await self._redis.transaction(replace, keys.file(record.id))
        return int(answers[-2])

    async def bytes_of(self, tenant: str) -> int:
        """Of all files of a tenant."""
        with mapped_errors():
            return int(await self._redis.get(keys.file_bytes(tenant)) or 0)

    async def get(self, file_id: str) -> FileRecord | None:
        with mapped_errors():
            packed = await self._redis.get(keys.file(file_id))
        return _unpack(packed) if packed else None

    async def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str,
        is_wanted: Callable[[FileRecord], bool],
        newest_first: bool,
    ) -> tuple[list[FileRecord], bool] | None:
        """Files of a tenant that are wanted, and whether there are more. None: no ``after``."""
        with mapped_errors():
            return await page_of(
                self._redis,
                keys.files_of(tenant),
                keys.file,
                _unpack,
                limit=limit,
                after=after,
                is_wanted=is_wanted,
                newest_first=newest_first,
            )

    async def remove(self, file_id: str) -> None:
        """Forget the record; the bytes are due at once."""

        async def take_out(pipe: Any) -> None:
            packed = await pipe.get(keys.file(file_id))
            record = _unpack(packed) if packed else None
            num_left = 0
            if record is not None:
                await pipe.watch(keys.file_bytes(record.tenant))
                num_bytes = int(await pipe.get(keys.file_bytes(record.tenant)) or 0)
                num_left = num_bytes - record.bytes
            pipe.multi()
            if record is not None:
                pipe.delete(keys.file(file_id))
                pipe.zrem(keys.files_of(record.tenant), file_id)
                if num_left > 0:
                    pipe.set(keys.file_bytes(record.tenant), num_left, px=_KEPT_MS)
                else:  # of a tenant without files nothing is kept
                    pipe.delete(keys.file_bytes(record.tenant))
            pipe.zadd(keys.FILES_DUE, {file_id: 0})
            pipe.pexpire(keys.FILES_DUE, _KEPT_MS)

        with mapped_errors():
            await self._redis.transaction(take_out, keys.file(file_id))

    async def forget_unrecorded(self, file_id: str) -> None:
        """Nothing is in storage any more, unless there is a record of it."""
        record = keys.file(file_id)

        async def forget(pipe: Any) -> None:
            is_recorded = await pipe.exists(record)
            pipe.multi()
            if not is_recorded:
                pipe.zrem(keys.FILES_DUE, file_id)

        with mapped_errors():
            await self._redis.transaction(forget, record)

    async def due(self, now_s: int, limit: int) -> list[str]:
        """Files, and bytes that became none, whose time is over."""
        with mapped_errors():
            ids = await self._redis.zrangebyscore(keys.FILES_DUE, "-inf", now_s, 0, limit)
        return [id.decode() for id in ids]
