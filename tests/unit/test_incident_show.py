"""One request's whole story, found in any amount of logs, and what changes were followed by."""

import gzip
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from ops.bench.incidents.history import Line, Plan, Trouble, read_lines, write_history
from ops.incident import changes, show
from ops.incident.source import Logs

PLAN = Plan(
    requests=1500,
    deaths=((1, 0.3),),
    new_version="b2b2b2b2b2b2",
    troubles=(
        Trouble({"model_version": "b2b2b2b2b2b2"}, "NAN_LOGITS", rate=0.3),
        Trouble({"worker_number": 2}, slow=6.0, since=0.1, until=0.2),
    ),
)


@pytest.fixture(scope="module")
def logs_of_trouble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trouble")
    write_history(folder, PLAN)
    return folder


@pytest.fixture(scope="module")
def lines(logs_of_trouble: Path) -> list[Line]:
    return list(read_lines(logs_of_trouble))


def finished(lines: list[Line], **fields: Any) -> Line:
    return next(
        line
        for line in lines
        if line["event"] == "request.finished" and fields.items() <= line.items()
    )


def told(folder: Path, request: str) -> tuple[int, dict[str, Any]]:
    arguments = [request, "--logs", str(folder), "--json"]
    answer = CliRunner().invoke(show.main, arguments, standalone_mode=False)
    assert answer.exception is None, answer.exception
    return answer.return_value, orjson.loads(answer.output)


def test_what_was_asked_anew_tells_as_which(
    logs_of_trouble: Path, lines: list[Line], tmp_path: Path
) -> None:
    """However long after its end an operator decided that."""
    end = finished(lines, code="NAN_LOGITS")
    wish = {"revived_as": "another-request", "cause": "operator at the gateway"}
    line = {name: end[name] for name in ("schema", "service", "instance", "pid", "host", "version")}
    line |= {"ts": "2099-01-01T00:00:00.000000Z", "level": "info", "event": "job.revived"}
    line |= {"request_id": end["request_id"], "job_id": f"{end['request_id']}.0", "git_sha": ""}
    folder = Path(shutil.copytree(logs_of_trouble, tmp_path / "logs"))
    (folder / "command.jsonl").write_bytes(orjson.dumps(line | wish) + b"\n")
    _, answer = told(folder, end["request_id"])
    [finding] = [one for one in answer["findings"] if "asked anew" in one["what"]]
    assert "another-request by operator at the gateway" in finding["what"]
    assert "show another-request" in finding["next"]


def test_a_request_that_was_moved_tells_by_whom_and_why(
    logs_of_trouble: Path, lines: list[Line]
) -> None:
    end = finished(lines, attempts=2, code="ok")
    code, answer = told(logs_of_trouble, end["request_id"])
    story = answer["story"]
    assert code == 1
    first, second = story["attempts"]
    assert second["worker"] == end["worker"] != first["worker"]
    (finding,) = [one for one in answer["findings"] if "did not end it" in one["what"]]
    assert first["worker"] in finding["what"]
    assert "SIGKILL" in finding["why"]
    events = [line["event"] for line in story["timeline"]]
    assert events[0] == "gateway.accepted"
    assert events[-1] == "request.finished"
    assert events.count("worker.claimed") == 2
    assert {"handover", "queue", "decode"} <= {phase["name"] for phase in story["phases"]}


def test_phases_add_up_to_the_whole(logs_of_trouble: Path, lines: list[Line]) -> None:
    end = finished(lines, attempts=1, code="ok", disconnected_after=None)
    _, answer = told(logs_of_trouble, end["request_id"])
    phases = answer["story"]["phases"]
    assert abs(sum(phase["seconds"] for phase in phases) - end["duration"]) < 0.01
    assert abs(sum(phase["share"] for phase in phases) - 1) < 0.02


