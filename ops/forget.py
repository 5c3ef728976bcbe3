"""`headrace forget`: removes what is kept of a tenant, and says what that was.

Who steers a batch is told to stop first, and keys go before all else where they are to go, so that
little can come after; what does is found by running it again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import click

from common import keys
from common.batches import BatchRecord, folder
from common.broker import (
    BatchStore,
    Client,
    Holdings,
    KeyStore,
    TenantStore,
    WebhookStore,
    connect,
)
from common.broker.file_store import FileStore
from common.clock import monotonic_s, wall_ms
from common.files import FileRecord, Files
from common.settings import StorageSettings
from common.storage import Storage, open_storage
from common.webhooks import Endpoint
from ops import runfile

T = TypeVar("T")
R = TypeVar("R", BatchRecord, FileRecord)

KEYS_HOLD_S = 1.0
"""For so long a gateway may go on taking a key that was removed."""
STOP_LIMIT_S = 10.0
"""How long batches may take to stop; then they are removed as they are."""
_PAGE = 100


@dataclass(frozen=True, slots=True)
class Found:
    """All there is of a tenant."""

    held: Holdings
    files: list[FileRecord]
    batches: list[BatchRecord]
    endpoints: list[Endpoint]

    def rows(self) -> list[tuple[str, int]]:
        return [
            ("requests, with their answers", self.held.num_requests),
            ("documents of responses", len(self.held.documents)),
            ("idempotency keys", len(self.held.idempotency_keys)),
            ("files", len(self.files)),
            ("batches", len(self.batches)),
            ("API keys", len(self.held.key_ids)),
            ("webhook endpoints", len(self.endpoints)),
        ]


def forget(
    settings: StorageSettings, tenant: str, *, only_looks: bool, takes_keys: bool, is_sure: bool
) -> None:
    """Show what there is of ``tenant`` and, unless ``only_looks``, remove it.

    Raises: click.BadParameter, click.Abort; Failure BROKER_UNAVAILABLE, STORAGE_UNAVAILABLE.
    """
    if not keys.is_tenant(tenant):
        raise click.BadParameter(f"{tenant!r} is no name of a tenant")
    found = _with_place(settings, lambda place: place.find(tenant))
    for what, count in found.rows():
        click.echo(f"{count:8} {what}")
    if only_looks:
        return
    if not is_sure:
        click.confirm(f"Remove all of it that is {tenant}'s for ever?", abort=True)
    rewrites = _with_place(settings, lambda place: place.remove(found, takes_keys=takes_keys))
    click.echo(f"What there was of {tenant} is removed.")
    if not takes_keys and found.held.key_ids:
        click.echo("Its API keys are still taken (--keys removes them).")
    if not rewrites:
        click.echo("An append-only file still holds it until: redis-cli bgrewriteaof")


class Place:
    """Where things of tenants lie: a server and a storage."""

    def __init__(self, redis: Client, storage: Storage) -> None:
        self._tenants = TenantStore(redis)
        self._batches = BatchStore(redis)
        self._webhooks = WebhookStore(redis)
        self._keys = KeyStore(redis)
        self._storage = storage
        self._files = Files(storage, FileStore(redis))

    async def find(self, tenant: str) -> Found:
        endpoints = await self._webhooks.endpoints()
        return Found(
            await self._tenants.holdings(tenant),
            await self._files_of(tenant),
            await self._batches_of(tenant),
            [endpoint for endpoint in endpoints if endpoint.tenant == tenant],
        )

    async def remove(self, found: Found, *, takes_keys: bool) -> bool:
        """Whether the log of Redis is written anew, without what was removed."""
        tenant = found.held.tenant
        if takes_keys:
            await self._remove_access(found)
        await self._stop(found.batches)
        for batch in await self._batches_of(tenant):
            await self._batches.remove(batch)
            await self._storage.delete(*await self._storage.list(folder(batch.id)))
        for file in await self._files_of(tenant):
            await self._files.delete(file.id, tenant)
        held = await self._tenants.holdings(tenant)
        await self._tenants.forget(replace(held, key_ids=found.held.key_ids))
        return await self._tenants.rewrite_log()

    async def _remove_access(self, found: Found) -> None:
        for key_id in found.held.key_ids:
            await self._keys.remove(key_id)
        for endpoint in found.endpoints:
            await self._webhooks.remove_endpoint(endpoint.id)
        if found.held.key_ids:
            await asyncio.sleep(KEYS_HOLD_S)

    async def _stop(self, batches: list[BatchRecord]) -> None:
        """Cancel those that have not ended, and wait for their last words."""
        running = [batch.id for batch in batches if not batch.is_final]
        for batch_id in running:
            await self._batches.change(batch_id, lambda it: it.cancelling(wall_ms() // 1000))
        end_at_s = monotonic_s() + STOP_LIMIT_S
        while running and monotonic_s() < end_at_s:
            await asyncio.sleep(0.1)
            records = [await self._batches.get(batch_id) for batch_id in running]
            running = [record.id for record in records if record and not record.is_final]

    async def _batches_of(self, tenant: str) -> list[BatchRecord]:
        return await _all(lambda last: self._batches.page(tenant, limit=_PAGE, after=last))

    async def _files_of(self, tenant: str) -> list[FileRecord]:
        return await _all(lambda last: self._files.list(tenant, limit=_PAGE, after=last))


async def _all(page_behind: Callable[[str], Awaitable[tuple[list[R], bool] | None]]) -> list[R]:
    """The records of all pages, each asked for by the last id of the one before."""
    found: list[R] = []
    has_more = True
    while has_more:
        page = await page_behind(found[-1].id if found else "")
        records, has_more = page or ([], False)
        found += records
    return found


def _with_place(settings: StorageSettings, act: Callable[[Place], Awaitable[T]]) -> T:
    async def run() -> T:
        redis = connect(runfile.redis_url_of(settings))
        try:
            return await act(Place(redis, open_storage(settings.storage_url, settings.data_dir)))
        finally:
            await redis.aclose()

    return asyncio.run(run())
