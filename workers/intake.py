"""From Redis to engine: how much this worker claims, and when.

A claim asks for what the engine has room for. An idle worker claims when the bell rings, and once a
second in any case; a busy one when a publish says that something waits. What a claim brings is held
at once, so that the next beat names it, and handed to the engine as soon as its spec and its log
have been read.
"""

import asyncio
import random
import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Protocol

import msgspec

from common.broker import Broker, Claimed
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import choice_of, new_nonce, request_of
from common.logs import get_logger
from common.messages import (
    Finish,
    FinishReason,
    GenerationSpec,
    Grammar,
    chain_next,
    chain_start,
    chain_text,
)
from common.settings import PrefixCache
from workers.attempts import Attempt, Ledger
from workers.engine.grammar import Matcher
from workers.engine.port import EngineLoad, EngineRequest

log = get_logger()

MAX_CLAIM = 32
"""Generations per claim call (protocol 4)."""
BELL_TIMEOUT_S = 1.0
"""A bell may be lost with a connection; so long may an idle worker then miss work."""
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
        self._turn = 0
        self._reserve = 0
        self._too_few_tokens = 0
        self._is_due = True
        self._is_open = True
        self._room_changed = asyncio.Event()
        self._reading: set[asyncio.Task[None]] = set()

    def free(self) -> tuple[int, int]:
        """(slots, tokens) that may still be claimed; no tokens while a claimed spec is unread."""
        slots, tokens = self._ledger.promised()
        if tokens is None:
            return self._capacity.free_slots - slots, 0
        return self._capacity.free_slots - slots, self._capacity.free_tokens - tokens

    def has_room(self) -> bool:
        """Also False while the engine hangs: what it will not run is better off elsewhere."""
        slots, tokens = self.free()
        is_open = self._is_open and not self._engine.is_stalled
        return is_open and slots > 0 and tokens > 0 and tokens >= self._reserve

    def room_changed(self) -> None:
        """Something ended in the engine, or was dropped."""
        self._adapters.room_changed()
        if self.has_room():
            self._room_changed.set()

    def close(self) -> None:
        """Claim nothing any more."""
        self._is_open = False

    def should_claim(self, waiting_tokens: int) -> bool:
        """Whether the bell rang, or something waits that was not just seen to be too large."""
        if not self.has_room():
            return False
        return self._is_due or (waiting_tokens > 0 and self.free()[1] > self._too_few_tokens)

    async def claim(self) -> None:
        """Take what there is room for.

        Raises:
            Failure: Redis did not answer. If it had executed the call, the next beat, which counts
                this turn as seen without naming its generations, has them handed back.
        """
        slots, tokens = self.free()
        limit = min(slots, MAX_CLAIM)
        self._turn += 1
        self._is_due = False
        try:
            answer = await self._broker.claim(
                self._worker,
                new_nonce(),
                self._turn,
                budget=tokens,
                max_generations=limit,
                model_version=self._model_version,
            )
            for claimed in answer.generations:
                self._take(claimed)
        except Failure as failure:
            if failure.code != "BROKER_FULL":
                raise
            return  # nothing was claimed; running generations go on, and the bell comes again
        finally:
            self._ledger.seen = self._turn
        self._reserve = answer.reserve
        self._too_few_tokens = 0 if answer.generations else tokens
        if len(answer.generations) == limit:
            self._is_due = True  # there may be more
            self._wake()

    async def listen(self) -> None:
        """Wait for the bell while there is room, until cancelled.

        A full worker does not listen: a bell that it took would be missed by one with room.
        """
        while True:
            self._room_changed.clear()
            if not self.has_room():
                await self._room_changed.wait()
                continue
            try:
                rang = await self._bell.wait_for_bell(BELL_TIMEOUT_S)
                if rang and not self.has_room():  # filled up while it listened
                    await self._bell.pass_bell_on()
            except Failure:
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))
            self._is_due = True
            self._wake()

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
            log.info("generation.claimed", next=claimed.next, kept=local.end, **local.names())
            return
        if local is not None:
            self._ledger.forget(local)
            self._engine.cancel(local.engine_id)
        attempt = Attempt(claimed, self._turn, self._model_version, monotonic_s())
        self._ledger.hold(attempt)
        log.info("generation.claimed", next=claimed.next, **attempt.names())
        if claimed.spec is not None and claimed.next == 0:
            self._submit(attempt, claimed.spec, [])
        else:
            self._read_beside(self._read(attempt, claimed))

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

    def _start(self, attempt: Attempt, spec: GenerationSpec | None, logged: list[int]) -> None:
        if not self._ledger.is_running(attempt):
            return
        if spec is None:  # it ended meanwhile: nobody waits for it
            self._ledger.forget(attempt)
            self._wake()
        else:
            self._submit(attempt, spec, logged)

    def _submit(self, attempt: Attempt, spec: GenerationSpec, logged: list[int]) -> None:
        if not spec.prompt or len(spec.prompt) % 4:
            self._reject_damaged(attempt, f"its prompt has {len(spec.prompt)} bytes")
            return
        prompt = list(struct.unpack(f"<{len(spec.prompt) // 4}I", spec.prompt))
        attempt.request = EngineRequest(
            attempt.engine_id,
            prompt,
            spec.sampling.of_choice(choice_of(attempt.id)),
            logged,
            self._cache_scope(attempt, spec),
            adapter=spec.adapter,
        )
        self._room_changed.set()
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
        log.error("generation.rejected", reason=why, **attempt.names())
        self._end(attempt, Failure("INTERNAL", "The stored request is damaged."))

    def _reject(self, attempt: Attempt, failure: Failure) -> None:
        """The reason stays out of the log: it may quote the request."""
        log.info("generation.rejected", code=failure.code, **attempt.names())
        self._end(attempt, failure)

    def _end(self, attempt: Attempt, failure: Failure) -> None:
        finish = Finish(FinishReason.FAILED, failure.code, failure.message)
        attempt.end_with(finish, monotonic_s())
        self._room_changed.set()
        self._wake()


class UnreadableLogError(Exception):
    """The log of a claimed generation is not what its claim says."""


async def read_log(broker: Broker, claimed: Claimed, model_version: str) -> list[int]:
    """All token ids of the log up to ``claimed.next``, with positions and chain checked.

    Raises:
        Failure: Redis did not answer.
        UnreadableLogError: the log has a gap, or its chain is not the claim's.
    """
    tokens: list[int] = []
    chain = chain_start(claimed.id, model_version)
    while len(tokens) < claimed.next:
        page = await broker.read(claimed.id, len(tokens))
        news = [entry.record for entry in page.entries] if page else []
        news = [record for record in news if record.end > len(tokens)]
        if not news:
            raise UnreadableLogError(f"its log ends at {len(tokens)} of {claimed.next}")
        for record in news:
            if record.start != len(tokens):
                raise UnreadableLogError(f"its log has a gap at {len(tokens)}")
            tokens += record.tokens
            for token in record.tokens:
                chain = chain_next(chain, token)
    if claimed.next and (len(tokens) != claimed.next or chain_text(chain) != claimed.chain):
        raise UnreadableLogError(f"its chain differs at {claimed.next}")
    return tokens