def test_the_phase_that_ate_the_time_is_named(logs_of_trouble: Path, lines: list[Line]) -> None:
    """Against its neighbours: a long answer alone is no finding."""
    slow = max(
        (line for line in lines if line["event"] == "request.finished" and line["tokens"] > 20),
        key=lambda line: line["generation_time"] / line["tokens"],
    )
    code, answer = told(logs_of_trouble, slow["request_id"])
    assert code == 1
    assert any(one["what"].startswith("decode ate the time") for one in answer["findings"])
    longest = max(
        (
            line
            for line in lines
            if line["event"] == "request.finished"
            and line["generation_time"] < 20
            and line["attempts"] == 1
            and line["code"] == "ok"
        ),
        key=lambda line: line["tokens"],
    )
    code, answer = told(logs_of_trouble, longest["request_id"])
    assert (code, answer["findings"]) == (0, [])


def test_a_failure_is_explained(logs_of_trouble: Path, lines: list[Line]) -> None:
    end = finished(lines, code="NAN_LOGITS")
    code, answer = told(logs_of_trouble, end["request_id"])
    assert code == 1
    assert answer["findings"][0]["next"] == "headrace explain NAN_LOGITS"
    assert answer["findings"][0]["confidence"] == "certain"


def test_a_request_is_found_by_whatever_names_it(
    logs_of_trouble: Path, lines: list[Line], tmp_path: Path
) -> None:
    """By its id or the start of it, a choice of it, its answer's id; packed or not."""
    id = finished(lines, code="ok")["request_id"]
    for path in logs_of_trouble.glob("*.jsonl"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    for name in (id[:14], f"{id}.0", f"chatcmpl-{id}"):
        _, answer = told(tmp_path if "." in name else logs_of_trouble, name)
        assert answer["story"]["request"]["request_id"] == id


def test_what_no_line_is_about_exits_with_2(logs_of_trouble: Path) -> None:
    arguments = ["f" * 32, "--logs", str(logs_of_trouble)]
    answer = CliRunner().invoke(show.main, arguments)
    assert answer.exit_code == 2
    assert "no line of these logs is about" in answer.output
    answer = CliRunner().invoke(show.main, ["000000", "--logs", str(logs_of_trouble)])
    assert "may be any of" in answer.output


def test_of_large_logs_only_the_surroundings_are_read(
    logs_of_trouble: Path, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the lines that are named keep the numbers that they have in the files."""
    monkeypatch.setattr(show, "_REACH_BYTES", 100_000)
    end = finished(lines, code="NAN_LOGITS")
    with Logs([str(logs_of_trouble)]) as logs:
        id = show.load_request(logs, end["request_id"])
        story = show.tell_story(logs, id)
        read = logs.db.execute("SELECT count(*) FROM events").fetchone()
    assert read is not None
    assert 0 < read[0] < len(lines) / 4
    for line in story.timeline:
        name, _, number = line["place"].rpartition(":")
        text = (logs_of_trouble / name).read_bytes().splitlines()[int(number) - 1]
        assert orjson.loads(text) == line["fields"]


def test_the_story_reads_well_on_a_terminal(logs_of_trouble: Path, lines: list[Line]) -> None:
    end = finished(lines, code="NAN_LOGITS")
    answer = CliRunner().invoke(
        show.main, [end["request_id"], "--logs", str(logs_of_trouble)], standalone_mode=False
    )
    for words in ("NAN_LOGITS", end["worker"], "batch.joined", "headrace explain", "◀"):
        assert words in answer.output


def test_the_change_that_made_it_worse_is_named(logs_of_trouble: Path) -> None:
    """What people did stands before what processes did for it."""
    answer = CliRunner().invoke(
        changes.main, ["--logs", str(logs_of_trouble), "--json"], standalone_mode=False
    )
    assert answer.return_value == 1
    found = orjson.loads(answer.output)
    assert found["findings"][0]["data"]["kind"] == "deploy.started"
    assert "of requests failed before" in found["findings"][0]["why"]
    kinds = {one["kind"]: one for one in found["changes"]}
    assert kinds["worker.ready"]["count"] >= 4


def test_changes_that_change_nothing_are_no_finding(tmp_path: Path) -> None:
    write_history(tmp_path, Plan(requests=1500, new_version="b2b2b2b2b2b2"))
    arguments = ["--logs", str(tmp_path), "--near", "2026-11-18T11:07:55"]
    answer = CliRunner().invoke(changes.main, arguments, standalone_mode=False)
    assert answer.return_value == 0
    assert "deploy.started" in answer.output
