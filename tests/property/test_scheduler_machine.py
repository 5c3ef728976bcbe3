"""Any sequence of submits, cancels, faults and steps keeps the promises of scheduler and cache.

The runner computes nothing; it writes down which token lies where, as the real cache would, and
looks before each step whether what a sequence reads is its own prefix and nothing else. Half of the
engines launch a step before they know the tokens of the last one, and so compute some in vain.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.models.tokenizer import Tokenizer
from tests.support.depth import searched
from tests.support.engines import request
from tests.support.tiny_model import build_tokenizer
from workers.engine import places as places_module
from workers.engine.batching import BatchingEngine, Choice, Outcome
from workers.engine.places import PagePlaces, Places, SlotPlaces
from workers.engine.port import DeviceMemoryError, EngineRequest
from workers.engine.scheduler import Chunk, Limits
from workers.engine.sequence import Sequence, TextRules

RULES = TextRules(Tokenizer(build_tokenizer(), {}), frozenset())
BLOCK = 4
MAX_PROMPT = 6 * BLOCK + 3
LARGEST = MAX_PROMPT + 20


@dataclass
class Cell:
    """One position of the cache: keys and values of one token, seen from the scope it came from."""

    token: int
    position: int
    scope: str
    writer: Sequence
    is_proven: bool = False
    is_doubted: bool = False
    """Who read it last had logits that were not finite."""


Address = tuple[int, int]
"""(slot or page, offset in it)."""


@dataclass
class Recorder:
    """Implements :class:`workers.engine.batching.Runner` and ``Launcher`` on a cache of cells."""

    page_tokens: int | None
    is_bad: Callable[[Sequence], bool] = lambda _: False
    """Whose logits are not finite."""
    does_fit: Callable[[list[Chunk]], bool] = lambda _: True
    can_choose: bool = True
    """Whether there is memory to choose the tokens of a step that was launched."""
    token_s: float = 0.0
    time_s: float = 0.0
    """What the engine's clock shows; computing a token takes ``token_s``."""
    cells: dict[Address, Cell] = field(default_factory=dict[Address, Cell])
    homes: dict[str, Chunk] = field(default_factory=dict[str, Chunk])
    """The last chunk of each sequence: where it lies."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        self.compute(chunks, {})
        outcomes = [self.choose(chunk) for chunk in chunks if chunk.samples]
        return [self.vouch(*pair) for pair in zip(sampled(chunks), outcomes, strict=True)]

    def launch(self, chunks: list[Chunk]) -> "RecordedStep":
        self.compute(chunks, {})
        return RecordedStep(self, chunks)

    def compute(self, chunks: list[Chunk], foreseen: dict[int, int]) -> None:
        """``foreseen``: by slot, the tokens of chunks that do not know theirs."""
        self.time_s += 0.01 + self.token_s * sum(chunk.count for chunk in chunks)
        for chunk in chunks:
            self.copy(chunk)
        for chunk in chunks:
            self.check_prefix(chunk)
        for chunk in chunks:
            tokens = [foreseen[chunk.slot]] if chunk.is_foreseen else chunk.tokens
            self.write(chunk, tokens)
        if not self.does_fit(chunks):
            raise DeviceMemoryError  # after it has written: the next try finds what this one left

    def address(self, chunk: Chunk, position: int) -> Address:
        if self.page_tokens is None:
            return (chunk.slot, position)
        return (chunk.pages[position // self.page_tokens], position % self.page_tokens)

    def copy(self, chunk: Chunk) -> None:
        if chunk.copied_from is not None:
            source, num_tokens = chunk.copied_from
            assert source != chunk.slot
            assert num_tokens == chunk.start
            for position in range(num_tokens):
                self.cells[chunk.slot, position] = self.cells[source, position]

    def check_prefix(self, chunk: Chunk) -> None:
        """What it reads are its own tokens, computed in its own scope, by itself or proven."""
        seq = chunk.sequence
        is_new = self.homes.get(seq.id) is None or chunk.start == 0
        for position in range(chunk.start):
            cell = self.cells[self.address(chunk, position)]
            assert (cell.token, cell.position) == (seq.tokens[position], position)
            assert cell.scope == seq.cache_scope
            assert cell.is_proven or cell.writer is seq
            assert not (is_new and cell.is_doubted)

    def write(self, chunk: Chunk, tokens: list[int]) -> None:
        seq = chunk.sequence
        self.homes[seq.id] = chunk
        for position, token in enumerate(tokens, chunk.start):
            cell = Cell(token, position, seq.cache_scope, seq)
            self.cells[self.address(chunk, position)] = cell

    def choose(self, chunk: Chunk) -> list[int]:
        seq = chunk.sequence
        chosen = [next_token(seq.tokens)]
        for guess in chunk.draft:
            if guess != chosen[-1]:
                break
            chosen.append(next_token(seq.tokens + chosen))
        return chosen

    def vouch(self, chunk: Chunk, chosen: list[int]) -> Outcome:
        """What was guessed wrong stays where it lies, and is nobody's. So is what was computed
        behind an end.
        """
        seq = chunk.sequence
        is_bad = self.is_bad(seq)
        if seq.finish is not None:
            return None
        for position in range(chunk.known_end + len(chosen) - 1):
            cell = self.cells[self.address(chunk, position)]
            cell.is_doubted = is_bad  # who reads it later and is fine, vouches for it again
            cell.is_proven |= not is_bad
        return None if is_bad else [Choice(token, 0.0) for token in chosen]


@dataclass
class RecordedStep:
    """Implements :class:`workers.engine.batching.Launched`."""

    runner: Recorder
    chunks: list[Chunk]
    chosen: list[list[int]] = field(default_factory=list[list[int]])

    def choose(self) -> None:
        if not self.runner.can_choose:
            raise DeviceMemoryError
        self.chosen = [self.runner.choose(chunk) for chunk in sampled(self.chunks)]

    def follow(self, chunks: list[Chunk]) -> "RecordedStep":
        pairs = zip(sampled(self.chunks), self.chosen, strict=True)
        self.runner.compute(chunks, {chunk.slot: tokens[-1] for chunk, tokens in pairs})
        return RecordedStep(self.runner, chunks)

    def outcomes(self) -> list[Outcome]:
        pairs = zip(sampled(self.chunks), self.chosen, strict=True)
        return [self.runner.vouch(*pair) for pair in pairs]


def sampled(chunks: list[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.samples]


def text_of(tokens: list[int]) -> str:
    return RULES.tokenizer.decode(tokens)


def next_token(tokens: list[int]) -> int:
    """Two letters: answers, too, have prefixes in common, and guesses are right half the time."""
    return 70 + sum(tokens) // 3 % 2


@dataclass
class Fault:
    """What happens in one step besides computing."""

    bad: int = 0
    """Every so-manieth sequence has logits that are not finite; 0: none."""
    most_tokens: int = 10_000
    """What fits the device at once."""
    misfit: int = 0
    """Every so-manieth sequence does not fit even alone; 0: none."""
    token_s: float = 0.001
    can_choose: bool = True


faults = st.one_of(
    st.just(Fault()),
    st.builds(
        Fault,
        bad=st.integers(0, 3),
        most_tokens=st.sampled_from([1, 2, 7, 10_000]),
        misfit=st.integers(0, 3),
        token_s=st.sampled_from([0.0, 0.001, 0.1]),
        can_choose=st.booleans(),
    ),
)
prompts = st.builds(
    lambda blocks, tail: [token for block in blocks for token in [block] * BLOCK] + tail,
    st.lists(st.sampled_from([70, 71]), max_size=6),
    st.lists(st.sampled_from([70, 71, 72]), min_size=1, max_size=3),
)


class EngineMachine(RuleBasedStateMachine):
    """The engine over a recording runner, beside the plain truth."""

    def places(self, limits: Limits) -> Places:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.num_submitted = 0
        self.alive: dict[str, EngineRequest] = {}
        self.said: dict[str, list[int]] = {}
        self.hits = 0

    @initialize(
        slots=st.integers(1, 4),
        cache=st.integers(0, 40),
        budget=st.integers(1, 24),
        draft=st.sampled_from([0, 1, 3, 10]),
        spare=st.integers(0, 3),
        foresees=st.booleans(),
    )
    def build(
        self, slots: int, cache: int, budget: int, draft: int, spare: int, *, foresees: bool
    ) -> None:
        tokens = -(-(LARGEST + cache) // BLOCK) * BLOCK
        self.limits = Limits(slots, tokens, budget, draft_tokens=draft, spare_sequences=spare)
        self.kept = self.places(self.limits)
        self.runner = Recorder(BLOCK if isinstance(self.kept, PagePlaces) else None)
        self.engine = BatchingEngine(
            self.runner,
            RULES,
            self.limits,
            model_version="m@1",
            max_cost=LARGEST,
            vocab_size=300,
            places=self.kept,
            launcher=self.runner if foresees else None,
            clock=lambda: self.runner.time_s,
        )

    @rule(
        prompt=prompts,
        logged=st.lists(st.sampled_from([70, 71]), max_size=5),
        more=st.integers(1, 12),
        scope=st.sampled_from(["one", "two"]),
        stop=st.sampled_from([(), ("ee",), ("de",)]),
        rank=st.sampled_from([0, 0, 1, 2, 2]),
    )
    def submit(
        self,
        prompt: list[int],
        logged: list[int],
        more: int,
        scope: str,
        stop: tuple[str, ...],
        rank: int,
    ) -> None:
        if any(one in text_of(logged) for one in stop):
            return
        self.num_submitted += 1
        id = str(self.num_submitted)
        plain = request(id, prompt, logged=logged, max_new_tokens=len(logged) + more, stop=stop)
        self.alive[id] = EngineRequest(
            id, prompt, plain.sampling, logged, cache_scope=scope, rank=rank
        )
        self.said[id] = list(logged)
        self.engine.submit(self.alive[id])

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.alive:
            id = sorted(self.alive)[which % len(self.alive)]
            self.engine.cancel(id)
            self.end(id)

    @rule(fault=faults)
    def step(self, fault: Fault) -> None:
        runner = self.runner
        runner.token_s, runner.can_choose = fault.token_s, fault.can_choose
        runner.is_bad = lambda seq: fault.bad > 0 and int(seq.id) % fault.bad == 0
        is_misfit = lambda seq: fault.misfit > 0 and int(seq.id) % fault.misfit == 0  # noqa: E731
        runner.does_fit = lambda chunks: (
            sum(chunk.count for chunk in chunks) <= fault.most_tokens
            and not any(is_misfit(chunk.sequence) for chunk in chunks)
        )
        under_way = self.engine._under_way
        planned = self.watch_plan()
        outputs = self.engine.step()
        if self.alive:
            assert planned or under_way, "there is work, and nothing is done"
        for output in outputs:
            said = self.said[output.id]
            assert output.start == len(said)
            for token in output.tokens:
                assert token == next_token(self.alive[output.id].prompt + said)
                said.append(token)
            if output.finish is None:
                continue
            if output.finish.code == "NAN_LOGITS":
                assert int(output.id) % fault.bad == 0
            elif output.finish.code == "CUDA_OOM":
                assert int(output.id) % fault.misfit == 0
            elif output.finish.reason == "stop_sequence":
                assert text_of(said).endswith(self.alive[output.id].sampling.stop)
            else:
                assert output.finish.reason == "length"
            self.end(output.id)

    def watch_plan(self) -> list[Chunk]:
        """Check the next plan when it is made; returns where its chunks will stand."""
        scheduler, seen = self.engine._scheduler, list[Chunk]()
        plan = type(scheduler).plan

        def watched() -> list[Chunk]:
            del scheduler.plan  # pyright: ignore[reportAttributeAccessIssue]
            seen.extend(plan(scheduler))
            self.check(seen)
            return list(seen)

        def foreseen(chunks: list[Chunk]) -> list[Chunk]:
            following = type(scheduler).foresee(scheduler, chunks)
            self.check_foreseen(following)
            return following

        scheduler.plan = watched
        scheduler.foresee = foreseen
        return seen

    def end(self, id: str) -> None:
        del self.alive[id]
        self.runner.homes.pop(id, None)

    def check(self, chunks: list[Chunk]) -> None:
        """What every plan must keep."""
        assert sum(chunk.count for chunk in chunks) <= self.limits.step_tokens
        slots = [chunk.slot for chunk in chunks]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.limits.num_slots for slot in slots)
        assert len(slots) <= self.limits.max_sequences
        sources = {chunk.copied_from[0] for chunk in chunks if chunk.copied_from}
        starting = {chunk.slot for chunk in chunks if chunk.copied_from or chunk.start == 0}
        assert not sources & starting, "a source is overwritten before the step is over"
        for chunk in chunks:
            assert chunk.sequence.id in self.alive
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.known_end - chunk.start <= chunk.sequence.num_pending
            assert chunk.end <= chunk.sequence.cost
            assert len(chunk.draft) <= self.limits.draft_tokens
            assert chunk.samples or not chunk.draft
            self.hits += chunk.start > 0 and self.runner.homes.get(chunk.sequence.id) is None
            if isinstance(self.kept, PagePlaces):
                self.check_pages(chunk)
        self.check_ranks(chunks)
        used = sum(s.num_tokens for s in self.engine._scheduler._running.values())
        used += sum(len(chunk.draft) for chunk in chunks)
        assert used <= self.limits.cache_tokens or isinstance(self.kept, PagePlaces)

    def check_ranks(self, chunks: list[Chunk]) -> None:
        """No interactive row is left out for the sake of others, or loses its place to them."""
        running = self.engine._scheduler._running.values()
        interactive = [seq for seq in running if seq.rank == 0]
        others = sum(chunk.sequence.rank > 0 for chunk in chunks)
        served = {chunk.sequence.id for chunk in chunks}
        if others and interactive:
            decoding = {seq.id for seq in interactive if seq.num_pending == 1}
            assert decoding <= served
        put_back = [seq for seq in self.engine._scheduler._waiting if seq.num_cached is not None]
        if any(seq.rank == 0 for seq in put_back):
            assert all(seq.rank == 0 for seq in running)

    def check_foreseen(self, chunks: list[Chunk]) -> None:
        """One place behind all that is known of everybody who runs and may go on."""
        assert len({chunk.slot for chunk in chunks}) == len(chunks) <= self.limits.step_tokens
        for chunk in chunks:
            assert chunk.sequence.id in self.alive
            assert (chunk.start, chunk.count) == (chunk.sequence.num_tokens, 1)
            assert chunk.end < chunk.sequence.cost
            if isinstance(self.kept, PagePlaces):
                self.check_pages(chunk)
        used = sum(s.num_tokens for s in self.engine._scheduler._running.values()) + len(chunks)
        assert not chunks or used <= self.limits.cache_tokens or isinstance(self.kept, PagePlaces)

    def check_pages(self, chunk: Chunk) -> None:
        """Enough of them, no one twice, and where it writes nobody else looks."""
        assert len(chunk.pages) * BLOCK >= chunk.end
        assert len(set(chunk.pages)) == len(chunk.pages)
        written = set(chunk.pages[chunk.start // BLOCK :])
        running = self.engine._scheduler._running.values()
        for other in running:
            if other is not chunk.sequence:
                assert not written & set(self.kept.place_of(other).pages)

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.num_submitted:
            load = self.engine.load()
            assert load.running + load.waiting == len(self.alive)
            assert load.running <= self.limits.num_slots
            promised = sum(one.cost for one in self.alive.values())
            assert load.free_tokens == max(0, self.kept.capacity_tokens - promised)

    @invariant()
    def no_page_leaks(self) -> None:
        kept = getattr(self, "kept", None)
        if isinstance(kept, PagePlaces):
            held = [page for place in kept._places.values() for page in place.pages]
            for page, num_users in enumerate(kept._num_users):
                assert num_users == held.count(page)
            known = [*kept._empty, *kept._unused, *set(held)]
            assert sorted(known) == list(range(len(kept._num_users)))
            assert {page: name for name, page in kept._page_of.items()} == kept._digest_of

    def teardown(self) -> None:
        """Left alone, everything ends, each within the work that was ahead of it."""
        if self.num_submitted == 0:
            return
        # Each token may be computed again for each sequence that ends and so lets it in again.
        work = sum(one.cost for one in self.alive.values())
        for _ in range(work * (len(self.alive) + 1) + 1):
            if not self.alive:
                break
            self.step(Fault())
        assert not self.alive, "starved"
        assert self.engine.step() == []
        kept: Any = self.kept
        assert kept._places == {}
        assert kept._starting == {}
        assert sorted(getattr(kept, "_free_slots", None) or kept._free) == list(
            range(self.limits.num_slots)
        )


class SlotMachine(EngineMachine):
    def places(self, limits: Limits) -> Places:
        return SlotPlaces(limits.num_slots, limits.cache_tokens, block_tokens=BLOCK)


class PageMachine(EngineMachine):
    def places(self, limits: Limits) -> Places:
        return PagePlaces(
            limits.cache_tokens // BLOCK, page_tokens=BLOCK, max_sequences=limits.num_slots
        )


@pytest.fixture(autouse=True)
def _wait_for_short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these small sequences have in common is worth waiting for, too."""
    monkeypatch.setattr(places_module, "_WORTH_WAITING_TOKENS", 2 * BLOCK)


SlotMachine.TestCase.settings = searched(max_examples=60, steps=40)
PageMachine.TestCase.settings = searched(max_examples=60, steps=40)
TestSlots = SlotMachine.TestCase
TestPages = PageMachine.TestCase
