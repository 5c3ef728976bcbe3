"""Where logs come from and how they become rows: files, folders, globs, gzip, standard input.

Whatever the logs hold, they load: a line that is no event is counted with its place and left aside,
a file that breaks off is read as far as it goes. What is larger than memory goes to a temporary
folder on disk, which is gone with :meth:`Logs.close`.
"""

import glob
import mmap
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Self

import orjson

from common.failures import Failure
from ops.incident import tables

STDIN = "-"
_LOG_NAME = re.compile(r"\.(?:jsonl|crash)(?:\.\d+)?(?:\.gz)?$")
"""What is read of a folder; a rotated log may have its number behind the ending."""
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1024 * 1024
_MAX_MALFORMED_SHARE = 0.001
"""A torn line here and there is what a killed process leaves behind."""
_CLOCK_SLACK_S = 600.0
"""How far lines of a file may be out of order: processes whose clocks differ share it."""
_TS = re.compile(rb'"ts":"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?)(?:Z|\+00:00)?"')
_MAX_CRASH_CHARS = 4_000
_SHOWN_PLACES = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, as a person finds it again."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True)
class Malformed:
    """Lines that are no events: how many, and where the first ones are."""

    count: int = 0
    places: list[Place] = field(default_factory=list[Place])


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of the sources: ``path`` holds its lines as plain text.

    ``path`` differs from ``name`` for what was packed or came over standard input.
    """

    name: str
    path: Path

    @property
    def is_crash(self) -> bool:
        return ".crash" in Path(self.name).name


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file from one line's start to another's, and how many bytes the file has."""

    file: LogFile
    start: int
    end: int
    size: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end == self.size


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Rows of ``lines`` from ``first`` on came from ``stretch``, up to the next one's ``first``."""

    first: int
    stretch: Stretch
    rejected: list[int]
    """Numbers of its lines that became no rows: no UTF-8, or endless."""


