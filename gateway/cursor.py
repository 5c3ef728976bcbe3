"""Cursors: where in a generation a reader stands. An SSE ``id:`` line is one.

``57-0a1b2c3d`` stands behind token 57, whose chain (see :mod:`common.messages`) is ``0a1b2c3d``.
The final frames have stages of their own, ``57-0a1b2c3d.1`` finish, ``.2`` usage, ``.3`` done, so
that a client which was cut off between them gets just the missing ones. ``0-00000000`` is the
beginning.

A stream of several choices has a cursor for each, in order, joined: ``57-0a1b2c3d~60-4e5f6a7b.1``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

from common.broker import MAX_CHOICES
from common.failures import Failure

FINISH, USAGE, DONE = 1, 2, 3
"""Stages: which final frame a cursor stands behind; 0 is none of them."""

SEPARATOR = "~"
"""Between the cursors of several choices: stands unquoted in a URL and in a header."""

_CURSOR = re.compile(r"(\d{1,9})(?:-([0-9a-f]{8}))?(?:\.([123]))?")


@dataclass(frozen=True, slots=True)
class Cursor:
    """``chain`` is None where it is not known: at position 0, or when only a number was given."""

    position: int = 0
    chain: int | None = None
    stage: int = 0

    def __str__(self) -> str:
        text = f"{self.position}-{self.chain or 0:08x}"
        return f"{text}.{self.stage}" if self.stage else text


def parse_cursor(text: str, field: str) -> Cursor:
    """Read a cursor; a bare position is accepted and then goes unchecked against the chain.

    Raises: Failure BAD_REQUEST that names ``field``.
    """
    match = _CURSOR.fullmatch(text.strip())
    if match is None:
        raise Failure(
            "BAD_REQUEST", f"{field} is not a cursor like 57-0a1b2c3d: {text[:40]!r}", field=field
        )
    position, chain = int(match[1]), match[2]
    known = int(chain, 16) if chain is not None and position > 0 else None
    return Cursor(position, known, int(match[3] or 0))


def parse_cursors(text: str, field: str) -> list[Cursor]:
    """Read the cursors of a stream, one per choice.

    Raises: Failure BAD_REQUEST that names ``field``.
    """
    return [parse_cursor(part, field) for part in text.split(SEPARATOR)[: MAX_CHOICES + 1]]


def chain_before(chain: int, tokens: Iterable[int]) -> int:
    """The chain before ``tokens``, when ``chain`` stands behind them: crc32, run backwards.

    With it an entry explains itself: a reader at position 0 needs no model version to know the
    chain there.
    """
    state = chain ^ 0xFFFFFFFF
    for token in reversed(list(tokens)):
        for byte in reversed(token.to_bytes(4, "little")):
            index = _INDEX_BY_TOP_BYTE[state >> 24]
            state = ((state ^ _CRC_TABLE[index]) << 8 & 0xFFFFFFFF) | (index ^ byte)
    return state ^ 0xFFFFFFFF


def chains_after(chain: int, tokens: Iterable[int]) -> list[int]:
    """The chain behind each of ``tokens``, when ``chain`` stands before them."""
    chains: list[int] = []
    for token in tokens:  # as `chain_next` says; a call for each is half of the time it takes
        chain = crc32(token.to_bytes(4, "little"), chain)
        chains.append(chain)
    return chains


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0xEDB88320 if value & 1 else 0)
    return value


_CRC_TABLE = [_crc_entry(value) for value in range(256)]
_INDEX_BY_TOP_BYTE = {entry >> 24: index for index, entry in enumerate(_CRC_TABLE)}
