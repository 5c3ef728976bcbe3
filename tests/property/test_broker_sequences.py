"""Sequences that once broke an invariant, in their shortest form.

The machine beside this file found them, or would have with more luck. The stage compares every step
with the reference and every key with the others, so most of these tests only say what happens.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from common.messages import Finish
from tests.support.broker_stage import Stage
from tests.support.redis_server import RedisServer


@pytest.fixture
def stage(redis_server: RedisServer) -> Iterator[Stage]:
    stage = Stage(redis_server.url)
    yield stage
    stage.close()


def test_a_claim_after_the_lease_ended_leaves_nothing_that_nobody_watches(stage: Stage) -> None:
    """A paused worker claims before it beats and dies: its generation still goes back."""
    worker = stage.new_worker()
    stage.admit(stage.admission(attached=False))
    stage.let_leases_end([worker.name])
    stage.claim(worker)
    stage.let_leases_end([worker.name])
    assert [it.deaths for it in stage.reference.of_state("Q")] == [1]


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_failure_keeps_its_message(stage: Stage, num_tokens: int) -> None:
    """Also when no token comes with it: a client is told what went wrong."""
    worker = stage.new_worker()
    stage.admit(stage.admission(attached=False))
    stage.claim(worker)
    stage.step(worker, [num_tokens])
    stage.step(worker, [0], [Finish("failed", "ENGINE_ERROR", "the device is on fire")])


def test_a_failure_keeps_its_message_when_its_tokens_are_known_already(stage: Stage) -> None:
    """The worker sends tokens once more together with the end, which is all that is new."""
    worker = stage.new_worker()
    stage.admit(stage.admission(attached=False))
    stage.claim(worker)
    stage.step(worker, [2], way="answer lost")
    (attempt,) = worker.attempts.values()
    (tokens,) = attempt.unacknowledged
    finish = Finish("failed", "ENGINE_ERROR", "the device is on fire")
    record = msgspec.structs.replace(tokens.record, finish=finish)
    stage.publish(worker, [replace(tokens, record=record)])


def test_an_idempotency_key_lives_until_the_last_choice_has_ended(stage: Stage) -> None:
    """The end of one choice neither frees the key nor shortens its life under the others."""
    worker = stage.new_worker()
    options: dict[str, Any] = {"attached": False, "num_choices": 2, "idempotency_key": "k"}
    stage.admit(stage.admission(retention_ms=1_000, **options))
    stage.claim(worker)
    stage.step(worker, [0], [Finish("failed", "ENGINE_ERROR"), None])
    stage.admit(stage.admission(**options))
    stage.step(worker, [0], [Finish("failed", "ENGINE_ERROR")])
    stage.admit(stage.admission(**options))
    assert [it.state for it in stage.reference.generations.values()] == ["T", "T", "Q", "Q"]


def test_the_run_limit_holds_for_what_nobody_reads(stage: Stage) -> None:
    """An unread generation keeps the end of its grace time, but never beyond its run limit."""
    worker = stage.new_worker()
    stage.admit(stage.admission(attached=True, queue_limit_ms=7_200_000, run_limit_ms=60_000))
    stage.claim(worker)


def test_a_sleeping_machine_leaves_its_model_versions_alive(stage: Stage) -> None:
    """After a sleep every worker seems silent for minutes: what waits for its version goes on."""
    worker = stage.new_worker()
    stage.admit(stage.admission(attached=False))
    stage.claim(worker)
    stage.step(worker, [2])
    stage.release(worker)
    stage.sleep()
    stage.beat(worker)
    stage.claim(worker)
    stage.step(worker, [2])
    assert [it.reason for it in stage.reference.of_state("T")] == ["length"]


def test_what_comes_back_to_a_forgotten_version_still_ends(stage: Stage) -> None:
    """The last worker of a version is reaped after its version: its tokens get an honest end."""
    worker, gateway = stage.new_worker("m@2"), stage.new_gateway()
    stage.admit(stage.admission(gateway=gateway))
    stage.claim(worker)
    stage.step(worker, [2])
    stage.view.silence_version("m@2")
    stage.reap()
    stage.let_leases_end([worker.name])
    stage.view.silence_version("m@2")
    stage.reap()
    assert [it.code for it in stage.reference.of_state("T")] == ["MODEL_VERSION_GONE"]


def test_generations_that_expired_unseen_leave_no_backlog(stage: Stage) -> None:
    """All processes were away longer than anything lives: what is left of it weighs nothing."""
    worker = stage.new_worker()
    for lane in ("default", "flex"):
        stage.admit(stage.admission(lane=lane, attached=False))
    for name in list(stage.seen.ttl_ms):
        if name.startswith(("gen:", "spec:")):
            stage.view.delete(name)
    for _ in range(2):
        stage.do(worker.claim())
        stage.do(stage.broker.reap())
    left = stage.view.look()
    assert [left.backlog(lane) for lane in ("default", "flex")] == [(0, 0), (0, 0)]
    assert not left.zset("lane:default")


def test_a_suspect_never_blocks_the_head_of_its_lane(stage: Stage) -> None:
    """Two workers died with it: it waits outside the lane, and two more, alone, end it."""
    workers = [stage.new_worker() for _ in range(4)]
    stage.admit(stage.admission(attached=False))
    for worker in workers:
        stage.claim(worker)
        stage.let_leases_end([worker.name])
    assert [it.code for it in stage.reference.of_state("T")] == ["POISON_REQUEST"]


def test_a_worker_with_much_is_reaped_in_parts(stage: Stage) -> None:
    """What one reap leaves of a dead worker, the next finds again."""
    worker, heir = stage.new_worker(), stage.new_worker()
    for _ in range(40):
        stage.admit(stage.admission(attached=False, lane_cap_tokens=1_000))
    stage.do(worker.claim(max_generations=20))
    stage.do(worker.claim(max_generations=20))
    stage.view.pass_lease(worker.name)
    moved = [len(stage.do(stage.broker.reap())) for _ in range(4)]
    assert moved == [16, 16, 8, 0]
    assert len(stage.do(heir.claim(max_generations=32)).generations) == 32


@pytest.mark.parametrize("by_claim", [False, True])
def test_nothing_starts_after_its_queue_deadline(stage: Stage, *, by_claim: bool) -> None:
    """Whoever looks first ends it: the reaper, or a worker that could have taken it."""
    worker = stage.new_worker()
    for _ in range(2):
        stage.admit(stage.admission(attached=False))
    late, punctual = stage.reference.generations.values()
    stage.view.pass_queue_deadline(late.id)
    if by_claim:
        stage.reference.time_out(late)
    else:
        stage.reap()
    stage.claim(worker)
    assert (late.code, punctual.state) == ("QUEUE_TIMEOUT", "R")


def test_a_late_release_does_not_take_it_from_its_next_owner(stage: Stage) -> None:
    """A zombie hands back what another worker has claimed meanwhile: the fence tells them apart."""
    zombie, heir = stage.new_worker(), stage.new_worker()
    stage.admit(stage.admission(attached=False))
    stage.claim(zombie)
    stage.let_leases_end([zombie.name])
    stage.claim(heir)
    stage.release(zombie)
    assert [it.owner for it in stage.reference.of_state("R")] == [heir.name]
