"""Webhooks leave from here: ends become events, and events are sent until somebody takes them.

Both are loops of every background process, over state in Redis alone. What this process noted or
sent when it was killed is noted or sent by the next one, under the same event id: an endpoint may
get an event twice, never not at all. arq has no part in it: it would start again what a killed
process was sending only after its longest job's time limit.
"""

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime

import httpx2
import msgspec
from standardwebhooks import Webhook

from common import keys
from common.broker import Broker, Ended, WebhookStore
from common.failures import Failure
from common.ids import request_of
from common.logs import get_logger
from common.messages import FinishReason
from common.settings import BackgroundSettings
from common.webhooks import Delivery, Endpoint, EventType
from workers.background.post import Poster, Refused

log = get_logger()

LOOK_S = 1.0
MAX_AT_ONCE = 32
MAX_AT_ONCE_PER_ENDPOINT = 4
"""A slow endpoint leaves room for the others."""
LEASE_MS = 30_000
"""Twice what one attempt may take."""
FIRST_RETRY_S = 5.0
RETRY_FACTOR = 4.0
MAX_RETRY_S = 8 * 3600.0
_UNSIGNED_RETRY_MS = 60_000
_GONE = 410
_RESPONSE_PREFIX = "resp_"


# Ends become events ------------------------------------------------------------------------------


async def keep_telling(broker: Broker) -> None:
    """Note the ends of batches and background responses as events, until cancelled."""
    while True:
        with suppress(Failure):  # Redis is away: whoever serves on it says so
            await tell_batches(broker)
            while await tell_responses(broker):
                continue
        await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))


async def tell_batches(broker: Broker) -> None:
    """What the records of batches left behind with their last step."""
    batches = broker.batch_store
    for batch_id, at_s in await batches.untold():
        record = await batches.get(batch_id)
        if record is not None and record.is_final:
            event_type = msgspec.convert(f"batch.{record.status}", EventType)
            await broker.webhook_store.enqueue(event_type, record.tenant, batch_id, at_s)
        await batches.note_told(batch_id)


async def tell_responses(broker: Broker) -> bool:
    """A page of the pool's ended generations; whether there may be more.

    Where the cursor stands is noted behind its events, and by every process: read twice, an end is
    the same event.
    """
    ends = await broker.read_ended(await broker.told_cursor())
    if not ends:
        return False
    for end in ends:
        if end.is_background:
            response_id = f"{_RESPONSE_PREFIX}{request_of(end.id)}"
            at_s = end.at_ms // 1000
            await broker.webhook_store.enqueue(event_of(end), end.tenant, response_id, at_s)
    await broker.keep_told_cursor(ends[-1].cursor)
    return True


def event_of(end: Ended) -> EventType:
    """By the status that the response then has."""
    match end.reason:
        case FinishReason.FAILED:
            return "response.failed"
        case FinishReason.CANCELLED:
            return "response.cancelled"
        case FinishReason.LENGTH:
            return "response.incomplete"
        case _:
            return "response.completed"


# Events are sent ---------------------------------------------------------------------------------


