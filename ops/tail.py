"""Follows the JSON logs of other processes: what they write from now on, line by line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

Line = dict[str, Any]


class LogTail:
    """Reads ``<log_dir>/<role>.jsonl`` from its present end; a file that appears later, from 0."""

    def __init__(self, log_dir: Path, roles: Iterable[str]) -> None:
        self._paths = [log_dir / f"{role}.jsonl" for role in roles]
        self._offsets = {path: _size(path) for path in self._paths}

    def read(self) -> list[Line]:
        """Whole lines written since the last call, file by file; what is no JSON object is left."""
        return [line for path in self._paths for line in self._read(path)]

    def _read(self, path: Path) -> list[Line]:
        size = _size(path)
        if size < self._offsets[path]:  # somebody emptied it
            self._offsets[path] = 0
        if size == self._offsets[path]:
            return []
        with path.open("rb") as file:
            file.seek(self._offsets[path])
            data = file.read(size - self._offsets[path])
        whole, newline, _ = data.rpartition(b"\n")
        self._offsets[path] += len(whole) + len(newline)
        return [line for text in whole.splitlines() if (line := _decode(text)) is not None]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _decode(text: bytes) -> Line | None:
    try:
        line: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None
