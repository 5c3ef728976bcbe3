"""Logs of every kind become the same tables, and what cannot be read is counted and said."""

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from common.failures import Failure
from ops.bench.incidents.history import (
    START_S,
    Plan,
    Trouble,
    read_lines,
    shown_moment,
    write_history,
)
from ops.incident.source import Logs, open_logs
from tests.support.event_schema import violations


def line(event: str, at_s: float = START_S, **fields: Any) -> bytes:
    stamp = {"ts": shown_moment(at_s), "level": "info", "event": event, "service": "gateway"}
    return orjson.dumps(stamp | {"instance": "g1"} | fields) + b"\n"


def rows(logs: Logs, query: str) -> list[tuple[Any, ...]]:
    return logs.db.execute(query).fetchall()


@pytest.fixture
def odd_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for lines that are no events of the schema: those below ``tmp_path`` are checked."""
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    write_history(folder, Plan(requests=300, deaths=((1, 0.5),)))
    return folder


def test_made_up_histories_are_as_the_schema_says(history: Path) -> None:
    assert [fault for line in read_lines(history) for fault in violations(line)] == []


def test_a_folder_a_pattern_and_files_give_the_same(history: Path) -> None:
    counts = set[int]()
    for sources in (
        [str(history)],
        [str(history / "*.jsonl")],
        [*map(str, history.glob("*.jsonl")), str(history)],
    ):
        with open_logs(sources) as logs:
            counts.add(rows(logs, "SELECT count(*) FROM events")[0][0])
            assert logs.incomplete == []
    assert len(counts) == 1


def test_packed_and_rotated_files_are_read(history: Path, odd_logs: Path) -> None:
    (odd_logs / "gateway.jsonl.1.gz").write_bytes(
        gzip.compress((history / "gateway.jsonl").read_bytes())
    )
    for role in ("worker", "supervisor", "background"):
        (odd_logs / f"{role}.jsonl").write_bytes((history / f"{role}.jsonl").read_bytes())
    with open_logs([str(odd_logs)]) as packed, open_logs([str(history)]) as plain:
        query = "SELECT * EXCLUDE (seq) FROM events ORDER BY ALL"
        assert rows(packed, query) == rows(plain, query)


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.TextIOWrapper(io.BytesIO(line("gateway.ready") + line("gateway.stopped")))
    monkeypatch.setattr(sys, "stdin", given)
    with open_logs(["-"]) as logs:
        assert rows(logs, "SELECT event FROM events ORDER BY seq") == [
            ("gateway.ready",),
            ("gateway.stopped",),
        ]


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(history: Path, odd_logs: Path) -> None:
    whole = gzip.compress((history / "gateway.jsonl").read_bytes())
    (odd_logs / "gateway.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with open_logs([str(odd_logs)]) as logs:
        assert rows(logs, "SELECT count(*) > 100 FROM events") == [(True,)]
        assert any("breaks off" in reason for reason in logs.incomplete)


def test_malformed_lines_are_counted_with_their_places(odd_logs: Path) -> None:
    """Whatever a line holds, those around it are read, and its number is that of an editor."""
    path = odd_logs / "gateway.jsonl"
    good = line("gateway.ready")
    bad = [b"{torn\n", b"[1, 2]\n", b'{"event": "x"}\n', b"\xff\xfe\n", b"nul\x00\x1f\x00\n"]
    path.write_bytes(good + b"\n" + b"".join(each + good for each in bad) + b'{"ts": "20')
    with open_logs([str(path)]) as logs:
        assert rows(logs, "SELECT count(*) FROM events") == [(6,)]
        assert logs.malformed.count == 6
        assert [str(place) for place in logs.malformed.places] == [
            "gateway.jsonl:3",
            "gateway.jsonl:5",
            "gateway.jsonl:7",
        ]
        last = rows(logs, "SELECT max(seq) FROM events")[0][0]
        assert logs.place(last).line == 12
        assert logs.incomplete


def test_a_source_that_names_nothing_is_refused(odd_logs: Path) -> None:
    with pytest.raises(Failure, match="no such log"):
        open_logs([str(odd_logs / "none-*.jsonl")])


def test_a_crash_of_the_interpreter_is_an_event(odd_logs: Path) -> None:
    (odd_logs / "worker.jsonl").write_bytes(line("worker.ready", service="worker"))
    (odd_logs / "worker.crash").write_text("Fatal Python error: Segmentation fault\n")
    (odd_logs / "gateway.crash").touch()
    with open_logs([str(odd_logs)]) as logs:
        found = rows(
            logs, "SELECT service, details->>'text' FROM changes WHERE kind LIKE '%crash%'"
        )
    assert found == [("worker", "Fatal Python error: Segmentation fault\n")]


def test_only_the_time_asked_for_is_read(odd_logs: Path) -> None:
    """Large files are entered in the middle, and lines keep their numbers."""
    path = odd_logs / "gateway.jsonl"
    path.write_bytes(b"".join(line("gateway.ready", START_S + i, n=i) for i in range(20_000)))
    since = START_S + 10_000
    with open_logs([str(path)], since=since, until=since + 100) as logs:
        found = rows(logs, "SELECT seq, CAST(fields->>'n' AS INTEGER) FROM events ORDER BY seq")
        assert [n for _, n in found] == list(range(10_000, 10_100))
        assert logs.place(found[0][0]).line == 10_001
        assert rows(logs, "SELECT count(*) < 5000 FROM lines") == [(True,)]


def test_small_files_are_read_whole(history: Path) -> None:
    with open_logs([str(history)], since=START_S + 5, until=START_S + 20) as logs:
        first, last, lines = rows(logs, "SELECT min(t), max(t), count(*) FROM events")[0]
    assert START_S + 5 <= first < last < START_S + 20
    with open_logs([str(history)]) as logs:
        query = "SELECT count(*) FROM events WHERE t >= ? AND t < ?"
        assert logs.db.execute(query, [START_S + 5, START_S + 20]).fetchall() == [(lines,)]


def test_times_are_on_the_clock_of_redis(odd_logs: Path) -> None:
    """A host whose clock is five minutes fast does not come after what followed on it."""
    path = odd_logs / "worker.jsonl"
    fast = [
        line("worker.ready", START_S + 300 + i / 1e4, ts_redis_ms=int((START_S + i / 1e4) * 1000))
        for i in range(30)
    ]
    path.write_bytes(b"".join(fast) + line("worker.ready", START_S + 1, instance="w2"))
    with open_logs([str(path)]) as logs:
        found = rows(logs, "SELECT t, seq FROM events ORDER BY t")
    assert [seq for _, seq in found] == list(range(31))
    assert all(abs(t - START_S - seq / 1e4) < 0.0011 for t, seq in found[:30])


def test_what_is_lost_or_silent_is_said(odd_logs: Path) -> None:
    path = odd_logs / "worker.jsonl"
    who: dict[str, Any] = {"service": "worker", "instance": "w1"}
    path.write_bytes(
        line("clock.sampled", **who)
        + line("log.dropped", lines=7, **who)
        + line("clock.sampled", START_S + 400, **who)
        + line("worker.claimed", START_S + 400, job_id="r1.0", attempt=1, worker="w1", **who)
    )
    with open_logs([str(path)]) as logs:
        said = "\n".join(logs.incomplete)
    assert "worker w1 lost 7 lines" in said
    assert "worker w1 said nothing for 400 s" in said or "said nothing for 405 s" in said
    assert "no lines of any gateway" in said


def test_requests_tell_their_whole_way(odd_logs: Path) -> None:
    plan = Plan(requests=400, deaths=((0, 0.4),), troubles=(Trouble({"lane": "flex"}, "CUDA_OOM"),))
    write_history(odd_logs, plan)
    with open_logs([str(odd_logs)]) as logs:
        assert rows(logs, "SELECT count(*), count(DISTINCT request_id) FROM requests") == [
            (400, 400)
        ]
        assert rows(logs, "SELECT count(*) FROM requests WHERE ended IS NULL") == [(0,)]
        bad = rows(logs, "SELECT DISTINCT code, lane, outcome FROM requests WHERE is_bad")
        assert bad == [("CUDA_OOM", "flex", "failed")]
        refused = rows(
            logs, "SELECT DISTINCT code, is_bad FROM requests WHERE outcome = 'rejected'"
        )
        assert refused == [("CONTEXT_LENGTH_EXCEEDED", False)]
        moved = rows(logs, "SELECT max(attempts), max(deaths) FROM requests")
        assert moved == [(2, 1)]
        ends = rows(
            logs,
            "SELECT end_event FROM attempts WHERE request_id IN (SELECT request_id "
            "FROM requests WHERE attempts = 2) ORDER BY attempt LIMIT 1",
        )
        assert ends == [("job.requeued",)]
        query = "SELECT bool_and(claimed <= joined AND joined <= ended) FROM attempts"
        assert rows(logs, query) == [(True,)]
        kinds = {kind for (kind,) in rows(logs, "SELECT kind FROM changes")}
        assert {"process.exited", "process.restarted", "worker.state"} <= kinds


def test_a_request_without_an_end_is_lost_when_the_log_goes_on(odd_logs: Path) -> None:
    path = odd_logs / "gateway.jsonl"
    path.write_bytes(
        line("gateway.accepted", request_id="r-lost", api="chat")
        + line("gateway.accepted", START_S + 90, request_id="r-open", api="chat")
        + line("gateway.ready", START_S + 100)
    )
    with open_logs([str(path)]) as logs:
        found = rows(logs, "SELECT request_id, outcome, is_bad FROM requests ORDER BY ALL")
    assert found == [("r-lost", "unfinished", True), ("r-open", "unfinished", False)]
