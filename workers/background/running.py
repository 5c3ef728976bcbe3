"""The lines of a batch while they run: a bounded window of them in the pool, the rest in storage.

A line is made into requests, which are queued under ids that follow from batch and line: one that
waits, runs or has ended already, under another steering, is found instead of run again. Ends are
heard of as they happen, and looked for every few seconds. A line that has ended is read once,
answered by the gateway's own code, and forgotten in Redis when a part of the results holds it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from common.batches import BatchRecord, request_id
from common.broker import BatchStore, BatchWatch, Broker
from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.files import Files
from common.ids import request_of
from common.logs import get_logger
from common.storage import Storage
from gateway.lines import (
    Asked,
    LineAnswer,
    LineOffer,
    Wholes,
    answer_of,
    failed,
    read_ended,
    refusal_of,
    requests_of,
    result_line,
)
from workers.background.line_index import LineIndex, LineReader
from workers.background.patience import PASSING, patiently
from workers.background.pool import Ends, Listener, Window
from workers.background.results import Results
from workers.background.validation import InputLine, read_line

log = get_logger()

LOOK_S = 5.0
"""How often lines are looked for whose end was not heard."""
COMMIT_S = 1.0
"""How long a finished line waits for its part at first."""
PARTS_BEFORE_SLOWER = 60
"""With so many parts, the wait is twice as long, and so on: a day has some 3,000."""
MAX_WAITING_BYTES = 8 * 1024 * 1024
"""Of results: then a part is written at once, and with four times as much no line is begun."""
RETENTION_MS = 3600 * 1000
"""How long an ended line can be found in Redis when nobody steers."""
MAX_TRIES = 3
"""Of a line that failed for reasons of the server, which clients try again as often."""
RETRY_S = 1.0
_AT_ONCE = 4
"""Lines that are being made into requests, and as many that are being answered."""
_FORGET_AT_ONCE = 16
_STALE = frozenset({"MODEL_VERSION_GONE", "QUEUE_TIMEOUT", "STREAM_DIVERGED", "STREAM_EXPIRED"})
"""Ends of a generation that say nothing of its line, and of which nobody has seen anything yet."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every steering in a process works with."""

    name: str
    """Of the process."""
    broker: Broker
    store: BatchStore
    watch: BatchWatch
    storage: Storage
    files: Files
    offer: LineOffer
    ends: Ends
    window: Window


@dataclass(slots=True, eq=False)
class _Line:
    number: int
    custom_id: str
    asked: list[Asked] = field(default_factory=list[Asked])
    open: set[str] = field(default_factory=set[str])
    """Generations whose end is not known."""
    tries: int = 1

    def generations(self) -> list[str]:
        return [id for asked in self.asked for id in asked.generations()]


