"""Batches under fire: processes die in every phase, and each line comes out exactly once."""

import json

import pytest

from ops.bench import chaos_batch
from ops.bench.chaos_batch import Plan, judged


@pytest.mark.timeout(300)
def test_every_line_comes_out_once_whoever_is_killed() -> None:
    """A background worker, workers, gateways and the server, at random; then one in each phase."""
    said: list[str] = []
    report = chaos_batch.run(
        Plan(
            num_lines=300,
            num_workers=2,
            max_kills=5,
            kill_every_s=1.0,
            inter_token_ms=50,
            victims=("background", "worker", "gateway", "server"),
            phases=(),
        ),
        said.append,
    )
    assert report.has_passed, "\n".join([*said, *report.lines()])
    assert report.disturbed.kills.total() >= 2
    assert len(report.disturbed.answers) == 294, "one line in fifty is bad"


@pytest.mark.timeout(300)
def test_every_phase_can_be_cut_short_and_is_gone_through_again() -> None:
    """The background worker, which has its hands on it, and the server, which has the record."""
    said: list[str] = []
    report = chaos_batch.run(
        Plan(
            num_lines=100,
            num_workers=1,
            num_gateways=1,
            max_kills=0,
            phase_lines=100,
            victims=("background", "server"),
            phases=("validating", "in_progress", "cancelling"),
        ),
        said.append,
    )
    assert report.has_passed, "\n".join([*said, *report.lines()])
    killed = [outcome for outcome in report.phases if outcome.kills.total()]
    assert len(killed) == len(report.phases) == 6
    assert {outcome.status for outcome in report.phases} == {"completed", "cancelled"}


def batch(completed: int, failed: int, status: str = "completed") -> dict[str, object]:
    counts = {"total": completed + failed, "completed": completed, "failed": failed}
    return {"status": status, "request_counts": counts}


def answer(id: str, status_code: int = 200) -> bytes:
    response = {"status_code": status_code, "body": {"choices": [{"text": "x"}]}}
    return json.dumps({"custom_id": id, "response": response, "error": None}).encode()


def failure(id: str, code: str) -> bytes:
    return json.dumps({"custom_id": id, "response": None, "error": {"code": code}}).encode()


@pytest.mark.parametrize(
    ("shown", "output", "errors", "problem"),
    [
        (batch(2, 0), [answer("0")], [], "line 1 is missing"),
        (batch(2, 0), [answer("0"), answer("0"), answer("1")], [], "line 0 stands 2 times"),
        (batch(1, 1), [answer("0")], [failure("0", "x"), failure("1", "x")], "line 0 stands 2"),
        (batch(1, 1), [answer("0")], [failure("1", "batch_cancelled")], "line 1 failed"),
        (batch(2, 0), [answer("0"), answer("1", 500)], [], "in the output file"),
        (batch(1, 1), [answer("0"), answer("1")], [], "are the counts of 2 answers"),
    ],
)
def test_the_judge_finds_what_would_be_wrong(
    shown: dict[str, object], output: list[bytes], errors: list[bytes], problem: str
) -> None:
    _, problems = judged({"0", "1"}, shown, output, errors)
    assert any(problem in found for found in problems), problems


def test_the_judge_takes_what_is_right() -> None:
    """Of a batch that was cancelled, what was not finished by then."""
    whole = judged({"0", "1"}, batch(2, 0), [answer("0"), answer("1")], [])
    assert whole == ({"0": "x", "1": "x"}, [])
    cut = judged(
        {"0", "1"}, batch(1, 1, "cancelled"), [answer("0")], [failure("1", "batch_cancelled")]
    )
    assert cut == ({"0": "x"}, [])
