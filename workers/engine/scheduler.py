"""Who computes how many tokens in the next step: policy only, no tensors, no I/O.

There are no prefill and decode phases: every running sequence has tokens that are not in the cache
yet, and a step closes part of that gap. Those with one pending token go first, then the others in
the order of their arrival, cut into chunks by the step's token budget. Where a sequence lies is for
:mod:`workers.engine.places` to say, and how much a step may carry for :mod:`workers.engine.pacing`.
"""

from collections import deque
from dataclasses import dataclass

import msgspec

from workers.engine.pacing import Pace
from workers.engine.places import Places
from workers.engine.sequence import Sequence

SPARE_ROWS = 64
"""Most logits in one step beside one row for each sequence: at a vocabulary of 150,000 they take 40
MB, where those of a whole chunk of a prompt would take 300."""


_FORESEEN_PRICE = 0.5
"""Where steps can be foreseen, guesses must be this likely, and there must be one per row: then
they bring half a token per row more, which is about what waiting for the last token costs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must keep."""

    max_sequences: int
    """Cache slots: most sequences in one step."""
    cache_tokens: int
    """Most tokens in the cache at once, over all running sequences."""
    step_tokens: int
    """Most tokens in one forward pass."""
    draft_tokens: int = 0
    """Most guessed tokens behind those of one sequence; 0: no speculation."""


class Chunk(msgspec.Struct, frozen=True):
    """``count`` pending tokens of one sequence from position ``start``, for one step."""

    sequence: Sequence
    slot: int
    start: int
    count: int
    pages: tuple[int, ...] = ()
    """Paged caches only: the pages of the sequence, enough for ``start + count`` positions."""
    copied_from: tuple[int, int] | None = None
    """(slot, num_tokens): before this step the first positions of that slot are copied here."""
    draft: tuple[int, ...] = ()
    """Guessed tokens behind all pending ones. They count as part of ``count``."""
    is_foreseen: bool = False
    """It is the place of the one token that the step before it, still under way, brings."""

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def known_end(self) -> int:
        """Where the guessed tokens begin."""
        return self.start + self.count - len(self.draft)

    @property
    def tokens(self) -> list[int]:
        """``[count]``: those to compute."""
        return [*self.sequence.tokens[self.start : self.known_end], *self.draft]

    @property
    def samples(self) -> bool:
        """Whether this chunk closes the gap, so that the next token can be chosen."""
        return self.is_foreseen or self.known_end == self.sequence.num_tokens

    @property
    def num_scored(self) -> int:
        """Tokens at its start whose logits must tell how likely the prompt's next one was."""
        return min(self.sequence.num_unscored(self.start), self.count)


