"""From Redis to engine: how much this worker claims, and when.

A claim asks for what the engine has room for. An idle worker claims when the bell rings, and once a
second in any case; a busy one when a publish says that something waits. What a claim brings is held
at once, so that the next beat names it, and handed to the engine as soon as its spec and its log
have been read.

Lanes that give way take no room from the others: interactive generations are claimed as if there
were no others. Some slots and tokens are kept for them; when these are used up as well, those who
give way are handed back, the ones first that lose least.

A suspect, of which two workers died, comes alone: until it has ended, or has come further than they
did, nothing else is claimed, so that nobody new is there should it kill this worker too.
"""

import asyncio
import random
import struct
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Protocol

import msgspec

from common.broker import Broker, Claimed, Reserve, Room
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import choice_of, new_nonce, request_of
from common.logs import get_logger
from common.messages import (
    LANES,
    RANKS,
    Finish,
    FinishReason,
    GenerationSpec,
    Grammar,
    Lane,
    TokenRecord,
    chain_next,
    chain_start,
    chain_text,
)
from common.redis_clock import RedisClock
from common.settings import PrefixCache
from workers.attempts import Attempt, Ledger
from workers.engine.grammar import Matcher
from workers.engine.port import EngineLoad, EngineRequest
from workers.figures import Figures

log = get_logger()

MAX_CLAIM = 32
"""Generations per claim call (protocol 4)."""
BELL_TIMEOUT_S = 1.0
"""A bell may be lost with a connection; so long may an idle worker then miss work."""
_PARTIAL_TIMEOUT_S = 0.25
"""The same while some lanes have no room, whose bells are not heard meanwhile."""
_SHARE_KEPT = 8
"""One token of so many is kept for who comes next while others give way."""
_RETRY_S = 0.25


class EngineIntake(Protocol):
    """What of the engine loop the intake needs; safe to call from the event loop."""

    @property
    def is_stalled(self) -> bool: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, id: str) -> None: ...


class GrammarSource(Protocol):
    """What makes matchers, off the event loop."""

    async def matcher(self, grammar: Grammar) -> Matcher:
        """Raises Failure: the grammar is refused."""
        ...


class AdapterSource(Protocol):
    """What has LoRA adapters loaded, off the event loop."""

    async def hold(self, version: str) -> None:
        """Raises Failure: there is none, or it cannot be used."""
        ...

    def room_changed(self) -> None: ...


