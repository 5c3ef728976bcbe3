"""What is searched, and what is promised of it.

``RULES_NEEDED`` says of each rule which faults show what it is for. ``KEPT`` are the promises that
every test run checks; ``KEPT_DEEP`` are the same with more faults and tokens at once.
"""

from dataclasses import replace

from tests.model.protocol_model import EVENTS, FAULTS, Fault, Rules, Scenario

EVERYTHING = FAULTS | EVENTS
WITHOUT_ROLLBACK = FAULTS & ~Fault.ROLLBACK

PLAIN = Rules(settle=False, restore=False)
"""Nothing is put back after a rollback: an error may follow from it, but never a wrong token."""

EXACT_ENGINE_ONLY = Rules(
    chain=False,
    cursor=False,
    settle=False,
    restore=False,
    keep=False,
    keep_released=False,
    name_kept=False,
    own_finish=False,
)
"""What suffices for an engine whose attempts all agree."""

FIRST_DESIGN = replace(EXACT_ENGINE_ONLY, nonce=False, reconcile=False)

KEPT: dict[str, Scenario] = {
    "any two faults": Scenario(),
    "any fault, with a cancel and a preemption": Scenario(faults=EVERYTHING, max_faults=1),
    "any fault, three tokens": Scenario(max_faults=1, num_tokens=3),
    "a rollback and lost workers, exact engine": Scenario(
        faults=Fault.ROLLBACK | Fault.WORKER_CRASH | Fault.ZOMBIE, exact=True
    ),
    "plain: any three faults but a rollback": Scenario(
        rules=PLAIN, faults=WITHOUT_ROLLBACK, max_faults=3
    ),
    "plain: any fault but a rollback, with a cancel and a preemption": Scenario(
        rules=PLAIN, faults=WITHOUT_ROLLBACK | EVENTS, max_faults=1
    ),
    "plain: a restart that loses nothing, and any other fault": Scenario(
        rules=PLAIN, lossless=True
    ),
    "plain: any fault, exact engine": Scenario(rules=PLAIN, max_faults=1, exact=True),
    "plain: a rollback ends in an honest error at worst": Scenario(
        rules=PLAIN, faults=EVERYTHING, max_faults=1, excused=Fault.ROLLBACK
    ),
    "what an exact engine needs: any fault": Scenario(
        rules=EXACT_ENGINE_ONLY, max_faults=1, exact=True
    ),
}

KEPT_DEEP: dict[str, Scenario] = {
    "any two faults, three tokens": Scenario(num_tokens=3),
    "any two faults, with a cancel and a preemption": Scenario(faults=EVERYTHING),
    "any two faults, exact engine": Scenario(exact=True),
    "plain: any three faults but a rollback, with a cancel and a preemption": Scenario(
        rules=PLAIN, faults=WITHOUT_ROLLBACK | EVENTS, max_faults=3
    ),
    "plain: a rollback and any other fault end in an honest error at worst": Scenario(
        rules=PLAIN, faults=EVERYTHING, excused=Fault.ROLLBACK
    ),
    "what an exact engine needs: any two faults, an honest error at worst": Scenario(
        rules=EXACT_ENGINE_ONLY, exact=True, excused=Fault.ROLLBACK
    ),
    "any three faults": Scenario(max_faults=3),
}

TWO_OWNERS = "violation: two owners"
MIXED_LOG = "violation: the log mixes attempts"
MIXED_STREAM = "violation: the client was shown the continuation of another attempt"
HOLE = "violation: the client was shown a position without the one before it"
LOST = "violation: NOT_FOUND after a rollback, without a lost process"
DIVERGED = "violation: STREAM_DIVERGED after a rollback, without a lost process"
STALL = "stall"

RULES_NEEDED: dict[str, tuple[int, str]] = {
    "nonce": (Fault.ROLLBACK | Fault.ZOMBIE, TWO_OWNERS),
    "chain": (Fault.ROLLBACK | Fault.ZOMBIE, MIXED_LOG),
    "cursor": (Fault.ROLLBACK | Fault.WORKER_CRASH, MIXED_STREAM),
    "reconcile": (Fault.LOST_CLAIM, STALL),
    "resubmit": (Fault.ROLLBACK, LOST),
    "tail": (Fault.LOST_RECORD, STALL),
    "gap": (Fault.LOST_RECORD, HOLE),
    "settle": (Fault.ROLLBACK, DIVERGED),
    "restore": (Fault.ROLLBACK, DIVERGED),
    "keep": (Fault.ROLLBACK, DIVERGED),
    "keep_released": (Fault.ROLLBACK | Fault.PREEMPT, DIVERGED),
    "name_kept": (Fault.ROLLBACK, DIVERGED),
    "claim_lease": (Fault.ZOMBIE | Fault.WORKER_CRASH, STALL),
    "own_finish": (Fault.ROLLBACK | Fault.DROP, DIVERGED),
}
"""Rule: the faults that together break a promise without it, and which promise."""


def without(rule: str) -> Scenario:
    """All rules but one, and the faults that it is there for."""
    faults, _ = RULES_NEEDED[rule]
    return Scenario(rules=replace(Rules(), **{rule: False}), faults=faults)


def with_fewer_faults(rule: str) -> Scenario:
    """The same rules with every fault allowed, but one fewer at a time."""
    scenario = without(rule)
    return replace(scenario, faults=FAULTS, max_faults=(scenario.faults & FAULTS).bit_count() - 1)
