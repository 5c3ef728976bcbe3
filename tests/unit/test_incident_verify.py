"""The log as a history: promises are found kept in a good one, and broken in each way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from ops.bench.incidents.history import Line, Plan, read_lines, shown_moment, write_history
from ops.incident.source import open_logs
from ops.incident.verify import PROPERTIES, Violation, main, verify

PLAN = Plan(requests=1000, per_s=10.0, deaths=((1, 0.3), (2, 0.5)))
Break = Callable[[list[Line]], list[Line]]


@pytest.fixture
def odd_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for lines that are no events of the schema: those below ``tmp_path`` are checked."""
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    folder = tmp_path_factory.mktemp("good")
    write_history(folder, PLAN)
    return list(read_lines(folder))


def checked(lines: list[Line], folder: Path) -> list[Violation]:
    path = folder / "all.jsonl"
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    with open_logs([str(path)]) as logs:
        return verify(logs)


def of(lines: list[Line], event: str, **fields: Any) -> Line:
    """The first one of an early request that one worker did, undisturbed, from start to end."""
    calm = {
        line["request_id"]
        for line in lines
        if line["event"] == "request.finished"
        and (line["code"], line["attempts"]) == ("ok", 1)
        and line["tokens"] > 2
    }
    wanted = fields.items()
    return next(
        line
        for line in lines
        if line["event"] == event and line.get("request_id") in calm and wanted <= line.items()
    )


def moved(line: Line, seconds: float, **fields: Any) -> Line:
    """The same later, or earlier, with other fields."""
    at_ms = line["ts_redis_ms"] + int(seconds * 1000)
    return line | {"ts": shown_moment(at_ms / 1000), "ts_redis_ms": at_ms} | fields


def without(event: str) -> Break:
    return lambda lines: [line for line in lines if line is not of(lines, event)]


def with_changed(event: str, change: Callable[[Line], Line]) -> Break:
    def broken(lines: list[Line]) -> list[Line]:
        one = of(lines, event)
        return [change(line) if line is one else line for line in lines]

    return broken


def with_another(event: str, change: Callable[[Line], list[Line]]) -> Break:
    return lambda lines: [*lines, *change(of(lines, event))]


def _handed_on(claim: Line) -> list[Line]:
    """Another worker goes on three tokens before the place where the first one says it stopped."""
    return [
        moved(claim, 0.001, event="job.requeued", cause="release", position=9),
        moved(claim, 0.002, event="worker.claimed", attempt=2, worker="w2", next=6),
        moved(claim, 0.003, event="generation.lost", attempt=2, worker="w2"),
    ]


BREAKS: dict[str, Break] = {
    "final-event": without("request.finished"),
    "one-final-event": with_another("request.finished", lambda line: [moved(line, 1.0)]),
    "one-end": with_another(
        "worker.finished", lambda line: [moved(line, 1.0, event="job.closed", cause="due")]
    ),
    "rising-epochs": with_another(
        "worker.claimed", lambda line: [moved(line, 0.001, worker="w2", instance="w2")]
    ),
    "no-stale-epoch": with_another(
        "worker.claimed",
        lambda line: [
            moved(line, 0.001, attempt=2, worker="w2"),
            moved(line, 0.002, event="generation.lost", attempt=2, worker="w2"),
        ],
    ),
    "dense-positions": with_another("worker.claimed", _handed_on),
    "tokens-arrive": with_changed(
        "request.finished", lambda line: line | {"tokens": line["tokens"] - 1}
    ),
    "claims-end": without("worker.finished"),
    "ordered-times": with_changed("worker.finished", lambda line: moved(line, -30.0)),
}


def test_every_promise_is_broken_below() -> None:
    assert list(BREAKS) == [each.name for each in PROPERTIES]


