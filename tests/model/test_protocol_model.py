"""The protocol keeps its promises in all states that a few faults reach, and needs its rules."""

from dataclasses import fields

import pytest

from tests.model.protocol_model import NOT_FOUND, STREAM_DIVERGED, Fault, Rules, Scenario
from tests.model.scenarios import (
    FIRST_DESIGN,
    KEPT,
    RULES_NEEDED,
    STALL,
    TWO_OWNERS,
    with_fewer_faults,
    without,
)
from tests.model.search import search


@pytest.mark.parametrize("name", KEPT)
def test_no_fault_breaks_a_promise_or_stalls_a_client(name: str) -> None:
    """Readers see one chain and one end, errors are rare and honest, and everything ends."""
    found = search(KEPT[name]).found
    assert found is None, found


@pytest.mark.parametrize("rule", RULES_NEEDED)
def test_each_rule_is_there_for_something(rule: str) -> None:
    """Without it, the faults that it is there for break exactly the promise that it guards."""
    found = search(without(rule)).found
    assert str(found).startswith(RULES_NEEDED[rule][1]), found


@pytest.mark.parametrize("rule", RULES_NEEDED)
def test_without_a_rule_fewer_faults_are_still_survived(rule: str) -> None:
    """The faults named for a rule are the least: no smaller number of any kind shows it missing."""
    found = search(with_fewer_faults(rule)).found
    assert found is None, found


def test_every_rule_has_its_faults_named() -> None:
    assert {rule.name for rule in fields(Rules)} == set(RULES_NEEDED)


@pytest.mark.parametrize(
    ("error", "beside"),
    [
        (NOT_FOUND, Fault.GATEWAY_CRASH),
        (STREAM_DIVERGED, Fault.WORKER_CRASH),
        (STREAM_DIVERGED, Fault.ZOMBIE),
    ],
)
def test_an_honest_error_does_follow_a_rollback_with_a_lost_process(
    error: str, beside: int
) -> None:
    """Two faults may be said, not hidden: the promise is not more than that."""
    found = search(Scenario(faults=Fault.ROLLBACK | beside, forbidden=error)).found
    assert str(found).startswith(f"violation: {error}"), found


def test_the_first_design_stalled_after_one_lost_answer() -> None:
    found = search(Scenario(rules=FIRST_DESIGN, faults=Fault.LOST_CLAIM)).found
    assert str(found).startswith(STALL)


def test_the_first_design_had_two_owners_after_one_rollback() -> None:
    found = search(Scenario(rules=FIRST_DESIGN, faults=Fault.ROLLBACK)).found
    assert str(found).startswith(TWO_OWNERS)
