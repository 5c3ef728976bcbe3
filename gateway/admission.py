"""Admission: from an order to a generation that waits in Redis, or an honest refusal.

The order of things matters: the mailbox is opened first, so that no record can arrive before it;
the request is queued, subscribed and charged in one step of the broker; what was admitted is kept
for a few seconds in case Redis forgets it. When Redis does not answer, admission is tried again
under the same id for a moment (it is idempotent), and an id whose fate stays unknown is cancelled.
"""

import asyncio
import math
import random
import struct
import time
from dataclasses import dataclass, replace

from starlette.datastructures import Headers

from common.broker import Admission, Admitted, Attachment, Broker, Presentation, Quota
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import generation_id
from common.keys import NO_LIMITS
from common.messages import GenerationSpec, Lane
from common.settings import GatewaySettings, OrderSettings
from gateway.callers import Caller
from gateway.idempotency import Idempotency, digest_of
from gateway.order import DETAILS, ECHO, Order
from gateway.recent import RecentAdmissions
from gateway.relay import Relay
from gateway.stream import Stream

PATIENCE_S = 3.0
"""How long admission waits for a Redis that just restarts or fails over."""
FORESIGHT_S = 0.5
"""A question that takes longer is not worth its answer."""
MAX_GRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Manner:
    """What the client's leaving does: cancel the generation after ``grace_s``; None: nothing."""

    grace_s: float | None

    @property
    def text(self) -> str:
        """As the header ``x-headrace-disconnect`` writes it."""
        if self.grace_s is None:
            return "continue"
        return "cancel" if self.grace_s == 0 else f"{self.grace_s:g}"


def manner_of(headers: Headers, *, resumable: bool, settings: GatewaySettings) -> Manner:
    """Read ``x-headrace-disconnect``. By default what is ``resumable``, a stream or an answer with
    an idempotency key, leaves its client some seconds to come back. Any other answer is cancelled
    at once: nobody can take it up again half-way.

    Raises: Failure BAD_REQUEST.
    """
    text = headers.get("x-headrace-disconnect")
    if text is None:
        return Manner(settings.disconnect_grace_s if resumable else 0.0)
    if text in ("cancel", "continue"):
        return Manner(0.0 if text == "cancel" else None)
    try:
        grace_s = float(text)
    except ValueError:
        grace_s = math.nan
    if not 0 <= grace_s <= MAX_GRACE_S:
        raise Failure(
            "BAD_REQUEST",
            f"x-headrace-disconnect must be cancel, continue, or seconds up to {MAX_GRACE_S:g}",
            field="x-headrace-disconnect",
        )
    return Manner(grace_s)


def retention_s(order: Order, settings: GatewaySettings) -> float:
    """How long the answer to ``order`` can be read after its end."""
    return settings.retention_s if order.retention_s is None else order.retention_s


@dataclass(frozen=True, slots=True)
class Ticket:
    """An admitted order: a stream for each choice, and what was decided on the way."""

    streams: list[Stream]
    admitted: Admitted
    presentation: Presentation
    retention_s: int
    """How long the answer is kept once it has ended."""

    @property
    def is_replayed(self) -> bool:
        """Whether it was admitted before, under the same idempotency key."""
        return self.admitted.existing


