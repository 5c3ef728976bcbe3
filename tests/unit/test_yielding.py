"""Who gives way, on a machine whose steps take what the test says: nobody interactive notices.

The engine is the real one; its clock shows the time of that machine, so nothing here depends on how
fast the tests run.
"""

import random
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.messages import Sampling
from common.models.tokenizer import Tokenizer
from tests.support.tiny_model import build_tokenizer
from workers.engine import yielding
from workers.engine.batching import BatchingEngine, Choice, Outcome
from workers.engine.port import EngineRequest
from workers.engine.scheduler import Chunk, Limits
from workers.engine.sequence import TextRules

RULES = TextRules(Tokenizer(build_tokenizer(), {}), frozenset())
LIMITS = Limits(32, 65_536, 512, spare_sequences=8)
INTERACTIVE, FLEX, BATCH = 0, 1, 2


@dataclass
class Machine:
    """Implements :class:`workers.engine.batching.Runner`: twelve rows take as long as one."""

    least_s: float = 0.010
    row_s: float = 0.0008
    prompt_token_s: float = 0.0007
    unevenness: float = 0.05
    time_s: float = 0.0
    steps: list[list[Chunk]] = field(default_factory=list[list[Chunk]])
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        rows = sum(chunk.count == 1 for chunk in chunks)
        prompt = sum(chunk.count for chunk in chunks if chunk.count > 1)
        work_s = self.row_s * rows + self.prompt_token_s * prompt
        self.time_s += max(self.least_s, work_s) * (1 + self.unevenness * self.draw.random())
        self.steps.append(chunks)
        return [[Choice(70 + self.draw.randrange(20), 0.0)] for c in chunks if c.samples]


@dataclass
class Seen:
    """What came out of an engine, in times of the machine."""

    first_s: dict[str, float] = field(default_factory=dict[str, float])
    gaps_s: list[float] = field(default_factory=list[float])
    num_tokens: Counter[int] = field(default_factory=Counter[int])
    """By rank."""


