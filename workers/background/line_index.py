"""Where the lines of a batch lie in its input, in the order in which they are run.

Validation writes the index once; whoever steers finds each line by it. Lines whose prompts begin
alike stand together, so that what one computes the next one finds.
"""

import struct
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import NamedTuple

_HEAD = struct.Struct("<4sI")
_MAGIC = b"HRL1"
_READ_BYTES = 256 * 1024
"""Of lines that stand one behind the other, so much is read at once."""

ReadInput = Callable[[int, int], AsyncGenerator[bytes]]
"""Bytes of the input from one offset up to another one."""


class LinePlace(NamedTuple):
    number: int
    """In the file, from 1; empty lines count, too."""
    offset: int
    length: int
    """In bytes, without what ends the line."""


class LineIndex:
    """``index[i]`` is the place of the ``i``-th line to be run."""

    def __init__(self) -> None:
        self._numbers = array("I")
        self._offsets = array("Q")
        self._lengths = array("I")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> LinePlace:
        return LinePlace(self._numbers[i], self._offsets[i], self._lengths[i])

    def add(self, place: LinePlace) -> None:
        self._numbers.append(place.number)
        self._offsets.append(place.offset)
        self._lengths.append(place.length)

    def in_order(self, order: list[int]) -> "LineIndex":
        """The same lines, the one at ``order[0]`` first."""
        index = LineIndex()
        for i in order:
            index.add(self[i])
        return index

    def encode(self) -> bytes:
        head = _HEAD.pack(_MAGIC, len(self))
        return b"".join((head, *(part.tobytes() for part in self._columns())))

    @classmethod
    def decode(cls, data: bytes) -> "LineIndex":
        magic, count = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("this is no index of lines")
        index, at = cls(), _HEAD.size
        for column in index._columns():
            end = at + count * column.itemsize
            column.frombytes(data[at:end])
            at = end
        return index

    def _columns(self) -> tuple["array[int]", "array[int]", "array[int]"]:
        return self._numbers, self._offsets, self._lengths


class LineReader:
    """Reads lines of the input, those that stand one behind the other together."""

    def __init__(self, index: LineIndex, read: ReadInput) -> None:
        self._index = index
        self._read = read
        self._start = 0
        self._block = b""

    async def line(self, i: int) -> bytes:
        """Raises: FileNotFoundError when the input is gone; Failure STORAGE_UNAVAILABLE."""
        place = self._index[i]
        end = place.offset + place.length
        if place.offset < self._start or end > self._start + len(self._block):
            async with aclosing(self._read(place.offset, self._end(i))) as blocks:
                block = b"".join([block async for block in blocks])
            self._start, self._block = place.offset, block
        return self._block[place.offset - self._start : end - self._start]

    def _end(self, i: int) -> int:
        """Where the lines end that are run one after the other and lie so, from ``i`` on."""
        _, start, length = self._index[i]
        end = start + length
        for j in range(i + 1, len(self._index)):
            _, offset, length = self._index[j]
            is_next = end < offset <= end + len("\r\n")
            if not is_next or offset + length - start > _READ_BYTES:
                break
            end = offset + length
        return end