class Admissions:
    def __init__(
        self,
        broker: Broker,
        relay: Relay,
        recent: RecentAdmissions,
        settings: GatewaySettings,
    ) -> None:
        self._broker = broker
        self._relay = relay
        self._recent = recent
        self._settings = settings

    async def foresee(self, caller: Caller, lane: Lane, idempotency_key: str) -> None:
        """Refuse ahead of the work on a prompt what :meth:`admit` would refuse after it, whatever
        the prompt holds. Where Redis is away, :meth:`admit` finds out.

        Raises: Failure QUEUE_FULL, NO_WORKERS, RATE_LIMITED.
        """
        settings = self._settings
        try:
            async with asyncio.timeout(FORESIGHT_S):
                await self._broker.foresee(
                    lane=lane,
                    tenant=caller.tenant,
                    queue_limit_ms=int(settings.queue_limit_s * 1000),
                    lane_cap_tokens=settings.lane_cap_tokens,
                    lane_cap_bytes=settings.lane_cap_bytes,
                    idempotency_key=digest_of(idempotency_key, 0) if idempotency_key else "",
                    quota=_quota(caller, is_first=True),
                )
        except TimeoutError:
            return
        except Failure as failure:
            if not failure.code.startswith("BROKER_"):
                raise

    async def admit(
        self,
        caller: Caller,
        request_id: str,
        order: Order,
        manner: Manner,
        *,
        part_of: str = "",
        trace: str = "",
        first_choice: int = 0,
        idempotency: Idempotency | None = None,
    ) -> Ticket:
        """Queue ``order`` of ``caller`` under ``request_id`` and follow it.

        ``part_of`` names the HTTP request in log lines, where it stands for several; ``trace`` is
        the ``traceparent`` of who queues it.

        ``first_choice`` counts the choices of orders that are answered together with this one.
        What came before under the key of ``idempotency`` is followed from its beginning instead.

        Raises: Failure QUEUE_FULL, NO_WORKERS, CONTEXT_LENGTH_EXCEEDED, BROKER_UNAVAILABLE,
            BROKER_FULL, IDEMPOTENCY_CONFLICT, STREAM_EXPIRED, RATE_LIMITED, QUOTA_EXHAUSTED.
        """
        settings = self._settings
        admission = replace(
            admission_of(settings, caller, request_id, order, part_of=part_of, trace=trace),
            gateway=self._relay.name,
            attached=manner.grace_s is not None,
            grace_ms=int((manner.grace_s or 0) * 1000),
            queue_limit_ms=int(settings.queue_limit_s * 1000),
            retention_ms=int(retention_s(order, settings) * 1000),
            quota=_quota(caller, is_first=first_choice == 0),
        )
        if idempotency is not None:
            admission = replace(
                admission,
                idempotency_key=digest_of(idempotency.key, first_choice),
                fingerprint=idempotency.fingerprint,
            )
        streams = self._open(request_id, caller.tenant, order.num_choices, first_choice)
        self._recent.keep(admission)
        try:
            admitted = await self._submit(admission)
        except BaseException:
            self._recent.forget(request_id)
            for stream in streams:
                self._relay.close(stream, was_subscribed=idempotency is not None)
            raise
        if admitted.request_id == request_id:
            admitted = replace(admitted, existing=False)  # an answer of Redis was lost, at most
            return Ticket(streams, admitted, admission.presentation, admission.retention_ms // 1000)
        self._recent.forget(request_id)
        for stream in streams:
            self._relay.close(stream, was_subscribed=False)
        return await self._follow(admitted, caller.tenant, order.num_choices, first_choice)

    def _open(
        self, request_id: str, tenant: str, num_choices: int, first_choice: int
    ) -> list[Stream]:
        return [
            self._relay.open(generation_id(request_id, i), tenant, choice=first_choice + i)
            for i in range(num_choices)
        ]

    async def _follow(
        self, admitted: Admitted, tenant: str, num_choices: int, first_choice: int
    ) -> Ticket:
        """Read what was admitted before, whether it runs or has ended."""
        streams = self._open(admitted.request_id, tenant, num_choices, first_choice)
        try:
            attachments = [await self._attach(stream) for stream in streams]
        except BaseException:
            for stream in streams:
                self._relay.close(stream)
            raise
        first = attachments[0]
        version = first.model_version or admitted.model_version
        admitted = replace(admitted, model_version=version)
        return Ticket(streams, admitted, first.presentation, first.retention_ms // 1000)

    async def _attach(self, stream: Stream) -> Attachment:
        attachment = await self._relay.attach(stream)
        if attachment is None:
            raise Failure("STREAM_EXPIRED")  # just now: key and stream expire together
        return attachment

    def keep_document(self, request_id: str, document: bytes, ttl_ms: int) -> None:
        """What Redis has been given beside an admission, in case it forgets that as well."""
        self._recent.keep_document(request_id, document, ttl_ms)

    def withdraw(self, ticket: Ticket) -> None:
        """Take back what was admitted, whatever its client's manner: its answer will not be."""
        for stream in ticket.streams:
            if ticket.is_replayed:
                self._relay.close(stream)
                continue
            self._recent.forget(ticket.admitted.request_id)
            self._relay.close(stream, was_subscribed=False)
            self._relay.cancel_soon(stream.id, stream.tenant)

    async def _submit(self, admission: Admission) -> Admitted:
        give_up_at = monotonic_s() + PATIENCE_S
        while True:
            try:
                return await self._broker.admit(admission)
            except Failure as failure:
                if failure.code != "BROKER_UNAVAILABLE":
                    raise
                if monotonic_s() > give_up_at:
                    self._give_up(admission)
                    raise
            await asyncio.sleep(random.uniform(0.05, 0.3))

    def _give_up(self, admission: Admission) -> None:
        """Nobody will read what Redis made of it, but for a client that may ask again by its key:
        then its grace time decides.
        """
        if admission.idempotency_key:
            return
        for choice in range(admission.num_choices):
            given_up = generation_id(admission.request_id, choice)
            self._relay.cancel_soon(given_up, admission.tenant)


def admission_of(
    settings: OrderSettings,
    caller: Caller,
    request_id: str,
    order: Order,
    *,
    part_of: str = "",
    trace: str = "",
) -> Admission:
    """What a request for ``order`` always is; whoever makes it says how it waits and who reads."""
    return Admission(
        request_id=request_id,
        spec=GenerationSpec(
            prompt=pack_tokens(order.prompt),
            sampling=order.sampling,
            request_id=part_of or request_id,
            trace=trace,
            tenant_hash=caller.tenant_hash,
            key_id=caller.key_id,
            tenant=caller.tenant,
            adapter=order.adapter,
        ),
        cost=order.cost,
        presentation=presentation_of(order),
        gateway="",
        lane=order.lane,
        tenant=caller.tenant,
        num_choices=order.num_choices,
        run_limit_ms=int(settings.run_limit_s * 1000),
        lane_cap_tokens=settings.lane_cap_tokens,
        lane_cap_bytes=settings.lane_cap_bytes,
    )


def presentation_of(order: Order) -> Presentation:
    """How the answer to a request for ``order``, made now, is to be shown."""
    shows_seed = order.flags & DETAILS and order.sampling.do_sample
    return Presentation(
        api=order.api,
        flags=order.flags,
        created=int(time.time()),
        prompt_tokens=len(order.prompt),
        seed=order.sampling.seed if shows_seed else None,
        num_choices=order.num_choices,
        prompt_characters=len(order.prompt_text) if order.flags & ECHO else 0,
        is_background=order.document is not None and order.document.is_background,
    )


def _quota(caller: Caller, *, is_first: bool) -> Quota | None:
    """Several prompts in one body are one request, and as many open ones."""
    if caller.limits == NO_LIMITS:
        return None
    return Quota(caller.key_id, caller.limits, num_requests=int(is_first))


def pack_tokens(tokens: list[int]) -> bytes:
    """Token ids as little-endian u32."""
    return struct.pack(f"<{len(tokens)}I", *tokens)
