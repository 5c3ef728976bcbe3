"""One shape of line for every process, and a sink that never makes anybody wait."""

import ast
import contextvars
import json
import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from jsonschema import Draft202012Validator

from common import logs
from common.logs import LineSink, get_logger
from tests.support.event_schema import check, note, violations
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log_dir(tmp_path: Path) -> Iterator[Path]:
    """Logging set up as in a process, and undone afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("worker", "w1234", log_dir=tmp_path)
    yield tmp_path
    logs.shut_down()
    logs.set_up_chain(check=note)
    (tmp_path / "worker.jsonl").unlink()  # events here are made up
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


def lines_in(folder: Path) -> list[dict[str, Any]]:
    logs.flush()
    return [json.loads(line) for line in (folder / "worker.jsonl").read_bytes().splitlines()]


def test_a_line_says_when_what_and_who_before_its_own_fields(log_dir: Path) -> None:
    """The same first fields in the same order in every line of every process."""
    get_logger().info("worker.ready", model_version="m@1")
    [line] = lines_in(log_dir)
    assert list(line) == [
        *("ts", "level", "event", "schema", "service", "instance", "pid", "host", "version"),
        *("git_sha", "model_version"),
    ]
    assert line["host"] == socket.gethostname()
    assert line["ts"].endswith("Z")
    assert (line["level"], line["event"], line["service"]) == ("info", "worker.ready", "worker")
    assert (line["instance"], line["pid"], line["schema"]) == ("w1234", os.getpid(), 1)


def test_a_second_process_appends_to_the_same_file(log_dir: Path) -> None:
    """Several gateways share one file, as a restarted worker shares its predecessor's."""
    get_logger().info("worker.ready")
    logs.flush()
    logs.configure("worker", "w5678", log_dir=log_dir)
    get_logger().info("worker.ready")
    assert [line["instance"] for line in lines_in(log_dir)] == ["w1234", "w5678"]


def test_a_name_outside_the_schema_is_marked_and_written(log_dir: Path) -> None:
    """A typo in an event name loses no line in production; the tests' own check names it."""
    get_logger().info("worker.exploded")
    [line] = lines_in(log_dir)
    assert line["unlisted"] is True
    with pytest.raises(ValueError, match=r"worker\.exploded: no event of the schema"):
        check(line)


def test_a_wrong_field_is_named_with_its_event_and_value(log_dir: Path) -> None:
    """A reader relies on names and types; whoever breaks them learns where."""
    logs.configure("worker", "w1234", log_dir=log_dir, check=check)
    with pytest.raises(ValueError, match=r'gateway\.ready: url: 8080 is not of type "string"'):
        get_logger().info("gateway.ready", url=8080)
    with pytest.raises(ValueError, match=r"gateway\.ready: line: .*'adress'"):
        get_logger().info("gateway.ready", adress="http://127.0.0.1")
    get_logger().info("gateway.ready", url="http://127.0.0.1:8080")
    assert [line["event"] for line in lines_in(log_dir)] == ["gateway.ready"]


def test_bound_context_is_in_every_line(log_dir: Path) -> None:
    """Bound once at the border, never passed along."""

    def serve() -> None:
        structlog.contextvars.bind_contextvars(request_id="r1")
        get_logger().info("request.finished", status=200)

    contextvars.copy_context().run(serve)
    [line] = lines_in(log_dir)
    assert (line["request_id"], line["status"]) == ("r1", 200)


def test_what_a_user_wrote_is_withheld(log_dir: Path) -> None:
    """Should somebody pass a prompt or a key, its value does not reach the file."""
    get_logger().info("request.finished", prompt="a secret", authorization="Bearer abc", tokens=3)
    [line] = lines_in(log_dir)
    assert (line["prompt"], line["authorization"], line["tokens"]) == (
        "[withheld]",
        "[withheld]",
        3,
    )


def test_an_exception_has_frames_and_a_fingerprint_but_no_locals(log_dir: Path) -> None:
    """Locals hold prompts. Equal errors have equal fingerprints, others have others."""

    def fail(prompt: str, error: Exception) -> None:
        try:
            raise error
        except type(error):
            get_logger().exception("worker.failed", code=str(len(prompt)))

    fail("the user's words", ValueError("no"))
    fail("the user's woods", ValueError("no, again"))
    fail("the user's words", KeyError("no"))
    first, second, third = lines_in(log_dir)
    assert "the user's" not in json.dumps([first, second, third])
    assert first["level"] == "error"
    assert first["exception"][0]["exc_type"] == "ValueError"
    assert first["exception"][0]["frames"][-1]["name"] == "fail"
    assert first["fingerprint"] == second["fingerprint"] != third["fingerprint"]


def test_logs_of_other_libraries_come_in_the_same_shape(log_dir: Path) -> None:
    """Standard logging and warnings are folded in; what is below a warning is not ours to keep."""
    logging.getLogger("somebody").warning("lost %s", "a connection")
    logging.getLogger("somebody").info("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    foreign, warned = lines_in(log_dir)
    assert (foreign["event"], foreign["level"]) == ("foreign.logged", "warning")
    assert (foreign["logger"], foreign["message"]) == ("somebody", "lost a connection")
    assert "old call" in warned["message"]


def test_access_logs_are_off_and_own_handlers_are_taken_over(log_dir: Path) -> None:
    """A request has one canonical line; a library that brought its own handler loses it."""
    assert logging.getLogger("uvicorn.access").disabled
    library = logging.getLogger("transformers")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    logs.adopt("transformers")
    library.warning("folded in")
    assert lines_in(log_dir)[-1]["message"] == "folded in"


def test_pretty_prints_a_readable_line_besides(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], log_dir: Path
) -> None:
    """For a person at a terminal: time, name and fields, without the machine's ones."""
    logs.configure("worker", "w1234", log_dir=tmp_path, pretty=True)
    get_logger().info("worker.ready", model_version="m@1")
    [line] = lines_in(log_dir)
    shown = capfdbinary.readouterr().err.decode()
    assert "worker.ready" in shown
    assert "model_version=m@1" in shown
    assert "schema" not in shown
    assert line["event"] == "worker.ready"


async def test_a_blocked_sink_costs_lines_and_never_time() -> None:
    """Nobody reads the pipe: writing goes on at once, and the loss is counted and reported."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as file, os.fdopen(read_end, "rb") as reader:
        sink = LineSink(file, capacity=50)
        line = b"x" * 4096
        for _ in range(500):  # far more than pipe and queue can hold
            sink.write(line)
        assert sink.dropped > 300

        taken = b""

        def is_reported() -> bool:
            nonlocal taken
            taken += os.read(reader.fileno(), 1 << 20)
            sink.write(b"one more")
            return b"log.dropped" in taken

        await wait_until(is_reported, what="the report of what was lost")
        report = next(line for line in taken.splitlines() if b"log.dropped" in line)
        assert json.loads(report)["lines"] > 300
        assert taken.startswith(line)
        sink.close(5)


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """What could not be written is counted; the process goes on."""
    with Path("/dev/full").open("wb", buffering=0) as full:
        sink = LineSink(full)
        sink.write(b"lost")
        assert sink.flush(5)
        assert sink.dropped == 1
        sink.close(5)
    with (tmp_path / "fine").open("wb", buffering=0) as file:
        sink = LineSink(file)
        sink.write(b"kept")
        sink.close(5)
    assert (tmp_path / "fine").read_bytes() == b"kept\n"


def test_every_event_in_the_source_is_in_the_list() -> None:
    """Names are literals, so a reader of the log can find the line that wrote them."""
    unlisted = {
        f"{path.relative_to(ROOT)}:{call.lineno} {name}"
        for path in source_files()
        for call, name in logged_names(path)
        if name not in logs.meanings()
    }
    assert not unlisted


def source_files() -> list[Path]:
    folders = ("common", "gateway", "workers", "ops")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def logged_names(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Calls such as ``log.info("noun.verb_past", …)`` with their names."""
    methods = {"debug", "info", "warning", "error", "critical", "exception"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in methods or not node.args:
            continue
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield node, name.value


def test_every_event_of_the_schema_is_logged_somewhere() -> None:
    """A name that nobody writes sends readers on a search. Some are for programs beside these."""
    logged = {name for path in source_files() for name in constants_in(path)}
    assert sorted(logs.meanings().keys() - logged - {"eval.run", "fault.injected"}) == []


def constants_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {it.value for it in nodes if isinstance(it, ast.Constant) and isinstance(it.value, str)}


def test_the_schema_is_a_schema_and_takes_a_line_as_it_is_written(log_dir: Path) -> None:
    """Anybody's validator can use the file alone; the tests' faster one must agree with it."""
    schema = json.loads(logs.SCHEMA_FILE.read_bytes())
    Draft202012Validator.check_schema(schema)
    whole = Draft202012Validator(schema)
    get_logger().info("gateway.ready", url="http://127.0.0.1:8080")
    get_logger().info("gateway.ready", adress="http://127.0.0.1:8080")
    good, bad = lines_in(log_dir)
    assert whole.is_valid(good)
    assert not whole.is_valid(bad)
    assert not violations(good)
    assert violations(bad)


ENDING = "import common.logs as logs; logs.configure('worker', 'w1', log_dir=None)\n"
LIBRARIES = {
    "arq": "from arq.worker import logger; logger.warning('said %s', 'by arq')",
    "redis": "import redis.asyncio, logging; logging.getLogger('redis').error('said by redis')",
    "torch": """
import torch, logging
logs.adopt('torch')
logging.getLogger('torch._dynamo').warning('said by torch')
""",
    "transformers": """
from transformers.utils import logging
logs.adopt('transformers')
logging.get_logger('transformers.generation').warning('said by transformers')
""",
    "uvicorn": """
import uvicorn
uvicorn.Config('x:y', log_config=None)
import logging; logging.getLogger('uvicorn.error').warning('said by uvicorn')
""",
    "warnings": "import warnings; warnings.warn('said by warnings', stacklevel=1)",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_with_its_own_log_says_it_in_ours(library: str) -> None:
    """A process of which only standard output is kept: each line of it is an event, once."""
    code = f"{ENDING}{LIBRARIES[library]}\nlogs.flush()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    [line] = [json.loads(text) for text in ended.stdout.splitlines()]
    assert (line["event"], line["service"]) == ("foreign.logged", "worker")
    assert f"said by {library}" in line["message"]
    assert violations(line) == []
    assert b"said" not in ended.stderr
