"""Where running sequences keep keys and values, and which computed prefixes are used again.

Policy only: numbers of slots and pages, no tensors. Tokens are named by chained hashes over blocks,
so equal hashes mean equal tokens from the very first on, and they begin with the scope, so nobody
finds what another scope has computed. Only *proven* tokens are offered: those behind which finite
logits came out. The last token of a sequence is always computed, since its logits are wanted.
"""

import hashlib
import heapq
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import Protocol

from workers.engine.sequence import Sequence

BLOCK_TOKENS = 16
"""Grain of a prefix in slots: at most 15 tokens of a hit are lost, for 2 µs per block to hash."""

_WORTH_WAITING_TOKENS = 64
"""So much of a prefix is worth waiting for while somebody else computes it: about a step's time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one running sequence lies; the fields are those of a chunk."""

    slot: int
    pages: tuple[int, ...] = ()
    copied_from: tuple[int, int] | None = None


class Places(Protocol):
    """What the scheduler asks; all calls by sequences that fit an empty cache."""

    capacity_tokens: int
    """Most tokens of running sequences."""
    block_tokens: int
    """Grain in which computed prefixes are found."""

    @property
    def used_tokens(self) -> int:
        """Of the capacity, what running sequences have."""
        ...

    def begin_step(self) -> None:
        """The last step is over: what it copied from may be overwritten, what it lent is back."""
        ...

    def admit(self, sequence: Sequence) -> bool:
        """Give a place for all tokens it has, and set ``num_computed`` to how many are there.

        False, and nothing changed, when there is no room, or when what it needs will be there soon
        because a running sequence computes it. The sequence must be part of the very next step.
        """
        ...

    def hold(self, sequence: Sequence) -> bool:
        """Keep room for all its tokens now that it has grown; False when there is none."""
        ...

    def lend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let it have room behind its tokens for this step only; False when there is none."""
        ...

    def place_of(self, sequence: Sequence) -> Place: ...

    def prove(self, sequence: Sequence) -> None:
        """Finite logits came out behind all its computed tokens: others may use them."""
        ...

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Take its place back; what is proven there stays known until the room is needed.

        Not sound: its logits were not finite, so all that it had in common with others is doubted.
        """
        ...


