"""A stream gives every token once, in order, whatever the inbox lost, repeated or mixed."""

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.broker import Page
from common.failures import Failure
from common.messages import (
    Finish,
    LogEntry,
    Timing,
    TokenRecord,
    chain_next,
    chain_start,
    chain_text,
)
from gateway.cursor import Cursor
from gateway.stream import MAX_AHEAD_TOKENS, Batch, ReaderGone, Stream

TIMING = Timing(1, 2, 3, 4, 1, 0, "m@1", "w1", "default")


@dataclass
class Log:
    """A token log as Redis holds it, and how often it was read."""

    id: str = "r.0"
    entries: list[LogEntry] = field(default_factory=list[LogEntry])
    state: str = "R"
    reads: int = 0
    is_gone: bool = False
    page_entries: int = 256

    def write(self, *tokens: int, finish: str = "", code: str = "") -> LogEntry:
        start = self.next
        chain = self.chain_at_end
        for token in tokens:
            chain = chain_next(chain, token)
        record = TokenRecord(
            start,
            chain_text(chain) if start or tokens else "",
            list(tokens),
            [b"t%d " % token for token in tokens],
            [-0.5] * len(tokens),
            Finish(finish, code) if finish else None,
        )
        entry = LogEntry(record, TIMING if finish else None)
        self.entries.append(entry)
        if finish:
            self.state = "T"
        return entry

    @property
    def next(self) -> int:
        return self.entries[-1].record.end if self.entries else 0

    @property
    def chain_at_end(self) -> int:
        last = self.entries[-1].record.chain if self.entries else ""
        return int(last, 16) if last else chain_start(self.id, "m@1")

    @property
    def tokens(self) -> list[int]:
        return [token for entry in self.entries for token in entry.record.tokens]

    def cursor_at(self, position: int) -> Cursor:
        chain = chain_start(self.id, "m@1")
        for token in self.tokens[:position]:
            chain = chain_next(chain, token)
        return Cursor(position, chain if position else None)

    async def read(self, _: str, cursor: int) -> Page | None:
        self.reads += 1
        if self.is_gone:
            return None
        behind = [
            entry
            for entry in self.entries
            if entry.record.end > cursor
            or (entry.record.end == cursor and (cursor > 0 or entry.record.finish))
        ]
        chain = self.entries[-1].record.chain if self.entries else ""
        return Page(self.state, self.next, chain, behind[: self.page_entries])


async def read_to_end(stream: Stream) -> tuple[list[int], list[Batch]]:
    batches: list[Batch] = []
    while not batches or batches[-1].finish is None:
        batch = await asyncio.wait_for(stream.next(), 5)
        assert batch is not None
        batches.append(batch)
    return [token for batch in batches for token in batch.tokens], batches


async def test_live_records_come_out_as_they_come_in() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    stream.offer(log.write(7))
    first = await stream.next()
    stream.offer(log.write(8, 9))
    stream.offer(log.write(finish="length"))
    second = await stream.next()
    assert first is not None
    assert second is not None
    assert (first.start, first.tokens, first.finish) == (0, [7], None)
    assert (second.start, second.tokens, second.pieces) == (1, [8, 9], [b"t8 ", b"t9 "])
    assert (second.finish, second.timing) == (Finish("length"), TIMING)
    assert log.reads == 0
    assert stream.is_over


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    start=st.integers(0, 20),
    page_entries=st.integers(2, 4),
    seed=st.integers(),
)
def test_whatever_the_inbox_does_the_client_gets_the_log(
    sizes: list[int], start: int, page_entries: int, seed: int
) -> None:
    """Lost, repeated and reordered records; a cursor inside an entry; small pages."""
    rng = random.Random(seed)
    log = Log(page_entries=page_entries)
    records = [log.write(*(rng.randrange(1000) for _ in range(size))) for size in sizes]
    records.append(log.write(finish="eos_token"))
    cursor = log.cursor_at(min(start, log.next))
    stream = Stream(log.id, "public", log.read, cursor)
    arriving = [record for record in records for _ in range(rng.choice((0, 1, 1, 2)))]
    if rng.random() < 0.5:
        rng.shuffle(arriving)

    async def run() -> None:
        for record in arriving:
            stream.offer(record)
        stream.read_on()  # as the tail check does when a generation is quiet
        tokens, batches = await read_to_end(stream)
        assert tokens == log.tokens[cursor.position :]
        chains = [chain for batch in batches for chain in batch.chains]
        assert chains == [
            log.cursor_at(position).chain for position in range(cursor.position + 1, log.next + 1)
        ]

    asyncio.run(run())


