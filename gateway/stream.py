"""One reader of one generation: a cursor into its token log, and a bounded buffer ahead of it.

The relay offers log entries in any order, any number of times, possibly with holes. What comes out
of :meth:`Stream.next` is dense from the cursor, each position once, and its chain follows from the
one before; where the buffer has a hole, or overflowed because the client is slow, the log is read
instead, at the client's pace. Nothing here knows HTTP or frames.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from common.broker import Page
from common.clock import monotonic_s
from common.failures import Failure
from common.messages import (
    Finish,
    LogEntry,
    PromptLogprobs,
    Timing,
    TopTokens,
    chain_text,
)
from gateway.cursor import Cursor, chain_before, chains_after

MAX_AHEAD_TOKENS = 512
"""Tokens buffered for a client that does not take them: some 50 kB, 10 s of a fast generation."""

ReadLog = Callable[[str, int], Awaitable[Page | None]]
"""``Broker.read``: entries that end at or behind a position; None when the log is gone."""


class ReaderGone(Exception):
    """The client of this stream has disconnected; nobody waits for an answer."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a generation stands that shows nothing yet."""

    is_waiting: bool
    """In the queue; else a worker has it."""
    ahead: int = 0
    """Generations that are served before it."""
    wait_ms: int | None = 0
    """What their work takes, as far as is known."""


RUNNING = Place(is_waiting=False)


class Batch(msgspec.Struct, gc=False):
    """Tokens in order, as parallel lists, from ``start`` on; then perhaps the end.

    ``chains[i]`` stands behind ``tokens[i]``. ``timing`` comes with ``finish``.
    """

    start: int
    tokens: list[int] = []
    pieces: list[bytes] = []
    logprobs: list[float | None] = []
    chains: list[int] = []
    finish: Finish | None = None
    timing: Timing | None = None
    tops: list[TopTokens] = []
    """One entry per token where the request asks for any, else none at all."""
    prompt: PromptLogprobs | None = None
    """With the first tokens of the log, where the request asks for it."""
    choice: int = 0
    """Which of the answers to one request this belongs to."""
    place: Place | None = None
    """Instead of tokens, for a client that asked to be told."""
    lag_s: float | None = None
    """Since Redis had the newest of it, by its clock; None where nobody could tell."""
    gap_s: float | None = None
    """Since the tokens before these were taken; None for the first ones."""


class Outlet(Protocol):
    """Where batches can go without a task that has to be woken for each of them."""

    @property
    def has_room(self) -> bool:
        """Whether the client has taken nearly all that came before."""
        ...

    def give(self, batch: Batch) -> None:
        """Raises: Failure, which then ends the stream."""
        ...


class Reader(Protocol):
    """What an answer reads from: a stream, or several as one."""

    id: str

    def feed(self, outlet: Outlet | None) -> None:
        """Give ``outlet`` what comes while :meth:`next` waits, as long as it has room; tokens only.

        All else, an end or a failure first of all, is for :meth:`next`.
        """
        ...

    @property
    def lags(self) -> int: ...
    @property
    def heals(self) -> int: ...
    async def next(self) -> Batch | None: ...
    def abandon(self) -> None: ...