class House:
    """An engine with readers who come now and then, and a batch that never ends."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.engine = BatchingEngine(
            self.machine,
            RULES,
            LIMITS,
            model_version="m@1",
            max_cost=4096,
            vocab_size=300,
            clock=lambda: self.machine.time_s,
        )
        self.num_submitted = 0

    def submit(self, rank: int, num_prompt: int = 64, num_new: int = 64) -> str:
        self.num_submitted += 1
        id = f"{rank} {self.num_submitted}"
        draw = random.Random(self.num_submitted)
        prompt = [draw.randrange(3, 250) for _ in range(num_prompt)]
        sampling = Sampling(seed=0, max_new_tokens=num_new)
        self.engine.submit(EngineRequest(id, prompt, sampling, cache_scope=id, rank=rank))
        return id

    def serve(self, seconds: float, *, rate: float, has_batch: bool) -> Seen:
        """Readers at ``rate`` per second, the same ones in each call; 32 batch rows at any time."""
        draw, machine, seen = random.Random(5), self.machine, Seen()
        began_s, next_s, num_batch = machine.time_s, draw.expovariate(rate), 0
        asked_s: dict[str, float] = {}
        last_s: dict[str, float] = {}
        while (now_s := machine.time_s - began_s) < seconds:
            while next_s <= now_s:
                asked_s[self.submit(INTERACTIVE)] = next_s
                next_s += draw.expovariate(rate)
            while has_batch and num_batch < LIMITS.max_sequences:
                self.submit(BATCH)
                num_batch += 1
            load = self.engine.load()
            if load.running + load.waiting == 0:
                machine.time_s = began_s + next_s
            for output in self.engine.step():
                rank, now_s = int(output.id[0]), machine.time_s - began_s
                seen.num_tokens[rank] += len(output.tokens)
                num_batch -= rank == BATCH and output.finish is not None
                if rank == INTERACTIVE and output.id in last_s:
                    seen.gaps_s.append(now_s - last_s[output.id])
                elif rank == INTERACTIVE:
                    seen.first_s[output.id] = now_s - asked_s[output.id]
                last_s[output.id] = now_s
        self.clear()
        return seen

    def clear(self) -> None:
        for number in range(self.num_submitted + 1):
            for rank in (INTERACTIVE, FLEX, BATCH):
                self.engine.cancel(f"{rank} {number}")

    def steps(self, count: int) -> list[list[Chunk]]:
        first = len(self.machine.steps)
        for _ in range(count):
            self.engine.step()
        return self.machine.steps[first:]


def p99(values: Rows[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.parametrize(
    ("machine", "seconds"),
    [
        ({}, 60),
        ({"unevenness": 0.6}, 60),
        ({"least_s": 0.005, "row_s": 0.00005, "prompt_token_s": 0.00003}, 12),
    ],
    ids=["even", "uneven", "wide"],
)
def test_readers_hardly_notice_a_batch_and_it_gets_what_they_leave(
    machine: dict[str, Any], seconds: int
) -> None:
    """A quarter at p99 is what they may notice, and four fifths what it must get."""
    rate = 120 / seconds
    alone = House(Machine(**machine)).serve(seconds, rate=rate, has_batch=False)
    beside = House(Machine(**machine)).serve(seconds, rate=rate, has_batch=True)
    batch = House(Machine(**machine)).serve(seconds / 4, rate=1e-9, has_batch=True)
    assert p99([*beside.first_s.values()]) <= 1.25 * p99([*alone.first_s.values()])
    assert p99(beside.gaps_s) <= 1.25 * p99(alone.gaps_s)
    assert abs(beside.num_tokens[INTERACTIVE] - alone.num_tokens[INTERACTIVE]) < 150
    left = 4 * batch.num_tokens[BATCH] - beside.num_tokens[INTERACTIVE]
    assert beside.num_tokens[BATCH] >= 0.8 * left


def test_a_batch_alone_has_every_slot_and_whole_steps() -> None:
    house = House()
    for _ in range(32):
        house.submit(BATCH, num_new=40)
    steps = house.steps(120)
    assert any(len(step) == 32 and all(c.count == 1 for c in step) for step in steps)
    assert sum(chunk.count for chunk in steps[0]) == LIMITS.step_tokens
    assert all(sum(c.count for c in step) >= 100 for step in steps if len(step) == 1)


def test_an_interactive_prompt_has_the_very_next_step() -> None:
    """However many others run or wait."""
    house = House()
    for _ in range(40):
        house.submit(BATCH)
    house.steps(60)
    id = house.submit(INTERACTIVE)
    [step] = house.steps(1)
    assert [(chunk.sequence.id, chunk.count) for chunk in step] == [(id, 64)]


def test_who_gives_way_keeps_his_place() -> None:
    """Nothing is computed twice: what is computed of each only grows."""
    house = House()
    ids = [house.submit(BATCH, num_new=200) for _ in range(32)]
    house.steps(80)
    reached: dict[str, int] = {}
    for _ in range(6):
        house.submit(INTERACTIVE, num_new=30)
        for step in house.steps(40):
            for chunk in step:
                assert chunk.start >= reached.get(chunk.sequence.id, 0)
                reached[chunk.sequence.id] = chunk.end
    assert reached.keys() >= set(ids)


def test_those_who_give_way_have_their_turns() -> None:
    """Beside a reader there is room for some of them at a time, and each goes on."""
    house = House()
    for _ in range(32):
        house.submit(BATCH, num_new=300)
    house.steps(60)
    reader = house.submit(INTERACTIVE, num_new=200)
    steps = [step for step in house.steps(150) if any(c.sequence.id == reader for c in step)]
    served = Counter(c.sequence.id for step in steps for c in step if c.sequence.rank == BATCH)
    assert len(served) == 32
    assert max(served.values()) - min(served.values()) <= 2
    assert max(len(step) for step in steps) < 32


def test_flex_goes_before_batch() -> None:
    house = House()
    for number in range(32):
        house.submit(FLEX if number % 2 else BATCH, num_new=300)
    house.steps(60)
    house.submit(INTERACTIVE, num_new=200)
    beside = [step for step in house.steps(100) if any(c.sequence.rank == 0 for c in step)]
    served = Counter(chunk.sequence.rank for step in beside for chunk in step)
    assert served[FLEX] > 0
    assert served[BATCH] == 0


def test_a_batch_goes_on_beside_prompts_without_end() -> None:
    """Interactive prompts have their steps for themselves, but for one in sixteen or so."""
    house = House()
    for _ in range(4):
        house.submit(BATCH, num_new=300)
    house.steps(20)
    for _ in range(30):
        house.submit(INTERACTIVE, num_prompt=1000, num_new=1)
    steps = house.steps(50)
    assert all(any(chunk.sequence.rank == 0 for chunk in step) for step in steps)
    assert 2 <= sum(any(chunk.sequence.rank for chunk in step) for step in steps) <= 6


def test_steps_are_short_while_readers_come_and_go_and_whole_when_they_have_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever comes next waits for the end of a step."""
    monkeypatch.setattr(yielding, "_BETWEEN_S", 2.0)
    house = House()
    house.submit(INTERACTIVE, num_new=40)
    for _ in range(32):
        house.submit(BATCH, num_new=500)
    house.steps(100)
    soon = house.steps(50)
    assert sorted(len(step) for step in soon)[25] < 24
    house.steps(150)
    assert [len(step) for step in house.steps(20)] == [32] * 20
