"""Any sequence of submits, cancels and steps keeps the scheduler's promises."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.models.tokenizer import Tokenizer
from tests.support.engines import request
from tests.support.tiny_model import build_tokenizer
from workers.engine.scheduler import Chunk, Limits, Scheduler
from workers.engine.sequence import Sequence, TextRules

RULES = TextRules(Tokenizer(build_tokenizer(), {}), frozenset())
LETTER = 70
LARGEST = 24


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler with an engine that computes nothing, beside the plain truth."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted = 0
        self.ended = 0
        self.alive: dict[str, Sequence] = {}

    @initialize(slots=st.integers(1, 4), cache=st.integers(LARGEST, 60), budget=st.integers(1, 12))
    def build(self, slots: int, cache: int, budget: int) -> None:
        self.limits = Limits(max_sequences=slots, cache_tokens=cache, step_tokens=budget)
        self.scheduler = Scheduler(self.limits)

    @rule(num_prompt=st.integers(1, 12), num_logged=st.integers(0, 5), more=st.integers(1, 7))
    def submit(self, num_prompt: int, num_logged: int, more: int) -> None:
        self.submitted += 1
        seq = Sequence(
            request(
                str(self.submitted),
                [LETTER] * num_prompt,
                logged=[LETTER] * num_logged,
                max_new_tokens=num_logged + more,
            ),
            RULES,
        )
        self.alive[seq.id] = seq
        self.scheduler.add(seq)

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.alive:
            self.end(sorted(self.alive)[which % len(self.alive)])

    @rule()
    def step(self) -> None:
        chunks = self.scheduler.plan()
        self.check(chunks)
        closed = [chunk.sequence for chunk in chunks if chunk.samples]
        self.scheduler.complete(chunks)
        for seq in closed:
            assert seq.num_pending == 0
            seq.append(LETTER)
            if seq.finish is not None:
                self.end(seq.id)

    def end(self, id: str) -> None:
        self.scheduler.remove(self.alive.pop(id))
        self.ended += 1

    def check(self, chunks: list[Chunk]) -> None:
        """What every plan must keep."""
        if self.alive:
            assert chunks, "there is work, and nothing is done"
        assert sum(chunk.count for chunk in chunks) <= self.limits.step_tokens
        slots = [chunk.slot for chunk in chunks]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.limits.max_sequences for slot in slots)
        for chunk in chunks:
            assert self.alive[chunk.sequence.id] is chunk.sequence
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.count <= chunk.sequence.num_pending
        running = [seq for seq in self.alive.values() if seq.num_computed]
        used = sum(seq.num_tokens for seq in running)
        assert used <= self.limits.cache_tokens or len(running) == 1

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.submitted:
            counted = self.scheduler.num_running + self.scheduler.num_waiting
            assert counted == len(self.alive) == self.submitted - self.ended
            assert self.scheduler.num_running <= self.limits.max_sequences
            assert self.scheduler.promised_tokens == sum(s.cost for s in self.alive.values())

    def teardown(self) -> None:
        """Left alone, everything ends, each within the work that was ahead of it."""
        if self.submitted == 0:
            return
        # Each token may be computed again for each sequence that ends and so lets it in again.
        work = sum(seq.cost for seq in self.alive.values())
        for _ in range(work * (len(self.alive) + 1) + 1):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "starved"
        assert self.scheduler.plan() == []
        everyone = [Sequence(request(f"x{i}", [LETTER]), RULES) for i in range(4)]
        for seq in everyone:
            self.scheduler.add(seq)
        self.scheduler.plan()
        assert self.scheduler.num_running == self.limits.max_sequences, "a slot leaked"


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase
