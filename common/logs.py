"""Logs: JSON lines with a closed list of event names, written without ever blocking the caller.

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
import queue
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

SCHEMA = 1
"""Version of the line's shape; grows only when a field changes its meaning."""

MEANINGS: dict[str, str] = {
    "admission.resubmitted": "A gateway queued again, under the same id, what Redis had forgotten.",
    "background.failed": "The background worker could not start or go on.",
    "background.ready": "The background worker takes jobs.",
    "background.started": "A background worker process began.",
    "background.stopped": "The background worker ended on purpose.",
    "batch.cancelled": "Somebody asked to cancel a batch.",
    "batch.cleared": "What batches that ended a day ago left beside their files was removed.",
    "batch.created": "A batch was asked for.",
    "batch.failed": "Steering a batch raised; another try follows.",
    "batch.moved": "A batch went from one state to the next.",
    "batch.overtaken": "Another process steers a batch; this one stepped down.",
    "batch.part_written": "Results of lines of a batch are in storage.",
    "batch.steered": "A process took up a batch, from the state that it was in.",
    "claim.recovered": "A beat handed back what a claim had taken whose answer was lost.",
    "config.changed": "A setting was changed while running.",
    "durability.missing": "What is promised for later may be lost with Redis; the reason says why.",
    "engine.failed": "The engine raised: the device is unusable and the process exits.",
    "engine.paused": "The engine stopped stepping because results can not be published.",
    "engine.resumed": "The engine goes on after a pause.",
    "engine.selected": "Which engine, device and fast paths this worker runs, and why.",
    "engine.memory_refused": "The device had no memory for a step; it was run in parts.",
    "engine.stalled": "No step ended within its limit; the process exits.",
    "fault.injected": "A test or an operator caused a fault on purpose.",
    "feed.closed": "A reader of the live figures left.",
    "foreign.logged": "A line of another library.",
    "file.created": "A tenant uploaded a file.",
    "file.deleted": "A tenant deleted a file.",
    "file.expired": "Files, and what never became one, were removed at their end; how many.",
    "follower.failed": "A process that computes with a worker failed; the worker ends with it.",
    "follower.lost": "A process that computes with this worker has ended, so this one does, too.",
    "follower.started": "A worker started a process to compute with, on a device of its own.",
    "gateway.draining": "SIGTERM: new requests are refused, open streams go on.",
    "gateway.ready": "The gateway accepts connections.",
    "gateway.started": "A gateway process began.",
    "gateway.stopped": "The gateway ended on purpose.",
    "adapter.dropped": "A worker gave up a LoRA adapter that nobody needed, for another one.",
    "adapter.loaded": "A worker holds a LoRA adapter, on its first use there.",
    "adapter.refused": "A LoRA adapter could not be loaded; who asked for it was told.",
    "generation.cancelled": "A generation was ended by its reader or for want of one.",
    "generation.claimed": "A worker took a generation; epoch > 1 means that it continues one.",
    "generation.detached": "Nobody reads a generation any more; its grace time runs.",
    "generation.diverged": "The log holds other tokens than this worker; it gave the claim back.",
    "generation.finished": "Canonical line of a worker: a generation ended here, with its timings.",
    "generation.lost": "The fence refused a publish: another owner, or handed back meanwhile.",
    "generation.moved": "Reap handed back, detached or closed a generation.",
    "generation.quarantined": "Workers died on a generation; it is kept aside and not run again.",
    "generation.realigned": "A publish was sent again from the position that Redis names.",
    "generation.rejected": "A claimed generation can not be run: its spec, its log or its grammar.",
    "generation.released": "A worker gave a generation back for another one to continue.",
    "generation.restored": "A worker put back what Redis, gone back in time, had forgotten.",
    "generation.yielded": "A generation was given back, to make room for others that go before it.",
    "grammar.trial_failed": "No process could be started to try a grammar.",
    "inbox.recreated": "A gateway's inbox had expired; everything was attached again.",
    "job.failed": "A background job raised.",
    "job.finished": "A background job ended.",
    "job.started": "A background job began.",
    "line.failed": "A line of a batch raised; its result is INTERNAL.",
    "library.loaded": "The Redis functions of this protocol were loaded into the server.",
    "log.dropped": "Lines were lost because the sink was full or failed.",
    "model.added": "A model was put into the store.",
    "model.load_failed": "A model could not be loaded.",
    "model.load_started": "Loading of a model began.",
    "model.loaded": "A model is in memory.",
    "model.verified": "Every file of a model matches its manifest.",
    "pool.measured": "A look at the pool each minute: workers, waiting, backlog, drain rate.",
    "process.exited": "A supervised process ended.",
    "process.restarted": "The supervisor started a process again.",
    "process.started": "The supervisor started a process.",
    "redis.connected": "First contact with Redis.",
    "redis.disconnected": "Redis can not be reached.",
    "redis.reconnected": "Redis answers again.",
    "relay.failed": "A task of a gateway's relay raised; it goes on after a second.",
    "request.failed": "A request raised inside the gateway; the caller got INTERNAL.",
    "request.finished": "Canonical line of a gateway: one HTTP request, with its timings.",
    "request.rejected": "A request was refused before any work was done.",
    "response.deleted": "A stored response was deleted by its owner, with its log.",
    "server.started": "The embedded Redis server runs.",
    "server.stopped": "The embedded Redis server ended.",
    "steering.unavailable": "A background process has no model, so it steers no batches.",
    "storage.failed": "The storage of files refused something, or did not answer.",
    "stream.attached": "A gateway subscribed to a generation.",
    "stream.closed": "A reader's connection ended.",
    "stream.diverged": "The log no longer continues what a reader saw.",
    "stream.expired": "A stream was asked for that is no longer kept.",
    "stream.healed": "A lost inbox record was replaced by reading the log.",
    "stream.lagged": "A slow reader was moved from live records to the log.",
    "stream.resumed": "A reader came back and continued from its cursor.",
    "supervisor.ready": "All processes of this start are ready.",
    "supervisor.started": "The supervisor began.",
    "supervisor.stopped": "The supervisor ended and all its processes with it.",
    "webhook.dead": "An event was given up; `headrace webhooks resend` sends it anew.",
    "webhook.delivered": "An endpoint took an event.",
    "webhook.disabled": "An endpoint said that it is gone; nothing is sent to it any more.",
    "webhook.failed": "An endpoint did not take an event; it is sent again later.",
    "webhook.unsigned": "Events cannot be signed: this process lacks the pepper of their secrets.",
    "worker.draining": "SIGTERM: no more claims, running generations finish or are handed over.",
    "worker.failed": "The worker could not start or go on.",
    "worker.ready": "The engine is loaded and the worker claims.",
    "worker.started": "A worker process began.",
    "worker.stopped": "The worker ended on purpose.",
}
EVENTS: frozenset[str] = frozenset(MEANINGS)
"""The closed list of event names, each ``noun.verb_past``."""

