"""`headrace forget`: removes what is kept of a tenant, and says what that was."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import click

from common import keys
from common.broker import Client, Holdings, KeyStore, TenantStore, WebhookStore, connect
from common.webhooks import Endpoint
from ops import runfile
from ops.processes import ForgetSettings

T = TypeVar("T")

KEYS_HOLD_S = 1.0
"""For so long a gateway may go on taking a key that was removed."""


@dataclass(slots=True)
class Found:
    """All there is of a tenant."""

    held: Holdings
    endpoints: Sequence[Endpoint] = field(default_factory=list[Endpoint])

    def rows(self) -> list[tuple[str, int]]:
        return [
            ("requests, with their answers", self.held.num_requests),
            ("documents of responses", len(self.held.documents)),
            ("idempotency keys", len(self.held.idempotency_keys)),
            ("API keys", len(self.held.key_ids)),
            ("webhook endpoints", len(self.endpoints)),
        ]


def forget(
    settings: ForgetSettings, tenant: str, *, only_looks: bool, takes_keys: bool, is_sure: bool
) -> None:
    """Show what there is of ``tenant`` and, unless ``only_looks``, remove it.

    Raises: click.BadParameter, click.Abort; Failure BROKER_UNAVAILABLE.
    """
    if not keys.is_tenant(tenant):
        raise click.BadParameter(f"{tenant!r} is no name of a tenant")
    found = _with_redis(settings, lambda redis: find(redis, tenant))
    for what, count in found.rows():
        click.echo(f"{count:8} {what}")
    if only_looks:
        return
    if not is_sure:
        click.confirm(f"Remove all of it that is {tenant}'s for ever?", abort=True)
    rewrites = _with_redis(settings, lambda redis: remove(redis, found, takes_keys=takes_keys))
    click.echo(f"What there was of {tenant} is removed.")
    if not takes_keys and found.held.key_ids:
        click.echo("Its API keys are still taken (--keys removes them).")
    if not rewrites:
        click.echo("An append-only file still holds it until: redis-cli bgrewriteaof")


async def find(redis: Client, tenant: str) -> Found:
    endpoints = await WebhookStore(redis).endpoints()
    return Found(
        await TenantStore(redis).holdings(tenant),
        [endpoint for endpoint in endpoints if endpoint.tenant == tenant],
    )


async def remove(redis: Client, found: Found, *, takes_keys: bool) -> bool:
    """Keys first, so that nothing comes after; whether the log of Redis is written anew."""
    store, held = TenantStore(redis), found.held
    if takes_keys:
        await _remove_access(redis, found)
        held = replace(await store.holdings(held.tenant), key_ids=held.key_ids)
    await store.forget(held)
    return await store.rewrite_log()


async def _remove_access(redis: Client, found: Found) -> None:
    for key_id in found.held.key_ids:
        await KeyStore(redis).remove(key_id)
    for endpoint in found.endpoints:
        await WebhookStore(redis).remove_endpoint(endpoint.id)
    if found.held.key_ids:
        await asyncio.sleep(KEYS_HOLD_S)


def _with_redis(settings: ForgetSettings, act: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        redis = connect(runfile.redis_url_of(settings))
        try:
            return await act(redis)
        finally:
            await redis.aclose()

    return asyncio.run(run())
