"""Who computes how many tokens in the next step: policy only, no tensors, no I/O.

There are no prefill and decode phases: every running sequence has tokens that are not in the cache
yet, and a step closes part of that gap. Those with one pending token go first, then the others in
the order of their arrival, cut into chunks by the step's token budget. Interactive sequences, of
rank 0, are planned as if there were no others; these get what :mod:`workers.engine.yielding` says
is left. Where a sequence lies is for :mod:`workers.engine.places` to say, and how much a step may
carry for :mod:`workers.engine.pacing`.
"""

from bisect import insort_left, insort_right
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from workers.engine.pacing import Pace
from workers.engine.places import Places
from workers.engine.sequence import Sequence
from workers.engine.yielding import Share

SPARE_ROWS = 64
"""Most logits in one step beside one row for each sequence: at a vocabulary of 150,000 they take 40
MB, where those of a whole chunk of a prompt would take 300."""


_FORESEEN_PRICE = 0.5
"""Where steps can be foreseen, guesses must be this likely, and there must be one per row: then
they bring half a token per row more, which is about what waiting for the last token costs."""
_PATIENCE_S = 0.1
"""Without anything interactive a step with prompts may take so long: who comes meanwhile waits for
its end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler must keep."""

    max_sequences: int
    """Most sequences in one step."""
    cache_tokens: int
    """Most tokens in the cache at once, over all running sequences."""
    step_tokens: int
    """Most tokens in one forward pass."""
    draft_tokens: int = 0
    """Most guessed tokens behind those of one sequence; 0: no speculation."""
    spare_sequences: int = 0
    """Most sequences beside these that keep their place while they are paused."""

    @property
    def num_slots(self) -> int:
        """Cache slots."""
        return self.max_sequences + self.spare_sequences


