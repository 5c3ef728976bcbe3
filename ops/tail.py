"""Follows the JSON logs of other processes: what they write from now on, line by line."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from common.clock import monotonic_s

Line = dict[str, Any]

_LEAVE_S = 3.0
"""Writers look once a second whether their file was moved; so long a moved one may still grow."""


class LogTail:
    """Reads ``<log_dir>/<role>.jsonl`` from its present end; a file that appears later, from 0.

    Close it: it keeps the files open, so that one that is moved away is read to its end.
    """

    def __init__(self, log_dir: Path, roles: Iterable[str]) -> None:
        self._logs = [_Log(log_dir / f"{role}.jsonl") for role in roles]

    def close(self) -> None:
        for log in self._logs:
            log.close()

    def read(self) -> list[Line]:
        """Whole lines written since the last call, file by file; what is no JSON object is left."""
        return [line for log in self._logs for line in log.read()]


class _Log:
    """One name, and the file of that name: another one once it was moved away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _File.opened(path)
        self._moved: list[tuple[float, _File]] = []
        """Those that had the name before, with the time at which they are left."""
        if self._file is not None:
            self._file.offset = self._file.size

    def read(self) -> list[Line]:
        if self._file is None:
            self._file = _File.opened(self._path)
        elif not self._file.is_still(self._path):
            self._moved.append((monotonic_s() + _LEAVE_S, self._file))
            self._file = _File.opened(self._path)
        lines = [line for _, moved in self._moved for line in moved.read()]
        while self._moved and self._moved[0][0] < monotonic_s():
            self._moved.pop(0)[1].close()
        return lines + (self._file.read() if self._file else [])

    def close(self) -> None:
        for _, moved in self._moved:
            moved.close()
        if self._file is not None:
            self._file.close()


class _File:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0

    @classmethod
    def opened(cls, path: Path) -> "_File | None":
        try:
            return cls(path.open("rb"))
        except FileNotFoundError:
            return None

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def is_still(self, path: Path) -> bool:
        """Whether it has that name; also while nothing has."""
        ours = os.fstat(self._file.fileno())
        try:
            named = path.stat()
        except FileNotFoundError:
            return True
        return (named.st_ino, named.st_dev) == (ours.st_ino, ours.st_dev)

    def read(self) -> list[Line]:
        size = self.size
        if size < self.offset:  # somebody emptied it
            self.offset = 0
        if size == self.offset:
            return []
        self._file.seek(self.offset)
        whole, newline, _ = self._file.read(size - self.offset).rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return [line for text in whole.splitlines() if (line := _decode(text)) is not None]

    def close(self) -> None:
        self._file.close()


def _decode(text: bytes) -> Line | None:
    try:
        line: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None