class Running:
    """The lines of one batch that have no result yet."""

    def __init__(
        self, means: Means, record: BatchRecord, index: LineIndex, results: Results
    ) -> None:
        self.over = asyncio.Event()
        """Set: no more lines are begun, and :meth:`run` returns."""
        self._means = means
        self._record = record
        self._results = results
        self._open_lines = open_lines(means, record, index, results)
        self._turn = asyncio.Lock()
        self._lines: dict[str, _Line] = {}
        """By request."""
        self._num_taken = 0
        """Places of the window that are in use, one for each generation."""
        self._freed = asyncio.Event()
        self._ended: asyncio.Queue[_Line] = asyncio.Queue()
        self._look_now = asyncio.Event()
        self._commit_now = asyncio.Event()
        self._retrying: set[asyncio.Task[None]] = set()
        self._done: list[str] = []
        """Generations that a part holds the results of."""
        self._waiting_generations: dict[int, list[str]] = {}
        """Of the lines whose results wait for a part."""

    async def run(self) -> None:
        """Run lines until each has a result in storage, or until the batch is to stop.

        Raises, inside an exception group: OvertakenError, FileNotFoundError for the input.
        """
        prefix = request_id(self._record.id, 0).partition("-")[0]
        listener = Listener(self._hear, self._look_now.set)
        with self._means.ends.told_to(prefix, listener):
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                mine = [
                    *(tasks.create_task(self._feed()) for _ in range(_AT_ONCE)),
                    *(tasks.create_task(self._collect()) for _ in range(_AT_ONCE)),
                    tasks.create_task(self._look_after()),
                    tasks.create_task(self._commit_regularly()),
                    tasks.create_task(self._watch()),
                    tasks.create_task(self._until_late()),
                ]
                await self.over.wait()
                for task in mine:
                    task.cancel()
                for retrying in self._retrying:
                    retrying.cancel()
        await patiently(self._commit)

    # Beginning -----------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while (line := await self._next()) is not None:
            number, read = line
            await self._begin(_Line(number, read.custom_id), read)

    async def _next(self) -> tuple[int, InputLine] | None:
        """The next line without a result, when there is room for it; None: there is none left."""
        async with self._turn:
            await self._until_room()
            self._num_taken += 1
            line = await anext(self._open_lines, None)
            if line is None:
                self._num_taken -= 1
            return line

    async def _until_room(self) -> None:
        while (
            self._num_taken >= await self._means.window.size()
            or self._results.waiting_bytes > 4 * MAX_WAITING_BYTES
        ):
            self._freed.clear()
            await _set_within(self._freed, 1.0)  # or the window has grown

    async def _begin(self, line: _Line, read: InputLine) -> None:
        means = self._means
        try:
            line.asked = await patiently(
                lambda: requests_of(
                    means.offer, means.broker, self._record, line.number, bytes(read.body)
                )
            )
        except Failure as failure:
            self._finish(line, refusal_of(self._record.endpoint, failure))
            return
        except Exception:  # noqa: BLE001 - as the gateway's border: it is logged, and answered
            self._finish(line, self._broken(line))
            return
        self._num_taken += len(line.generations()) - 1
        await self._queue(line)

    async def _queue(self, line: _Line) -> None:
        """Queue a line's requests, or find that they are queued."""
        line.open = set(line.generations())
        for asked in line.asked:
            self._lines[asked.request_id] = line
        try:
            for asked in line.asked:
                await self._admit(asked)
        except Failure as failure:
            await self._drop(line)
            self._finish(line, refusal_of(self._record.endpoint, failure))

    async def _admit(self, asked: Asked) -> None:
        left_ms = max(0, self._record.expires_at * 1000 - wall_ms())
        admission = asked.admission(
            self._means.offer, queue_limit_ms=left_ms + RETENTION_MS, retention_ms=RETENTION_MS
        )
        admitted = await patiently(lambda: self._means.broker.admit(admission))
        if admitted.existing:  # it may have ended long ago
            self._look_now.set()

    # Ending --------------------------------------------------------------------------------------

    def _hear(self, generation: str) -> None:
        line = self._lines.get(request_of(generation))
        if line is None or generation not in line.open:
            return
        line.open.discard(generation)
        if not line.open:
            self._ended.put_nowait(line)

    async def _look_after(self) -> None:
        while True:
            await _set_within(self._look_now, LOOK_S)
            self._look_now.clear()
            await patiently(self._look)

    async def _look(self) -> None:
        open_ids = [id for line in set(self._lines.values()) for id in line.open]
        for look in await self._means.broker.look("", open_ids):
            if look.state in ("", "T"):  # unknown: reading it tells
                self._hear(look.id)

    async def _collect(self) -> None:
        while True:
            line = await self._ended.get()
            wholes = await self._read(line)
            failure = failed(wholes) if wholes is not None else None
            if wholes is None or (failure is not None and self._is_passing(line, failure.code)):
                self._try_again(line)
                continue
            self._finish(line, self._answer(line, wholes))

    async def _read(self, line: _Line) -> Wholes | None:
        return await patiently(lambda: read_ended(self._means.broker, line.asked))

    def _is_passing(self, line: _Line, code: str) -> bool:
        if code in PASSING or code in _STALE:
            return True
        return Failure(code).kind.retryable and line.tries < MAX_TRIES

    def _answer(self, line: _Line, wholes: Wholes) -> LineAnswer:
        try:
            return answer_of(self._means.offer, line.asked, wholes)
        except Failure as failure:
            return refusal_of(self._record.endpoint, failure)
        except Exception:  # noqa: BLE001 - the same
            return self._broken(line)

    def _broken(self, line: _Line) -> LineAnswer:
        log.exception(  # noqa: LOG004 - called where an exception is handled
            "line.failed", batch_id=self._record.id, line=line.number
        )
        return refusal_of(self._record.endpoint, Failure("INTERNAL"))

    def _try_again(self, line: _Line) -> None:
        line.tries += 1
        task = self._tasks.create_task(self._retry(line))
        self._retrying.add(task)
        task.add_done_callback(self._retrying.discard)

    async def _retry(self, line: _Line) -> None:
        await self._drop(line)
        await asyncio.sleep(RETRY_S)
        await self._queue(line)

    async def _drop(self, line: _Line) -> None:
        for asked in line.asked:
            self._lines.pop(asked.request_id, None)
        await patiently(lambda: forget(self._means.broker, self._record.tenant, line.generations()))

    def _finish(self, line: _Line, answer: LineAnswer) -> None:
        record = self._record
        result = result_line(record.id, line.number, line.custom_id, answer)
        if answer.status == 200:
            self._results.add_answer(line.number, result, answer.usage)
        else:
            self._results.add_failure(line.number, result)
        generations = line.generations()
        self._waiting_generations[line.number] = generations
        for asked in line.asked:
            self._lines.pop(asked.request_id, None)
        self._num_taken -= max(1, len(generations))
        self._freed.set()
        if self._results.num_open == 0 or self._results.waiting_bytes > MAX_WAITING_BYTES:
            self._commit_now.set()

    # Committing ----------------------------------------------------------------------------------

    async def _commit_regularly(self) -> None:
        while True:
            wait_s = COMMIT_S * (1 + self._results.num_parts / PARTS_BEFORE_SLOWER)
            await _set_within(self._commit_now, wait_s)
            self._commit_now.clear()
            await patiently(self._commit)
            if self._results.num_open == 0 and self._results.num_waiting == 0:
                self.over.set()

    async def _commit(self) -> None:
        for line in await write_part(self._record.id, self._results):
            self._done += self._waiting_generations.pop(line, [])
        await count(self._means.store, self._record.id, self._results)
        while self._done:
            await forget(self._means.broker, self._record.tenant, self._done[:_FORGET_AT_ONCE])
            del self._done[:_FORGET_AT_ONCE]

    # Stopping ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Stop when somebody cancelled the batch."""
        async with self._means.watch.following(self._record.id) as changed:
            while not self.over.is_set():
                await changed.wait()
                changed.clear()
                record = await patiently(lambda: self._means.store.get(self._record.id))
                if record is None or record.status != "in_progress":
                    self.over.set()

    async def _until_late(self) -> None:
        while (left_s := self._record.expires_at - wall_ms() / 1000) > 0:
            await asyncio.sleep(min(left_s, 60.0))
        self.over.set()