async def test_a_slow_client_costs_a_bounded_buffer_and_then_reads_the_log() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    for token in range(3 * MAX_AHEAD_TOKENS):
        stream.offer(log.write(token))
        assert stream.tail - stream.position <= MAX_AHEAD_TOKENS + 1
    stream.offer(log.write(finish="length"))
    tokens, _ = await read_to_end(stream)
    assert tokens == list(range(3 * MAX_AHEAD_TOKENS))
    assert stream.lags >= 1
    assert log.reads >= 1


async def test_a_hole_is_filled_from_the_log() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    stream.offer(log.write(1))
    log.write(2)  # its inbox record is lost
    stream.offer(log.write(3))
    stream.offer(log.write(finish="length"))
    tokens, _ = await read_to_end(stream)
    assert tokens == [1, 2, 3]
    assert stream.heals == 1


async def test_other_tokens_than_the_client_saw_are_an_error_not_a_continuation() -> None:
    seen, forgotten = Log(), Log()
    for token in (1, 2, 3):
        seen.write(token)
    for token in (1, 2, 99):
        forgotten.write(token)
    forgotten.write(4)
    stream = Stream(seen.id, "public", forgotten.read, seen.cursor_at(3))
    stream.read_on()
    with pytest.raises(Failure, match="STREAM_DIVERGED"):
        await stream.next()


async def test_what_was_good_before_a_divergence_is_still_shown() -> None:
    log, other = Log(), Log()
    for token in (1, 2):
        log.write(token)
        other.write(token + 1)
    stream = Stream(log.id, "public", log.read)
    stream.offer(log.entries[0])
    stream.offer(other.entries[1])
    batch = await stream.next()
    assert batch is not None
    assert batch.tokens == [1]
    with pytest.raises(Failure, match="STREAM_DIVERGED"):
        await stream.next()


async def test_an_end_before_what_was_shown_is_a_divergence() -> None:
    """Redis forgot shown tokens, and then the generation was cancelled."""
    log = Log()
    log.write(1)
    log.write(finish="cancelled")
    ahead = Log()
    for token in (1, 2, 3):
        ahead.write(token)
    live = Stream(log.id, "public", log.read, ahead.cursor_at(3))
    live.offer(log.entries[-1])
    with pytest.raises(Failure, match="STREAM_DIVERGED"):
        await live.next()
    resumed = Stream(log.id, "public", log.read, ahead.cursor_at(3))
    resumed.offer_page(Page("T", 1, log.entries[-1].record.chain, []))
    with pytest.raises(Failure, match="STREAM_DIVERGED"):
        resumed.check()


async def test_an_end_that_redis_wrote_before_any_token_has_no_chain() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    stream.offer(log.write(finish="failed", code="QUEUE_TIMEOUT"))
    batch = await stream.next()
    assert batch is not None
    assert (batch.tokens, batch.finish) == ([], Finish("failed", "QUEUE_TIMEOUT"))


async def test_a_log_that_is_gone_is_said_to_be_gone() -> None:
    log = Log(is_gone=True)
    stream = Stream(log.id, "public", log.read)
    stream.read_on()
    with pytest.raises(Failure, match="STREAM_EXPIRED"):
        await stream.next()


async def test_an_ended_generation_without_an_end_in_its_log_does_not_hang() -> None:
    log = Log(state="T")
    stream = Stream(log.id, "public", log.read)
    stream.read_on()
    with pytest.raises(Failure, match="STREAM_EXPIRED"):
        await stream.next()