class Deliverer:
    """Sends what is due, many at once, on as many tasks."""

    def __init__(self, store: WebhookStore, poster: Poster, settings: BackgroundSettings) -> None:
        self._store = store
        self._poster = poster
        self._settings = settings
        self._sending: dict[asyncio.Task[None], str] = {}

    async def run(self) -> None:
        """Send until cancelled. What was on its way then is sent again when its lease has ended."""
        try:
            while True:
                with suppress(Failure):
                    await self._start_due()
                await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))
        finally:
            for task in self._sending:
                task.cancel()

    async def _start_due(self) -> None:
        room = MAX_AT_ONCE - len(self._sending)
        busy = Counter(self._sending.values())
        for delivery in await self._store.claim_due(limit=room, lease_ms=LEASE_MS) if room else ():
            if busy[delivery.endpoint_id] >= MAX_AT_ONCE_PER_ENDPOINT:
                await self._store.postpone(delivery, _ms(LOOK_S))
                continue
            busy[delivery.endpoint_id] += 1
            task = asyncio.create_task(self._send(delivery))
            self._sending[task] = delivery.endpoint_id
            task.add_done_callback(self._sending.pop)

    async def _send(self, delivery: Delivery) -> None:
        with suppress(Failure):  # Redis is away: it is sent again when the lease has ended
            try:
                await self.deliver(delivery)
            except Failure:
                raise
            except Exception:  # an answer that a library does not understand is none
                log.exception("webhook.failed", event_id=delivery.event_id)
                delivery = msgspec.structs.replace(delivery, attempts=delivery.attempts + 1)
                await self._settle(delivery, "it could not be sent: see the log")

    async def deliver(self, delivery: Delivery) -> None:
        """One attempt, and what becomes of the delivery.

        Raises: Failure BROKER_UNAVAILABLE, BROKER_FULL.
        """
        endpoint = await self._store.endpoint(delivery.endpoint_id)
        if endpoint is None or endpoint.disabled:
            why = "it was removed" if endpoint is None else endpoint.disabled
            return await self._settle(delivery, f"the endpoint is not served: {why}", is_last=True)
        pepper = self._pepper_of(endpoint)
        if pepper is None:
            return await self._store.postpone(delivery, _ms(0) + _UNSIGNED_RETRY_MS)
        delivery = msgspec.structs.replace(delivery, attempts=delivery.attempts + 1)
        try:
            status = await self._poster.post(
                endpoint.url, headers_of(delivery, endpoint, pepper), delivery.body()
            )
        except Refused as refused:
            return await self._settle(delivery, f"not sent: {refused}")
        except (OSError, httpx2.HTTPError) as error:
            return await self._settle(delivery, f"no answer: {_words(error)}")
        if 200 <= status < 300:
            return await self._settle(delivery, f"status {status}", is_taken=True)
        if status == _GONE:
            await self._disable(endpoint)
        return await self._settle(delivery, f"status {status}", is_last=status == _GONE)

    async def _settle(
        self, delivery: Delivery, came_to: str, *, is_taken: bool = False, is_last: bool = False
    ) -> None:
        now_s = time.time()
        delivery = msgspec.structs.replace(delivery, last=came_to, last_s=int(now_s))
        next_s = now_s + retry_s(delivery.attempts)
        if is_taken:
            event, delivery = "webhook.delivered", _in_state(delivery, "delivered")
        elif is_last or next_s > delivery.give_up_s:
            event, delivery = "webhook.dead", _in_state(delivery, "dead")
        else:
            event = "webhook.failed"
        await self._store.settle(delivery, due_ms=int(next_s * 1000))
        log.info(
            event,
            event_id=delivery.event_id,
            event_type=delivery.event_type,
            endpoint=delivery.endpoint_id,
            attempts=delivery.attempts,
            reason=came_to,
        )

    async def _disable(self, endpoint: Endpoint) -> None:
        why = f"it answered {_GONE}"
        await self._store.change_endpoint(
            endpoint.id, lambda known: msgspec.structs.replace(known, disabled=why)
        )
        log.warning("webhook.disabled", endpoint=endpoint.id, reason=why)

    def _pepper_of(self, endpoint: Endpoint) -> bytes | None:
        """What this endpoint's secret hangs on; None: it is not here."""
        with suppress(Failure):
            given = self._settings.key_pepper.get_secret_value()
            pepper = keys.read_pepper(given, self._settings.data_dir)
            if pepper is not None and keys.fingerprint(pepper) == endpoint.pepper:
                return pepper
        log.error("webhook.unsigned", endpoint=endpoint.id)
        return None


def headers_of(delivery: Delivery, endpoint: Endpoint, pepper: bytes) -> dict[str, str]:
    """Of one attempt, signed as of now; while a secret is being replaced, with both."""
    now = datetime.now(UTC)
    body = delivery.body().decode()
    signatures = [
        Webhook(secret).sign(delivery.event_id, now, body)
        for secret in endpoint.secrets(pepper, now.timestamp())
    ]
    return {
        "content-type": "application/json",
        "user-agent": "headrace",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def retry_s(attempts: int) -> float:
    """How long after so many attempts the next one waits: 5 s, 20 s, … 8 h, a quarter more or less,
    so that endpoints that come back are not met by everything at once.
    """
    grown_s = FIRST_RETRY_S * RETRY_FACTOR ** min(max(0, attempts - 1), 10)
    return min(MAX_RETRY_S, grown_s) * random.uniform(0.75, 1.25)


def _in_state(delivery: Delivery, state: str) -> Delivery:
    return msgspec.structs.replace(delivery, state=state)


def _ms(later_s: float) -> int:
    return int((time.time() + later_s) * 1000)


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:200]
