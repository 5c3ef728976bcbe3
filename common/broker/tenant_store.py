"""All that Redis holds of one tenant, in every pool: found by looking at each key, and removed.

Nothing else keeps a list of what a tenant has, so this reads through the whole server, in small
steps beside the traffic. It is for the one who runs the server, and not part of the protocol.
"""

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from common.broker import keys
from common.broker.broker import Broker
from common.broker.connection import Client, mapped_errors
from common.broker.key_store import KeyStore
from common.ids import request_of
from common.messages import LANES

_POOL = re.compile(rb"hr:\{(.+)/(\d+)\}:")
_PAGE = 500
"""Keys that are looked at in one step."""


class _Owned(msgspec.Struct):
    """What every document of a response says, whatever else it holds."""

    tenant: str = ""


_owner = msgspec.json.Decoder(_Owned).decode


@dataclass(slots=True)
class Holdings:
    """What there is of a tenant. Pools are (name, partition)."""

    tenant: str
    generations: list[tuple[tuple[str, int], str]] = field(
        default_factory=list[tuple[tuple[str, int], str]]
    )
    documents: list[bytes] = field(default_factory=list[bytes])
    idempotency_keys: list[bytes] = field(default_factory=list[bytes])
    pools: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Every pool that there is."""
    key_ids: list[str] = field(default_factory=list[str])
    """Its API keys."""

    @property
    def num_requests(self) -> int:
        return len({(pool, request_of(id)) for pool, id in self.generations})


class TenantStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client) -> None:
        self._redis: Any = redis
        self._client = redis

    async def holdings(self, tenant: str) -> Holdings:
        """Look for everything; nothing is changed."""
        found = Holdings(tenant)
        found.key_ids = [
            key.id for key, _ in await KeyStore(self._client).all() if key.tenant == tenant
        ]
        with mapped_errors():
            async for names in self._pages("hr:{*/*}:clock"):
                found.pools += [_pool_of(name) for name in names]
            for family in ("gen", "dead"):  # a dead letter outlives its generation
                async for names in self._pages(f"hr:{{*/*}}:{family}:*"):
                    found.generations += await self._owned_generations(names, tenant)
            async for names in self._pages("hr:{*/*}:doc:*"):
                found.documents += await self._owned_documents(names, tenant)
            async for names in self._pages(f"hr:{{*/*}}:idem:{len(tenant)}:{tenant}:*"):
                found.idempotency_keys += names
        return found

    async def forget(self, found: Holdings) -> None:
        """End what runs of ``found`` and remove all of it, also what its keys have used; the keys
        themselves stay.
        """
        for (pool, partition), id in dict.fromkeys(found.generations):
            await Broker(self._client, pool, partition).forget(id, found.tenant)
        with mapped_errors():
            await self._unlink([*found.documents, *found.idempotency_keys])
            for pool, partition in found.pools:
                prefix = keys.prefix(pool, partition)
                used = (keys.quota(prefix, id) for id in found.key_ids)
                using = (keys.using(prefix, id) for id in found.key_ids)
                await self._unlink([*used, *using])
                tags = (f"t.{lane}.{found.tenant}" for lane in LANES)
                await self._redis.hdel(keys.tenants(prefix), *tags)

    async def rewrite_log(self) -> bool:
        """Have Redis write its append-only file anew, without what was removed; False: this user
        may not ask for it, or there is none.
        """
        with mapped_errors():
            try:
                await self._redis.bgrewriteaof()
            except ResponseError:
                return False
        return True

    async def _pages(self, pattern: str) -> AsyncIterator[list[bytes]]:
        cursor = 0
        while True:
            cursor, names = await self._redis.scan(cursor, match=pattern, count=_PAGE)
            if names:
                yield names
            if cursor == 0:
                return

    async def _owned_generations(
        self, names: Sequence[bytes], tenant: str
    ) -> list[tuple[tuple[str, int], str]]:
        owners = await self._read("hget", names, "tenant")
        return [
            (_pool_of(name), name.rpartition(b":")[2].decode())
            for name, owner in zip(names, owners, strict=True)
            if owner == tenant.encode()
        ]

    async def _owned_documents(self, names: Sequence[bytes], tenant: str) -> list[bytes]:
        documents = await self._read("get", names)
        return [
            name
            for name, document in zip(names, documents, strict=True)
            if document is not None and _owner(document).tenant == tenant
        ]

    async def _read(self, command: str, names: Sequence[bytes], *arguments: str) -> list[Any]:
        """``command`` for each key, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                getattr(pipe, command)(name, *arguments)
            return await pipe.execute()

    async def _unlink(self, names: Sequence[bytes | str]) -> None:
        for first in range(0, len(names), _PAGE):
            await self._redis.unlink(*names[first : first + _PAGE])


def _pool_of(name: bytes) -> tuple[str, int]:
    found = _POOL.match(name)
    if found is None:  # the pattern of the scan says otherwise
        raise ValueError(f"{name!r} is no key of a pool")
    return found[1].decode(), int(found[2])
