"""The records of batch jobs in Redis, who steers which, and word of every change.

Records are changed by compare-and-set, so that whoever comes second sees what the first one did.
All keys lie in one slot, beside the pools, and live some weeks behind the last change.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from common.batches import BatchRecord
from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.broker.records import page_of
from common.clock import wall_ms
from common.failures import Failure
from common.files import LIFE_S

Step = Callable[[BatchRecord], BatchRecord | None]
"""What becomes of a record; None: it stays as it is."""

_KEPT_MS = LIFE_S * 1000
"""How long a record is known behind its last change: as long as its files."""
_CHANGES_KEPT = 1000
_CHANGES_TTL_MS = 24 * 3600 * 1000
_BLOCK_MS = 1000

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(BatchRecord).decode


class BatchStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client) -> None:
        self._redis: Any = redis

    # Records -------------------------------------------------------------------------------------

    async def create(self, record: BatchRecord) -> BatchRecord:
        """Keep a new batch, and return it; if there is one of this id, that is returned instead,
        and nothing changes.
        """

        async def add(pipe: Any) -> BatchRecord:
            packed = await pipe.get(keys.batch(record.id))
            pipe.multi()
            if packed is not None:
                return _unpack(packed)
            _write(pipe, record)
            of_tenant = keys.batches_of(record.tenant)
            now_ms = wall_ms()
            pipe.zadd(of_tenant, {record.id: now_ms})
            pipe.zremrangebyscore(of_tenant, "-inf", now_ms - 2 * _KEPT_MS)
            pipe.pexpire(of_tenant, 2 * _KEPT_MS)
            return record

        with mapped_errors():
            return await self._redis.transaction(
                add, keys.batch(record.id), value_from_callable=True
            )

    async def get(self, batch_id: str, tenant: str | None = None) -> BatchRecord | None:
        """The batch; None: there is no such one, or it is not of this ``tenant``."""
        with mapped_errors():
            packed = await self._redis.get(keys.batch(batch_id))
        record = _unpack(packed) if packed else None
        return record if record and tenant in (None, record.tenant) else None

    async def page(
        self, tenant: str, *, limit: int, after: str = ""
    ) -> tuple[list[BatchRecord], bool] | None:
        """Batches of a tenant, the newest first, behind the batch ``after``; and whether there are
        more. None: it has no batch ``after``.
        """
        with mapped_errors():
            return await page_of(
                self._redis,
                keys.batches_of(tenant),
                keys.batch,
                _unpack,
                limit=limit,
                after=after,
            )

    async def change(self, batch_id: str, step: Step) -> BatchRecord | None:
        """The record as it stands after ``step``, which may be called again, with another record,
        when somebody else was faster. None: there is no such batch.
        """

        async def take_step(pipe: Any) -> BatchRecord | None:
            packed = await pipe.get(keys.batch(batch_id))
            pipe.multi()
            if packed is None:
                return None
            record = _unpack(packed)
            changed = step(record)
            if changed is None:
                return record
            _write(pipe, changed)
            return changed

        with mapped_errors():
            return await self._redis.transaction(
                take_step, keys.batch(batch_id), value_from_callable=True
            )

    # Steering ------------------------------------------------------------------------------------

    async def take_lease(self, batch_id: str, owner: str, lease_ms: int) -> bool:
        """Whether ``owner`` steers the batch from now on, or goes on to; False: another one does.

        A lease keeps two from doing the same work; it fences nothing.
        """
        lease = keys.batch_lease(batch_id)
        with mapped_errors():
            if await self._redis.set(lease, owner, nx=True, px=lease_ms):
                return True
        return await self._change_lease(lease, owner, lambda pipe: pipe.pexpire(lease, lease_ms))

    async def drop_leases(self, batch_ids: Iterable[str], owner: str) -> None:
        """End those leases that are ``owner``'s, so that others go on at once."""
        for lease in map(keys.batch_lease, batch_ids):
            await self._change_lease(lease, owner, lambda pipe, lease=lease: pipe.delete(lease))

    async def _change_lease(self, lease: str, owner: str, change: Callable[[Any], object]) -> bool:
        """Whether the lease is ``owner``'s; then it is changed."""

        async def if_owned(pipe: Any) -> bool:
            is_owned = await pipe.get(lease) == owner.encode()
            pipe.multi()
            if is_owned:
                change(pipe)
            return is_owned

        with mapped_errors():
            return await self._redis.transaction(if_owned, lease, value_from_callable=True)

    async def active(self, pool: str) -> list[str]:
        """Batches of ``pool`` that have not ended, the oldest first."""
        with mapped_errors():
            ids = await self._redis.zrange(keys.active_batches(pool), 0, -1)
        return [id.decode() for id in ids]

    async def unsteered(self, pool: str) -> list[str]:
        """Those of them that nobody steers."""
        active = await self.active(pool)
        if not active:
            return []
        with mapped_errors():
            owners = await self._redis.mget([keys.batch_lease(id) for id in active])
        return [id for id, owner in zip(active, owners, strict=True) if owner is None]

    async def forget_missing(self, pool: str, batch_id: str) -> None:
        """Of a batch whose record has gone nobody has to take care any more."""
        with mapped_errors():
            await self._redis.zrem(keys.active_batches(pool), batch_id)

    # Ends that webhooks tell of ------------------------------------------------------------------

    async def untold(self, limit: int = 100) -> list[tuple[str, int]]:
        """Batches whose end has to be told yet, and when it was in seconds."""
        with mapped_errors():
            found = await self._redis.zrange(keys.UNTOLD_BATCHES, 0, limit - 1, withscores=True)
        return [(id.decode(), int(at_s)) for id, at_s in found]

    async def note_told(self, batch_id: str) -> None:
        """Webhooks have been made of its end."""
        with mapped_errors():
            await self._redis.zrem(keys.UNTOLD_BATCHES, batch_id)

    # What is left of those that have ended -------------------------------------------------------

    async def ended_before(self, at_s: int, limit: int = 100) -> list[str]:
        """Batches that ended before ``at_s`` and whose folders in storage may still be there."""
        with mapped_errors():
            ids = await self._redis.zrangebyscore(keys.ENDED_BATCHES, "-inf", at_s, 0, limit)
        return [id.decode() for id in ids]

    async def note_cleared(self, batch_id: str) -> None:
        """The folder is gone."""
        with mapped_errors():
            await self._redis.zrem(keys.ENDED_BATCHES, batch_id)

    async def remove(self, record: BatchRecord) -> None:
        """Forget a batch. Its folder is due to be cleared, whatever somebody still puts there."""
        with mapped_errors():
            pipe = self._redis.pipeline(transaction=True)
            pipe.delete(keys.batch(record.id), keys.batch_lease(record.id))
            pipe.zrem(keys.batches_of(record.tenant), record.id)
            pipe.zrem(keys.active_batches(record.pool), record.id)
            pipe.zrem(keys.UNTOLD_BATCHES, record.id)
            pipe.zadd(keys.ENDED_BATCHES, {record.id: wall_ms() // 1000})
            pipe.pexpire(keys.ENDED_BATCHES, _KEPT_MS)
            await pipe.execute()

    # Changes -------------------------------------------------------------------------------------

    async def last_change(self) -> str:
        """Where :meth:`read_changes` goes on from now."""
        with mapped_errors():
            newest = await self._redis.execute_command(
                "XREVRANGE", keys.BATCH_CHANGES, "+", "-", "COUNT", 1
            )
        return newest[0][0].decode() if newest else "0-0"

    async def read_changes(self, after: str) -> tuple[str, set[str]]:
        """Wait up to a second for changes behind ``after``, on a connection that may block.

        Returns where to go on, and the batches that changed.
        """
        with mapped_errors():
            answer: Any = await self._redis.execute_command(
                "XREAD", "COUNT", _CHANGES_KEPT, "BLOCK", _BLOCK_MS,
                "STREAMS", keys.BATCH_CHANGES, after,
            )  # fmt: skip
        changed: set[str] = set()
        for entry_id, fields in answer[0][1] if answer else ():
            after = entry_id.decode()
            changed.add(fields[b"id"].decode())
        return after, changed


def _write(pipe: Any, record: BatchRecord) -> None:
    """The record, its place among the active or the ended ones, and word of it, in one step."""
    pipe.set(keys.batch(record.id), _pack(record), px=_KEPT_MS)
    active = keys.active_batches(record.pool)
    if record.is_final:
        pipe.zrem(active, record.id)
        pipe.zadd(keys.ENDED_BATCHES, {record.id: wall_ms() // 1000}, nx=True)
        pipe.pexpire(keys.ENDED_BATCHES, _KEPT_MS)
        pipe.zadd(keys.UNTOLD_BATCHES, {record.id: wall_ms() // 1000})
        pipe.pexpire(keys.UNTOLD_BATCHES, _KEPT_MS)
    else:
        pipe.zadd(active, {record.id: record.created_at})
        pipe.pexpire(active, _KEPT_MS)
    pipe.xadd(keys.BATCH_CHANGES, {"id": record.id}, maxlen=_CHANGES_KEPT, approximate=True)
    pipe.pexpire(keys.BATCH_CHANGES, _CHANGES_TTL_MS)


class BatchWatch:
    """Wakes who follows a batch in this process when it changes.

    One task reads the changes of all batches, while anybody follows one. ``store`` must be on a
    blocking connection of its own.
    """

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._events: dict[str, set[asyncio.Event]] = {}
        self._reading: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def following(self, batch_id: str) -> AsyncGenerator[asyncio.Event]:
        """An event that is set whenever the batch may have changed; clear it, then look.

        It is set at first, and whenever a change may have been missed.
        """
        changed = asyncio.Event()
        changed.set()
        self._events.setdefault(batch_id, set()).add(changed)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        try:
            yield changed
        finally:
            self._events[batch_id].discard(changed)
            if not self._events[batch_id]:
                del self._events[batch_id]
            if not self._events:
                self._stop()

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    async def _read(self) -> None:
        after = ""
        while True:
            try:
                if after:
                    after, changed = await self._store.read_changes(after)
                else:
                    after = await self._store.last_change()
                    changed = set(self._events)  # whatever happened before
            except Failure:  # away, or gone back in time: then its ids did, too
                after = ""
                await asyncio.sleep(random.uniform(0.1, 0.5))
                continue
            for batch_id in changed:
                for event in self._events.get(batch_id, ()):
                    event.set()
