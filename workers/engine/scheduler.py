"""Who computes how many tokens in the next step: policy only, no tensors, no I/O.

There are no prefill and decode phases: every running sequence has tokens that are not in the cache
yet, and a step closes part of that gap. Those with one pending token go first, then the others in
the order of their arrival, cut into chunks by the step's token budget.
"""

import heapq
from collections import deque
from dataclasses import dataclass

from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must keep."""

    max_sequences: int
    """Cache slots: most sequences in one step."""
    cache_tokens: int
    """Most tokens in the cache at once, over all running sequences."""
    step_tokens: int
    """Most tokens in one forward pass."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` pending tokens of one sequence from position ``start``, for one step."""

    sequence: Sequence
    slot: int
    start: int
    count: int
    pages: tuple[int, ...] = ()
    """Paged caches only: the pages of the sequence, enough for ``start + count`` positions."""
    copied_from: tuple[int, int] | None = None
    """(slot, num_tokens): before this step the first positions of that slot are copied here."""

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether this chunk closes the gap, so that the next token can be chosen."""
        return self.end == self.sequence.num_tokens


class Scheduler:
    """Waiting and running sequences, their slots and their share of each step.

    Admission is first come, first served, while a slot is free and the tokens fit the cache. When
    growing sequences no longer fit, the youngest goes back to the head of the queue and loses its
    cache. Since the others only grow, it fits again only after one of them has ended: two never
    push each other out in turn. The oldest is never pushed out, so everything submitted ends.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        """In the order of arrival: the last one is the youngest."""
        self._free_slots = list(range(limits.max_sequences))
        self._slots: dict[str, int] = {}
        """Of the running ones, by id."""
        self._num_served = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def promised_tokens(self) -> int:
        """Cost of everything submitted that has not ended."""
        return sum(s.cost for s in self._running) + sum(s.cost for s in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits an empty cache."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, ended or not, and free its slot."""
        if sequence.id not in self._slots:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._vacate(sequence)

    def plan(self) -> list[Chunk]:
        """Choose the chunks of the next step: at most one per sequence, ``step_tokens`` in all.

        Empty only when nothing waits or runs. The caller computes all of them, then says
        :meth:`complete`.
        """
        self._make_room()
        self._admit()
        budget = self.limits.step_tokens
        chunks: list[Chunk] = []
        for sequence in sorted(self._running, key=self._turn):
            if budget == 0:
                break
            count = min(sequence.num_pending, budget)
            budget -= count
            self._num_served += 1
            sequence.served_at = self._num_served
            slot = self._slots[sequence.id]
            chunks.append(Chunk(sequence, slot, sequence.num_computed, count))
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        """Note that the step ran: its tokens are in the cache now."""
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end

    def _turn(self, sequence: Sequence) -> tuple[bool, int]:
        """Sort key: single tokens first; when the budget cannot serve them all, in turn.

        Longer gaps keep the order of arrival, so that one prompt is finished before the next.
        """
        is_single = sequence.num_pending == 1
        return (not is_single, sequence.served_at if is_single else 0)

    def _used_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self._running)

    def _make_room(self) -> None:
        used = self._used_tokens()
        while used > self.limits.cache_tokens and len(self._running) > 1:
            youngest = self._running.pop()
            used -= youngest.num_tokens
            self._vacate(youngest)
            self._waiting.appendleft(youngest)

    def _admit(self) -> None:
        used = self._used_tokens()
        while self._waiting and self._free_slots:
            used += self._waiting[0].num_tokens
            if used > self.limits.cache_tokens and self._running:
                return
            sequence = self._waiting.popleft()
            self._slots[sequence.id] = heapq.heappop(self._free_slots)
            self._running.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        """Give the slot back. The lowest free slot is taken first: that memory is warm already."""
        heapq.heappush(self._free_slots, self._slots.pop(sequence.id))
        sequence.num_computed = 0
