"""The API keys in Redis: one hash for all of them, so that every gateway sees a change at once.

They have no time to live: a key lasts until it is revoked. They lie beside the pools, because a key
holds for all models on one server.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.broker.records import change_field
from common.failures import Failure
from common.keys import ApiKey

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(ApiKey).decode


class KeyStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client) -> None:
        self._redis: Any = redis

    async def get(self, key_id: str) -> ApiKey | None:
        with mapped_errors():
            packed = await self._redis.hget(keys.API_KEYS, key_id)
        return _unpack(packed) if packed else None

    async def has_any(self) -> bool:
        with mapped_errors():
            return await self._redis.hlen(keys.API_KEYS) > 0

    async def all(self) -> list[tuple[ApiKey, int]]:
        """Every key, oldest first, and when it was last used in seconds; 0: never."""
        with mapped_errors():
            packed = await self._redis.hvals(keys.API_KEYS)
            used = await self._redis.hgetall(keys.API_KEYS_USED)
        found = sorted(map(_unpack, packed), key=lambda key: key.created_s)
        return [(key, int(used.get(key.id.encode(), 0))) for key in found]

    async def add(self, key: ApiKey, pepper: bytes) -> None:
        """Store a new key, hashed under the pepper of this fingerprint.

        Raises: Failure ACCESS_MISCONFIGURED when the keys there are hashed under another one.
        """
        await self.check_pepper(pepper)
        with mapped_errors():
            await self._redis.set(keys.PEPPER, pepper)
            await self._redis.hset(keys.API_KEYS, key.id, _pack(key))

    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """Replace a key by what ``change`` makes of it, whoever else changes it; None: no such."""
        with mapped_errors():
            return await change_field(self._redis, keys.API_KEYS, key_id, _unpack, change)

    async def remove(self, key_id: str) -> bool:
        """Forget a key; False: there was none."""
        with mapped_errors():
            removed = await self._redis.hdel(keys.API_KEYS, key_id)
            await self._redis.hdel(keys.API_KEYS_USED, key_id)
        return bool(removed)

    async def note_use(self, key_id: str, at_s: int) -> None:
        with mapped_errors():
            await self._redis.hset(keys.API_KEYS_USED, key_id, at_s)

    async def check_pepper(self, pepper: bytes) -> None:
        """Raises: Failure ACCESS_MISCONFIGURED when there are keys hashed under a pepper of another
        fingerprint.
        """
        with mapped_errors():
            known = await self._redis.get(keys.PEPPER)
        if known not in (None, pepper) and await self.has_any():
            raise Failure(
                "ACCESS_MISCONFIGURED",
                "The keys in Redis are hashed under another pepper: give this process the "
                "keys.pepper of the data directory where they were made, or the same "
                "HEADRACE_KEY_PEPPER",
            )