def test_a_good_history_has_no_violation(good: list[Line], odd_logs: Path) -> None:
    """With two workers killed in the middle of their work, and their work continued."""
    assert any(line["event"] == "job.requeued" for line in good)
    assert checked(good, odd_logs) == []


@pytest.mark.parametrize("name", BREAKS)
def test_each_broken_promise_is_named(name: str, good: list[Line], odd_logs: Path) -> None:
    broken = BREAKS[name](good)
    assert broken != good
    found = checked(broken, odd_logs)
    # A worker that goes on although another one had finished breaks two promises at once.
    assert {one.property for one in found} - {"no-stale-epoch"} == {name} - {"no-stale-epoch"}
    violation = next(one for one in found if one.property == name)
    assert not violation.excuse
    assert len({one.id.partition(".")[0] for one in found}) == 1
    for place in violation.lines:
        number = int(place.rpartition(":")[2])
        assert violation.id.partition(".")[0] in str(broken[number - 1])


@pytest.mark.parametrize("name", ["final-event", "claims-end"])
def test_lost_lines_excuse_what_is_missing(name: str, good: list[Line], odd_logs: Path) -> None:
    event = {"final-event": "request.finished", "claims-end": "worker.finished"}[name]
    missing = of(good, event)
    kept = [line for line in good if line is not missing]
    dropped = {"event": "log.dropped", "lines": 3, "request_id": None, "job_id": None}
    found = checked([*kept, missing | dropped], odd_logs)
    assert [(one.property, one.excuse) for one in found] == [
        (name, f"{missing['instance']} lost 3 lines")
    ]


def test_a_gateway_that_was_killed_owes_nothing(good: list[Line], odd_logs: Path) -> None:
    missing = of(good, "request.finished")
    gateway, at_s = missing["instance"], missing["ts_redis_ms"]
    kept = [line for line in good if line["instance"] != gateway or line["ts_redis_ms"] < at_s]
    killed = moved(missing, 0.1, event="process.exited", service="supervisor", role="gateway")
    killed |= {"instance": "s1", "child_pid": missing["pid"], "request_id": None, "job_id": None}
    found = checked([*kept, killed], odd_logs)
    assert {one.property for one in found} == {"final-event"}
    assert {one.excuse for one in found} == {f"{gateway} ended without a word"}


def test_a_redis_that_went_back_explains_what_was_said_twice(
    good: list[Line], odd_logs: Path
) -> None:
    claim = of(good, "worker.claimed")
    again = BREAKS["rising-epochs"](good)
    back = moved(claim, -1.0, event="redis.reconnected", request_id=None, job_id=None)
    found = checked([*again, back], odd_logs)
    assert [one.excuse.partition(",")[0] for one in found] == ["Redis came back"]


def test_what_had_begun_before_the_log_or_ends_after_it_is_no_violation(
    good: list[Line], odd_logs: Path
) -> None:
    moments = sorted(line["ts_redis_ms"] for line in good)
    first, last = moments[len(moments) // 4], moments[len(moments) * 3 // 4]
    cut = [line for line in good if first <= line["ts_redis_ms"] < last]
    assert checked(cut, odd_logs) == []


def test_the_command_tells_violations_and_exits_with_1(good: list[Line], odd_logs: Path) -> None:
    broken = BREAKS["tokens-arrive"](good)
    checked(broken, odd_logs)
    answer = CliRunner().invoke(main, ["--logs", str(odd_logs)], standalone_mode=False)
    assert answer.return_value == 1
    request = of(good, "request.finished")["request_id"]
    assert f"headrace incident show {request} --logs {odd_logs}" in answer.output
    told = CliRunner().invoke(main, ["--logs", str(odd_logs), "--json"], standalone_mode=False)
    assert [one["property"] for one in orjson.loads(told.output)["violations"]] == ["tokens-arrive"]
    checked(good, odd_logs)
    assert (
        CliRunner().invoke(main, ["--logs", str(odd_logs)], standalone_mode=False).return_value == 0
    )