class Workspace:
    """Files of the sources as plain text, and the folder for what is made of them."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-incident-"))
        self.incomplete: list[str] = []
        self._num_spooled = 0
        try:
            self.files = [self._plain(name) for name in find_files(sources)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def spool(self) -> Path:
        """A new path in the folder."""
        self._num_spooled += 1
        return self.folder / f"{self._num_spooled}.jsonl"

    def _plain(self, name: str) -> LogFile:
        if name == STDIN:
            path = self.spool()
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, _CHUNK_BYTES)
            return LogFile("standard input", self._unpacked("standard input", path))
        return LogFile(name, self._unpacked(name, Path(name)))

    def _unpacked(self, name: str, path: Path) -> Path:
        """``path``, or what it holds where it is gzip: as far as it can be read."""
        with path.open("rb") as packed:
            if packed.read(2) != _GZIP:
                return path
            packed.seek(0)
            plain = self.spool()
            with plain.open("wb") as file:
                if not _gunzip(packed, file):
                    self.incomplete.append(f"{name} breaks off: its end could not be unpacked")
        return plain


def find_files(sources: Sequence[str]) -> list[str]:
    """Paths of all files that ``sources`` name, each once, in order; ``-`` stays as it is.

    Raises: Failure BAD_REQUEST where a source names nothing.
    """
    found: dict[str, None] = {}
    for source in sources:
        names = [STDIN] if source == STDIN else _find(source)
        if not names:
            raise Failure("BAD_REQUEST", f"{source}: no such log; see --logs")
        found |= dict.fromkeys(names)
    return list(found)


def _find(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return sorted(str(each) for each in path.iterdir() if _is_log(each))
    if path.exists():
        return [source]
    return sorted(each for each in glob.glob(source, recursive=True) if Path(each).is_file())  # noqa: PTH207 - a pattern may be absolute


def _is_log(path: Path) -> bool:
    return _LOG_NAME.search(path.name) is not None and path.is_file()


def _gunzip(packed: BinaryIO, plain: BinaryIO) -> bool:
    """Copy what can be unpacked, members one after the other; False where it breaks off."""
    unpacker = None
    while data := packed.read(_CHUNK_BYTES):
        while data:
            unpacker = unpacker or zlib.decompressobj(wbits=31)
            try:
                plain.write(unpacker.decompress(data))
            except zlib.error:
                return False
            data = unpacker.unused_data
            unpacker = None if unpacker.eof else unpacker
    return unpacker is None


# --- stretches of time ---------------------------------------------------------------------------


def find_stretch(file: LogFile, since: float | None, until: float | None) -> Stretch:
    """The part of ``file`` that can hold lines of that time (seconds since 1970), generously.

    Found by bisection, since each process appends its lines as they come.
    """
    size = file.path.stat().st_size
    if size == 0 or file.is_crash or (since is None and until is None):
        return Stretch(file, 0, size, size)
    with file.path.open("rb") as opened, _mapped(opened) as data:
        start = 0 if since is None else _find_moment(data, since - _CLOCK_SLACK_S)[0]
        end = size if until is None else _find_moment(data, until + _CLOCK_SLACK_S)[1]
        start = data.rfind(b"\n", 0, start) + 1
        line_end = data.find(b"\n", end)
    return Stretch(file, start, size if line_end < 0 else line_end + 1, size)


def find_offset(file: LogFile, at_s: float) -> int:
    """Where in ``file`` its lines of ``at_s`` (seconds since 1970) begin, about."""
    if file.path.stat().st_size == 0:
        return 0
    with file.path.open("rb") as opened, _mapped(opened) as data:
        return _find_moment(data, at_s)[0]


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _find_moment(data: mmap.mmap, at_s: float) -> tuple[int, int]:
    """Two places with the first line that is not earlier than ``at_s`` between them."""
    wanted = datetime.fromtimestamp(max(0.0, at_s), UTC).isoformat()[:19].encode()
    low, high = 0, len(data)
    while high - low > _CHUNK_BYTES // 16:
        middle = (low + high) // 2
        found = _TS.search(data, middle, min(high, middle + _CHUNK_BYTES))
        if found is not None and found[1] < wanted:
            low = middle
        else:
            high = middle
    return low, high


# --- loading -------------------------------------------------------------------------------------


class Logs:
    """Logs as tables, see :mod:`ops.incident.tables`: ask ``db``, and close it at the end.

    ``incomplete`` says in words what is missing, so that nobody takes silence for health.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.work = Workspace(sources)
        self.db = tables.connect(self.work.folder)
        self.malformed = Malformed()
        self.incomplete = self.work.incomplete
        self._loaded: list[_Loaded] = []
        self._names = _short_names(self.work.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()
        self.work.close()

    def load(
        self,
        stretches: Iterable[Stretch] | None = None,
        *,
        since: float | None = None,
        until: float | None = None,
    ) -> None:
        """Read ``stretches`` of the files, or all that can hold lines of ``[since, until)``, and
        make the tables.
        """
        is_excerpt = stretches is not None
        if stretches is None:
            stretches = [find_stretch(file, since, until) for file in self.work.files]
        for stretch in stretches:
            first = tables.count_lines(self.db)
            path = self._path_of(stretch)
            rejected = [] if path is None else tables.add_lines(self.db, path)
            self._loaded.append(_Loaded(first, stretch, rejected))
        tables.make(self.db, since, until)
        self._count_malformed()
        self.incomplete += tables.find_missing(self.db, is_excerpt=is_excerpt)
        if self.malformed.count > _MAX_MALFORMED_SHARE * tables.count_lines(self.db):
            self.incomplete.append(f"{self.malformed.count} lines are no events")

    def place(self, seq: int) -> Place:
        """Where the line of the row ``seq`` of ``events`` stands."""
        origin = next(one for one in reversed(self._loaded) if one.first <= seq)
        number = seq - origin.first + 1
        for rejected in origin.rejected:
            number += rejected <= number
        number += _count_newlines(origin.stretch.file.path, origin.stretch.start)
        return Place(self._names[origin.stretch.file], number)

    def _count_malformed(self) -> None:
        seqs = tables.find_malformed(self.db)
        rejected = [
            Place(self._names[one.stretch.file], line)
            for one in self._loaded
            for line in one.rejected
        ]
        self.malformed.count = len(seqs) + len(rejected)
        places = [self.place(seq) for seq in seqs[:_SHOWN_PLACES]]
        self.malformed.places = [*places, *rejected][:_SHOWN_PLACES]

    def _path_of(self, stretch: Stretch) -> Path | None:
        """A file with just this stretch; None: it has no lines."""
        if stretch.start >= stretch.end:
            return None
        if stretch.file.is_crash:
            path = self.work.spool()
            path.write_bytes(_crash_line(stretch.file))
            return path
        if stretch.is_whole:
            return stretch.file.path
        part = self.work.spool()
        with stretch.file.path.open("rb") as whole, part.open("wb") as copy:
            whole.seek(stretch.start)
            for block in _blocks(whole, stretch.end - stretch.start):
                copy.write(block)
        return part


def open_logs(
    sources: Sequence[str], *, since: float | None = None, until: float | None = None
) -> Logs:
    """Read all of ``sources``, or only ``[since, until)`` (seconds since 1970), into tables.

    Raises: Failure BAD_REQUEST where a source names nothing; OSError where it cannot be read.
    """
    logs = Logs(sources)
    try:
        logs.load(since=since, until=until)
    except BaseException:
        logs.close()
        raise
    return logs


def _short_names(files: Sequence[LogFile]) -> dict[LogFile, str]:
    """Without folders, where that leaves no doubt."""
    counts = Counter(Path(file.name).name for file in files)
    return {
        file: name if counts[name := Path(file.name).name] == 1 else file.name for file in files
    }


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (block := file.read(min(num_bytes, _CHUNK_BYTES))):
        num_bytes -= len(block)
        yield block


@lru_cache
def _count_newlines(path: Path, end: int) -> int:
    """In front of ``end``."""
    if not end:
        return 0
    buffer, num = bytearray(_CHUNK_BYTES), 0
    with path.open("rb", buffering=0) as file, memoryview(buffer) as view:
        while end > 0 and (size := file.readinto(view[: min(end, _CHUNK_BYTES)])):
            num += buffer.count(b"\n", 0, size)
            end -= size
    return num


def _crash_line(file: LogFile) -> bytes:
    """What the interpreter wrote when it crashed, as an event of the moment of its last word."""
    text = file.path.read_text(errors="replace")
    changed = datetime.fromtimestamp(file.path.stat().st_mtime, UTC)
    return orjson.dumps(
        {
            "ts": changed.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": "critical",
            "event": tables.CRASHED,
            "service": Path(file.name).name.partition(".")[0],
            "file": file.name,
            "text": text[:_MAX_CRASH_CHARS],
        }
    )
