"""Steering: a batch is taken from wherever it stands to its end, phase by phase.

Each phase can be repeated, in whole or in part, by whoever comes next: what it has done lies in
storage under names that follow from the batch, and the record moves on last. A lease keeps two
processes from doing the same; what keeps them from undoing each other's work is that a part of the
results is written once.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Literal

from common.batches import (
    BatchError,
    BatchRecord,
    index_name,
    request_id,
    result_file_id,
)
from common.broker import MAX_LOOKS
from common.broker.batch_store import Step
from common.clock import wall_ms
from common.files import RESULTS, FileRecord
from common.ids import generation_id
from common.logs import get_logger
from gateway.lines import (
    answer_of,
    failed,
    read_ended,
    requests_of,
    result_line,
    unfinished_line,
)
from workers.background.line_index import LineIndex
from workers.background.patience import patiently
from workers.background.results import OvertakenError, Results
from workers.background.running import (
    MAX_WAITING_BYTES,
    Means,
    Running,
    count,
    forget,
    open_lines,
    write_part,
)
from workers.background.validation import InputLine, Validation, validate

log = get_logger()

LEASE_MS = 5000
"""Of a process that was killed, until another one goes on; at most, as a supervisor that sees it
die ends its leases."""
_RENEW_S = 1.5

_UNFINISHED = {
    "cancelling": ("batch_cancelled", "The batch was cancelled before this line was finished."),
    "finalizing": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}
"""Why a line was not finished, by the state that the batch is in then."""
_INPUT_GONE = BatchError("input_file_not_found", "The input file was deleted.", "input_file_id")


class Steering:
    """Of one batch, by this process. Raises from :meth:`run`, inside an exception group:
    OvertakenError when somebody else steers.
    """

    def __init__(self, means: Means, batch_id: str) -> None:
        self._means = means
        self._batch_id = batch_id
        self._is_stopped = False
        self._running: Running | None = None

    def stop(self) -> None:
        """Let :meth:`run` return soon, with all that is known in storage."""
        self._is_stopped = True
        if self._running is not None:
            self._running.over.set()

    async def run(self) -> None:
        """Until the batch has ended, or :meth:`stop`. The lease must have been taken before."""
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(self._keep_lease())
            await self._steer()
            keeping.cancel()

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            if not await patiently(self._renew):
                raise OvertakenError

    async def _renew(self) -> bool:
        return await self._means.store.take_lease(self._batch_id, self._means.name, LEASE_MS)

    async def _steer(self) -> None:
        means = self._means
        record = await patiently(lambda: means.store.get(self._batch_id))
        if record is None:
            await patiently(lambda: means.store.forget_missing(means.broker.pool, self._batch_id))
            return
        log.info("batch.steered", batch_id=self._batch_id, status=record.status)
        while not record.is_final and not self._is_stopped:
            before = record.status
            match before:
                case "validating":
                    record = await self._validate(record)
                case "in_progress":
                    record = await self._run_lines(record)
                case _:
                    record = await self._finish(record)
            if record.status != before:
                self._log_move(record, before)

    def _log_move(self, record: BatchRecord, before: str) -> None:
        counts = record.counts
        log.info(
            "batch.moved",
            batch_id=record.id,
            tenant=record.tenant,
            before=before,
            status=record.status,
            total=counts.total,
            completed=counts.completed,
            failed=counts.failed,
            age_s=wall_ms() // 1000 - record.created_at,
        )

    async def _change(self, record: BatchRecord, step: Step) -> BatchRecord:
        changed = await patiently(lambda: self._means.store.change(record.id, step))
        if changed is None:
            raise OvertakenError  # the record was removed: there is nothing to steer
        return changed

    # Validating ----------------------------------------------------------------------------------

    async def _validate(self, record: BatchRecord) -> BatchRecord:
        file = await patiently(lambda: self._means.files.get(record.input_file_id, record.tenant))
        found = Validation(errors=[_INPUT_GONE])
        if file is not None:
            with suppress(FileNotFoundError):
                found = await patiently(lambda: self._validated(record, file))
        if found.errors:
            return await self._change(record, lambda it: it.refused(found.errors, _now_s()))
        index = found.index.encode()
        await patiently(lambda: self._means.storage.put(index_name(record.id), index))
        total = len(found.index)
        return await self._change(record, lambda it: it.begun(total, found.model, _now_s()))

    async def _validated(self, record: BatchRecord, file: FileRecord) -> Validation:
        max_body_bytes = self._means.offer.settings.payload_limit
        async with aclosing(self._means.files.read(file)) as chunks:
            return await validate(chunks, record.endpoint, max_body_bytes=max_body_bytes)

    # Running -------------------------------------------------------------------------------------

    async def _run_lines(self, record: BatchRecord) -> BatchRecord:
        """Until every line has a result, the time is over, or the batch is cancelled."""
        results, is_input_gone = await self._results(record), False
        try:
            if results.num_open:
                await self._run(record, results)
        except* FileNotFoundError:  # nothing can be run, nor said of what was not
            is_input_gone = True
        if results.num_open == 0:
            return await self._change(record, lambda it: it.finalizing(_now_s()))
        if is_input_gone or _now_s() >= record.expires_at:
            return await self._change(record, lambda it: it.finalizing(_now_s(), is_late=True))
        return await patiently(lambda: self._means.store.get(record.id)) or record

    async def _run(self, record: BatchRecord, results: Results) -> None:
        index = await self._index(record)
        self._running = Running(self._means, record, index, results)
        if self._is_stopped:
            return
        try:
            await self._running.run()
        finally:
            self._running = None

    async def _index(self, record: BatchRecord) -> LineIndex:
        data = await patiently(lambda: self._means.storage.get(index_name(record.id)))
        return LineIndex.decode(data)

    async def _results(self, record: BatchRecord) -> Results:
        """As the parts tell. What the newest one holds may not have been forgotten in Redis."""
        means, total = self._means, record.counts.total
        results = await patiently(lambda: Results.load(means.storage, record.id, total))
        await patiently(lambda: count(means.store, record.id, results))
        left = [generation_id(request_id(record.id, line)) for line in results.last]
        await patiently(lambda: forget(means.broker, record.tenant, left))
        return results

    # Ending --------------------------------------------------------------------------------------

    async def _finish(self, record: BatchRecord) -> BatchRecord:
        """Give every line a result, write the files, and end the batch."""
        results = await self._results(record)
        error: BatchError | None = None
        if results.num_open:
            try:
                await self._wind_up(record, results)
            except FileNotFoundError:
                error = _INPUT_GONE
            await self._write(record, results)
        counts = results.counts
        output = await self._file(record, "output", results.output) if counts.completed else None
        errors = await self._file(record, "error", results.errors) if counts.failed else None
        return await self._change(record, lambda it: it.ended(output, errors, _now_s(), error))

    async def _wind_up(self, record: BatchRecord, results: Results) -> None:
        """What has ended meanwhile keeps its result; of the rest it is said why it has none.

        Raises: FileNotFoundError when the input is gone.
        """
        index = await self._index(record)
        async with aclosing(open_lines(self._means, record, index, results)) as lines:
            while some := await _take(lines, MAX_LOOKS):
                for number, line in await patiently(lambda: self._unknown(record, some)):
                    _leave(record, results, number, line)
                for number, line in some:
                    if not results.has(number):
                        await self._take_up(record, results, number, line)
                if results.waiting_bytes > MAX_WAITING_BYTES:
                    await self._write(record, results)

    async def _unknown(
        self, record: BatchRecord, lines: list[tuple[int, InputLine]]
    ) -> list[tuple[int, InputLine]]:
        """Those of which there is nothing in Redis: they never ran."""
        ids = [generation_id(request_id(record.id, number)) for number, _ in lines]
        looks = await self._means.broker.look("", ids)
        return [line for line, look in zip(lines, looks, strict=True) if not look.state]

    async def _take_up(
        self, record: BatchRecord, results: Results, number: int, line: InputLine
    ) -> None:
        """A line that was queued: its answer, if it has ended; else it ends here."""
        means = self._means
        body = bytes(line.body)
        asked = await patiently(
            lambda: requests_of(means.offer, means.broker, record, number, body)
        )
        wholes = await patiently(lambda: read_ended(means.broker, asked))
        if wholes is not None and failed(wholes) is None:
            answer = answer_of(means.offer, asked, wholes)
            result = result_line(record.id, number, line.custom_id, answer)
            results.add_answer(number, result, answer.usage)
        else:
            _leave(record, results, number, line)
        generations = [id for one in asked for id in one.generations()]
        await patiently(lambda: forget(means.broker, record.tenant, generations))

    async def _write(self, record: BatchRecord, results: Results) -> None:
        await patiently(lambda: write_part(record.id, results))
        await patiently(lambda: count(self._means.store, record.id, results))

    async def _file(
        self,
        record: BatchRecord,
        kind: Literal["output", "error"],
        content: Callable[[], AsyncGenerator[bytes]],
    ) -> str:
        """Write a file of results, in the place of what was written of it before."""
        id = result_file_id(record.id, kind)

        async def write() -> None:
            async with aclosing(content()) as chunks:
                await self._means.files.create(
                    record.tenant,
                    f"{record.id}_{kind}.jsonl",
                    RESULTS,
                    chunks,
                    expires_s=record.output_life_s,
                    id=id,
                )

        await patiently(write)
        return id


def _leave(record: BatchRecord, results: Results, number: int, line: InputLine) -> None:
    """Say of a line why it was not finished."""
    code, message = _UNFINISHED[record.status]
    result = unfinished_line(record.id, number, line.custom_id, code, message)
    results.add_failure(number, result)


async def _take(
    lines: AsyncGenerator[tuple[int, InputLine]], limit: int
) -> list[tuple[int, InputLine]]:
    """The next lines, at most so many."""
    taken: list[tuple[int, InputLine]] = []
    while len(taken) < limit and (line := await anext(lines, None)) is not None:
        taken.append(line)
    return taken


def _now_s() -> int:
    return wall_ms() // 1000
