"""Webhook endpoints in Redis, and every event on its way to one of them.

Endpoints last until they are removed; an event is known for a month behind its last attempt, so
that its end can be noted again without its being sent again. The set of what is due is the truth:
who sends something holds a lease on it meanwhile, and what nobody holds is sent by the next one.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from common.broker import keys
from common.broker.connection import Client, mapped_errors
from common.broker.records import change_field
from common.clock import wall_ms
from common.webhooks import GIVE_UP_S, Delivery, Endpoint, EventType, event_id

MAX_LISTED = 1000
_KEPT_MS = 30 * 24 * 3600 * 1000
_MAX_KNOWN = 100_000
"""Deliveries in the list; older ones are only known by their id."""

_pack = msgspec.msgpack.Encoder().encode
_endpoint = msgspec.msgpack.Decoder(Endpoint).decode
_delivery = msgspec.msgpack.Decoder(Delivery).decode


class WebhookStore:
    """All methods raise Failure BROKER_UNAVAILABLE or BROKER_FULL for what Redis answers."""

    def __init__(self, redis: Client) -> None:
        self._redis: Any = redis

    # Endpoints -----------------------------------------------------------------------------------

    async def endpoints(self) -> list[Endpoint]:
        """All of them, the oldest first."""
        with mapped_errors():
            packed = await self._redis.hvals(keys.WEBHOOK_ENDPOINTS)
        return sorted(map(_endpoint, packed), key=lambda endpoint: endpoint.created_s)

    async def endpoint(self, endpoint_id: str) -> Endpoint | None:
        with mapped_errors():
            packed = await self._redis.hget(keys.WEBHOOK_ENDPOINTS, endpoint_id)
        return _endpoint(packed) if packed else None

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        with mapped_errors():
            await self._redis.hset(keys.WEBHOOK_ENDPOINTS, endpoint.id, _pack(endpoint))

    async def change_endpoint(
        self, endpoint_id: str, change: Callable[[Endpoint], Endpoint]
    ) -> Endpoint | None:
        """Replace an endpoint by what ``change`` makes of it; None: there is none."""
        with mapped_errors():
            return await change_field(
                self._redis, keys.WEBHOOK_ENDPOINTS, endpoint_id, _endpoint, change
            )

    async def remove_endpoint(self, endpoint_id: str) -> bool:
        """False: there was none. What is on its way there dies."""
        with mapped_errors():
            return bool(await self._redis.hdel(keys.WEBHOOK_ENDPOINTS, endpoint_id))

    # Events --------------------------------------------------------------------------------------

    async def enqueue(
        self, event_type: EventType, tenant: str, object_id: str, at_s: int | None = None
    ) -> None:
        """Have an end told to all endpoints of the tenant that want it; ``at_s``: when it was.

        May be called any number of times: what was noted before is not noted again.
        """
        for endpoint in await self.endpoints():
            if endpoint.wants(tenant, event_type):
                await self.enqueue_for(endpoint, event_type, object_id, at_s)

    async def enqueue_for(
        self, endpoint: Endpoint, event_type: EventType, object_id: str, at_s: int | None = None
    ) -> Delivery:
        """The same, for one endpoint whatever it wants."""
        now_s = wall_ms() // 1000
        delivery = Delivery(
            event_id=event_id(event_type, object_id),
            event_type=event_type,
            object_id=object_id,
            tenant=endpoint.tenant,
            endpoint_id=endpoint.id,
            created_s=now_s if at_s is None else at_s,
            give_up_s=now_s + GIVE_UP_S,
        )
        record = keys.webhook_delivery(delivery.id)

        async def note(pipe: Any) -> None:
            is_known = await pipe.exists(record)
            pipe.multi()
            if not is_known:
                _write(pipe, delivery, due_ms=wall_ms())

        with mapped_errors():
            await self._redis.transaction(note, record)
        return delivery

    async def delivery(self, delivery_id: str) -> Delivery | None:
        with mapped_errors():
            packed = await self._redis.get(keys.webhook_delivery(delivery_id))
        return _delivery(packed) if packed else None

    async def deliveries(self, *, only_dead: bool = False) -> list[Delivery]:
        """The newest :data:`MAX_LISTED`, the newest first."""
        listed = keys.DEAD_WEBHOOKS if only_dead else keys.WEBHOOK_DELIVERIES
        with mapped_errors():
            ids = await self._redis.zrevrange(listed, 0, MAX_LISTED - 1)
            if not ids:
                return []
            packed = await self._redis.mget([keys.webhook_delivery(id.decode()) for id in ids])
        return [_delivery(record) for record in packed if record]

    async def send_again(self, delivery_id: str) -> Delivery | None:
        """Send a delivery anew, for as long as a new one, under its event id; None: unknown."""
        delivery = await self.delivery(delivery_id)
        if delivery is None:
            return None
        again = msgspec.structs.replace(
            delivery, state="waiting", attempts=0, give_up_s=wall_ms() // 1000 + GIVE_UP_S
        )
        await self.settle(again, due_ms=wall_ms())
        return again

    # Sending -------------------------------------------------------------------------------------

    async def claim_due(self, *, limit: int, lease_ms: int) -> list[Delivery]:
        """Deliveries whose time has come, ours for ``lease_ms``; the longest due first."""
        now_ms = wall_ms()
        claimed: list[Delivery] = []
        with mapped_errors():
            # More than asked for: what others hold stands among them.
            ids = await self._redis.zrangebyscore(keys.DUE_WEBHOOKS, "-inf", now_ms, 0, MAX_LISTED)
            for delivery_id in (id.decode() for id in ids):
                if len(claimed) == limit:
                    break
                lease = keys.webhook_lease(delivery_id)
                if not await self._redis.set(lease, b"", nx=True, px=lease_ms):
                    continue
                packed = await self._redis.get(keys.webhook_delivery(delivery_id))
                delivery = _delivery(packed) if packed else None
                if delivery and delivery.state == "waiting":
                    claimed.append(delivery)
                else:
                    await self._redis.zrem(keys.DUE_WEBHOOKS, delivery_id)
        return claimed

    async def settle(self, delivery: Delivery, *, due_ms: int = 0) -> None:
        """Keep what an attempt made of it, and end our lease; ``due_ms``: when to send it next."""
        with mapped_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                _write(pipe, delivery, due_ms=due_ms)
                pipe.delete(keys.webhook_lease(delivery.id))
                await pipe.execute()

    async def postpone(self, delivery: Delivery, due_ms: int) -> None:
        """Try it later: what was missing was on our side."""
        with mapped_errors():
            await self._redis.zadd(keys.DUE_WEBHOOKS, {delivery.id: due_ms}, xx=True)
            await self._redis.delete(keys.webhook_lease(delivery.id))


def _write(pipe: Any, delivery: Delivery, *, due_ms: int) -> None:
    """The record and its places, in one step."""
    pipe.set(keys.webhook_delivery(delivery.id), _pack(delivery), px=_KEPT_MS)
    pipe.zadd(keys.WEBHOOK_DELIVERIES, {delivery.id: delivery.created_s})
    pipe.zremrangebyrank(keys.WEBHOOK_DELIVERIES, 0, -_MAX_KNOWN - 1)
    for listed, is_in, score in (
        (keys.DUE_WEBHOOKS, delivery.state == "waiting", due_ms),
        (keys.DEAD_WEBHOOKS, delivery.state == "dead", delivery.last_s),
    ):
        if is_in:
            pipe.zadd(listed, {delivery.id: score})
        else:
            pipe.zrem(listed, delivery.id)
    for listed in (keys.WEBHOOK_DELIVERIES, keys.DUE_WEBHOOKS, keys.DEAD_WEBHOOKS):
        pipe.pexpire(listed, _KEPT_MS)
