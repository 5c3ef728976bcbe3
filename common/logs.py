"""Logs: JSON lines of the events in ``events.schema.json``, never blocking whoever logs.

A line goes through one chain of processors, is serialised once by orjson and handed to a
:class:`LineSink`, whose own thread writes it. A full disk or a blocked pipe therefore costs lines,
which are counted and reported, and never time on the event loop. Logs of other libraries come in
through the standard library's root logger and leave as ``foreign.logged`` events in the same shape.

Prompts and keys are never logged: exceptions carry no locals, and :data:`WITHHELD` names the fields
whose value is replaced should somebody pass one.
"""

import atexit
import faulthandler
import hashlib
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from common import build
from common.clock import monotonic_s

SCHEMA = 1
"""Version of the line's shape; grows only when a field changes its meaning."""
SCHEMA_FILE = Path(__file__).with_name("events.schema.json")
"""The only list of events, with what each means and its fields."""
Level = Literal["debug", "info", "warning", "error"]

WITHHELD: frozenset[str] = frozenset(
    {"api_key", "authorization", "content", "inputs", "messages", "prompt", "text"}
)
"""Fields that would hold a user's words or secrets; their values never reach a line."""

_MAX_FOREIGN_CHARS = 2_000
_QUEUE_LINES = 10_000
"""Lines that wait for a slow sink: about 5 MB, some seconds of a busy gateway."""
_MAX_BATCH_LINES = 256
_GATHER_S = 0.005
"""So long the sink's thread lets lines gather: to be woken for each would cost who logs more than
the line itself, and a process that is killed loses no more than this."""
_LOOK_S = 1.0
"""How often it is looked whether the file was moved away."""

_chain: list[Processor] = []


