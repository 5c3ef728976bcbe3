"""Runs of the bench of incidents: the system really breaks, its logs say so, and its truth fits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ops.bench.incidents import truth
from ops.bench.incidents.catalog import all_incidents, healthy_runs
from ops.bench.incidents.produce import LOG, produce, read_lines
from ops.bench.incidents.truth import Truth


def run(name: str, folder: Path) -> tuple[Truth, list[dict[str, Any]]]:
    """A shorter run than the bench's, and its lines."""
    known = {one.name: one for one in (*all_incidents(), *healthy_runs())}
    told = produce(replace(known[name], lead_s=3.0, fault_s=4.0, tail_s=1.0), folder)
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
    told, lines = run("key-limit", tmp_path / "run")
    assert told.names("code", "RATE_LIMITED")
    assert "RATE_LIMITED" in codes_of(lines)
    assert told.onset is not None


@pytest.mark.timeout(180)
def test_a_worker_that_crashes_is_named_by_each_of_its_names(tmp_path: Path) -> None:
    """The truth knows every process that ran in the slot; the supervisor saw all but one die."""
    told, lines = run("worker-segfaults", tmp_path / "run")
    slot = next(str(cause.value) for cause in told.causes if cause.dimension == "slot")
    died = {
        line["child_pid"]
        for line in lines
        if line["event"] == "process.exited" and line["exit_code"] == -11
    }
    assert died
    instances = {line["instance"] for line in lines if line["pid"] in died}
    assert instances
    assert all(told.names("worker", instance) for instance in instances)
    assert slot.startswith("worker ")
