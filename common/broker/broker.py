"""The broker: every protocol step of one pool partition, as one call each.

What a step does is written in ``functions.lua``; here its arguments are packed and its answer is
unpacked. All methods raise :class:`Failure` with ``BROKER_UNAVAILABLE``, ``BROKER_FULL`` or
``PROTOCOL_TOO_NEW`` for what Redis itself answers.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from common.broker import keys, library
from common.broker.batch_store import BatchStore
from common.broker.connection import Client, mapped_errors
from common.broker.dead_letter_store import DeadLetterStore
from common.broker.file_store import FileStore
from common.broker.key_store import KeyStore
from common.broker.overview_store import OverviewStore
from common.broker.steps import (
    Admission,
    Admitted,
    Attachment,
    Census,
    ClaimAnswer,
    Claimed,
    CountedGateway,
    CountedLane,
    CountedWorker,
    DeadLetters,
    Ended,
    FailureNote,
    GatewayBeat,
    GatewayPresence,
    GatewayState,
    LimitReached,
    LiveGeneration,
    Look,
    Lost,
    Memory,
    Moved,
    Page,
    PoolState,
    Presentation,
    Publication,
    PublishAnswer,
    Quota,
    QuotaState,
    Refusal,
    Reserve,
    Restoration,
    Room,
    ServerFacts,
    WorkerBeat,
    WorkerPresence,
    WorkerState,
)
from common.broker.webhook_store import WebhookStore
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.messages import LANES, GenerationSpec, Lane, LogEntry, Timing, TokenRecord

MAX_PUBLICATIONS = 256
"""Longest publish call; a batch may not be larger."""
START_PATIENCE_S = 5.0
"""How long a server may be away when a process starts."""
_LOOK_AGAIN_S = 0.1
_CLOCK_SAMPLES = 3
MAX_CHOICES = 16
MAX_FAILURES = 50
"""Of each code, that are remembered."""
_FAILURES_TTL_MS = 24 * 3600 * 1000
MAX_LOOKS = 256
"""Streams that one call looks at, or keeps."""
GATEWAY_LEASE_MS = 15_000
_BELL_TTL_MS = 60_000
_DISK_LIMIT_MS = 4000
"""Longest wait for a disk: the server gives up before the 5 s that any command may take."""
_LONGEST_READ_MS = 30 * 60_000
_CURSOR_TTL_MS = 2 * 24 * 3600 * 1000
"""Longer than what it points at."""
_CANNOT_TELL = ("unknown command", "appendonly is disabled", "no permissions")

_pack = msgspec.msgpack.Encoder().encode


class _Host(msgspec.Struct):
    """Of any presence only where its process ran."""

    host: str = ""


_record = msgspec.msgpack.Decoder(TokenRecord).decode
_timing = msgspec.msgpack.Decoder(Timing).decode
_spec = msgspec.msgpack.Decoder(GenerationSpec).decode
_presentation = msgspec.msgpack.Decoder(Presentation).decode
_presence = msgspec.msgpack.Decoder(WorkerPresence).decode
_gateway_presence = msgspec.msgpack.Decoder(GatewayPresence).decode
_host = msgspec.msgpack.Decoder(_Host).decode
_failure_note = msgspec.msgpack.Decoder(FailureNote).decode
_inbox = msgspec.msgpack.Decoder(list[tuple[str, TokenRecord, Timing | None]]).decode


class Broker:
    """One partition of a pool (a pool is one model name) on one Redis or Valkey."""

    def __init__(
        self, redis: Client, pool: str, partition: int = 0, *, durable_replicas: int = 0
    ) -> None:
        self.pool = pool
        self._durable_replicas = durable_replicas
        self._redis = redis
        self._prefix = keys.prefix(pool, partition)
        self._clock = keys.clock(self._prefix)

    @property
    def key_store(self) -> KeyStore:
        """The API keys on the same server; they hold for all its pools."""
        return KeyStore(self._redis)

    @property
    def webhook_store(self) -> WebhookStore:
        """The webhooks on the same server, of all its pools."""
        return WebhookStore(self._redis)

    @property
    def batch_store(self) -> BatchStore:
        """The batches on the same server, of all its pools."""
        return BatchStore(self._redis)

    @property
    def dead_letter_store(self) -> DeadLetterStore:
        """What was set aside because workers died of it."""
        return DeadLetterStore(self._redis, self._prefix, self._call, self.admit)

    @property
    def overview_store(self) -> OverviewStore:
        """What the pool looked like, second by second."""
        return OverviewStore(self._redis, self._prefix)

    @property
    def file_store(self) -> FileStore:
        """The records of files on the same server, of all its pools."""
        return FileStore(self._redis)

    async def load_patiently(self) -> None:
        """As :meth:`load`, for a process that starts: a server that is started again meanwhile, and
        still reads its file, is waited for. To give up would cost the whole start once more.

        Raises: Failure BROKER_UNAVAILABLE after ``START_PATIENCE_S``; ACCESS_MISCONFIGURED.
        """
        give_up_at_s = monotonic_s() + START_PATIENCE_S
        while True:
            try:
                return await self.load()
            except Failure as failure:
                if failure.code != "BROKER_UNAVAILABLE" or monotonic_s() > give_up_at_s:
                    raise
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def load(self) -> None:
        """Load the function library unless it is there.

        Raises: Failure ACCESS_MISCONFIGURED when it is not, and this user may not load it.
        """
        with mapped_errors():
            try:
                await self._redis.execute_command("FUNCTION", "LOAD", library.source())
            except ResponseError as error:
                if "no permissions" in str(error):
                    await self._check_loaded()
                elif "already exists" not in str(error):
                    raise

    async def _check_loaded(self) -> None:
        if not await self.is_loaded():
            raise Failure(
                "ACCESS_MISCONFIGURED",
                "This version's functions are not in Redis, and this user may not load them: "
                "headrace doctor --load, with the admin's --redis-url",
            )

    async def is_loaded(self) -> bool:
        """Whether the server has this version's functions."""
        with mapped_errors():
            try:
                await self._redis.execute_command(
                    "FCALL_RO", f"{library.name()}_state", 1, self._clock
                )
            except ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                return False
        return True

    async def facts(self) -> ServerFacts:
        """What the server says of itself, for who sets it up."""
        redis: Any = self._redis
        with mapped_errors():
            info = await redis.info()
            before_s = wall_ms() / 1000
            seconds, microseconds = await redis.time()
            after_s = wall_ms() / 1000
            try:
                fsync = (await redis.config_get("appendfsync"))["appendfsync"]
            except ResponseError:
                fsync = ""
        valkey = info.get("valkey_version")
        return ServerFacts(
            name="Valkey" if valkey else "Redis",
            version=str(valkey or info["redis_version"]),
            eviction=info["maxmemory_policy"],
            has_append_only_file=bool(info["aof_enabled"]),
            clock_offset_s=seconds + microseconds / 1e6 - (before_s + after_s) / 2,
            fsync=fsync,
        )

    async def clock_offset_s(self) -> float:
        """The server's clock less this machine's: of three samples the one that took least time.

        Off by at most half of that time. Raises: Failure BROKER_UNAVAILABLE.
        """
        redis: Any = self._redis
        samples: list[tuple[float, float]] = []
        with mapped_errors():
            for _ in range(_CLOCK_SAMPLES):
                before_s, began_s = time.time(), monotonic_s()
                seconds, microseconds = await redis.time()
                took_s = monotonic_s() - began_s
                samples.append((took_s, seconds + microseconds / 1e6 - before_s - took_s / 2))
        return min(samples)[1]

    async def durable(self) -> bool:
        """Wait until all that Redis has acknowledged so far lies on its disk, and its replicas'.

        WAITAOF waits for what its own connection wrote: a mark, behind everything before it. Call
        this before an answer that promises something for later.

        Returns False where the server cannot tell: Redis before 7.2, no append-only file, or a user
        who may not ask. :meth:`durability_gap` says so at the start.

        Raises: Failure BROKER_UNAVAILABLE when a disk, or a replica, did not write in time.
        """
        redis: Any = self._redis
        mark = keys.mark(self._prefix)
        with mapped_errors():
            pipe = redis.pipeline(transaction=False)
            pipe.set(mark, b"", px=_DISK_LIMIT_MS)
            pipe.execute_command("WAITAOF", 1, self._durable_replicas, _DISK_LIMIT_MS)
            marked, written = await pipe.execute(raise_on_error=False)
            if isinstance(marked, Exception):
                raise marked
            if isinstance(written, ResponseError) and any(
                reason in str(written) for reason in _CANNOT_TELL
            ):
                return False
            if isinstance(written, Exception):
                raise written
        disks, replicas = written
        if disks < 1 or replicas < self._durable_replicas:
            raise Failure(
                "BROKER_UNAVAILABLE",
                f"Redis did not write to disk in time (own disk: {disks} of 1, replicas: "
                f"{replicas} of {self._durable_replicas})",
            )
        return True

    async def durability_gap(self) -> str:
        """Why what is promised for later may be lost with the server; empty: it is not."""
        try:
            is_durable = await self.durable()
        except Failure as failure:
            return failure.message
        if is_durable:
            return ""
        return "Redis cannot say what is on its disk: it needs version 7.2, or Valkey, with AOF"

    async def close(self) -> None:
        await self._redis.aclose()

    async def _call(self, step: str, *args: bytes, read_only: bool = False) -> Any:
        command = "FCALL_RO" if read_only else "FCALL"
        function = f"{library.name()}_{step}"
        with mapped_errors():
            try:
                return await self._redis.execute_command(command, function, 1, self._clock, *args)
            except ResponseError as error:
                if "Function not found" not in str(error):
                    raise
            await self.load()
            return await self._redis.execute_command(command, function, 1, self._clock, *args)

    # Requests ------------------------------------------------------------------------------------

    async def admit(self, admission: Admission) -> Admitted:
        """Queue a request, all its choices or none.

        Raises:
            Failure: QUEUE_FULL with a measured ``retry_after_ms``, NO_WORKERS,
                CONTEXT_LENGTH_EXCEEDED, IDEMPOTENCY_CONFLICT; RATE_LIMITED and QUOTA_EXHAUSTED as
                :class:`LimitReached`.
        """
        a = admission
        room = a.spec.sampling.max_new_tokens
        fields = (
            a.request_id, min(a.num_choices, MAX_CHOICES), a.cost, room, a.lane, a.tenant, a.weight,
            a.attached, a.grace_ms, a.queue_limit_ms, a.run_limit_ms, a.retention_ms,
            a.lane_cap_tokens, a.lane_cap_bytes, a.idempotency_key, a.fingerprint, a.gateway,
            a.resubmit, _limits(a.quota),
        )  # fmt: skip
        answer = await self._call("admit", _pack(fields), _pack(a.spec), _pack(a.presentation))
        kind = _text(answer[0])
        if kind in ("accepted", "existing"):
            _, request, position, wait, version, left = answer
            quota = _quota_state(a.quota, left) if a.quota else None
            return Admitted(
                _text(request), kind == "existing", position, wait, _text(version), quota
            )
        raise _refusal(answer, a.quota)

    async def foresee(
        self,
        *,
        lane: Lane,
        tenant: str,
        queue_limit_ms: int,
        lane_cap_tokens: int,
        lane_cap_bytes: int,
        idempotency_key: str = "",
        quota: Quota | None = None,
    ) -> None:
        """Refuse what would be refused however small it were; whoever passes may be refused yet.

        A request that is known under its idempotency key always passes.

        Raises: Failure QUEUE_FULL, NO_WORKERS, RATE_LIMITED, as :meth:`admit`.
        """
        fields = (
            lane, tenant, idempotency_key, queue_limit_ms, lane_cap_tokens, lane_cap_bytes,
            _limits(quota),
        )  # fmt: skip
        answer = await self._call("foresee", _pack(fields), read_only=True)
        if _text(answer[0]) not in ("known", "free"):
            raise _refusal(answer, quota)

    async def cancel(self, generation_id: str, tenant: str) -> str:
        """End a generation now, whoever holds it: ``cancelled``, ``ended`` or ``unknown``.

        An unknown id leaves a tombstone for a minute, so that an admission still on its way is not
        revived.
        """
        return _text((await self._call("cancel", _pack((generation_id, tenant))))[0])

    async def forget(self, generation_id: str, tenant: str, *, for_good: bool = False) -> bool:
        """End a generation and remove all there is of it; False where the tenant has none such.

        ``for_good``: nothing brings it back, neither a worker nor an admission of the same id.
        """
        answer = await self._call("forget", _pack((generation_id, tenant, for_good)))
        return _text(answer[0]) == "forgotten"

    async def keep_document(self, request_id: str, document: bytes, ttl_ms: int) -> None:
        """Keep what a response says beside its tokens. Before it is admitted."""
        key = keys.document(self._prefix, request_id)
        with mapped_errors():
            await self._redis.set(key, document, px=ttl_ms)

    async def read_document(self, request_id: str) -> bytes | None:
        with mapped_errors():
            return await self._redis.get(keys.document(self._prefix, request_id))

    # Workers -------------------------------------------------------------------------------------

    async def claim(
        self,
        worker: str,
        nonce: str,
        turn: int,
        *,
        budget: int,
        max_generations: int,
        model_version: str,
        rooms: Mapping[Lane, Room] | None = None,
    ) -> ClaimAnswer:
        """Take ownership of waiting generations whose cost fits into ``budget`` tokens.

        ``rooms`` are those of lanes that may be given less: what is given to a lane is taken from
        the room of its own rank and of those that give way to it.

        ``nonce`` is new for each call and ``turn`` counts calls: a lost answer is handed back by
        the beat that names the turn in ``seen`` without naming the generations.
        """
        whole = Room(max_generations, budget)
        by_rank = [(rooms or {}).get(lane, whole) for lane in LANES]
        fields = (worker, nonce, turn, min(max_generations, 32), model_version, by_rank)
        reserve, found, settling_ms, suspect = await self._call("claim", _pack(fields))
        return ClaimAnswer(
            [_claimed(row) for row in found], _reserve(reserve), settling_ms, _text(suspect)
        )

    async def read_spec(self, request_id: str) -> GenerationSpec | None:
        """The spec of a request whose body was too large for the claim; None if it ended."""
        body = await self._call("spec", _pack((request_id,)), read_only=True)
        return _spec(body) if body else None

    async def publish(
        self, worker: str, publications: Sequence[Publication], *, lease_ms: int
    ) -> PublishAnswer:
        """Append what one engine step produced, for the whole batch, and renew the lease.

        A repeated publication is accepted and changes nothing; a refused one names the reason.
        """
        if len(publications) > MAX_PUBLICATIONS:
            raise ValueError(f"at most {MAX_PUBLICATIONS} publications per call")
        items = [_publication_head(item) for item in publications]
        records = [_pack(item.record) for item in publications]
        waiting, refusals = await self._call("publish", _pack((worker, lease_ms, items)), *records)
        return PublishAnswer(
            [_not_taken(row) for row in refusals], dict(zip(LANES, waiting, strict=True))
        )

    async def restore(self, worker: str, restorations: Sequence[Restoration]) -> list[Refusal]:
        """Put back claims that Redis forgot; answers those that it does not take.

        What it took is this worker's again, up to the position named: publish what is behind. It is
        never taken over a later claim, nor where the log is another attempt's.
        """
        items = [(it.id, it.fence, it.position, it.chain, it.model_version) for it in restorations]
        parts = [part for it in restorations for part in (_body(it.spec), it.head)]
        answer = await self._call("restore", _pack((worker, items)), *parts)
        return [_not_taken(row) for row in answer]

    async def release(self, worker: str, held: Sequence[tuple[str, str]]) -> None:
        """Hand back (id, fence) pairs at once. Send it after their last publish."""
        await self._call("release", _pack((worker, held)))

    async def beat_worker(
        self,
        worker: str,
        presence: WorkerPresence,
        *,
        seen: int,
        holding: Sequence[str],
        lease_ms: int,
    ) -> WorkerBeat:
        """Renew the lease and say what is held; answers what Redis handed back for it, and whether
        somebody wants it to rest.

        ``seen`` is the highest claim turn whose answer was handled or given up: what was claimed up
        to then and is not in ``holding`` was lost on the way and goes back without a death.
        """
        fields = (
            worker, lease_ms, seen, presence.model_version, presence.max_cost,
            presence.tokens_per_second, list(holding),
        )  # fmt: skip
        returned, cause = await self._call("beat_worker", _pack(fields), _pack(presence))
        return WorkerBeat([_text(generation_id) for generation_id in returned], _text(cause))

    async def announce_worker(self, worker: str, presence: WorkerPresence) -> None:
        """Say that a worker loads its model, at least every 15 s. It has no lease yet, so nothing
        is queued for it.
        """
        await self._call("announce_worker", _pack((worker,)), _pack(presence))

    async def drain_worker(self, worker: str, cause: str) -> bool:
        """Ask a worker to rest: it hears of it with its next beat, finishes or hands over what it
        holds, and claims no more until :meth:`resume_worker`. False: no such worker has a lease.
        """
        return await self._call("drain_worker", _pack((worker, cause))) is not None

    async def resume_worker(self, worker: str) -> bool:
        """Let a worker claim again; False: no such worker has a lease."""
        return await self._call("drain_worker", _pack((worker, ""))) is not None

    async def leave_worker(self, worker: str, *, has_died: bool = False) -> None:
        """End the lease at once; what is still held goes back, and bears no blame.

        ``has_died``: it took no leave itself, as people are to be told.
        """
        await self._call("leave_worker", _pack((worker, has_died)))

    async def bury_worker(self, worker: str) -> None:
        """End the lease of a worker that somebody saw die; the next reap hands back what it held.

        Only for who knows: a supervisor that has its exit status. It counts as a death.
        """
        await self._call("bury", _pack((worker,)))

    async def wait_for_bell(self, timeout_s: float, lanes: Iterable[Lane] = LANES) -> Lane | None:
        """Wait until something may have been queued in one of ``lanes``.

        None after ``timeout_s``. Interactive lanes share a bell, of which the last one is told.
        """
        bells: dict[str, Lane] = {keys.bell(self._prefix, lane): lane for lane in lanes}
        with mapped_errors():
            rung: Any = await self._redis.execute_command("BLPOP", *bells, f"{timeout_s:g}")
        return None if rung is None else bells[_text(rung[0])]

    async def pass_bell_on(self, lane: Lane) -> None:
        """Wake another worker: for who heard the bell and has no room for what it announced."""
        bell = keys.bell(self._prefix, lane)
        with mapped_errors():
            await self._redis.execute_command("LPUSH", bell, "1")
            await self._redis.execute_command("PEXPIRE", bell, _BELL_TTL_MS)

    # Gateways ------------------------------------------------------------------------------------

    async def attach(
        self, gateway: str, generation_id: str, tenant: str, cursor: int
    ) -> Attachment | None:
        """Subscribe and read state and first page in one step, so that nothing falls between.

        None: unknown, expired, or another tenant's. The caller's mailbox must exist before.
        """
        answer = await self._call("attach", _pack((gateway, generation_id, tenant, cursor)))
        if answer is None:
            return None
        state, at, chain, version, out, attached, retention, entries = answer
        return Attachment(
            state=_text(state),
            next=at,
            chain=_text(chain),
            model_version=_text(version),
            presentation=_presentation(out),
            attached=bool(attached),
            retention_ms=retention,
            entries=_entries(entries),
        )

    async def detach(self, gateway: str, generation_id: str) -> None:
        """Stop reading; the last reader's leaving starts the grace time of an attached request."""
        await self._call("detach", _pack((gateway, generation_id)))

    async def read(self, generation_id: str, cursor: int) -> Page | None:
        """Log entries that end at or behind ``cursor`` (≤ 256 or 64 KB); None when it is gone."""
        answer = await self._call("read", _pack((generation_id, cursor)), read_only=True)
        if answer is None:
            return None
        state, at, chain, entries = answer
        return Page(_text(state), at, _text(chain), _entries(entries))

    async def look(self, gateway: str, generation_ids: Sequence[str]) -> list[Look]:
        """State of streams, and what those that wait have ahead of them.

        It heals what a lost inbox record would leave hanging.
        """
        rows: list[Any] = []
        for first in range(0, len(generation_ids), MAX_LOOKS):
            some = list(generation_ids[first : first + MAX_LOOKS])
            rows += await self._call("look", _pack((gateway, some)), read_only=True)
        return [
            Look(
                generation_id, _text(state), at, bool(subscribed), ahead, None if wait < 0 else wait
            )
            for generation_id, (state, at, subscribed, ahead, wait) in zip(
                generation_ids, rows, strict=True
            )
        ]

    async def stream_secret(
        self, candidate: str, request_id: str = "", tenant: str = ""
    ) -> bytes | None:
        """What stream tokens are signed with: the same for all gateways, ``candidate`` at first.

        None: this tenant has no such request.
        """
        asked = f"{request_id}.0" if request_id else ""
        return await self._call("stream_secret", _pack((candidate, asked, tenant)))

    async def beat_gateway(
        self,
        gateway: str,
        *,
        reading: Sequence[str] = (),
        lease_ms: int = GATEWAY_LEASE_MS,
        presence: GatewayPresence | None = None,
    ) -> GatewayBeat:
        """Renew the lease and the inbox. ``recreated``: attach every stream again.

        ``reading`` are ended streams that a slow client still reads; their log lives on meanwhile,
        at most half an hour per beat.
        """
        prolong_ms = min(4 * lease_ms, _LONGEST_READ_MS)
        prolonged = [(generation_id, prolong_ms) for generation_id in reading]
        told = _pack(presence) if presence else b""
        fields = _pack((gateway, lease_ms, prolonged))
        recreated, last = await self._call("beat_gateway", fields, told)
        return GatewayBeat(bool(recreated), _text(last))

    async def leave_gateway(self, gateway: str) -> None:
        """Detach from everything and end the lease at once."""
        await self._call("leave_gateway", _pack((gateway,)))

    async def read_inbox(
        self, gateway: str, after: str, block_ms: int
    ) -> tuple[str, list[tuple[str, LogEntry]]]:
        """Wait for inbox records behind the stream id ``after``.

        Returns the id to continue from and (generation id, entry) in order; empty after
        ``block_ms``.
        """
        inbox = keys.inbox(self._prefix, gateway)
        with mapped_errors():
            answer: Any = await self._redis.execute_command(
                "XREAD", "COUNT", 64, "BLOCK", block_ms, "STREAMS", inbox, after
            )
        items: list[tuple[str, LogEntry]] = []
        for record_id, record_fields in answer[0][1] if answer else ():
            after = _text(record_id)
            items += [
                (generation_id, LogEntry(record, timing))
                for generation_id, record, timing in _inbox(record_fields[b"r"])
            ]
        return after, items

    # Ends ----------------------------------------------------------------------------------------

    async def read_ended(self, after: str, limit: int = 500) -> list[Ended]:
        """What ended behind the cursor ``after`` ("" for the beginning), in order, at most a day
        and 100,000 ends back.
        """
        start = f"({after}" if after else "-"
        with mapped_errors():
            rows: Any = await self._redis.execute_command(
                "XRANGE", keys.ended(self._prefix), start, "+", "COUNT", limit
            )
        return [_ended(cursor, fields) for cursor, fields in rows]

    async def last_end(self) -> str:
        """The cursor behind all that has ended."""
        with mapped_errors():
            rows: Any = await self._redis.execute_command(
                "XREVRANGE", keys.ended(self._prefix), "+", "-", "COUNT", 1
            )
        return _text(rows[0][0]) if rows else "0-0"

    async def wait_for_ends(self, after: str, block_ms: int) -> list[Ended]:
        """What ended behind ``after``, waiting for it; empty after ``block_ms``."""
        with mapped_errors():
            answer: Any = await self._redis.execute_command(
                "XREAD", "COUNT", 500, "BLOCK", block_ms, "STREAMS", keys.ended(self._prefix), after
            )
        return [_ended(cursor, fields) for cursor, fields in (answer[0][1] if answer else ())]

    async def told_cursor(self) -> str:
        """The end up to which webhooks have been made; "" at first."""
        with mapped_errors():
            kept = await self._redis.get(keys.told(self._prefix))
        return kept.decode() if kept else ""

    async def keep_told_cursor(self, cursor: str) -> None:
        with mapped_errors():
            await self._redis.set(keys.told(self._prefix), cursor, px=_CURSOR_TTL_MS)

    # Everybody -----------------------------------------------------------------------------------

    async def reap(self) -> list[Moved]:
        """Move what dead processes held and what is due; any process may call it, once a second."""
        return [Moved(*map(_text, row)) for row in await self._call("reap")]

    async def census(self) -> Census:
        """One look at the partition that is cheap enough for each second."""
        at_ms, workers, gateways, lanes, dead_letters, lost, rate = await self._call(
            "census", read_only=True
        )
        return Census(
            at_ms=at_ms,
            workers=[_counted_worker(row) for row in workers],
            gateways=[
                CountedGateway(
                    _text(name), expires, reading, _gateway_presence(blob) if blob else None
                )
                for name, expires, reading, blob in gateways
            ],
            lanes={lane: CountedLane(*row) for lane, row in zip(LANES, lanes, strict=True)},
            dead_letters=dead_letters,
            lost=[_lost(row) for row in lost],
            drain_rate=float(rate),
        )

    async def live(self, limit: int) -> list[LiveGeneration]:
        """Up to ``limit`` generations that run, of each worker some, and that wait."""
        return [
            LiveGeneration(
                _text(generation_id),
                _text(worker),
                _text(lane),
                age,
                running if running >= 0 else None,
                tokens,
                prompt_tokens,
                deaths,
            )
            for generation_id, worker, lane, age, running, tokens, prompt_tokens, deaths in (
                await self._call("live", _pack((limit,)), read_only=True)
            )
        ]

    async def memory(self) -> Memory:
        """What the server has left, of a part of what it can say: cheap enough for each second."""
        redis: Any = self._redis
        with mapped_errors():
            memory = await redis.info(section="memory")
            stats = await redis.info(section="stats")
        return Memory(
            used_bytes=memory["used_memory"],
            max_bytes=memory["maxmemory"],
            evicts=memory["maxmemory"] > 0 and memory["maxmemory_policy"] != "noeviction",
            evicted_keys=stats["evicted_keys"],
        )

    async def count_dead(self, before: DeadLetters | None = None) -> DeadLetters:
        """How many generations are kept aside. ``before`` is what this said last, so that they are
        only looked through when that has changed.
        """
        redis: Any = self._redis
        key = keys.dead(self._prefix)
        with mapped_errors():
            try:
                info = await redis.xinfo_stream(key)
            except ResponseError as error:
                if "no such key" not in str(error):
                    raise
                return DeadLetters({}, 0)
            last_id, num_ever = _text(info["last-generated-id"]), info["entries-added"]
            known = before if before is not None and before.last_id == last_id else None
            if known is not None and sum(known.num_in.values()) == info["length"]:
                return known
            entries = await redis.xrange(key)
        lanes = Counter(_text(fields[b"lane"]) for _, fields in entries)
        return DeadLetters(dict(lanes), num_ever, last_id)

    async def round_trip_s(self) -> float:
        """How long the server takes to answer the smallest question."""
        began_s = monotonic_s()
        with mapped_errors():
            await self._redis.execute_command("PING")
        return monotonic_s() - began_s

    async def keep_failures(self, failures: Sequence[FailureNote]) -> None:
        """Remember what failed lately, ``MAX_FAILURES`` of each code, for a day."""
        by_code: dict[str, list[bytes]] = {}
        for failure in failures:
            by_code.setdefault(failure.code, []).append(_pack(failure))
        redis: Any = self._redis
        with mapped_errors():
            pipe = redis.pipeline(transaction=False)
            for code, packed in by_code.items():
                listed = keys.errors_of(self._prefix, code)
                pipe.lpush(listed, *packed[-MAX_FAILURES:])
                pipe.ltrim(listed, 0, MAX_FAILURES - 1)
                pipe.pexpire(listed, _FAILURES_TTL_MS)
            await pipe.execute()

    async def failures(self, code: str) -> list[FailureNote]:
        """The last ones of this code, the newest first."""
        redis: Any = self._redis
        with mapped_errors():
            found = await redis.lrange(keys.errors_of(self._prefix, code), 0, MAX_FAILURES - 1)
        return [_failure_note(packed) for packed in found]

    async def state(self) -> PoolState:
        """One look at the partition."""
        workers, gateways, lanes, again, oldest, rate = await self._call("state", read_only=True)
        return PoolState(
            workers=[
                WorkerState(
                    _text(name),
                    expires,
                    _presence(blob) if blob else None,
                    [_text(generation_id) for generation_id in held],
                )
                for name, expires, blob, held in workers
            ],
            gateways=[GatewayState(_text(name), expires, n) for name, expires, n in gateways],
            waiting={lane: row[0] for lane, row in zip(LANES, lanes, strict=True)},
            handed_back=again,
            backlog_tokens={lane: row[1] for lane, row in zip(LANES, lanes, strict=True)},
            oldest_wait_ms=oldest,
            drain_rate=float(rate),
        )