class LineSink:
    """Writes lines to a binary file from its own thread; when that falls behind, lines are dropped.

    ``dropped`` counts what was lost since the start. The count is also written into the log, as a
    ``log.dropped`` line, as soon as the file takes lines again. With a ``path``, what was moved
    away, as logrotate does, is followed by a new file of that name.
    """

    def __init__(
        self, file: BinaryIO, *, path: Path | None = None, capacity: int = _QUEUE_LINES
    ) -> None:
        self._fd = file.fileno()
        self._path = path
        self._capacity = capacity
        self._waiting: deque[bytes | threading.Event] = deque()
        self._is_woken = False
        self._woken = threading.Event()
        self._hurry = threading.Event()
        self._is_closing = False
        self._counting = threading.Lock()
        self.dropped = 0
        self._reported = 0
        self._is_torn = False
        self._looked_s = monotonic_s()
        self._thread = threading.Thread(target=self._run, name="log-sink", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue ``line`` (without its newline) or count it as dropped; never waits."""
        if len(self._waiting) >= self._capacity:
            self._drop(1)
            return
        self._waiting.append(line)
        if not self._is_woken:
            self._is_woken = True
            self._woken.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was queued before has been written; False when the time ran out."""
        written = threading.Event()
        self._waiting.append(written)
        self._wake_now()
        return written.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is queued and end the thread; the file stays open."""
        self._is_closing = True
        self._wake_now()
        self._thread.join(timeout_s)

    def _wake_now(self) -> None:
        self._hurry.set()
        self._is_woken = True
        self._woken.set()

    def _drop(self, num_lines: int) -> None:
        with self._counting:
            self.dropped += num_lines

    def _run(self) -> None:
        while not self._is_closing or self._waiting:
            self._woken.wait()
            self._hurry.wait(_GATHER_S)
            self._hurry.clear()
            self._woken.clear()
            self._is_woken = self._is_closing  # from here on a new line wakes this thread again
            self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            lines: list[bytes] = []
            written: threading.Event | None = None
            while self._waiting and len(lines) < _MAX_BATCH_LINES and written is None:
                item = self._waiting.popleft()
                if isinstance(item, bytes):
                    lines.append(item)
                else:
                    written = item
            self._write_all(lines)
            if written is not None:
                written.set()

    def _write_all(self, lines: list[bytes]) -> None:
        if not lines:
            return
        self._follow()
        reported = self.dropped
        if reported > self._reported:
            lines = [*lines, _dropped_line(reported - self._reported)]
        start = b"\n" if self._is_torn else b""
        data = start + b"\n".join(lines) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
                self._is_torn = True
        except OSError:
            self._drop(len(lines))
        else:
            self._reported = reported
            self._is_torn = False

    def _follow(self) -> None:
        """Write into the file of our name again, should it have been moved or removed."""
        if self._path is None or monotonic_s() - self._looked_s < _LOOK_S:
            return
        self._looked_s = monotonic_s()
        with suppress(OSError):
            ours = os.fstat(self._fd)
            try:
                named = self._path.stat()
            except FileNotFoundError:
                named = None
            if named is None or (named.st_ino, named.st_dev) != (ours.st_ino, ours.st_dev):
                with self._path.open("ab", buffering=0) as fresh:
                    os.dup2(fresh.fileno(), self._fd)


Check = Callable[[Mapping[str, object]], None]
"""Is shown each line before it is written; what it raises reaches whoever logged it."""


class _Outputs:
    """Where this process's lines go. One object, so that cached loggers follow a new set-up."""

    def __init__(self) -> None:
        self.lines: LineSink | None = None
        self.terminal: LineSink | None = None
        self.stamp: dict[str, object] = {}
        self.check: Check | None = None
        self.redis_offset_ms: float | None = None
        self.num_dropped = 0
        """By sinks of earlier set-ups."""
        self.files: list[BinaryIO] = []
        """Files of ours, to be closed; standard output is not."""


_outputs = _Outputs()


class _SinkLogger:
    """What structlog calls at the end of the chain: one method for every level."""

    def msg(self, line: bytes) -> None:
        if _outputs.lines is not None:
            _outputs.lines.write(line)

    debug = info = warning = error = critical = msg


def configure(
    role: str,
    process: str,
    *,
    log_dir: Path | None,
    pretty: bool = False,
    level: Level = "info",
    check: Check | None = None,
) -> None:
    """Send every log of this process to ``<log_dir>/<role>.jsonl``, or to standard output.

    ``role`` is a service of the schema (``gateway``, ``worker``, …); ``process`` names this
    incarnation. ``pretty`` prints a readable line on standard error as well. An event that is not
    in the schema is marked ``unlisted``; ``check``, for tests, is shown each line.

    Raises: OSError when ``log_dir`` can not be written.
    """
    shut_down()
    _outputs.redis_offset_ms = None
    _outputs.stamp = {
        "schema": SCHEMA,
        "service": role,
        "instance": process,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "version": build.version(),
        "git_sha": build.git_sha(),
    }
    file, path = _open_lines(role, log_dir)
    _outputs.lines = LineSink(file, path=path)
    _outputs.terminal = LineSink(sys.stderr.buffer) if pretty else None
    set_up_chain(level=level, pretty=pretty, check=check)
    _fold_in_foreign_logs()
    _write_crashes(role, log_dir)
    atexit.register(shut_down)


def set_up_chain(
    *, level: Level = "info", pretty: bool = False, check: Check | None = None
) -> None:
    """Have every event of our own pass through the chain; where lines go is left as it is."""
    _outputs.check = check
    meanings()
    # One list for ever: loggers that are cached keep it.
    _chain[:] = [
        structlog.contextvars.merge_contextvars,
        _withhold,
        _name_exception,
        _stamp,
        *([_print_readable(colors=sys.stderr.isatty())] if pretty else []),
        _to_json,
    ]
    structlog.configure(
        processors=_chain,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _SinkLogger(),
        cache_logger_on_first_use=True,
    )


@cache
def meanings() -> dict[str, str]:
    """The closed list of events, each ``noun.verb_past``, with what it means: from the schema."""
    schema = orjson.loads(SCHEMA_FILE.read_bytes())
    return {one["properties"]["event"]["const"]: one["description"] for one in schema["oneOf"]}


def get_logger() -> FilteringBoundLogger:
    """A logger; cheap to call at import, bound to the set-up at its first use."""
    return structlog.get_logger()


def note(**context: object) -> None:
    """Have these fields in every line from now on, unless an event says otherwise: what holds for
    the whole process, as the model that it serves.
    """
    _outputs.stamp |= context


def note_redis_clock(offset_s: float) -> None:
    """Have ``ts_redis_ms`` in every line from now on: this host's clock plus ``offset_s``."""
    _outputs.redis_offset_ms = offset_s * 1000


def dropped() -> int:
    """Lines that were lost since this process began."""
    sinks = (_outputs.lines, _outputs.terminal)
    return _outputs.num_dropped + sum(sink.dropped for sink in sinks if sink is not None)


def flush(timeout_s: float = 1.0) -> None:
    """Wait until the lines so far are written, at most ``timeout_s``: before ``os._exit``."""
    for sink in (_outputs.lines, _outputs.terminal):
        if sink is not None:
            sink.flush(timeout_s)


def shut_down(timeout_s: float = 1.0) -> None:
    """Write what is queued, then end threads and close files; :func:`configure` starts anew."""
    for sink in (_outputs.lines, _outputs.terminal):
        if sink is not None:
            sink.close(timeout_s)
    _outputs.num_dropped = dropped()
    _outputs.lines = _outputs.terminal = None
    if _outputs.files:
        faulthandler.disable()
    while _outputs.files:
        _outputs.files.pop().close()


def adopt(*libraries: str) -> None:
    """Fold in libraries that set up own handlers when imported, for any of their modules; call it
    after that import.
    """
    for library in libraries:
        modules = [
            name for name in logging.root.manager.loggerDict if name.startswith(f"{library}.")
        ]
        for name in (library, *modules):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True


def _open_lines(role: str, log_dir: Path | None) -> tuple[BinaryIO, Path | None]:
    if log_dir is None:
        return sys.stdout.buffer, None
    log_dir.mkdir(parents=True, exist_ok=True)
    # O_APPEND: several processes of one role share the file, and each write lands whole at its end.
    path = log_dir / f"{role}.jsonl"
    return _open(path), path


def _open(path: Path) -> BinaryIO:
    file = path.open("ab", buffering=0)
    _outputs.files.append(file)
    return file


def _write_crashes(role: str, log_dir: Path | None) -> None:
    """Have the interpreter's own crashes (a segfault in a kernel) leave a traceback behind."""
    if log_dir is None:
        faulthandler.enable()
        return
    faulthandler.enable(_open(log_dir / f"{role}.crash"))


# --- processors, in the order of the chain -------------------------------------------------------


def _withhold(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for field in WITHHELD.intersection(event):
        event[field] = "[withheld]"
    return event


_describe = ExceptionDictTransformer(show_locals=False, max_frames=20)


def _name_exception(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Replace ``exc_info`` by type, message, frames without locals and a fingerprint."""
    exc_info = event.pop("exc_info", None)
    if exc_info is True or (method == "exception" and not exc_info):
        exc_info = sys.exc_info()
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    if not exc_info or exc_info[0] is None:
        return event
    stack = _describe(exc_info)
    event["exception"] = stack
    frames = [f"{frame['filename']}:{frame['name']}" for frame in stack[0]["frames"][-5:]]
    described = "\n".join([str(event.get("code", "")), stack[0]["exc_type"], *frames])
    event["fingerprint"] = hashlib.sha1(described.encode(), usedforsecurity=False).hexdigest()[:12]
    return event


def _stamp(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Put time, level, name and process first; mark a name that is not in the schema."""
    name = event.pop("event")
    if name not in meanings():
        event["unlisted"] = True
    level = "error" if method == "exception" else method
    line = {"ts": _now(), "level": level, "event": name, **_outputs.stamp, **event}
    if _outputs.redis_offset_ms is not None:
        line["ts_redis_ms"] = int(time.time() * 1000 + _outputs.redis_offset_ms)
    if _outputs.check is not None:
        _outputs.check(line)
    return line


def _print_readable(*, colors: bool) -> structlog.typing.Processor:
    render = structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, pad_event_to=24, timestamp_key="time"
    )

    def print_readable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if _outputs.terminal is not None:
            shown: MutableMapping[str, Any] = {
                "time": event["ts"][11:23],
                "level": event["level"],
                "event": event["event"],
                "service": event["service"],
            }
            shown |= {k: v for k, v in event.items() if k not in shown and k not in _TERSE}
            if "exception" in event:
                raised = event["exception"][0]
                shown["raised"] = f"{raised['exc_type']}: {raised['exc_value']}"
            _outputs.terminal.write(render(logger, method, shown).encode())
        return event

    return print_readable


_TERSE = frozenset(
    {"ts", "ts_redis_ms", "schema", "pid", "host", "version", "git_sha", "exception"}
)
"""Fields that a person at a terminal does not need in each line."""


def _to_json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _dropped_line(num_lines: int) -> bytes:
    return orjson.dumps(
        {
            "ts": _now(),
            "level": "warning",
            "event": "log.dropped",
            **_outputs.stamp,
            "lines": num_lines,
        }
    )


# --- logs of other libraries ---------------------------------------------------------------------


class _ForeignHandler(logging.Handler):
    """Turns a record of the standard library into a ``foreign.logged`` event."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(
            Exception
        ):  # a malformed record of somebody else must not raise at its caller
            log = get_logger().bind(logger=record.name)
            log.log(
                record.levelno,
                "foreign.logged",
                message=record.getMessage()[:_MAX_FOREIGN_CHARS],
                exc_info=record.exc_info,
            )


def _fold_in_foreign_logs() -> None:
    root = logging.getLogger()
    root.handlers = [_ForeignHandler()]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    adopt("uvicorn", "uvicorn.error", "arq", "transformers")
    # Each request has its own canonical line; an access log would say it twice.
    logging.getLogger("uvicorn.access").disabled = True
