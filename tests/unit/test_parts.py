"""The log of a batch's results: what was written is found again, and nothing is written twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common.batches import Usage, new_batch_id
from common.parts import Parts, encode_part
from common.storage import Storage, open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = open_storage("", tmp_path)
    yield storage
    storage.close()


def numbered(*lines: int) -> list[tuple[int, bytes]]:
    return [(line, b'{"line":%d}' % line) for line in lines]


async def test_a_part_is_read_as_it_was_written(storage: Storage) -> None:
    """Its header, its lines in order, and the two files' shares of it."""
    parts = Parts(storage, new_batch_id())
    usage = Usage(input_tokens=7, output_tokens=9)
    assert await parts.add(1, encode_part(0, numbered(3, 1), numbered(2), usage))
    part = await parts.part(1)
    assert (part.header.answers, part.header.failures) == ([3, 1], [2])
    assert (part.header.first, part.header.end, part.header.usage) == (0, 3, usage)
    lines = [line for _, line in numbered(3, 1, 2)]
    assert [line async for line in parts.lines(part)] == lines
    assert b"".join([block async for block in parts.answers(part)]) == b'{"line":3}\n{"line":1}\n'
    assert b"".join([block async for block in parts.failures(part)]) == b'{"line":2}\n'


async def test_who_comes_second_is_refused(storage: Storage) -> None:
    parts = Parts(storage, new_batch_id())
    assert await parts.add(1, encode_part(0, numbered(1), [], Usage()))
    assert not await parts.add(1, encode_part(0, numbered(2), [], Usage()))
    assert await parts.count() == 1
    assert (await parts.part(1)).header.answers == [1]


async def test_every_position_is_found(storage: Storage) -> None:
    """In parts of any size, with headers that do not fit the first read."""
    parts = Parts(storage, new_batch_id())
    sizes = [1, 3, 20_000, 2, 1]
    first = 0
    for number, size in enumerate(sizes, start=1):
        lines = numbered(*range(first + 1, first + size + 1))
        assert await parts.add(number, encode_part(first, lines, [], Usage()))
        first += size
    for position, number in ((0, 1), (1, 2), (3, 2), (4, 3), (20_003, 3), (20_004, 4), (20_006, 5)):
        part = await parts.at(position, len(sizes))
        assert part is not None
        assert part.number == number
    assert await parts.at(first, len(sizes)) is None
    assert await parts.at(0, 0) is None
    assert await parts.at(20_004, 3) is None
