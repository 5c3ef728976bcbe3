"""The results of a batch as a log of parts: what is written in storage of the lines that finished.

A part holds the lines of one moment, in their final form: answers, then failures. Part ``n`` is
written only if there is none, so of two that steer one batch one is refused, and whoever starts
again finds in the headers which lines are finished. A line's *position* is the number of lines that
stand before it, over all parts: it never changes, whoever reads it.

An object is ``<length of the header, 4 bytes><header, msgpack><answers><failures>``; each line ends
with a newline.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from common.batches import Usage, part_name, parts_prefix
from common.storage import Storage

_LENGTH_BYTES = 4
_FIRST_READ_BYTES = 16 * 1024
"""Holds most headers: some 3 bytes for each line."""


class PartHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a part holds. Line numbers are those of the input, from 1."""

    first: int
    """Position of its first line: so many were finished before this part."""
    answers: list[int]
    """Numbers of the lines that were answered, in the part's order."""
    failures: list[int]
    """Numbers of the lines that failed; they stand behind the answers."""
    answers_bytes: int
    usage: Usage = Usage()
    """Of its answers."""

    @property
    def end(self) -> int:
        """Position behind its last line."""
        return self.first + len(self.answers) + len(self.failures)


class Part(msgspec.Struct, frozen=True):
    """A part that was written: its header, and where its lines begin, in bytes."""

    number: int
    header: PartHeader
    answers_at: int

    @property
    def failures_at(self) -> int:
        return self.answers_at + self.header.answers_bytes


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(PartHeader).decode


def encode_part(
    first: int,
    answers: Sequence[tuple[int, bytes]],
    failures: Sequence[tuple[int, bytes]],
    usage: Usage,
) -> bytes:
    """A part of ``(line number, line without its newline)``; ``first`` as in the header."""
    body = b"".join(line + b"\n" for _, line in answers)
    header = PartHeader(
        first, [line for line, _ in answers], [line for line, _ in failures], len(body), usage
    )
    packed = _pack(header)
    failed = b"".join(line + b"\n" for _, line in failures)
    return len(packed).to_bytes(_LENGTH_BYTES, "big") + packed + body + failed


class Parts:
    """The parts of one batch."""

    def __init__(self, storage: Storage, batch_id: str) -> None:
        self._storage = storage
        self._batch_id = batch_id

    async def add(self, number: int, part: bytes) -> bool:
        """Write part ``number``, from 1; False: there is one, so somebody else steers."""
        return await self._storage.put(self._name(number), part, only_if_absent=True)

    async def count(self) -> int:
        """How many there are."""
        return len(await self._storage.list(parts_prefix(self._batch_id)))

    async def part(self, number: int) -> Part:
        """Raises: FileNotFoundError."""
        start = await self._bytes(number, 0, _FIRST_READ_BYTES)
        length = int.from_bytes(start[:_LENGTH_BYTES], "big")
        end = _LENGTH_BYTES + length
        if len(start) < end:
            start += await self._bytes(number, len(start), end)
        return Part(number, _unpack(start[_LENGTH_BYTES:end]), end)

    async def at(self, position: int, num_parts: int) -> Part | None:
        """The part, of the first ``num_parts``, that holds the line at ``position``; None: it is
        in a later one, or there are none.

        Raises: FileNotFoundError.
        """
        low, high = 1, num_parts
        while low <= high:
            part = await self.part((low + high) // 2)
            if position < part.header.first:
                high = part.number - 1
            elif position >= part.header.end:
                low = part.number + 1
            else:
                return part
        return None

    async def lines(self, part: Part) -> AsyncGenerator[bytes]:
        """Its lines in order, answers first, each without its newline.

        Raises: FileNotFoundError.
        """
        rest = b""
        blocks = self._storage.read(self._name(part.number), part.answers_at)
        async with aclosing(blocks):
            async for block in blocks:
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield line

    async def answers(self, part: Part) -> AsyncGenerator[bytes]:
        """The bytes of its answers, for the output file.

        Raises: FileNotFoundError.
        """
        name = self._name(part.number)
        async with aclosing(self._storage.read(name, part.answers_at, part.failures_at)) as blocks:
            async for block in blocks:
                yield block

    async def failures(self, part: Part) -> AsyncGenerator[bytes]:
        """The bytes of its failures, for the error file.

        Raises: FileNotFoundError.
        """
        name = self._name(part.number)
        async with aclosing(self._storage.read(name, part.failures_at)) as blocks:
            async for block in blocks:
                yield block

    async def _bytes(self, number: int, start: int, end: int) -> bytes:
        async with aclosing(self._storage.read(self._name(number), start, end)) as blocks:
            return b"".join([block async for block in blocks])

    def _name(self, number: int) -> str:
        return part_name(self._batch_id, number)
