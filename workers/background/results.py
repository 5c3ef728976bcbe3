"""What has become of the lines of a batch: the parts in storage, and what waits for the next one.

The parts are the log of results and its fence. Whoever steers writes part ``n + 1`` only if there
is none; where there is one, somebody else steers, and this one has to stop.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from common.batches import Counts, Usage
from common.parts import Part, Parts, encode_part
from common.storage import Storage

_HEADERS_AT_ONCE = 16


class OvertakenError(Exception):
    """Somebody else steers this batch."""


class Results:
    """Of ``total`` lines; made by :meth:`load`."""

    def __init__(self, storage: Storage, batch_id: str, total: int) -> None:
        self._parts = Parts(storage, batch_id)
        self._total = total
        self.num_parts = 0
        self.num_counted = 0
        """Parts of which the record tells."""
        self.last: list[int] = []
        """Lines of the newest part."""
        self.usage = Usage()
        self.waiting_bytes = 0
        """Of lines that no part holds yet."""
        self._finished: set[int] = set()
        self._num_answers = 0
        self._answers: list[tuple[int, bytes]] = []
        self._failures: list[tuple[int, bytes]] = []
        self._usage = Usage()

    @classmethod
    async def load(cls, storage: Storage, batch_id: str, total: int) -> "Results":
        """As the parts in storage tell."""
        results = cls(storage, batch_id, total)
        count = await results._parts.count()
        for first in range(1, count + 1, _HEADERS_AT_ONCE):
            numbers = range(first, min(first + _HEADERS_AT_ONCE, count + 1))
            for part in await asyncio.gather(*(results._parts.part(n) for n in numbers)):
                results._note(part.header.answers, part.header.failures, part.header.usage)
        return results

    @property
    def counts(self) -> Counts:
        """Of lines that parts hold."""
        num_finished = len(self._finished) - self.num_waiting
        return Counts(self._total, self._num_answers, num_finished - self._num_answers)

    @property
    def num_waiting(self) -> int:
        """Lines that the next part will hold."""
        return len(self._answers) + len(self._failures)

    @property
    def num_open(self) -> int:
        """Lines without a result."""
        return self._total - len(self._finished)

    def has(self, line: int) -> bool:
        """Whether the line of this number has a result, in a part or for the next one."""
        return line in self._finished

    def add_answer(self, line: int, result: bytes, usage: Usage) -> None:
        """``result`` is the line's form in the output file."""
        self._answers.append((line, result))
        self._usage += usage
        self._take(line, result)

    def add_failure(self, line: int, result: bytes) -> None:
        """``result`` is the line's form in the error file."""
        self._failures.append((line, result))
        self._take(line, result)

    async def commit(self) -> list[int]:
        """Write the next part; returns the numbers of its lines. If this fails, or is cancelled,
        it can be called again: then those lines may turn out to be in a part already.

        Raises: OvertakenError; Failure STORAGE_UNAVAILABLE, STORAGE_FULL.
        """
        answers, failures, usage = self._answers[:], self._failures[:], self._usage
        if not answers and not failures:
            return []
        first = len(self._finished) - self.num_waiting
        part = encode_part(first, answers, failures, usage)
        if not await self._parts.add(self.num_parts + 1, part):
            raise OvertakenError
        del self._answers[: len(answers)], self._failures[: len(failures)]
        self._usage -= usage
        self.waiting_bytes -= sum(len(result) for _, result in (*answers, *failures))
        lines = [line for line, _ in (*answers, *failures)]
        self._count(len(answers), usage)
        return lines

    async def output(self) -> AsyncGenerator[bytes]:
        """The output file."""
        async for part in self._all():
            async with aclosing(self._parts.answers(part)) as blocks:
                async for block in blocks:
                    yield block

    async def errors(self) -> AsyncGenerator[bytes]:
        """The error file."""
        async for part in self._all():
            if part.header.failures:
                async with aclosing(self._parts.failures(part)) as blocks:
                    async for block in blocks:
                        yield block

    async def _all(self) -> AsyncGenerator[Part]:
        for number in range(1, self.num_parts + 1):
            yield await self._parts.part(number)

    def _take(self, line: int, result: bytes) -> None:
        self._finished.add(line)
        self.waiting_bytes += len(result)

    def _note(self, answers: list[int], failures: list[int], usage: Usage) -> None:
        self.last = [*answers, *failures]
        self._finished.update(self.last)
        self._count(len(answers), usage)

    def _count(self, num_answers: int, usage: Usage) -> None:
        self.num_parts += 1
        self._num_answers += num_answers
        self.usage += usage
