"""Whether log lines are what ``common/events.schema.json`` says they are.

The schema is checked as it stands by one test; here each event has its properties laid together
with those of any line, which says the same and is faster.
"""

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from jsonschema_rs import Draft202012Validator
from structlog.testing import capture_logs

from common import logs

Line = Mapping[str, object]

_STAMP: dict[str, object] = {
    "ts": "2026-01-01T00:00:00.000000Z",
    "schema": logs.SCHEMA,
    "service": "worker",
    "instance": "w1",
    "pid": 1,
    "host": "here",
    "version": "source",
    "git_sha": "",
    "request_id": "r1",
}
"""For events of parts that run alone: no process told them who they are, nor for whom they run."""


@cache
def _validators() -> dict[str, Draft202012Validator]:
    schema = json.loads(logs.SCHEMA_FILE.read_bytes())
    definitions = schema["$defs"]
    line = definitions["line"]
    return {
        one["properties"]["event"]["const"]: Draft202012Validator(
            {
                "$schema": schema["$schema"],
                "type": "object",
                "properties": line["properties"] | one["properties"],
                "required": [*line["required"], *one.get("required", [])],
                "additionalProperties": False,
                "$defs": definitions,
            }
        )
        for one in schema["oneOf"]
    }


def violations(line: Line) -> list[str]:
    """What is wrong with a line, each naming the event, the field and its value."""
    event = line.get("event")
    validator = _validators().get(str(event))
    if validator is None:
        return [f"{event}: no event of the schema: {line}"]
    return [
        f"{event}: {'.'.join(map(str, error.instance_path)) or 'line'}: {error.message}"
        for error in validator.iter_errors(cast(Any, line))
    ]


_noted: list[str] = []


def note(line: Line) -> None:
    """For :func:`common.logs.set_up_chain`: kept until :func:`noted` asks, whoever logs the line;
    an exception might be caught on its way.
    """
    _noted.extend(violations(json.loads(json.dumps({**_STAMP, **line}, default=str))))


def noted() -> list[str]:
    """What was wrong with lines since the last call."""
    found = _noted[:]
    _noted.clear()
    return found


def check(line: Line) -> None:
    """For :func:`common.logs.configure`. Raises: ValueError, in whoever logs the line."""
    wrong = violations(line)
    if wrong:
        raise ValueError("; ".join(wrong))


def violations_in(path: Path) -> list[str]:
    """What is wrong with the lines of a file; those that are no events, as those of batch jobs, are
    let pass.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [fault for line in _events(whole.splitlines()) for fault in violations(line)]


def _events(lines: Iterable[bytes]) -> Generator[Line]:
    for text in lines:
        if b'"service"' in text and b'"event"' in text:
            line: object = json.loads(text)
            if isinstance(line, dict) and "service" in line:
                yield line


@contextmanager
def captured_logs() -> Generator[list[dict[str, Any]]]:
    """structlog's ``capture_logs``, whose events must be in the schema."""
    with capture_logs() as lines:
        yield lines  # pyright: ignore[reportReturnType] - its mappings are dicts
    faults = [fault for line in lines for fault in violations(_stamped(line))]
    assert not faults, "\n".join(faults)


def _stamped(caught: Mapping[str, object]) -> Line:
    line = {k: v for k, v in caught.items() if k not in ("log_level", "exc_info")}
    level = {"exception": "error"}.get(str(caught["log_level"]), caught["log_level"])
    return json.loads(json.dumps(_STAMP | line | {"level": level}, default=str))