async def test_a_failure_waits_behind_what_is_buffered() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    stream.offer(log.write(1))
    stream.fail(Failure("BROKER_UNAVAILABLE"))
    batch = await stream.next()
    assert batch is not None
    assert batch.tokens == [1]
    with pytest.raises(Failure, match="BROKER_UNAVAILABLE"):
        await stream.next()


async def test_a_nudge_wakes_once_for_a_keep_alive() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    stream.nudge()
    assert await stream.next() is None
    stream.offer(log.write(1))
    batch = await stream.next()
    assert batch is not None


async def test_a_client_that_left_ends_the_wait() -> None:
    log = Log()
    stream = Stream(log.id, "public", log.read)
    waiting = asyncio.ensure_future(stream.next())
    await asyncio.sleep(0)
    stream.abandon()
    with pytest.raises(ReaderGone):
        await asyncio.wait_for(waiting, 5)


async def test_a_bare_position_learns_its_chain_from_the_log() -> None:
    log = Log()
    for token in (1, 2, 3):
        log.write(token)
    stream = Stream(log.id, "public", log.read, Cursor(2))
    stream.read_on()
    batch = await stream.next()
    assert batch is not None
    assert (batch.start, batch.tokens, batch.chains) == (2, [3], [log.cursor_at(3).chain])


@dataclass
class Pipe:
    """An outlet that a test can stop up."""

    has_room: bool = True
    batches: list[Batch] = field(default_factory=list[Batch])

    def give(self, batch: Batch) -> None:
        self.batches.append(batch)

    @property
    def tokens(self) -> list[list[int]]:
        return [batch.tokens for batch in self.batches]


async def _waiting(stream: Stream) -> asyncio.Task[Batch | None]:
    """A task that waits for the next batch, and has found none yet."""
    task = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    return task


async def test_tokens_that_somebody_waits_for_go_straight_out_and_the_end_wakes_him() -> None:
    log, pipe = Log(), Pipe()
    stream = Stream(log.id, "public", log.read)
    stream.feed(pipe)
    waiting = await _waiting(stream)
    stream.offer(log.write(1))
    stream.offer(log.write(2, 3))
    stream.deliver()
    stream.offer(log.write(4))
    stream.deliver()
    assert pipe.tokens == [[1, 2, 3], [4]]
    assert [batch.start for batch in pipe.batches] == [0, 3]
    assert not waiting.done()
    stream.offer(log.write(5, finish="length"))
    stream.deliver()
    last = await waiting
    assert last is not None
    assert (last.tokens, last.finish) == ([5], Finish("length"))
    assert len(pipe.batches) == 2


async def test_nothing_overtakes_what_a_task_was_woken_for() -> None:
    """The client had no room; by the time it has, its task is on its way with what came first."""
    log, pipe = Log(), Pipe(has_room=False)
    stream = Stream(log.id, "public", log.read)
    stream.feed(pipe)
    waiting = await _waiting(stream)
    stream.offer(log.write(1))
    stream.deliver()
    pipe.has_room = True
    stream.offer(log.write(2))
    stream.deliver()
    first = await waiting
    assert first is not None
    assert first.tokens == [1, 2]
    assert pipe.batches == []


async def test_a_hole_is_read_from_the_log_before_anything_goes_straight_out() -> None:
    log, pipe = Log(), Pipe()
    stream = Stream(log.id, "public", log.read)
    stream.feed(pipe)
    waiting = await _waiting(stream)
    log.write(1)
    stream.offer(log.write(2))
    stream.deliver()
    healed = await waiting
    assert healed is not None
    assert healed.tokens == [1, 2]
    assert (pipe.batches, stream.heals) == ([], 1)


async def test_a_divergence_is_raised_where_tokens_go_straight_out_too() -> None:
    log, other, pipe = Log(), Log(), Pipe()
    log.write(1)
    other.write(9)
    stream = Stream(log.id, "public", log.read)
    stream.feed(pipe)
    waiting = await _waiting(stream)
    stream.offer(log.entries[0])
    stream.offer(other.write(2))
    stream.deliver()
    with pytest.raises(Failure) as caught:
        await waiting
    assert caught.value.code == "STREAM_DIVERGED"
    assert pipe.tokens == [[1]]