def _ended(cursor: bytes, fields: dict[bytes, bytes]) -> Ended:
    return Ended(
        cursor=_text(cursor),
        id=_text(fields[b"id"]),
        tenant=_text(fields[b"tenant"]),
        reason=_text(fields[b"reason"]),
        code=_text(fields[b"code"]),
        at_ms=int(cursor.partition(b"-")[0]),
        is_background=fields.get(b"background") == b"1",
    )


def _counted_worker(row: Sequence[Any]) -> CountedWorker:
    name, expires, age, held, cause, blob, suspect = row
    return CountedWorker(
        _text(name),
        expires,
        age if age >= 0 else None,
        held,
        _text(cause),
        _presence(blob) if blob else None,
        _text(suspect),
    )


def _lost(entry: Sequence[Any]) -> Lost:
    id, flat = entry
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Lost(
        at_ms=int(id.partition(b"-")[0]),
        role=_text(fields[b"role"]),
        name=_text(fields[b"name"]),
        is_seen=fields[b"cause"] == b"seen",
        host=_host(fields[b"blob"]).host if fields[b"blob"] else "",
    )


def _text(value: bytes) -> str:
    return value.decode()


def _limits(quota: Quota | None) -> tuple[str, int, int, int, int]:
    if quota is None:
        return ("", 0, 0, 0, 0)
    limits = quota.limits
    return (
        quota.key_id, limits.requests_per_minute, limits.tokens_per_minute, limits.streams,
        quota.num_requests,
    )  # fmt: skip


