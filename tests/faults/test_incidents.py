"""Runs of the bench of incidents: the system really breaks, its logs say so, its truth fits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ops.bench.incidents import truth
from ops.bench.incidents.catalog import all_incidents, healthy_runs
from ops.bench.incidents.produce import LOG, produce, read_lines
from ops.bench.incidents.score import score
from ops.bench.incidents.truth import Truth


def run(name: str, folder: Path, fault_s: float = 4.0) -> tuple[Truth, list[dict[str, Any]]]:
    """A shorter run than the bench's, and its lines."""
    known = {one.name: one for one in (*all_incidents(), *healthy_runs())}
    told = produce(replace(known[name], lead_s=3.0, fault_s=fault_s, tail_s=1.0), folder)
    assert truth.read(folder) == told
    assert told.requests > 40
    return told, list(read_lines(folder / LOG))


def codes_of(lines: Sequence[dict[str, Any]]) -> set[str]:
    return {line["code"] for line in lines if line.get("code")}


@pytest.mark.timeout(180)
def test_a_healthy_run_has_nothing_to_find(tmp_path: Path) -> None:
    told, lines = run("healthy-4", tmp_path / "run")
    assert told.is_healthy
    assert told.onset is None
    assert codes_of(lines) <= {"ok"}
    assert {line["level"] for line in lines} == {"info"}


@pytest.mark.timeout(180)
def test_a_key_that_is_used_up_fails_one_tenant_alone(tmp_path: Path) -> None:
    told, lines = run("key-limit", tmp_path / "run", fault_s=8.0)
    assert told.names("code", "RATE_LIMITED")
    assert "RATE_LIMITED" in codes_of(lines)
    assert told.onset is not None
    scored = score(tmp_path / "run")
    assert scored.is_right, scored


@pytest.mark.timeout(180)
def test_a_prompt_that_crashes_workers_is_named_by_who_saw_them_die(tmp_path: Path) -> None:
    """Mostly the supervisor, which hands their work back at once."""
    told, lines = run("poison-prompt", tmp_path / "run")
    exits = {line["signal"] for line in lines if line["event"] == "process.exited"}
    assert "SIGSEGV" in exits
    dead = [line for line in lines if line["event"] == "job.dead"]
    assert dead
    assert all(told.names("request_id", line["job_id"].partition(".")[0]) for line in dead)
    assert "POISON_REQUEST" in codes_of(lines)
