"""Records in Redis: pages of those of a tenant, and one in a hash that several may change."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_MIN_READ, _MAX_READ = 50, 500
"""Records that are read at once."""

_pack = msgspec.msgpack.Encoder().encode


async def page_of(
    redis: Any,
    listed: str,
    key_of: Callable[[str], str],
    unpack: Callable[[bytes], T],
    *,
    limit: int,
    after: str,
    is_wanted: Callable[[T], bool] = lambda _: True,
    newest_first: bool = True,
) -> tuple[list[T], bool] | None:
    """Records whose ids stand in the zset ``listed`` by their time, behind the id ``after``, and
    whether there are more. None: ``after`` is not in it.

    Raises: what redis-py does.
    """
    rank_of, ids_in = (
        (redis.zrevrank, redis.zrevrange) if newest_first else (redis.zrank, redis.zrange)
    )
    found: list[T] = []
    first = 0
    if after:
        rank = await rank_of(listed, after)
        if rank is None:
            return None
        first = rank + 1
    while len(found) <= limit:
        size = min(_MAX_READ, max(_MIN_READ, limit + 1 - len(found)))
        ids = await ids_in(listed, first, first + size - 1)
        if not ids:
            break
        first += len(ids)
        packed = await redis.mget([key_of(id.decode()) for id in ids])
        found += [record for record in (unpack(it) for it in packed if it) if is_wanted(record)]
    return found[:limit], len(found) > limit


async def change_field(
    redis: Any,
    name: str,
    field: str,
    unpack: Callable[[bytes], T],
    change: Callable[[T], T],
) -> T | None:
    """Replace the record in a field of the hash ``name`` by what ``change`` makes of it, whoever
    else changes the hash. None: there is no such field.

    Raises: what redis-py does.
    """

    async def replace(pipe: Any) -> T | None:
        packed = await pipe.hget(name, field)
        pipe.multi()
        if packed is None:
            return None
        changed = change(unpack(packed))
        pipe.hset(name, field, _pack(changed))
        return changed

    return await redis.transaction(replace, name, value_from_callable=True)