def _quota_state(quota: Quota, left: Sequence[int]) -> QuotaState:
    return QuotaState(quota.limits, *left)


def _refusal(answer: Sequence[Any], quota: Quota | None) -> Failure:
    code, wait_ms, cause = _text(answer[0]), int(answer[1]), _text(answer[2])
    if quota and code in ("RATE_LIMITED", "QUOTA_EXHAUSTED"):
        return _limited(code, wait_ms, cause, _quota_state(quota, answer[3]))
    return _refused(code, wait_ms, cause)


def _limited(code: str, wait_ms: int, cause: str, quota: QuotaState) -> LimitReached:
    limits = quota.limits
    if code == "QUOTA_EXHAUSTED":
        message = (
            "Prompt and answer may have more tokens together than this API key may use in a "
            f"minute, which are {limits.tokens_per_minute}: ask for fewer new tokens"
        )
        return LimitReached(code, message, quota)
    reached = {
        "requests": f"{limits.requests_per_minute} requests a minute",
        "tokens": f"{limits.tokens_per_minute} tokens a minute",
        "streams": f"{limits.streams} at once",
    }
    message = f"The limit of this API key is reached: {reached[cause]}"
    return LimitReached(code, message, quota, retry_after_ms=max(1, wait_ms))


def _refused(code: str, wait_ms: int, cause: str) -> Failure:
    if code != "QUEUE_FULL":
        return Failure(code)
    messages = {
        "tokens": "The lane is full: too many tokens wait already",
        "bytes": "The lane is full: too many bytes of prompts wait already",
        "wait": "The wait would be longer than the queue limit",
    }
    return Failure(code, messages[cause], retry_after_ms=max(1000, wait_ms))