WITHHELD: frozenset[str] = frozenset(
    {"api_key", "authorization", "content", "inputs", "messages", "prompt", "text"}
)
"""Fields that would hold a user's words or secrets; their values never reach a line."""

_MAX_FOREIGN_CHARS = 2_000
_QUEUE_LINES = 10_000
"""Lines that wait for a slow sink: about 5 MB, some seconds of a busy gateway."""
_MAX_BATCH_LINES = 256


class LineSink:
    """Writes lines to a binary file from its own thread; when that falls behind, lines are dropped.

    ``dropped`` counts what was lost since the start. The count is also written into the log, as a
    ``log.dropped`` line, as soon as the file takes lines again.
    """

    def __init__(self, file: BinaryIO, *, capacity: int = _QUEUE_LINES) -> None:
        self._fd = file.fileno()
        self._queue: queue.Queue[bytes | threading.Event | None] = queue.Queue(capacity)
        self.dropped = 0
        self._reported = 0
        self._thread = threading.Thread(target=self._run, name="log-sink", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue ``line`` (without its newline) or count it as dropped; never waits."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was queued before has been written; False when the time ran out."""
        written = threading.Event()
        try:
            self._queue.put(written, timeout=timeout_s)
        except queue.Full:
            return False
        return written.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is queued and end the thread; the file stays open."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        item: bytes | threading.Event | None = b""
        while item is not None:
            item = self._queue.get()
            lines: list[bytes] = []
            while isinstance(item, bytes):
                lines.append(item)
                if len(lines) == _MAX_BATCH_LINES or self._queue.empty():
                    break
                item = self._queue.get_nowait()
            self._write_all(lines)
            if isinstance(item, threading.Event):
                item.set()

    def _write_all(self, lines: list[bytes]) -> None:
        if not lines:
            return
        if self.dropped > self._reported:
            lines = [*lines, _dropped_line(self.dropped - self._reported)]
        reported = self.dropped
        data = b"\n".join(lines) + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self.dropped += len(lines)
        else:
            self._reported = reported


class _Outputs:
    """Where this process's lines go. One object, so that cached loggers follow a new set-up."""

    def __init__(self) -> None:
        self.lines: LineSink | None = None
        self.terminal: LineSink | None = None
        self.stamp: dict[str, object] = {}
        self.strict = False
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
    role: str, process: str, *, log_dir: Path | None, pretty: bool = False, strict: bool = False
) -> None:
    """Send every log of this process to ``<log_dir>/<role>.jsonl``, or to standard output.

    ``role`` is ``gateway``, ``worker``, ``background`` or ``supervisor``; ``process`` names this
    incarnation. ``pretty`` prints a readable line on standard error as well. ``strict`` raises on
    an event name that is not in :data:`EVENTS`; otherwise such a line is marked ``unlisted``.

    Raises: OSError when ``log_dir`` can not be written.
    """
    shut_down()
    _outputs.lines = LineSink(_open_lines(role, log_dir))
    _outputs.terminal = LineSink(sys.stderr.buffer) if pretty else None
    _outputs.strict = strict
    _outputs.stamp = {
        "schema": SCHEMA,
        "service": role,
        "instance": process,
        "pid": os.getpid(),
        "version": _package_version(),
    }
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _withhold,
            _name_exception,
            _stamp,
            *([_print_readable(colors=sys.stderr.isatty())] if pretty else []),
            _to_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _SinkLogger(),
        cache_logger_on_first_use=True,
    )
    _fold_in_foreign_logs()
    _write_crashes(role, log_dir)
    atexit.register(shut_down)


