"""The bench of incidents without any process: its truths, its catalogue, its traffic, its score."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from ops.bench import machine
from ops.bench.incidents import truth
from ops.bench.incidents.catalog import all_incidents, healthy_runs
from ops.bench.incidents.command import has_passed
from ops.bench.incidents.produce import read_lines
from ops.bench.incidents.score import Score, findings_in, markdown, onset_in, summarise
from ops.bench.incidents.traffic import Asker, Source
from ops.bench.incidents.truth import Cause, Truth
from ops.bench.incidents.worker import Orders, OrdersFile


def told(*causes: Cause) -> Truth:
    return Truth(
        name="a", kind="slow worker", seed=1, symptom="slow", onset=5.0, causes=list(causes)
    )


@pytest.mark.parametrize(
    ("cause", "dimension", "value"),
    [
        (Cause("worker", "w1"), "worker", "w1"),
        (Cause("stream", True), "stream", "true"),
        (Cause("n", 2.0), "n", "2.0"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "256-1023"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "64–255"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", ">=512"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "512+"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", [512, None]),
        (Cause("batch_size", (4, 64)), "batch_size", 5),
    ],
)
def test_a_truth_knows_its_cause_in_other_words(
    cause: Cause, dimension: str, value: object
) -> None:
    assert told(Cause("lane", "flex"), cause).names(dimension, value)


@pytest.mark.parametrize(
    ("cause", "dimension", "value"),
    [
        (Cause("worker", "w1"), "worker", "w2"),
        (Cause("worker", "w1"), "gateway", "w1"),
        (Cause("stream", True), "stream", "false"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "<64"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "16-63"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", "short"),
        (Cause("prompt_tokens", (200, 1000)), "prompt_tokens", None),
        (Cause("batch_size", (4, 64)), "batch_size", True),
    ],
)
def test_a_truth_takes_nothing_else_for_its_cause(
    cause: Cause, dimension: str, value: object
) -> None:
    assert not told(cause).names(dimension, value)


def test_a_truth_is_kept_as_it_is(tmp_path: Path) -> None:
    kept = told(Cause("worker", "w1"), Cause("max_tokens", (31, 1000)), Cause("stream", True))
    truth.write(tmp_path, kept)
    assert truth.read(tmp_path) == kept
    assert not kept.is_healthy
    assert told().is_healthy


def test_the_catalogue_is_as_large_as_was_promised_and_each_run_has_a_name_and_a_seed() -> None:
    ill, well = all_incidents(), healthy_runs()
    assert len(ill) >= 40
    assert len(well) >= 10
    for field in ("name", "seed"):
        counts = Counter(getattr(run, field) for run in (*ill, *well))
        assert counts.most_common(1)[0][1] == 1, f"two runs have one {field}"


def test_clients_ask_the_same_whenever_their_seed_is_the_same() -> None:
    """And of each kind of request there is some."""
    source = Source(rate=5.0, words="first", tier="flex", new_tokens=(3, 9), prompt_words=(4, 6))
    runs = [[Asker(source, seed).next() for _ in range(1)] for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    asker = Asker(source, 7)
    asked = [asker.next() for _ in range(300)]
    assert {one.path for one in asked} == {
        "/v1/completions",
        "/v1/chat/completions",
        "/generate",
        "/generate_stream",
    }
    assert len({one.request_id for one in asked}) == 300
    of_openai = [one.body for one in asked if one.path.startswith("/v1")]
    assert {body["service_tier"] for body in of_openai} == {"flex"}
    assert {body["max_tokens"] for body in of_openai} == set(range(3, 10))
    assert {body["stream"] for body in of_openai} == {True, False}
    assert any("response_format" in body for body in of_openai)
    of_tgi = [one.body for one in asked if not one.path.startswith("/v1")]
    assert all(body["inputs"].startswith("first ") for body in of_tgi)
    assert any("grammar" in body["parameters"] for body in of_tgi)


def test_orders_hold_from_when_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "worker-1.json"
    file = OrdersFile(path)
    assert file.now() == Orders()
    path.write_bytes(msgspec.json.encode(Orders(step_factor=3.0)))
    assert file.now().step_factor == 3.0


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "gateway.jsonl").write_bytes(b'{"event":"gateway.ready"}\nTraceback\n{"event":"x"')
    assert [line["event"] for line in read_lines(tmp_path)] == ["gateway.ready"]


ANSWER = {
    "findings": [
        {"what": "something at that time", "data": {"kind": "interval"}},
        {
            "what": "worker w1",
            "data": {"kind": "trait", "subject": {"worker": "w1"}, "aliases": {"host": "h"}},
        },
    ]
}


def test_a_finding_is_right_if_it_names_the_cause_or_another_name_of_it() -> None:
    first, second = findings_in(ANSWER)
    assert not first.names_a_cause
    assert not first.is_right(told(Cause("kind", "interval")))
    assert second.is_right(told(Cause("worker", "w1")))
    assert second.is_right(told(Cause("host", "h")))
    assert not second.is_right(told(Cause("worker", "w2")))
    assert findings_in({}) == []


def test_the_onset_is_that_of_the_first_finding_or_else_of_the_first_symptom() -> None:
    symptoms = [{"start": 9.0}, {"start": 4.5}, {"start": None}]
    findings = [{"data": {"since": 6.0}}, {"data": {"since": 1.0}}]
    assert onset_in({"symptoms": symptoms, "findings": findings}) == 6.0
    assert onset_in({"symptoms": symptoms, "findings": [{"data": {"since": None}}]}) == 4.5
    assert onset_in({}) is None


def scored(name: str, *, rank: int, healthy: bool = False, blames: bool = True) -> Score:
    return Score(
        name=name,
        kind="slow worker",
        symptom="slow",
        is_healthy=healthy,
        true_cause="worker w1",
        named="worker | w1" if blames else "",
        rank=rank,
        blames=blames,
        onset_error_s=-0.5,
        seconds=1.25,
        exit_code=1,
    )


def test_the_report_counts_first_and_top_places_and_false_blame() -> None:
    scores = [
        *(scored(f"ill-{n}", rank=1) for n in range(9)),
        scored("ill-9", rank=3),
        scored("well-1", rank=0, healthy=True, blames=False),
    ]
    report = summarise(scores, machine.describe(), "abc")
    assert (report.incidents, report.first, report.in_top) == (10, 0.9, 1.0)
    assert (report.healthy, report.falsely_blamed, report.onset_error_s) == (1, 0, 0.5)
    assert has_passed(report)
    page = markdown(report)
    assert "| true cause named first | 90% |" in page
    assert "| ill-9 | slow worker | worker w1 | 3 | worker \\| w1 | -0.5 s | 1.2 s |" in page


@pytest.mark.parametrize(
    "worse",
    [scored("ill", rank=0), scored("well", rank=0, healthy=True)],
    ids=["a cause is missed", "a healthy run has a culprit"],
)
def test_a_miss_and_a_false_culprit_fail_the_bench(worse: Score) -> None:
    scores = [scored("first", rank=1), worse]
    assert not has_passed(summarise(scores, machine.describe(), "abc"))