class SlotPlaces:
    """One slot of contiguous positions per sequence.

    A freed slot keeps its content. A new sequence goes on in the free slot that holds its longest
    proven prefix, or has that copied from the slot, free or not, where it lies. Copying a token
    takes a hundredth of the time of computing it.
    """

    def __init__(
        self, num_slots: int, capacity_tokens: int, *, block_tokens: int = BLOCK_TOKENS
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self._chains: list[list[bytes]] = [[] for _ in range(num_slots)]
        """Per slot the digests of its proven blocks."""
        self._free = set(range(num_slots))
        self._freed_at = [0] * num_slots
        self._num_freed = 0
        self._sources: set[int] = set()
        """Slots that this step copies from. A step may be tried again in parts, so none of them
        may be written before it is over."""
        self._places: dict[str, Place] = {}
        self._held: dict[str, int] = {}
        self._used_tokens = 0
        self._lent_tokens = 0
        self._starting: dict[str, Sequence] = {}

    @property
    def used_tokens(self) -> int:
        return self._used_tokens

    def begin_step(self) -> None:
        self._sources.clear()
        self._lent_tokens = 0

    def admit(self, sequence: Sequence) -> bool:
        free = self._free - self._sources
        taken_tokens = self._used_tokens + self._lent_tokens
        if not free or taken_tokens + sequence.num_tokens > self.capacity_tokens:
            return False
        wanted = _wanted(sequence, self.block_tokens)
        matches = [_num_shared(chain, wanted) for chain in self._chains]
        best = max(matches)
        if _is_coming(sequence, wanted, best, self._starting, self.block_tokens):
            return False
        slot = min(free, key=lambda slot: self._rank(slot, matches[slot], best))
        copied_from = None
        # Whole prompts are found, too, but for their last token.
        num_found = min(best * self.block_tokens, sequence.num_tokens - 1)
        if matches[slot] < best:
            source = matches.index(best)
            copied_from = (source, num_found)
            self._sources.add(source)
            del self._chains[slot][:]
        del self._chains[slot][num_found // self.block_tokens :]
        self._free.remove(slot)
        self._places[sequence.id] = Place(slot, copied_from=copied_from)
        self._held[sequence.id] = sequence.num_tokens
        self._used_tokens += sequence.num_tokens
        self._starting[sequence.id] = sequence
        sequence.num_computed = num_found
        return True

    def hold(self, sequence: Sequence) -> bool:
        held = self._held[sequence.id]
        if self._used_tokens + sequence.num_tokens - held > self.capacity_tokens:
            return False
        self._used_tokens += sequence.num_tokens - held
        self._held[sequence.id] = sequence.num_tokens
        return True

    def lend(self, sequence: Sequence, num_tokens: int) -> bool:  # noqa: ARG002 - any slot is long enough
        if self._used_tokens + self._lent_tokens + num_tokens > self.capacity_tokens:
            return False
        self._lent_tokens += num_tokens
        return True

    def place_of(self, sequence: Sequence) -> Place:
        return self._places[sequence.id]

    def prove(self, sequence: Sequence) -> None:
        self._starting.pop(sequence.id, None)
        chain = self._chains[self._places[sequence.id].slot]
        num_blocks = sequence.num_computed // self.block_tokens
        if len(chain) < num_blocks:
            chain += digests(sequence, self.block_tokens)[len(chain) : num_blocks]

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        self._starting.pop(sequence.id, None)
        self._used_tokens -= self._held.pop(sequence.id)
        slot = self._places.pop(sequence.id).slot
        self._free.add(slot)
        self._num_freed += 1
        self._freed_at[slot] = self._num_freed
        if not is_sound:
            for chain in self._chains:
                if _num_shared(chain, sequence.digests):
                    del chain[:]

    def _rank(self, slot: int, match: int, best: int) -> tuple[int, int, int]:
        """Sort key of free slots: where the prefix lies, then an empty one, then the oldest.

        A slot that holds much more than the prefix is left alone: a copy costs little, and whoever
        has the longer conversation may come back.
        """
        length = len(self._chains[slot])
        if match == best and 0 < length <= 2 * match:
            return (0, length, slot)
        return (1, 0, slot) if length == 0 else (2, self._freed_at[slot], slot)


class PagePlaces:
    """Pages of a fixed number of tokens, counted by their users, and a list of pages per sequence.

    Full pages are shared without a copy. A proven page that nobody uses any more is kept until a
    new page is wanted, the one unused for longest first.
    """

    def __init__(self, num_pages: int, *, page_tokens: int, max_sequences: int) -> None:
        self.capacity_tokens = num_pages * page_tokens
        self.block_tokens = page_tokens
        self._empty = list(reversed(range(num_pages)))
        self._num_users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        """Proven pages, by digest and by number."""
        self._unused: dict[int, None] = {}
        """Proven pages without users, the oldest first."""
        self._free_slots = list(range(max_sequences))
        self._places: dict[str, Place] = {}
        self._num_proven: dict[str, int] = {}
        """Pages of each running sequence that have been looked at by :meth:`prove`."""
        self._starting: dict[str, Sequence] = {}
        self._lent: list[Sequence] = []

    @property
    def used_tokens(self) -> int:
        num_free = len(self._empty) + len(self._unused)
        return (len(self._num_users) - num_free) * self.block_tokens

    def begin_step(self) -> None:
        for sequence in self._lent:
            if sequence.id in self._places:
                self._take_back(sequence)
        self._lent.clear()

    def admit(self, sequence: Sequence) -> bool:
        if not self._free_slots:
            return False
        wanted = _wanted(sequence, self.block_tokens)
        found = self._find(wanted[: (sequence.num_tokens - 1) // self.block_tokens])
        num_new = self._num_pages_for(sequence) - len(found)
        num_idle = sum(page in self._unused for page in found)
        if num_new > len(self._empty) + len(self._unused) - num_idle:
            return False
        if _is_coming(sequence, wanted, len(found), self._starting, self.block_tokens):
            return False
        for page in found:
            self._num_users[page] += 1
            self._unused.pop(page, None)
        pages = (*found, *(self._take_page() for _ in range(num_new)))
        self._places[sequence.id] = Place(heapq.heappop(self._free_slots), pages)
        self._num_proven[sequence.id] = len(found)
        self._starting[sequence.id] = sequence
        sequence.num_computed = len(found) * self.block_tokens
        return True

    def hold(self, sequence: Sequence) -> bool:
        return self._reach(sequence, sequence.num_tokens)

    def lend(self, sequence: Sequence, num_tokens: int) -> bool:
        self._lent.append(sequence)
        return self._reach(sequence, sequence.num_tokens + num_tokens)

    def place_of(self, sequence: Sequence) -> Place:
        return self._places[sequence.id]

    def prove(self, sequence: Sequence) -> None:
        self._starting.pop(sequence.id, None)
        first, end = self._num_proven[sequence.id], sequence.num_computed // self.block_tokens
        if first == end:
            return
        self._num_proven[sequence.id] = end
        pages, names = self._places[sequence.id].pages, digests(sequence, self.block_tokens)
        for page, digest in zip(pages[first:end], names[first:end], strict=True):
            if digest not in self._page_of:  # somebody else may have computed the same meanwhile
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def release(self, sequence: Sequence, *, is_sound: bool) -> None:
        self._starting.pop(sequence.id, None)
        del self._num_proven[sequence.id]
        place = self._places.pop(sequence.id)
        heapq.heappush(self._free_slots, place.slot)
        for page in reversed(place.pages):  # the end of a prefix is forgotten before its beginning
            if not is_sound:
                self._forget(page)
            self._num_users[page] -= 1
            if self._num_users[page] > 0:
                continue
            if page in self._digest_of:
                self._unused[page] = None
            else:
                self._empty.append(page)

    def _reach(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it pages for so many tokens; False when there are none."""
        place = self._places[sequence.id]
        num_new = -(-num_tokens // self.block_tokens) - len(place.pages)
        if num_new > len(self._empty) + len(self._unused):
            return False
        if num_new > 0:
            pages = (*place.pages, *(self._take_page() for _ in range(num_new)))
            self._places[sequence.id] = Place(place.slot, pages)
        return True

    def _take_back(self, sequence: Sequence) -> None:
        """Empty the pages that its tokens did not come to need; nobody has been told of them."""
        place, num_needed = self._places[sequence.id], self._num_pages_for(sequence)
        if num_needed >= len(place.pages):  # nearly always
            return
        for page in place.pages[num_needed:]:
            self._num_users[page] = 0
            self._empty.append(page)
        self._places[sequence.id] = Place(place.slot, place.pages[:num_needed])

    def _num_pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self.block_tokens)

    def _find(self, wanted: list[bytes]) -> list[int]:
        """The proven pages of the longest prefix of ``wanted``."""
        found: list[int] = []
        for digest in wanted:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def _take_page(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page = next(iter(self._unused))
            del self._unused[page]
            self._forget(page)
        self._num_users[page] = 1
        return page

    def _forget(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]


def digests(sequence: Sequence, block_tokens: int) -> list[bytes]:
    """One name per full block of its tokens, each for all tokens up to the block's end.

    SHA-256, because a prefix that others chose must not be mistaken for one's own. The list is kept
    with the sequence and grows with it; 512 tokens in blocks of 16 take 50 µs.
    """
    names = sequence.digests
    for end in range((len(names) + 1) * block_tokens, sequence.num_tokens + 1, block_tokens):
        before = names[-1] if names else hashlib.sha256(sequence.cache_scope.encode()).digest()
        block = array("I", sequence.tokens[end - block_tokens : end])
        names.append(hashlib.sha256(before + block.tobytes()).digest())
    return names


def _wanted(sequence: Sequence, block_tokens: int) -> list[bytes]:
    """What it may use if it is there: nothing while the logits of the whole prompt are needed."""
    return [] if sequence.num_unscored(0) else digests(sequence, block_tokens)


def _num_shared(chain: list[bytes], other: list[bytes]) -> int:
    """How many blocks two chains have in common: where they part once, they part for good."""
    return bisect_left(range(min(len(chain), len(other))), True, key=lambda i: chain[i] != other[i])


def _is_coming(
    sequence: Sequence,
    wanted: list[bytes],
    num_found: int,
    starting: dict[str, Sequence],
    block_tokens: int,
) -> bool:
    """Whether a sequence without its first logits computes much more of ``wanted`` than is there.

    Choices of one request and prompts with one preamble come together; then one computes and the
    others find. Nobody waits for who gives way to him: that one may be paused.
    """
    before = (other for other in starting.values() if other.rank <= sequence.rank)
    num_coming = max((_num_shared(other.digests, wanted) for other in before), default=0)
    return (num_coming - num_found) * block_tokens >= _WORTH_WAITING_TOKENS