class Chunk(msgspec.Struct, frozen=True, gc=False):
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

    Admission is first come, first served within a rank, while there is a place and the step has
    tokens left for it. When growing sequences no longer fit, the youngest of the highest rank goes
    back to the head of its rank and loses its place. Since the others only grow, it fits again only
    after one of them has ended: two never push each other out in turn. The oldest of the lowest
    rank is never pushed out, so everything submitted ends.

    Who is above rank 0 gives way: it is left out of steps that would take too long with it, in turn
    with others of its rank, and goes on from where it stands.

    ``foresees``: the caller asks for :meth:`foresee`.
    """

    def __init__(self, limits: Limits, places: Places, *, foresees: bool = False) -> None:
        self._max_sequences = limits.max_sequences
        self._draft_tokens = limits.draft_tokens
        self._places = places
        self._foresees = foresees
        self._pace = Pace(limits.step_tokens)
        """Learnt from steps with nothing but interactive sequences."""
        self._pace_between = Pace(limits.step_tokens, patience_s=_PATIENCE_S)
        """Learnt from steps without any."""
        self._share = Share(limits.max_sequences)
        self._weighed: Pace | None = None
        """What has learnt from the last step."""
        self._waiting: list[Sequence] = []
        """By rank, then in the order in which they are let in."""
        self._running: dict[str, Sequence] = {}
        """By id, in the order of arrival: the last one is the youngest."""
        self._num_served = 0
        self.num_preempted = 0
        """Sequences that lost their place again, so far; as all that follows."""
        self.num_joined = 0
        self.queried_tokens = 0
        """Tokens for which a computed prefix was looked for."""
        self.found_tokens = 0
        self.last_tokens = 0
        """In the step that was completed last."""
        self.last_prefill_tokens = 0

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
        insort_right(self._waiting, sequence, key=_rank)

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
        chunks = self._plan_interactive()
        return chunks + self._plan_beside(chunks) if chunks else self._plan_between()

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
        if self._may_come_in(lasting) or not self._may_last([c.sequence for c in lasting]):
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
        interactive, others = _Tally(), _Tally()
        for chunk in chunks:
            (interactive if chunk.sequence.rank == 0 else others).add(chunk)
            chunk.sequence.num_computed = chunk.known_end
        self.last_tokens = interactive.num_tokens + others.num_tokens
        self.last_prefill_tokens = interactive.num_prefill + others.num_prefill
        alone_s = self._pace.decode_s
        has_prompt = interactive.num_prefill > 0
        self._weighed = None
        if not interactive.num_tokens:
            self._learn(self._pace_between, others, duration_s)
            self._share.note_between(others.num_tokens, duration_s, alone_s)
        elif not others.num_tokens:
            self._learn(self._pace, interactive, duration_s)
            self._share.note_interactive(has_prompt=has_prompt)
        else:
            num_tokens = interactive.num_tokens + others.num_tokens
            self._share.note_beside(num_tokens, duration_s, alone_s, has_prompt=has_prompt)

    def prove(self, sequence: Sequence, *, num_drafted: int = 0) -> None:
        """Finite logits came out behind all that is computed of it.

        ``num_drafted`` of the tokens appended since were guessed right, so they are computed, too.
        """
        if num_drafted:
            sequence.num_computed += num_drafted
            if self._weighed is not None:
                self._weighed.credit(num_drafted)
        self._places.prove(sequence)

    def shrink(self) -> None:
        """Plan smaller steps for a while: the last one did not fit the device's memory."""
        self._pace.shrink()
        self._pace_between.shrink()

    def _plan_interactive(self) -> list[Chunk]:
        """What the step would be if nobody gave way."""
        pace = self._pace
        starting = [*_interactive(self._starting()), *_interactive(self._waiting)]
        decoding = _interactive(self._decoding())
        decoding = self._in_turn(decoding, self._max_rows(pace, starting))
        has_others = any(sequence.rank for sequence in self._running.values())
        owed = self._share.num_owed if has_others else 0
        return self._plan_by(pace, decoding, starting, max(1, pace.step_tokens - owed))

    def _plan_between(self) -> list[Chunk]:
        """A step for those who give way, when nobody else has anything to compute."""
        pace, room = self._pace_between, self._share.room_between(self._pace.decode_s)
        starting = self._starting() + self._yielding_who_may_come()
        max_rows = self._max_rows(pace, starting)
        max_rows = max_rows if room is None else min(room, max_rows)
        decoding = self._in_turn(self._decoding(), max_rows)
        return self._plan_by(pace, decoding, starting, room)

    def _plan_beside(self, chunks: list[Chunk]) -> list[Chunk]:
        """What those who give way get of a step with the interactive ``chunks``."""
        num_tokens = sum(chunk.count for chunk in chunks)
        has_prompt = any(chunk.known_end - chunk.start > 1 for chunk in chunks)
        room = self._share.room_beside(num_tokens, self._pace.decode_s, has_prompt=has_prompt)
        room = min(room, self._pace.step_tokens - num_tokens)
        max_rows = self._max_sequences - len(chunks)
        if room <= 0 or max_rows <= 0:
            return []
        decoding = [sequence for sequence in self._decoding() if sequence.rank]
        decoding = self._in_turn(decoding, min(room, max_rows))
        starting = [sequence for sequence in self._starting() if sequence.rank]
        starting += self._yielding_who_may_come()
        chunks = [self._chunk(sequence, 1) for sequence in decoding]
        return chunks + self._start(starting, room - len(decoding), max_rows - len(decoding))

    def _plan_by(
        self,
        pace: Pace,
        decoding: list[Sequence],
        starting: list[Sequence],
        room: int | None,
    ) -> list[Chunk]:
        """A step of ``decoding`` and as much of ``starting`` as its pace and ``room`` allow."""
        num_free = self._max_sequences - len(decoding)
        budget = pace.prefill_tokens(len(decoding), min(len(starting), num_free))
        if room is not None:
            budget = min(budget, max(0, room - len(decoding)))
        chunks = [self._chunk(sequence, 1) for sequence in decoding]
        chunks += self._start(starting, budget, num_free)
        if self._draft_tokens and len(chunks) == len(decoding):
            chunks = self._with_drafts(decoding, pace, room)
        return chunks

    def _start(self, starting: Iterable[Sequence], budget: int, max_rows: int) -> list[Chunk]:
        """Chunks of prompts, one after the other, of ``budget`` tokens in all."""
        chunks: list[Chunk] = []
        spare_rows = SPARE_ROWS
        for sequence in starting:
            if budget == 0 or len(chunks) == max_rows:
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
        return chunks

    def _decoding(self) -> list[Sequence]:
        """Who has one token pending."""
        return [sequence for sequence in self._running.values() if sequence.num_pending == 1]

    def _starting(self) -> list[Sequence]:
        """Longer gaps in the order of arrival: one prompt is finished before the next begins."""
        running = [sequence for sequence in self._running.values() if sequence.num_pending > 1]
        return sorted(running, key=_rank)

    def _yielding_who_may_come(self) -> list[Sequence]:
        """Nobody takes a place for which somebody waits to whom he gives way."""
        if self._waiting and self._waiting[0].rank == 0:
            return []
        return list(self._waiting)

    def _max_rows(self, pace: Pace, starting: list[Sequence]) -> int:
        """Most rows of one token, so that those who start find some room."""
        return min(self._max_sequences, pace.max_rows(is_alone=not starting))

    def _in_turn(self, decoding: list[Sequence], max_rows: int) -> list[Sequence]:
        """When there are too many, those of the lowest rank that were not served for longest."""
        if len(decoding) > max_rows:
            decoding.sort(key=lambda sequence: (sequence.rank, sequence.served_at))
            del decoding[max_rows:]
        for sequence in decoding:
            self._num_served += 1
            sequence.served_at = self._num_served
        return decoding

    def _may_come_in(self, lasting: list[Chunk]) -> bool:
        """Whether somebody who waits could be part of the step behind that of ``lasting``."""
        if not self._waiting:
            return False
        has_room = len(lasting) < self._max_sequences
        return has_room or any(self._waiting[0].rank < chunk.sequence.rank for chunk in lasting)

    def _may_last(self, decoding: list[Sequence]) -> bool:
        """Whether these may make the next step as it is, each with one token."""
        num_interactive = len(_interactive(decoding))
        pace = self._pace if num_interactive else self._pace_between
        if len(decoding) > pace.max_rows(is_alone=True):
            return False
        if num_interactive == 0:
            room = self._share.room_between(self._pace.decode_s)
        elif num_interactive == len(decoding):
            room = None
        else:
            alone_s = self._pace.decode_s
            room = self._share.room_beside(num_interactive, alone_s, has_prompt=False)
            room += num_interactive
        if room is not None and len(decoding) > room:
            return False
        guessing = _interactive(decoding) if num_interactive else decoding
        return not (self._draft_tokens and any(self._drafts(guessing, pace, room)))

    def _with_drafts(
        self, decoding: list[Sequence], pace: Pace, room: int | None = None
    ) -> list[Chunk]:
        """Chunks of one token and what is guessed behind it, where that is worth its time.

        Only steps without prompts carry guesses: who waits for a first token comes before who would
        have the next ones sooner.
        """
        chunks: list[Chunk] = []
        for sequence, draft in zip(decoding, self._drafts(decoding, pace, room), strict=True):
            if draft and not self._places.lend(sequence, len(draft)):
                draft = ()  # noqa: PLW2901
            chunks.append(self._chunk(sequence, 1 + len(draft), draft))
        return chunks

    def _drafts(
        self, decoding: list[Sequence], pace: Pace, max_tokens: int | None = None
    ) -> list[tuple[int, ...]]:
        """What is guessed behind each, empty where that is not worth its time."""
        price = pace.draft_price(len(decoding))
        room = min(SPARE_ROWS, pace.draft_tokens(len(decoding)))
        if max_tokens is not None:
            room = min(room, max(0, max_tokens - len(decoding)))
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

    def _learn(self, pace: Pace, tally: "_Tally", duration_s: float) -> None:
        pace.note(tally.num_decoding, tally.num_prefill, duration_s, tally.num_drafted)
        self._weighed = pace

    def _chunk(self, sequence: Sequence, count: int, draft: tuple[int, ...] = ()) -> Chunk:
        place = self._places.place_of(sequence)
        start, copied = sequence.num_computed, place.copied_from
        # What was copied lies there once the first chunk has run.
        is_first = copied is not None and copied[1] == start
        copied_from = copied if is_first else None
        return Chunk(sequence, place.slot, start, count, place.pages, copied_from, draft)

    def _make_room(self) -> None:
        for sequence in sorted(self._running.values(), key=_rank):
            while sequence.id in self._running and not self._places.hold(sequence):
                self._put_back(self._first_to_give_way())

    def _first_to_give_way(self) -> Sequence:
        return max(reversed(self._running.values()), key=_rank)

    def _put_back(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        del self._running[sequence.id]
        self._vacate(sequence, is_sound=True)
        insort_left(self._waiting, sequence, key=_rank)

    def _admit(self, sequence: Sequence) -> bool:
        """Let one who waits in, if there is a place."""
        if not self._places.admit(sequence):
            return False
        self._waiting.remove(sequence)
        self._running[sequence.id] = sequence
        self.num_joined += 1
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.queried_tokens += sequence.num_prompt
            self.found_tokens += sequence.num_cached
        return True

    def _vacate(self, sequence: Sequence, *, is_sound: bool) -> None:
        self._places.release(sequence, is_sound=is_sound)
        sequence.num_computed = 0


@dataclass(slots=True)
class _Tally:
    """What some of the chunks of a step were."""

    num_tokens: int = 0
    """In all, guessed ones too."""
    num_decoding: int = 0
    num_prefill: int = 0
    num_drafted: int = 0

    def add(self, chunk: Chunk) -> None:
        count = chunk.known_end - chunk.start
        self.num_tokens += chunk.count
        self.num_drafted += chunk.count - count
        if count == 1:
            self.num_decoding += 1
        else:
            self.num_prefill += count


def _rank(sequence: Sequence) -> int:
    return sequence.rank


def _interactive(sequences: Iterable[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.rank == 0]