class Scheduler:
    """Waiting and running sequences and their share of each step.

    Admission is first come, first served, while there is a place and the step has tokens left for
    it. When growing sequences no longer fit, the youngest goes back to the head of the queue and
    loses its place. Since the others only grow, it fits again only after one of them has ended: two
    never push each other out in turn. The oldest is never pushed out, so everything submitted ends.

    ``foresees``: the caller asks for :meth:`foresee`.
    """

    def __init__(self, limits: Limits, places: Places, *, foresees: bool = False) -> None:
        self._max_sequences = limits.max_sequences
        self._draft_tokens = limits.draft_tokens
        self._places = places
        self._foresees = foresees
        self._pace = Pace(limits.step_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, Sequence] = {}
        """By id, in the order of arrival: the last one is the youngest."""
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
        return sum(s.cost for s in self._running.values()) + sum(s.cost for s in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits an empty cache."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Forget a sequence, ended or not, and free its place.

        Not sound: its logits were not finite, so nobody may go on from what it had in the cache.
        """
        if sequence.id not in self._running:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.id]
        self._vacate(sequence, is_sound=is_sound)

    def plan(self) -> list[Chunk]:
        """Choose the chunks of the next step: at most one per sequence, ``step_tokens`` in all.

        Guessed tokens are among them. Empty only when nothing waits or runs. The caller computes
        all of them, then says :meth:`complete`, and :meth:`prove` of each that brought finite
        logits.
        """
        self._places.begin_step()
        self._make_room()
        starting = self._next_starting()
        decoding = self._next_decoding(self._pace.max_rows(is_alone=not starting))
        chunks = [self._chunk(sequence, 1) for sequence in decoding]
        num_free = self._max_sequences - len(decoding)
        budget = self._pace.prefill_tokens(len(decoding), min(len(starting), num_free))
        spare_rows = SPARE_ROWS
        for sequence in starting:
            if budget == 0:
                break
            if sequence.num_unscored(sequence.num_computed) and spare_rows == 0:
                break
            if sequence.id not in self._running and not self._admit(sequence):
                break
            count = min(sequence.num_pending, budget)
            num_unscored = sequence.num_unscored(sequence.num_computed)
            if num_unscored:
                count = min(count, spare_rows)
                spare_rows -= min(count, num_unscored)
            budget -= count
            chunks.append(self._chunk(sequence, count))
        if self._draft_tokens and len(chunks) == len(decoding):
            chunks = self._with_drafts(decoding)
        return chunks

    def foresee(self, chunks: list[Chunk]) -> list[Chunk]:
        """The step behind ``chunks`` while these are computed: a token more of everybody.

        It computes the tokens that ``chunks`` bring, and leaves out who ends with them for certain.
        Empty where the next step is better planned when these are known: somebody might come in or
        has more of a prompt to compute, or guesses bring more than waiting costs.
        """
        chunks = [chunk for chunk in chunks if chunk.sequence.finish is None]
        if len(chunks) < len(self._running) or not all(c.samples and not c.draft for c in chunks):
            return []
        lasting = [chunk for chunk in chunks if not chunk.sequence.is_at_last_token]
        if self._waiting and len(lasting) < self._max_sequences:
            return []
        if len(lasting) > self._pace.max_rows(is_alone=True):
            return []
        if self._draft_tokens and any(self._drafts([chunk.sequence for chunk in lasting])):
            return []
        self._places.begin_step()
        if not all(self._places.hold(chunk.sequence) for chunk in chunks):
            return []
        following: list[Chunk] = []
        for chunk in lasting:
            sequence = chunk.sequence
            if not self._places.lend(sequence, 1):
                return []
            place = self._places.place_of(sequence)
            following.append(
                Chunk(sequence, place.slot, chunk.end, 1, place.pages, is_foreseen=True)
            )
        return following

    def complete(self, chunks: list[Chunk], duration_s: float) -> None:
        """Note that the step ran: its tokens are in the cache now."""
        num_decoding = num_prefill = num_drafted = 0
        for chunk in chunks:
            end = chunk.known_end
            count = end - chunk.start
            if count == 1:
                num_decoding += 1
            else:
                num_prefill += count
            num_drafted += chunk.count - count
            chunk.sequence.num_computed = end
        self._pace.note(num_decoding, num_prefill, duration_s, num_drafted)

    def prove(self, sequence: Sequence, *, num_drafted: int = 0) -> None:
        """Finite logits came out behind all that is computed of it.

        ``num_drafted`` of the tokens appended since were guessed right, so they are computed, too.
        """
        if num_drafted:
            sequence.num_computed += num_drafted
            self._pace.credit(num_drafted)
        self._places.prove(sequence)

    def shrink(self) -> None:
        """Plan smaller steps for a while: the last one did not fit the device's memory."""
        self._pace.shrink()

    def _next_decoding(self, max_rows: int) -> list[Sequence]:
        """Who has one token pending; when there are too many of them, in turn."""
        decoding = [sequence for sequence in self._running.values() if sequence.num_pending == 1]
        if len(decoding) > max_rows:
            decoding.sort(key=lambda sequence: sequence.served_at)
            del decoding[max_rows:]
        self._num_served += 1
        for sequence in decoding:
            sequence.served_at = self._num_served
        return decoding

    def _next_starting(self) -> list[Sequence]:
        """Longer gaps in the order of arrival: one prompt is finished before the next begins."""
        running = [sequence for sequence in self._running.values() if sequence.num_pending > 1]
        return running + list(self._waiting)

    def _with_drafts(self, decoding: list[Sequence]) -> list[Chunk]:
        """Chunks of one token and what is guessed behind it, where that is worth its time.

        Only steps without prompts carry guesses: who waits for a first token comes before who would
        have the next ones sooner.
        """
        chunks: list[Chunk] = []
        for sequence, draft in zip(decoding, self._drafts(decoding), strict=True):
            if draft and not self._places.lend(sequence, len(draft)):
                draft = ()  # noqa: PLW2901
            chunks.append(self._chunk(sequence, 1 + len(draft), draft))
        return chunks

    def _drafts(self, decoding: list[Sequence]) -> list[tuple[int, ...]]:
        """What is guessed behind each, empty where that is not worth its time."""
        price = self._pace.draft_price(len(decoding))
        room = min(SPARE_ROWS, self._pace.draft_tokens(len(decoding)))
        if self._foresees:
            price = max(price, _FORESEEN_PRICE)
        drafts: list[tuple[int, ...]] = []
        for sequence in decoding:
            draft = sequence.draft(min(room, self._draft_tokens), price) if room else ()
            room -= len(draft)
            drafts.append(draft)
        if self._foresees and sum(map(len, drafts)) < len(decoding):
            return [()] * len(decoding)
        return drafts

    def _chunk(self, sequence: Sequence, count: int, draft: tuple[int, ...] = ()) -> Chunk:
        place = self._places.place_of(sequence)
        start, copied = sequence.num_computed, place.copied_from
        # What was copied lies there once the first chunk has run.
        is_first = copied is not None and copied[1] == start
        copied_from = copied if is_first else None
        return Chunk(sequence, place.slot, start, count, place.pages, copied_from, draft)

    def _make_room(self) -> None:
        for sequence in list(self._running.values()):
            while sequence.id in self._running and not self._places.hold(sequence):
                _, youngest = self._running.popitem()
                self._vacate(youngest, is_sound=True)
                self._waiting.appendleft(youngest)

    def _admit(self, sequence: Sequence) -> bool:
        """Let the head of the queue in, if there is a place."""
        if not self._places.admit(sequence):
            return False
        self._waiting.popleft()
        self._running[sequence.id] = sequence
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        return True

    def _vacate(self, sequence: Sequence, *, is_sound: bool) -> None:
        self._places.release(sequence, is_sound=is_sound)
        sequence.num_computed = 0