class Stream:
    """``position`` and ``chain`` say what the client has been given."""

    __slots__ = (  # a token costs more by the memory that is touched than by what is computed
        "_ahead",
        "_failure",
        "_has_end",
        "_has_moved",
        "_is_gone",
        "_is_waited_for",
        "_must_read",
        "_nudged",
        "_num_ahead",
        "_outlet",
        "_place",
        "_read_log",
        "_tail",
        "_taken_at",
        "_woken",
        "chain",
        "choice",
        "heals",
        "heard_at",
        "id",
        "lag_s",
        "lags",
        "position",
        "served_at",
        "state",
        "tells_place",
        "tenant",
    )

    def __init__(
        self,
        id: str,
        tenant: str,
        read_log: ReadLog,
        cursor: Cursor | None = None,
        choice: int = 0,
    ) -> None:
        cursor = cursor or Cursor()
        self.id = id
        self.tenant = tenant
        self.choice = choice
        self.position = cursor.position
        self.chain = cursor.chain
        self.state = "Q"
        """Last known state: ``Q`` waiting, ``R`` running, ``T`` ended."""
        self.heard_at = monotonic_s()
        """When anything was last known of this generation."""
        self.served_at = self.heard_at
        """When the client was last given anything."""
        self.lags = 0
        """How often the buffer overflowed."""
        self.heals = 0
        """How often a hole was filled from the log."""
        self.lag_s: float | None = None
        """Age of what was offered last, when it came."""
        self.tells_place = False
        """Whether :meth:`next` also tells the place in the queue."""
        self._place: Place | None = None
        self._has_moved = False
        self._read_log = read_log
        self._ahead: list[LogEntry] = []
        self._num_ahead = 0
        self._tail = cursor.position
        self._has_end = False
        self._must_read = False
        self._nudged = False
        self._is_gone = False
        self._failure: Failure | None = None
        self._outlet: Outlet | None = None
        self._is_waited_for = False
        self._woken = asyncio.Event()
        self._taken_at: float | None = None

    @property
    def tail(self) -> int:
        """The position that cursor and buffer together reach."""
        return self._tail

    @property
    def is_over(self) -> bool:
        """Whether the end is known; nothing more can come."""
        return self._has_end or self._failure is not None or self._is_gone

    @property
    def wants_place(self) -> bool:
        """Whether the place in the queue may have changed, and the client is to be told."""
        may_change = self.state == "Q" or self._place is None or self._place.is_waiting
        return self.tells_place and may_change and not self.is_over

    @property
    def reads_log(self) -> bool:
        """Whether the client is behind what Redis holds, by choice or by a hole."""
        return self._must_read or self._num_ahead > 0

    # What the relay calls ------------------------------------------------------------------------

    def offer(self, entry: LogEntry) -> None:
        """Take a live entry if it continues the buffer; else remember to read the log.

        The client gets it with :meth:`deliver`, so that entries which came together are one write.
        """
        if self._accept(entry) and self._num_ahead > MAX_AHEAD_TOKENS:
            self.lags += 1
            self._drop_ahead()

    def deliver(self) -> None:
        """Hand over what was offered: into the outlet at once, where nothing speaks against it."""
        self._note_life()
        if self._is_waited_for and self._ahead and not self._must_read and not self.is_over:
            outlet = self._outlet
            if outlet is not None and outlet.has_room:
                self._give(outlet)
                return
        self._wake()

    def _give(self, outlet: Outlet) -> None:
        try:
            outlet.give(self._take())
        except Failure as failure:
            self.fail(failure)
        if self.is_over:
            self._wake()

    def offer_page(self, page: Page) -> None:
        """Take a page of the log, whole: it is bounded already, and it was asked for."""
        self._note_life()
        self.state = page.state
        tail, had_end = self._tail, self._has_end
        self._must_read = False
        for entry in page.entries:
            self._accept(entry)
        has_moved = self._tail > tail or self._has_end != had_end
        lacks_more = self._tail < page.next or (page.state == "T" and not self._has_end)
        self._must_read = lacks_more and has_moved
        if lacks_more and not has_moved and page.state == "T":
            # The end was written and is not behind this cursor: gone, or it came before.
            self.fail(Failure("STREAM_DIVERGED" if page.next < self.position else "STREAM_EXPIRED"))
        self._wake()

    def read_on(self) -> None:
        """Read the log before waiting again: Redis holds more than has arrived here."""
        if not self._has_end:
            self._must_read = True
            self._wake()

    def fail(self, failure: Failure) -> None:
        """End this stream with a failure, behind what is buffered. The first one counts."""
        if self._failure is None:
            self._failure = failure
        self._wake()

    def nudge(self) -> None:
        """Make a waiting :meth:`next` return None once, so that a keep-alive can be sent."""
        self._nudged = True
        self._wake()

    def move_to(self, place: Place) -> None:
        """Make a waiting :meth:`next` tell its place in the queue, if that is news."""
        if self.wants_place and place != self._place:
            self._place = place
            self._has_moved = True
            self._wake()

    def abandon(self) -> None:
        """The client left: :meth:`next` raises :class:`ReaderGone` from now on."""
        self._is_gone = True
        self._wake()

    # What the answer calls -----------------------------------------------------------------------

    def check(self) -> None:
        """Raises: Failure, when it is known already that nothing can be shown."""
        if self._failure is not None and not self._ahead:
            raise self._failure

    async def next(self) -> Batch | None:
        """Everything that has come since the last call, waiting for at least one thing.

        None means that nothing came but a keep-alive is due.

        Raises:
            ReaderGone: the client left.
            Failure: STREAM_EXPIRED, STREAM_DIVERGED, or what :meth:`fail` was given.
        """
        while True:
            if self._is_gone:
                raise ReaderGone
            if self._ahead:
                return self._take()
            if self._failure is not None:
                raise self._failure
            if self._must_read:
                await self._fill_from_log()
            elif self._has_moved:
                self._has_moved = False
                self.served_at = monotonic_s()
                return Batch(self.position, choice=self.choice, place=self._place)
            elif self._nudged:
                self._nudged = False
                self.served_at = monotonic_s()
                return None
            else:
                await self._wait()

    def feed(self, outlet: Outlet | None) -> None:
        self._outlet = outlet

    async def _wait(self) -> None:
        self._woken.clear()
        self._is_waited_for = True
        try:
            await self._woken.wait()
        finally:
            self._is_waited_for = False

    def _wake(self) -> None:
        self._is_waited_for = False  # nothing may overtake what it is woken for
        self._woken.set()

    # The buffer ----------------------------------------------------------------------------------

    def _note_life(self) -> None:
        self.heard_at = monotonic_s()
        if self.state == "Q":
            self.state = "R"

    def _accept(self, entry: LogEntry) -> bool:
        """Append ``entry`` when it touches the tail. A hole is noted, a repeat is dropped."""
        record = entry.record
        end = record.start + len(record.tokens)
        if self.is_over or (end < self._tail and record.finish is None):
            return False
        if record.start > self._tail:
            self.heals += not self._must_read
            self._must_read = True
            return False
        if end == self._tail and record.finish is None:
            self._check_cursor(entry)
            return False
        self._ahead.append(entry)
        self._num_ahead += max(0, end - self._tail)
        self._tail = max(self._tail, end)
        if record.finish is not None:
            self._has_end = True
            self.state = "T"
        return True

    def _check_cursor(self, entry: LogEntry) -> None:
        """An entry that ends right at the cursor tells the chain there."""
        record = entry.record
        if record.end != self.position or self._ahead or not record.tokens:
            return
        if self.chain is None:
            self.chain = int(record.chain, 16)
        elif chain_text(self.chain) != record.chain:
            self.fail(Failure("STREAM_DIVERGED"))

    def _drop_ahead(self) -> None:
        self._ahead.clear()
        self._num_ahead = 0
        self._tail = self.position
        self._has_end = False
        self._must_read = True

    async def _fill_from_log(self) -> None:
        self._must_read = False
        page = await self._read_log(self.id, self.position)
        if page is None:
            raise Failure("STREAM_EXPIRED")
        self.offer_page(page)

    def _take(self) -> Batch:
        """Move the buffer into a batch and the cursor behind it, checking the chain on the way."""
        batch = Batch(self.position, choice=self.choice, lag_s=self.lag_s)
        for entry in self._ahead:
            if not self._extend(batch, entry):
                self.fail(Failure("STREAM_DIVERGED"))
                break
        self._ahead.clear()
        self._num_ahead = 0
        self._nudged = self._has_moved = False
        self._place = RUNNING
        self.served_at = now = monotonic_s()
        if batch.tokens:
            batch.gap_s = None if self._taken_at is None else now - self._taken_at
            self._taken_at = now
        if not batch.tokens and batch.finish is None and self._failure is not None:
            raise self._failure
        return batch

    def _extend(self, batch: Batch, entry: LogEntry) -> bool:
        """Add to ``batch`` what ``entry`` holds behind the cursor; False when the chain differs."""
        record = entry.record
        known = self.position - record.start
        tokens = record.tokens[known:] if known else record.tokens
        if known > len(record.tokens):
            return False  # the log ended before what this client was shown
        end = int(record.chain, 16) if record.chain else None
        if self.chain is None and end is not None:
            self.chain = chain_before(end, tokens)
        chains = chains_after(self.chain or 0, tokens)
        if end is not None and (chains[-1] if chains else self.chain) != end:
            return False
        batch.tokens += tokens
        batch.pieces += record.pieces[known:] if known else record.pieces
        batch.logprobs += record.logprobs[known:] if record.logprobs else [None] * len(tokens)
        batch.tops += (record.tops or [])[known:]
        batch.prompt = record.prompt or batch.prompt
        batch.chains += chains
        batch.finish, batch.timing = record.finish, entry.timing
        if chains:
            self.chain = chains[-1]
        self.position += len(tokens)
        return True