def _not_taken(row: Sequence[Any]) -> Refusal:
    refused, kind, at, chain = row
    return Refusal(_text(refused), _text(kind), int(at), _text(chain))


def _body(spec: GenerationSpec | None) -> bytes:
    return b"" if spec is None else _pack(spec)


def _claimed(row: Sequence[Any]) -> Claimed:
    generation_id, fence, at, chain, deaths, lane, admitted, claimed, size, body, head, clear = row
    return Claimed(
        id=_text(generation_id),
        fence=_text(fence),
        next=at,
        chain=_text(chain),
        deaths=deaths,
        lane=msgspec.convert(_text(lane), Lane),
        admitted_ms=admitted,
        claimed_ms=claimed,
        body_bytes=size,
        spec=_decoded_spec(body),
        head=head,
        clear_at=clear,
    )


def _reserve(row: Sequence[Any]) -> Reserve | None:
    if not row:
        return None
    tokens, lane, is_starved = row
    return Reserve(tokens, msgspec.convert(_text(lane), Lane), bool(is_starved))


def _decoded_spec(body: bytes) -> GenerationSpec | None:
    """None also for a damaged one: it must not hide the other generations of its claim."""
    try:
        return _spec(body) if body else None
    except msgspec.DecodeError:
        return None


def _publication_head(item: Publication) -> tuple[str, str, int, int, str, str, str, str, str]:
    record = item.record
    finish = record.finish
    return (
        item.id,
        item.fence,
        record.start,
        len(record.tokens),
        item.prev_chain,
        record.chain,
        finish.reason if finish else "",
        finish.code if finish else "",
        finish.message if finish else "",
    )


def _entries(rows: Iterable[tuple[bytes, bytes]]) -> list[LogEntry]:
    return [
        LogEntry(_record(record), _timing(timing) if timing else None) for record, timing in rows
    ]