def get_logger() -> FilteringBoundLogger:
    """A logger; cheap to call at import, bound to the set-up at its first use."""
    return structlog.get_logger()


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
    _outputs.lines = _outputs.terminal = None
    if _outputs.files:
        faulthandler.disable()
    while _outputs.files:
        _outputs.files.pop().close()


def adopt(*libraries: str) -> None:
    """Fold in libraries that set up own handlers when imported; call it after that import."""
    for name in libraries:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _open_lines(role: str, log_dir: Path | None) -> BinaryIO:
    if log_dir is None:
        return sys.stdout.buffer
    log_dir.mkdir(parents=True, exist_ok=True)
    # O_APPEND: several processes of one role share the file, and each write lands whole at its end.
    return _open(log_dir / f"{role}.jsonl")


def _open(path: Path) -> BinaryIO:
    file = path.open("ab", buffering=0)
    _outputs.files.append(file)
    return file


def _package_version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "source"


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
    """Put time, level, name and process first; refuse (or mark) a name that is not in the list."""
    name = event.pop("event")
    if name not in EVENTS:
        if _outputs.strict:
            raise ValueError(f"{name!r} is not in common.logs.EVENTS")
        event["unlisted"] = True
    level = "error" if method == "exception" else method
    return {"ts": _now(), "level": level, "event": name, **_outputs.stamp, **event}


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


_TERSE = frozenset({"ts", "schema", "pid", "version", "exception"})
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
