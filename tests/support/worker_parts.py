"""A worker's parts without its process: ledger, intake and publisher around an engine that records.

The engine computes nothing; the test says what each step brought. Redis is real.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from common.broker import Broker, WorkerPresence
from common.clock import monotonic_s
from common.messages import Finish, Grammar, LogEntry, chain_next, chain_start, chain_text
from common.settings import PrefixCache
from workers.adapters import HeldAdapters
from workers.attempts import Attempt, Ledger
from workers.engine.grammar import Matcher
from workers.engine.port import Adapters, EngineLoad, EngineRequest, StepOutput
from workers.figures import Figures
from workers.intake import GrammarSource, Intake
from workers.publisher import Publisher

VERSION = "m@1"


@dataclass
class RecordingEngine:
    """What an engine loop was told, in order."""

    submitted: list[EngineRequest] = field(default_factory=list[EngineRequest])
    cancelled: list[str] = field(default_factory=list[str])
    is_paused: bool = False
    is_stalled: bool = False

    def run_between_steps(self, command: Callable[[], None]) -> None:
        command()

    def submit(self, request: EngineRequest) -> None:
        self.submitted.append(request)

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False


@dataclass
class RecordingGrammars:
    """What grammars were asked for; each is ready when the test says so, or refused."""

    asked: dict[str, asyncio.Future[Matcher]] = field(
        default_factory=dict[str, "asyncio.Future[Matcher]"]
    )

    async def matcher(self, grammar: Grammar) -> Matcher:
        return await self.asked.setdefault(grammar.value, asyncio.Future())


class Parts:
    """One worker's parts on one broker."""

    def __init__(
        self,
        broker: Broker,
        bell: Broker,
        *,
        name: str = "w1",
        slots: int = 4,
        spare: int = 0,
        tokens: int = 1000,
        clock: Callable[[], float] | None = None,
        prefix_cache: PrefixCache = "tenant",
        grammars: GrammarSource | None = None,
        adapters: Adapters | None = None,
        max_adapters: int = 2,
    ) -> None:
        self.broker = broker
        self.name = name
        self.engine = RecordingEngine()
        self.ledger = Ledger()
        self.figures = Figures()
        self.wake = asyncio.Event()
        self.max_cost = tokens
        self.publisher = Publisher(
            broker,
            name,
            self.ledger,
            self.engine,
            lease_ms=5000,
            model_version=VERSION,
            wake=self.wake.set,
            figures=self.figures,
            clock=clock or monotonic_s,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.intake = Intake(
            broker,
            bell,
            name,
            self.ledger,
            self.engine,
            capacity=EngineLoad(0, 0, free_tokens=tokens, free_slots=slots, spare_slots=spare),
            model_version=VERSION,
            prefix_cache=prefix_cache,
            grammars=grammars or RecordingGrammars(),
            adapters=HeldAdapters(
                adapters, self.engine, max_adapters=max_adapters, needed=self.ledger.adapters
            ),
            wake=self.wake.set,
            spawn=self.spawn,
            figures=self.figures,
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def beat(self) -> list[str]:
        beat = await self.broker.beat_worker(
            self.name,
            WorkerPresence(VERSION, self.max_cost, 100.0),
            seen=self.ledger.seen,
            holding=self.ledger.holding(),
            lease_ms=5000,
        )
        return beat.returned

    async def make_room(self) -> list[str]:
        """Hand back whoever has to give way; returns their ids."""
        too_many = self.intake.first_to_give_way()
        await self.publisher.release(too_many, event="generation.yielded")
        return [attempt.id for attempt in too_many]

    async def claim(self) -> list[Attempt]:
        """Claim, and return what is held now."""
        await self.intake.claim()
        return self.ledger.running()

    def step(self, attempt: Attempt, *tokens: int, finish: str = "") -> None:
        """What the engine made of one attempt in one step."""
        output = StepOutput(
            attempt.engine_id,
            attempt.end,
            list(tokens),
            [f"t{token} ".encode() for token in tokens],
            [-0.5] * len(tokens),
            Finish(finish) if finish else None,
        )
        self.publisher.take([output])


async def logged(
    broker: Broker, generation_id: str, model_version: str = VERSION
) -> list[LogEntry]:
    """The whole log, with its positions, its chain and its single end checked."""
    entries: list[LogEntry] = []
    cursor, chain = 0, chain_start(generation_id, model_version)
    while True:
        page = await broker.read(generation_id, cursor)
        assert page is not None, f"the log of {generation_id} is gone"
        news = [entry for entry in page.entries if is_news(entry, cursor, entries)]
        if not news:
            return entries
        for entry in news:
            assert not (entries and entries[-1].record.finish), "an entry behind the end"
            assert entry.record.start == cursor, f"a gap or a repeat at {cursor}"
            for token in entry.record.tokens:
                chain = chain_next(chain, token)
            cursor = entry.record.end
            assert entry.record.chain == (chain_text(chain) if cursor else "")
            entries.append(entry)


def is_news(entry: LogEntry, cursor: int, before: list[LogEntry]) -> bool:
    is_end = entry.record.finish is not None and not (before and before[-1].record.finish)
    return entry.record.end > cursor or is_end


def tokens_of(entries: list[LogEntry]) -> list[int]:
    return [token for entry in entries for token in entry.record.tokens]
