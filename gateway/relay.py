"""The relay: brings the token logs of generations to the clients that read them here.

One task reads the gateway's inbox and hands each record to the streams that follow its generation.
Everything that can go wrong with that is healed here: a record may be lost (the tail check looks at
quiet streams), the inbox may vanish or Redis may go back in time (join again: attach every stream
anew and re-submit what is unknown), a client may leave while Redis is away (the detach is kept and
sent later). See protocol.md, "Gateway".
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from common.broker import (
    MAX_CHOICES,
    MAX_LOOKS,
    Attachment,
    Broker,
    GatewayPresence,
    Look,
    Page,
)
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import generation_id, request_of
from common.logs import get_logger
from common.messages import LogEntry
from common.metrics import GatewayMetrics
from common.reaping import keep_reaping
from common.redis_clock import RedisClock
from gateway.cursor import Cursor
from gateway.recent import RecentAdmissions
from gateway.stream import RUNNING, Place, Stream

log = get_logger()

BLOCK_MS = 1000
"""One wait for inbox records; also how often a healthy Redis is heard of."""
BEAT_S = 1.0
"""Far below the lease, because each beat brings the figures of the live page."""
WATCH_S = 0.5
QUIET_RUNNING_S = 1.0
"""Silence of a running generation after which Redis is asked for its state."""
QUIET_WAITING_S = 5.0
PLACE_S = 1.0
"""How often clients that asked for it are told their place in the queue."""
AWAY_LIMIT_S = 10.0
"""Redis away for so long: clients are told. Below the gateway's lease of 15 s, so that nothing is
cancelled for want of a reader while its client waits."""
LOST_LIMIT_S = 3.0
"""How long an id may be unknown to Redis before its readers are told that it is gone."""
CANCEL_MEMORY_S = 3.0
"""Cancels that a Redis which went back may have forgotten are sent again within this time."""
MAX_OFFERS, MAX_DELIVERIES = 4096, 256
"""Records taken in, and streams written to, before others of this process have their turn: some
6 ms each."""


class Relay:
    """Streams of one gateway process on one pool partition.

    ``commands`` may be any connection pool; ``ordered`` must send one command after another, so
    that a detach never overtakes the attach that follows it; ``inbox`` must be allowed to block.
    """

    def __init__(
        self,
        name: str,
        *,
        commands: Broker,
        ordered: Broker,
        inbox: Broker,
        recent: RecentAdmissions,
        metrics: GatewayMetrics,
        keep_alive_s: float,
        clock: RedisClock | None = None,
    ) -> None:
        self.name = name
        self._commands = commands
        self._ordered = ordered
        self._inbox = inbox
        self._recent = recent
        self._metrics = metrics
        self._keep_alive_s = keep_alive_s
        self._clock = clock or RedisClock()
        self._readers: dict[str, list[Stream]] = {}
        self._order = asyncio.Lock()
        self._leaving: dict[str, None] = {}
        self._cancelling: dict[str, str] = {}
        self._errand = asyncio.Event()
        self._cancelled: deque[tuple[float, str, str]] = deque(maxlen=4096)
        self._lost_since: dict[str, float] = {}
        self._must_join = True
        self._heard_at = monotonic_s()
        self._is_away = False
        self._joined_ms = 0
        self.presence: Callable[[], GatewayPresence] = GatewayPresence
        """What this gateway says of itself in each beat."""
        self.joined = asyncio.Event()
        """Set once the inbox exists and is read."""

    @property
    def num_streams(self) -> int:
        return sum(map(len, self._readers.values()))

    @property
    def silent_s(self) -> float:
        """How long Redis has not been heard of; about 1 s at most when all is well."""
        return monotonic_s() - self._heard_at

    # Streams -------------------------------------------------------------------------------------

    def open(self, id: str, tenant: str, cursor: Cursor | None = None, choice: int = 0) -> Stream:
        """A mailbox for a generation. Open it before admit or attach, so that nothing is missed.

        ``choice`` stands on its batches, for who reads several.
        """
        stream = Stream(id, tenant, self._read_log, cursor, choice)
        self._readers.setdefault(id, []).append(stream)
        self._metrics.streams.inc()
        return stream

    async def attach(self, stream: Stream) -> Attachment | None:
        """Subscribe ``stream`` to its generation, with what the log holds behind its cursor.

        None: no such generation for this tenant. Raises: Failure BROKER_UNAVAILABLE.
        """
        attachment = await self._attach(stream.id, stream.tenant, stream.position)
        if attachment is not None:
            stream.offer_page(_page_of(attachment))
        return attachment

    def close(self, stream: Stream, *, was_subscribed: bool = True) -> None:
        """Forget a reader. Of a generation's last one Redis is told, if need be later.

        ``was_subscribed`` is False where Redis refused the generation, so that it needs no telling.
        """
        readers = self._readers.get(stream.id, [])
        if stream not in readers:
            return
        readers.remove(stream)
        self._metrics.streams.dec()
        self._metrics.lags.inc(stream.lags)
        self._metrics.heals.inc(stream.heals)
        if not readers:
            del self._readers[stream.id]
            self._lost_since.pop(stream.id, None)
            if was_subscribed and stream.state != "T":
                self._detach_soon(stream.id)

    async def cancel(self, request_id: str, tenant: str) -> str:
        """End a request, all its choices, for everybody: ``cancelled``, ``ended`` or ``unknown``.

        One that Redis does not know yet is not admitted any more.
        """
        self._recent.forget_of(tenant, request_id)
        first, *others = (generation_id(request_id, choice) for choice in range(MAX_CHOICES))
        # The first one first: its tombstone keeps out an admission that comes from now on.
        states = {await self._cancel(first, tenant)}
        known = [look.id for look in await self._commands.look(self.name, others) if look.state]
        states |= {await self._cancel(id, tenant) for id in known}
        return next((state for state in ("cancelled", "ended") if state in states), "unknown")

    async def _cancel(self, id: str, tenant: str) -> str:
        self._cancelled.append((monotonic_s(), id, tenant))
        return await self._commands.cancel(id, tenant)

    def cancel_soon(self, id: str, tenant: str) -> None:
        """Cancel a generation until Redis acknowledges it, for what nobody will ever read."""
        self._cancelling[id] = tenant
        self._errand.set()

    def fail_all(self, failure: Failure) -> None:
        """End every open stream with ``failure``; all stay resumable."""
        for stream in self._all_streams():
            stream.fail(failure)

    # Tasks ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the streams until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_keep("inbox", self._read_inbox))
            tasks.create_task(_keep("beat", self._beat))
            tasks.create_task(_keep("watch", self._watch))
            tasks.create_task(_keep("errands", self._run_errands))
            tasks.create_task(_keep("reap", lambda: keep_reaping(self._commands)))
            tasks.create_task(_keep("clock", lambda: self._clock.keep_sampling(self._commands)))

    async def flush(self, limit_s: float = 1.0) -> None:
        """Wait until Redis knows of every reader that left, at most ``limit_s``."""
        end_at = monotonic_s() + limit_s
        while (self._leaving or self._cancelling) and monotonic_s() < end_at:
            await asyncio.sleep(0.01)

    async def leave(self) -> None:
        """Tell Redis that this gateway is gone: grace times start now, not when its lease ends."""
        try:
            await self._commands.leave_gateway(self.name)
        except Failure:
            return  # the lease ends it

    async def _read_inbox(self) -> None:
        after = "0"
        while True:
            try:
                if self._must_join:
                    after = await self._join()
                after, items = await self._inbox.read_inbox(self.name, after, BLOCK_MS)
            except Failure as error:
                self._note_away(error)
                await asyncio.sleep(random.uniform(0.05, 0.5))
                continue
            self._note_heard()
            if items:
                written_ms = int(after.partition("-")[0])
                is_live = written_ms >= self._joined_ms
                lag_s = self._lag_s(written_ms) if is_live else None
                if lag_s is not None:
                    self._metrics.relay_lag_s.observe(lag_s)
                    self._metrics.tally.figures.relay_lag.observe(lag_s)
                await self._deliver(items, is_live=is_live, lag_s=lag_s)

    def _lag_s(self, written_ms: int) -> float | None:
        now_s = self._clock.now_s()
        return None if now_s is None else max(0.0, now_s - written_ms / 1000)

    async def _deliver(
        self, items: list[tuple[str, LogEntry]], *, is_live: bool, lag_s: float | None
    ) -> None:
        """Hand records to their readers, to each all that came together.

        ``is_live``: written since this gateway joined. ``lag_s``: how old the newest one is.
        """
        told: dict[Stream, None] = {}
        for number, (id, entry) in enumerate(items, 1):
            if number % MAX_OFFERS == 0:
                await asyncio.sleep(0)
            readers = self._readers.get(id)
            if readers is None:
                if is_live and entry.record.finish is None:
                    self._detach_soon(id)  # subscribed by mistake: a late attach, a lost detach
                continue
            if entry.record.start == 0:
                self._recent.note_first_token(request_of(id))
            for stream in readers:
                stream.offer(entry)
                stream.lag_s = lag_s
                told[stream] = None
        for number, stream in enumerate(told, 1):
            stream.deliver()
            if number % MAX_DELIVERIES == 0:
                await asyncio.sleep(0)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            reading = [s.id for s in self._all_streams() if s.state == "T" or s.reads_log]
            try:
                beat = await self._commands.beat_gateway(
                    self.name, reading=reading[:MAX_LOOKS], presence=self.presence()
                )
                if failures := self._metrics.tally.untold:
                    await self._commands.keep_failures(failures)
                    self._metrics.tally.note_told(len(failures))
            except Failure:
                continue  # the inbox reader notices the same, and joins again
            if beat.recreated:
                self._must_join = True

    # Joining: after the start, and whenever Redis may have forgotten something -------------------

    async def _join(self) -> str:
        """Make the inbox exist and every reader attached; returns where to read the inbox from.

        The inbox exists before anything is attached, so that nothing falls between. It is read from
        its beginning: what is known already is dropped by its position, and an old place in it is
        never trusted, because after a failover its ids may be lower and a read would wait for ever.
        """
        beat = await self._commands.beat_gateway(self.name)
        if beat.recreated and self.joined.is_set():
            log.warning("inbox.recreated", streams=self.num_streams)
        self._note_heard()
        self._must_join = False
        if self._clock.offset_s is None:
            await self._clock.sample(self._commands)
        self._joined_ms = int(1000 * (self._clock.now_s() or 0))
        now = monotonic_s()
        for at, cancelled, tenant in list(self._cancelled):
            if now - at < CANCEL_MEMORY_S:
                self.cancel_soon(cancelled, tenant)
        for read in list(self._readers):
            await self._attach_again(read)
        await self._resubmit_unread()
        await self._recent.put_back_documents()
        self.joined.set()
        return beat.last_id or "0"

    async def _attach_again(self, id: str) -> None:
        """Attach all readers of one generation anew, re-submitting it when Redis forgot it."""
        readers = self._readers.get(id)
        if not readers:
            return
        # A stranger may just have asked for it, and be about to be told that there is none.
        found = [await self._attach_of(tenant, id) for tenant in {it.tenant for it in readers}]
        if not any(found):
            self._note_lost(id)
            return
        self._lost_since.pop(id, None)
        if not readers:
            self._detach_soon(id)  # the last one left while Redis was asked

    async def _attach_of(self, tenant: str, id: str) -> bool:
        """The same for a tenant's readers; whether there is such a generation for them."""
        cursor = min((it.tail for it in self._of_tenant(tenant, id)), default=0)
        attachment = await self._attach(id, tenant, cursor)
        if attachment is None and await self._recent.resubmit(request_of(id), self.name):
            attachment = await self._attach(id, tenant, cursor)
        if attachment is None:
            return False
        for stream in self._of_tenant(tenant, id):
            stream.offer_page(_page_of(attachment))
        return True

    def _of_tenant(self, tenant: str, id: str) -> list[Stream]:
        return [stream for stream in self._readers.get(id, ()) if stream.tenant == tenant]

    async def _resubmit_unread(self) -> None:
        """What Redis forgot is queued again also for a client that left: it may come back."""
        kept = map(generation_id, self._recent.ids())
        unread = [known for known in kept if known not in self._readers]
        for look in await self._commands.look(self.name, unread):
            if not look.state:
                await self._recent.resubmit(request_of(look.id), gateway="")

    def _note_lost(self, id: str) -> None:
        since = self._lost_since.setdefault(id, monotonic_s())
        if monotonic_s() - since > LOST_LIMIT_S:
            for stream in self._readers.get(id, []):
                stream.fail(Failure("STREAM_EXPIRED"))

    async def _attach(self, id: str, tenant: str, cursor: int) -> Attachment | None:
        async with self._order:
            self._leaving.pop(id, None)
            return await self._ordered.attach(self.name, id, tenant, cursor)

    async def _read_log(self, id: str, cursor: int) -> Page | None:
        """Read for a stream, waiting for a Redis that is away as long as live streams do."""
        while True:
            try:
                return await self._commands.read(id, cursor)
            except Failure as failure:
                if failure.code != "BROKER_UNAVAILABLE" or self.silent_s > AWAY_LIMIT_S:
                    raise
            await asyncio.sleep(random.uniform(0.1, 0.4))

    # Watching quiet streams ----------------------------------------------------------------------

    async def _watch(self) -> None:
        places_at = 0.0
        while True:
            await asyncio.sleep(WATCH_S)
            self._recent.forget_old({request_of(id) for id in self._readers})
            now = monotonic_s()
            if self.silent_s > AWAY_LIMIT_S:
                self.fail_all(Failure("BROKER_UNAVAILABLE"))
                continue
            quiet: dict[str, None] = {}
            tells_places = now - places_at >= PLACE_S
            places_at = now if tells_places else places_at
            for stream in self._all_streams():
                if now - stream.served_at >= self._keep_alive_s:
                    stream.nudge()
                is_quiet = not stream.is_over and now - stream.heard_at >= _patience_s(stream)
                if is_quiet or (tells_places and stream.wants_place):
                    quiet[stream.id] = None
            if quiet and not self._must_join:
                await self._check_tails(list(quiet))

    async def _check_tails(self, ids: list[str]) -> None:
        try:
            for look in await self._commands.look(self.name, ids):
                await self._heal(look)
        except Failure:
            return  # Redis is away: the inbox reader notices and joins again

    async def _heal(self, look: Look) -> None:
        for stream in self._readers.get(look.id, []):
            stream.heard_at = monotonic_s()
            if look.state:
                stream.state = look.state
            if look.state == "T" or look.next > stream.tail:
                stream.read_on()
            elif look.state:
                stream.move_to(_place_of(look))
        if not look.state or (look.state != "T" and not look.subscribed):
            await self._attach_again(look.id)

    # Errands: what must reach Redis even when it is away just now --------------------------------

    def _detach_soon(self, id: str) -> None:
        self._leaving[id] = None
        self._errand.set()

    async def _run_errands(self) -> None:
        while True:
            await self._errand.wait()
            self._errand.clear()
            try:
                await self._detach_left()
                await self._cancel_lost()
            except Failure:
                await asyncio.sleep(random.uniform(0.2, 0.5))
                self._errand.set()

    async def _detach_left(self) -> None:
        for left in list(self._leaving):
            async with self._order:
                if left in self._leaving and left not in self._readers:
                    await self._ordered.detach(self.name, left)
                self._leaving.pop(left, None)

    async def _cancel_lost(self) -> None:
        for lost, tenant in list(self._cancelling.items()):
            await self._commands.cancel(lost, tenant)
            self._cancelling.pop(lost, None)

    # Contact with Redis --------------------------------------------------------------------------

    def _note_away(self, error: Exception) -> None:
        self._must_join = True
        if not self._is_away:
            self._is_away = True
            log.warning("redis.disconnected", error=str(error)[:200])

    def _note_heard(self) -> None:
        if self._is_away:
            self._is_away = False
            log.info("redis.reconnected", away_s=round(self.silent_s, 3), streams=self.num_streams)
        self._heard_at = monotonic_s()

    def _all_streams(self) -> Iterable[Stream]:
        return [stream for readers in self._readers.values() for stream in readers]


def _patience_s(stream: Stream) -> float:
    return QUIET_WAITING_S if stream.state == "Q" else QUIET_RUNNING_S


def _place_of(look: Look) -> Place:
    return (
        Place(is_waiting=True, ahead=look.ahead, wait_ms=look.wait_ms)
        if look.state == "Q"
        else RUNNING
    )


def _page_of(attachment: Attachment) -> Page:
    return Page(attachment.state, attachment.next, attachment.chain, attachment.entries)


async def _keep(name: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a loop for ever: a defect in one record must not silence every client."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("relay.failed", task=name)
            await asyncio.sleep(1.0)