# Steps that ending a batch early takes, too ------------------------------------------------------


async def open_lines(
    means: Means, record: BatchRecord, index: LineIndex, results: Results
) -> AsyncGenerator[tuple[int, InputLine]]:
    """The lines without a result, with their numbers, in the order of the index.

    Raises: FileNotFoundError when the input is gone.
    """
    file = await patiently(lambda: means.files.get(record.input_file_id, record.tenant))
    if file is None:
        raise FileNotFoundError(record.input_file_id)
    reader = LineReader(index, lambda start, end: means.files.read(file, start, end))
    for i in range(len(index)):
        number = index[i].number
        if not results.has(number):
            yield number, read_line(await _line(reader, i))


async def _line(reader: LineReader, i: int) -> bytes:
    return await patiently(lambda: reader.line(i))


async def forget(broker: Broker, tenant: str, generations: Sequence[str]) -> None:
    """End generations, if they have not ended, and remove what there is of them in Redis."""
    await asyncio.gather(*(broker.forget(id, tenant) for id in generations))


async def write_part(batch_id: str, results: Results) -> list[int]:
    """Write what waits for a part, if anything does; returns the numbers of its lines.

    Raises: OvertakenError; Failure STORAGE_UNAVAILABLE, STORAGE_FULL.
    """
    began_s = monotonic_s()
    lines = await results.commit()
    if lines:
        log.info(
            "batch.part_written",
            batch_id=batch_id,
            part=results.num_parts,
            lines=len(lines),
            completed=results.counts.completed,
            failed=results.counts.failed,
            duration=round(monotonic_s() - began_s, 6),
        )
    return lines


async def count(store: BatchStore, batch_id: str, results: Results) -> None:
    """Let the record say what the parts hold. Raises: Failure BROKER_UNAVAILABLE."""
    num_parts, counts, usage = results.num_parts, results.counts, results.usage
    if num_parts > results.num_counted:
        await store.change(batch_id, lambda record: record.counted(num_parts, counts, usage))
        results.num_counted = num_parts


async def _set_within(event: asyncio.Event, limit_s: float) -> None:
    """Return when the event is set, or after so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