class Intake:
    """Claims for one engine. ``capacity`` is the load of the empty engine: what it can promise.

    ``prefix_cache`` says whose computed prompts a generation may begin with; see the setting.
    """

    def __init__(
        self,
        broker: Broker,
        bell: Broker,
        worker: str,
        ledger: Ledger,
        engine: EngineIntake,
        *,
        capacity: EngineLoad,
        model_version: str,
        prefix_cache: PrefixCache,
        grammars: GrammarSource,
        adapters: AdapterSource,
        wake: Callable[[], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
        figures: Figures | None = None,
        clock: RedisClock | None = None,
        gpu_uuid: str | None = None,
    ) -> None:
        self._broker = broker
        self._bell = bell
        self._worker = worker
        self._ledger = ledger
        self._engine = engine
        self._capacity = capacity
        self._model_version = model_version
        self._prefix_cache: PrefixCache = prefix_cache
        self._grammars = grammars
        self._adapters = adapters
        self._wake = wake
        self._spawn = spawn
        self._figures = (figures or Figures()).generations
        self._clock = clock or RedisClock()
        self._gpu_uuid = gpu_uuid
        self._turn = 0
        self._reserve: Reserve | None = None
        self._too_few_tokens: Mapping[Lane, int] = {}
        self._waited: dict[Lane, int] = {}
        """Tokens that waited when they were first heard of behind the last claim."""
        self._is_due = True
        self._is_open = True
        self._suspect: Attempt | None = None
        self._room_changed = asyncio.Event()
        self._reading: set[asyncio.Task[None]] = set()

    @property
    def free_tokens(self) -> int:
        """Of the engine's capacity, what is promised to nobody."""
        _, tokens = self._ledger.promised()[-1]
        return 0 if tokens is None else max(0, self._capacity.free_tokens - tokens)

    def free(self) -> list[Room]:
        """Per rank, what a generation may still be claimed for, which gives way to lower ranks.

        No tokens while a claimed spec is unread that does not give way to it.
        """
        capacity, promised = self._capacity, self._ledger.promised()
        num_interactive, _ = promised[0]
        free: list[Room] = []
        for rank, (slots, tokens) in enumerate(promised):
            # Half of the spare slots are kept for those to whom the others give way.
            free_slots = min(
                capacity.free_slots - max(num_interactive, slots - num_interactive),
                capacity.free_slots + capacity.spare_slots // 2 - slots,
            )
            num_kept = capacity.free_tokens // _SHARE_KEPT if rank and slots else 0
            free_tokens = 0 if tokens is None else capacity.free_tokens - num_kept - tokens
            free.append(Room(free_slots, free_tokens))
        return free

    def rooms(self) -> dict[Lane, Room]:
        """What may be claimed of lanes that have any room.

        None also while the engine hangs: what it will not run is better off elsewhere; and while a
        suspect is on probation here, for which Redis would answer nothing.
        """
        if not self._is_open or self._engine.is_stalled or self._suspect is not None:
            return {}
        free = self.free()
        rooms: dict[Lane, Room] = {lane: free[RANKS[lane]] for lane in LANES}
        reserve = self._reserve
        if reserve is not None and rooms[reserve.lane].tokens < reserve.tokens:
            first = 0 if reserve.is_starved else RANKS[reserve.lane]
            rooms = {lane: room for lane, room in rooms.items() if RANKS[lane] < first}
        return {lane: room for lane, room in rooms.items() if min(room) > 0}

    def has_room(self) -> bool:
        """For an interactive generation, to which others would give way if need be."""
        return "default" in self.rooms()

    def first_to_give_way(self) -> list[Attempt]:
        """Whom to hand back, since more is promised than there is. At first nobody gives way: he
        pauses in his place, for which slots are kept.
        """
        capacity = self._capacity
        held = [it for it in self._ledger.running() if it.is_in_engine]
        num_slots = len(held) - capacity.free_slots - capacity.spare_slots
        num_tokens = sum(it.cost or 0 for it in held) - capacity.free_tokens
        if num_slots <= 0 and num_tokens <= 0:
            return []
        chosen: list[Attempt] = []
        for attempt in sorted(held, key=lambda it: (-it.rank, it.num_to_recompute)):
            if (num_slots <= 0 and num_tokens <= 0) or attempt.rank == 0:
                break
            num_slots, num_tokens = num_slots - 1, num_tokens - (attempt.cost or 0)
            chosen.append(attempt)
        return chosen

    def room_changed(self) -> None:
        """Something ended in the engine, was dropped, or was published."""
        self._adapters.room_changed()
        suspect = self._suspect
        if suspect and not (self._ledger.is_running(suspect) and suspect.is_on_probation):
            self._suspect = None
            self._is_due = True
        if self.has_room():
            self._room_changed.set()

    def close(self) -> None:
        """Claim nothing any more."""
        self._is_open = False

    def open(self) -> None:
        """Claim again."""
        self._is_open = True
        self._room_changed.set()
        self._claim_soon()

    def should_claim(self, waiting: Mapping[Lane, int]) -> bool:
        """Whether the bell rang, or something waits that was not just seen to be too large.

        ``waiting`` has the tokens that wait in each lane; more of them than behind the last claim
        are somebody new.
        """
        rooms = self.rooms()
        has_news = False
        for lane in LANES:
            tokens = waiting.get(lane, 0)
            is_more = tokens > self._waited.setdefault(lane, tokens)
            has_grown = lane in rooms and rooms[lane].tokens > self._too_few_tokens.get(lane, 0)
            has_news |= lane in rooms and (is_more or (tokens > 0 and has_grown))
        return bool(rooms) and (self._is_due or has_news)

    async def claim(self) -> None:
        """Take what there is room for.

        Raises:
            Failure: Redis did not answer. If it had executed the call, the next beat, which counts
                this turn as seen without naming its generations, has them handed back.
        """
        rooms = self.rooms()
        is_kept = self._reserve is not None and self._reserve.lane not in rooms
        self._turn += 1
        self._is_due = False
        try:
            answer = await self._broker.claim(
                self._worker,
                new_nonce(),
                self._turn,
                budget=0,
                max_generations=MAX_CLAIM,
                model_version=self._model_version,
                rooms={lane: rooms.get(lane, Room(0, 0)) for lane in LANES},
            )
            for claimed in answer.generations:
                self._take(claimed)
        except Failure as failure:
            if failure.code != "BROKER_FULL":
                raise
            return  # nothing was claimed; running generations go on, and the bell comes again
        finally:
            self._ledger.seen = self._turn
        if answer.settling_ms:
            asyncio.get_running_loop().call_later(answer.settling_ms / 1000, self._claim_soon)
        if answer.suspect and not answer.generations:  # it waits until nobody else may kill here
            asyncio.get_running_loop().call_later(_RETRY_S, self._claim_soon)
        if answer.reserve is not None or not is_kept:
            self._reserve = answer.reserve
        self._waited.clear()
        found_nothing = not answer.generations
        self._too_few_tokens = {lane: rooms[lane].tokens for lane in rooms if found_nothing}
        if len(answer.generations) == MAX_CLAIM:
            self._claim_soon()  # there may be more

    def _claim_soon(self) -> None:
        self._is_due = True
        self._wake()

    async def listen(self) -> None:
        """Wait for the bells of lanes for which there is room, until cancelled.

        Others are left alone: a bell that it took would be missed by a worker with room.
        """
        while True:
            self._room_changed.clear()
            lanes = list(self.rooms())
            if not lanes:
                await self._room_changed.wait()
                continue
            timeout_s = BELL_TIMEOUT_S if len(lanes) == len(LANES) else _PARTIAL_TIMEOUT_S
            try:
                rung = await self._bell.wait_for_bell(timeout_s, lanes)
                if rung and rung not in self.rooms():  # filled up while it listened
                    await self._bell.pass_bell_on(rung)
            except Failure:
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))
            self._claim_soon()

    async def stop_reading(self) -> None:
        """Give up what is still being read; it stays held until it is released."""
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)

    def _take(self, claimed: Claimed) -> None:
        local = self._ledger.get(claimed.id)
        if local is not None and local.agrees(claimed.next, claimed.chain):
            local.adopt(claimed)
            self._ledger.hold(local)
            self._see_through(local)
            self._tell_claimed(local, claimed, kept=local.end)
            return
        if local is not None:
            self._ledger.forget(local)
            self._engine.cancel(local.engine_id)
        attempt = Attempt(claimed, self._turn, self._model_version, monotonic_s())
        self._figures.note_claimed(attempt)
        self._ledger.hold(attempt)
        self._see_through(attempt)
        if claimed.spec is not None:
            attempt.begin(claimed.spec)
        self._tell_claimed(attempt, claimed)
        if claimed.spec is not None and claimed.next == 0:
            self._submit(attempt, claimed.spec, [])
        else:
            self._read_beside(self._read(attempt, claimed))

    def _see_through(self, attempt: Attempt) -> None:
        if attempt.is_on_probation:
            self._suspect = attempt

    def _tell_claimed(self, attempt: Attempt, claimed: Claimed, **kept: int) -> None:
        if attempt.is_on_probation:
            kept["on_probation"] = True
        lag_s = attempt.claim_lag_s(self._clock.now_s())
        log.info(
            "worker.claimed",
            worker=self._worker,
            next=claimed.next,
            claim_lag_s=round(lag_s, 6),
            gpu_uuid=self._gpu_uuid,
            **kept,
            **attempt.names(),
        )

    def _read_beside(self, reading: Coroutine[None, None, None]) -> None:
        task = self._spawn(reading)
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _read(self, attempt: Attempt, claimed: Claimed) -> None:
        """Fetch what was too large for the claim's answer, as often as Redis needs to answer."""
        while self._ledger.is_running(attempt):
            try:
                spec = claimed.spec or await self._broker.read_spec(request_of(claimed.id))
                logged = await read_log(self._broker, claimed, self._model_version)
            except Failure as failure:
                if failure.code != "BROKER_UNAVAILABLE":
                    return self._reject_damaged(attempt, str(failure))
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))
            except (msgspec.MsgspecError, UnreadableLogError) as error:
                return self._reject_damaged(attempt, str(error))
            else:
                return self._start(attempt, spec, logged)
        return None

    def _start(
        self, attempt: Attempt, spec: GenerationSpec | None, logged: list[TokenRecord]
    ) -> None:
        if not self._ledger.is_running(attempt):
            return
        if spec is None:  # it ended meanwhile: nobody waits for it
            self._ledger.forget(attempt)
            self._wake()
        else:
            attempt.recall(logged)
            self._submit(attempt, spec, [token for it in logged for token in it.tokens])

    def _submit(self, attempt: Attempt, spec: GenerationSpec, logged: list[int]) -> None:
        if not spec.prompt or len(spec.prompt) % 4:
            self._reject_damaged(attempt, f"its prompt has {len(spec.prompt)} bytes")
            return
        if attempt.spec is None:
            attempt.begin(spec)
        prompt = list(struct.unpack(f"<{len(spec.prompt) // 4}I", spec.prompt))
        attempt.request = EngineRequest(
            attempt.engine_id,
            prompt,
            spec.sampling.of_choice(choice_of(attempt.id)),
            logged,
            self._cache_scope(attempt, spec),
            adapter=spec.adapter,
            rank=attempt.rank,
        )
        self._room_changed.set()
        self._wake()  # it may be more than there is
        grammar = spec.sampling.grammar
        if grammar is None and not spec.adapter:
            self._engine.submit(attempt.request)
        else:
            self._read_beside(self._submit_with(grammar, attempt, attempt.request))

    async def _submit_with(
        self, grammar: Grammar | None, attempt: Attempt, request: EngineRequest
    ) -> None:
        """Submit ``request`` once its grammar is compiled and its adapter loaded; its cost is
        promised meanwhile.
        """
        try:
            matcher = await self._grammars.matcher(grammar) if grammar else None
            if request.adapter:
                await self._adapters.hold(request.adapter)
        except Failure as failure:
            if failure.code != "DRAINING":  # it is this worker that ends: another goes on
                self._reject(attempt, failure)
            return
        if self._ledger.is_running(attempt):
            self._engine.submit(replace(request, matcher=matcher))

    def _cache_scope(self, attempt: Attempt, spec: GenerationSpec) -> str:
        """Keys and values are those of the adapter as well."""
        adapter = f" with {spec.adapter}" if spec.adapter else ""
        match self._prefix_cache:
            case "tenant":
                return f"tenant {spec.tenant}{adapter}"
            case "shared":
                return f"shared{adapter}"
            case "off":
                return f"alone {attempt.engine_id}"

    def _reject_damaged(self, attempt: Attempt, why: str) -> None:
        """End a generation that no worker could run, so that its reader gets an answer."""
        log.error("generation.rejected", worker=self._worker, reason=why, **attempt.names())
        self._end(attempt, Failure("INTERNAL", "The stored request is damaged."))

    def _reject(self, attempt: Attempt, failure: Failure) -> None:
        """The reason stays out of the log: it may quote the request."""
        log.info("generation.rejected", worker=self._worker, code=failure.code, **attempt.names())
        self._end(attempt, failure)

    def _end(self, attempt: Attempt, failure: Failure) -> None:
        finish = Finish(FinishReason.FAILED, failure.code, failure.message)
        attempt.end_with(finish, monotonic_s())
        self._room_changed.set()
        self._wake()


class UnreadableLogError(Exception):
    """The log of a claimed generation is not what its claim says."""


async def read_log(broker: Broker, claimed: Claimed, model_version: str) -> list[TokenRecord]:
    """The log up to ``claimed.next``, with positions and chain checked.

    Raises:
        Failure: Redis did not answer.
        UnreadableLogError: the log has a gap, or its chain is not the claim's.
    """
    logged: list[TokenRecord] = []
    end, chain = 0, chain_start(claimed.id, model_version)
    while end < claimed.next:
        page = await broker.read(claimed.id, end)
        news = [entry.record for entry in page.entries] if page else []
        news = [record for record in news if record.end > end]
        if not news:
            raise UnreadableLogError(f"its log ends at {end} of {claimed.next}")
        for record in news:
            if record.start != end:
                raise UnreadableLogError(f"its log has a gap at {end}")
            end = record.end
            logged.append(record)
            for token in record.tokens:
                chain = chain_next(chain, token)
    if claimed.next and (end != claimed.next or chain_text(chain) != claimed.chain):
        raise UnreadableLogError(f"its chain differs at {claimed.next}")
    return logged
