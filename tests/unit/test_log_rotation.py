"""Logs that are moved away: who writes follows the name, who reads loses no line."""

import gzip
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from common import logs
from common.logs import LineSink
from ops import rotation
from ops.rotation import LogRotation
from ops.tail import LogTail


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the next look."""
    monkeypatch.setattr(logs, "_LOOK_S", 0.0)
    monkeypatch.setattr(rotation, "_SETTLE_S", 0.0)


def test_a_sink_follows_its_name(tmp_path: Path, at_once: None) -> None:
    """As logrotate moves a file away, or somebody removes it, a new one of the name is written."""
    path = tmp_path / "worker.jsonl"
    with path.open("ab", buffering=0) as file:
        sink = LineSink(file, path=path)

        def say(line: bytes) -> None:
            sink.write(line)
            assert sink.flush(5)

        say(b"first")
        path.rename(tmp_path / "moved")
        say(b"second")
        path.unlink()
        say(b"third")
        sink.close(5)
    assert (tmp_path / "moved").read_bytes() == b"first\n"
    assert path.read_bytes() == b"third\n"
    assert sink.dropped == 0


def test_a_large_log_is_moved_compressed_and_in_the_end_dropped(
    tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is small stays; of each role the newest so many are kept."""
    monkeypatch.setattr(rotation, "datetime", counting_clock())
    keeper = LogRotation(tmp_path, max_bytes=10, num_kept=2)
    (tmp_path / "gateway.jsonl").write_text("small\n")
    for number in range(4):
        (tmp_path / "worker.jsonl").write_text(f"a long line {number}\n")
        keeper.rotate()
        keeper.rotate()
    found = sorted(tmp_path.glob("worker*"))
    assert [gzip.decompress(path.read_bytes()) for path in found] == [
        b"a long line 2\n",
        b"a long line 3\n",
    ]
    assert (tmp_path / "gateway.jsonl").read_text() == "small\n"


def test_who_reads_along_misses_nothing_of_a_moved_log(tmp_path: Path) -> None:
    """Lines that a slow writer still puts into the old file come as well."""
    path = tmp_path / "worker.jsonl"
    path.write_text("")
    with closing(LogTail(tmp_path, ["worker"])) as tail, path.open("a") as old:
        old.write('{"event": "a"}\n')
        old.flush()
        path.rename(tmp_path / "worker-1.jsonl")
        path.write_text('{"event": "b"}\n')
        assert [line["event"] for line in tail.read()] == ["a", "b"]
        old.write('{"event": "c"}\n')
        old.flush()
        with path.open("a") as new:
            new.write('{"event": "d"}\n')
        assert [line["event"] for line in tail.read()] == ["c", "d"]
        assert tail.read() == []


def test_a_line_cut_off_by_a_full_disk_spoils_no_other_one(tmp_path: Path) -> None:
    """A write that failed half-way leaves a torn line; the next one begins on a new one."""
    path = tmp_path / "worker.jsonl"
    with path.open("ab", buffering=0) as file:
        sink = LineSink(file, path=path)
        sink.flush(5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", failing_after(4, os.write))
            sink.write(b"0123456789")
            sink.flush(5)
        sink.write(b"whole")
        sink.close(5)
    first, second, third = path.read_bytes().splitlines()
    assert (first, second) == (b"0123", b"whole")
    assert b'"log.dropped"' in third
    assert sink.dropped == 1


def failing_after(num_bytes: int, write: Callable[[int, bytes], int]) -> Callable[..., int]:
    """A disk with room for so many bytes."""
    written = 0

    def limited(fd: int, data: bytes) -> int:
        nonlocal written
        if written >= num_bytes:
            raise OSError(28, "No space left on device")
        written += write(fd, data[:num_bytes])
        return written

    return limited


def counting_clock() -> type:
    """Each look at it is a second later."""
    seconds = iter(range(60))

    class Clock:
        @staticmethod
        def now(_: object) -> "Clock":
            return Clock()

        @staticmethod
        def strftime(_: str) -> str:
            return f"20260101T0000{next(seconds):02}Z"

    return Clock
