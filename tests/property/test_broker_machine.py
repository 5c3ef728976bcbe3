"""The invariants of protocol.md, section 9, under any interleaving of steps, losses and deaths.

Hypothesis draws what happens; a real server executes it; after each step the stage compares every
key with the reference and with one another. Each run ends without new faults, and then everything
must end and every reader be answered (invariant 9).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.broker import Publication
from common.messages import LANES, Finish, TokenRecord
from tests.support.broker_actors import Gateway, Reader, Worker
from tests.support.broker_stage import BIG, Stage
from tests.support.depth import searched
from tests.support.redis_server import RedisServer

T = TypeVar("T")

VERSIONS = ("m@1", "m@1", "m@2")
"""Of the workers, slot by slot."""
MAX_LIVING = 14
"""Less than one claim looks at, so that a claim must find whatever fits."""
FINISHES = (
    Finish("eos_token"),
    Finish("stop_sequence"),
    Finish("failed", "ENGINE_ERROR", "the device is on fire"),
)

GATEWAY_KINDS = (
    *("serves", "looks", "beats", "loses records", "loses its inbox"),
    *("pauses", "dies", "leaves", "asks"),
)
TIMES = (
    *("leases of the dead", "queue deadline", "run limit", "grace", "version"),
    *("patience", "sleep", "restart"),
)

slots = st.integers(0, len(VERSIONS) - 1)
doors = st.integers(0, 1)
picks = st.integers(0, 30)
requests = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(("ann", "bob")),
        "lane": st.sampled_from(LANES),
        "prompt_tokens": st.integers(1, 40),
        "room": st.integers(1, 12),
        "num_choices": st.sampled_from((1, 1, 1, 2, 3)),
        "weight": st.sampled_from((1.0, 0.5, 3.0)),
        "attached": st.sampled_from((True, False)),
        "grace_ms": st.sampled_from((0, 5_000)),
        "idempotency_key": st.sampled_from(("", "", "k")),
        "fingerprint": st.sampled_from(("x", "x", "y")),
        "lane_cap_tokens": st.sampled_from((4_000_000, 4_000_000, 100)),
        "resubmit": st.sampled_from((False, False, True)),
    }
)
rounds = st.fixed_dictionaries(
    {
        "slot": slots,
        "budget": st.sampled_from((BIG, BIG, BIG, 50, 0)),
        "max_generations": st.integers(1, 4),
        "loses_claim": st.sampled_from((False,) * 5 + (True,)),
        "counts": st.lists(st.integers(0, 2), min_size=1, max_size=3),
        "finishes": st.lists(st.sampled_from((None,) * 9 + FINISHES), min_size=1, max_size=3),
        "way": st.sampled_from(
            ("sent", "sent", "sent", "twice", "backwards", "call lost", "answer lost")
        ),
    }
)


class BrokerMachine(RuleBasedStateMachine):
    """Three workers of two versions, two gateways; the dead are replaced, and may still speak."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(self.url)
        self.dead_workers: list[Worker] = []
        self.dead_gateways: list[Gateway] = []
        self.orphans: list[Reader] = []

    @initialize(
        first=st.lists(requests, min_size=2, max_size=5),
        plan=st.lists(rounds, min_size=1, max_size=3),
    )
    def start(self, first: list[dict[str, Any]], plan: list[dict[str, Any]]) -> None:
        stage = self.stage
        for version in VERSIONS:
            stage.new_worker(version)
        for _ in range(2):
            stage.new_gateway()
        for drawn in first:
            stage.admit(stage.admission(gateway=stage.gateways[0], **drawn))
        self.work(plan)

    # Requests ------------------------------------------------------------------------------------

    @precondition(lambda self: self._has_room())
    @rule(drawn=requests, door=st.sampled_from((0, 0, 1, 1, None)))
    def admit(self, drawn: dict[str, Any], door: int | None) -> None:
        gateway = None if door is None else self.stage.gateways[door]
        self.stage.admit(self.stage.admission(gateway=gateway, **drawn))

    @precondition(lambda self: self._has_room())
    @rule(kind=st.sampled_from(("repeated", "after its cancel")), drawn=requests, which=picks)
    def admit_strangely(self, kind: str, drawn: dict[str, Any], which: int) -> None:
        """Asked once more, because the answer was lost; or overtaken by its own cancel."""
        stage = self.stage
        if kind == "repeated":
            stage.admit(_pick(stage.requests, which))
            return
        early = stage.admission(gateway=stage.gateways[0], **drawn | {"num_choices": 1})
        stage.cancel(f"{early.request_id}.0", _pick(("eve", early.tenant), which))
        stage.admit(early)

    def _has_room(self) -> bool:
        return len(self.stage.living()) < MAX_LIVING - 2

    # Workers -------------------------------------------------------------------------------------

    @precondition(lambda self: self.stage.living())
    @rule(slot=slots, num_rounds=st.integers(1, 3))
    def work_undisturbed(self, slot: int, num_rounds: int) -> None:
        """A worker takes whatever waits and makes a token of each per step."""
        for _ in range(num_rounds):
            self.stage.claim(self.stage.workers[slot])
            self.stage.step(self.stage.workers[slot], [1])

    @precondition(lambda self: self.stage.living())
    @rule(plan=st.lists(rounds, min_size=1, max_size=4))
    def work(self, plan: list[dict[str, Any]]) -> None:
        """Rounds of the workers' loops: claim, then publish what one engine step made."""
        for drawn in plan:
            worker = self.stage.workers[drawn["slot"]]
            self.stage.claim(
                worker,
                budget=drawn["budget"],
                max_generations=drawn["max_generations"],
                loses_answer=drawn["loses_claim"],
            )
            self.stage.step(worker, drawn["counts"], drawn["finishes"], drawn["way"])

    @rule(
        slot=slots,
        kind=st.sampled_from(
            ("beats", "forgets", "releases", "pauses", "dies", "dies unnoticed", "leaves")
        ),
        keep=st.integers(0, 1),
    )
    def worker(self, slot: int, kind: str, keep: int) -> None:
        """A death is noticed when the lease ends; who pauses for so long comes back a zombie."""
        busy = [worker for worker in self.stage.workers if worker.attempts]
        worker = _pick(busy or self.stage.workers, slot)
        match kind:
            case "beats":
                self.stage.beat(worker)
            case "forgets":
                for generation_id in list(worker.attempts)[keep:]:
                    del worker.attempts[generation_id]
                self.stage.beat(worker)
            case "releases":
                self.stage.release(worker, keep)
            case "pauses":
                self.stage.let_leases_end([worker.name])
            case "dies":
                self._replace_worker(worker)
                self.stage.let_leases_end([worker.name])
            case "dies unnoticed":
                self._replace_worker(worker)
            case _:
                self.stage.leave_worker(worker)
                self._replace_worker(worker)

    @precondition(lambda self: self.stage.living())
    @rule(slot=slots, num_deaths=st.integers(2, 4), num_rounds=st.integers(0, 2))
    def workers_die_of_what_they_claim(self, slot: int, num_deaths: int, num_rounds: int) -> None:
        """One after the other: what makes suspects, and at last finds one of them guilty."""
        for _ in range(num_deaths):
            worker = self.stage.workers[slot]
            for _ in range(1 + num_rounds):
                self.stage.claim(worker)
                self.stage.step(worker, [1])
            self._replace_worker(worker)
            self.stage.let_leases_end([worker.name])

    def _replace_worker(self, worker: Worker) -> None:
        self.dead_workers.append(worker)
        workers = self.stage.workers
        slot = workers.index(worker)
        self.stage.new_worker(worker.version)
        workers[slot] = workers.pop()

    @precondition(lambda self: self.stage.sent)
    @rule(which=st.integers(0, 200))
    def copy_of_a_publish_arrives(self, which: int) -> None:
        self.stage.publish_raw(*_pick(self.stage.sent, which))

    @rule(
        kind=st.sampled_from(("beat", "release", "claim", "attach", "detach")),
        who=picks,
        which=picks,
    )
    def call_arrives_late(self, kind: str, who: int, which: int) -> None:
        """Of somebody who died meanwhile; a beat or a release perhaps of somebody who lives."""
        stage = self.stage
        targets = list(stage.reference.generations.values())
        if kind == "beat" and stage.beats:
            stage.beat_late(*_pick(stage.beats, who))
        elif kind == "release" and stage.claims:
            worker, held = _pick(stage.claims, who)
            stage.release_raw(worker, [held])
        elif kind == "claim" and self.dead_workers:
            stage.claim(_pick(self.dead_workers, who), max_generations=2, loses_answer=True)
        elif kind == "attach" and self.dead_gateways and targets:
            stage.attach(_pick(self.dead_gateways, who), stage.reader(_pick(targets, which)))
        elif kind == "detach" and self.dead_gateways and targets:
            stage.detach(_pick(self.dead_gateways, who), _pick(targets, which).id)

    @precondition(lambda self: self.stage.reference.of_state("R"))
    @rule(which=picks, fault=st.sampled_from(("nonce", "epoch", "gap", "chain", "id")))
    def publish_wrongly(self, which: int, fault: str) -> None:
        target = _pick(self.stage.reference.of_state("R"), which)
        record = TokenRecord(target.next, "00000000", [7], [b"x"])
        epoch, _, nonce = target.fence.partition(".")
        right = Publication(target.id, target.fence, target.chain, record)
        wrong = {
            "nonce": replace(right, fence=f"{epoch}.{'0' * 16}"),
            "epoch": replace(right, fence=f"{int(epoch) - 1}.{nonce}"),
            "gap": replace(right, record=msgspec.structs.replace(record, start=target.next + 1)),
            "chain": replace(right, prev_chain="deadbeef"),
            "id": replace(right, id="request-unknown.0"),
        }[fault]
        self.stage.publish_raw(target.owner, wrong, must_be_refused=True)

    # Readers -------------------------------------------------------------------------------------

    @precondition(lambda self: self.stage.reference.generations)
    @rule(
        door=doors,
        kind=st.sampled_from(("attaches", "returns", "detaches", "cancels", "intrudes")),
        which=picks,
        seen=st.integers(0, 6),
    )
    def client(self, door: int, kind: str, which: int, seen: int) -> None:
        """Somebody reads from where it stood, comes back elsewhere, leaves, or is a stranger."""
        stage, gateway = self.stage, self.stage.gateways[door]
        target = _pick(list(stage.reference.generations.values()), which)
        match kind:
            case "attaches":
                stage.attach(gateway, stage.reader(target, position=seen))
            case "returns" if self.orphans:
                stage.attach(gateway, self.orphans.pop())
            case "detaches":
                stage.detach(gateway, target.id)
            case "cancels":
                stage.cancel(target.id, target.admission.tenant)
            case _:
                stage.attach(gateway, stage.reader(target, tenant="eve"))
                stage.cancel(target.id, "eve")

    @rule(
        door=doors,
        kind=st.sampled_from(GATEWAY_KINDS),
    )
    def gateway(self, door: int, kind: str) -> None:
        stage, gateway = self.stage, self.stage.gateways[door]
        match kind:
            case "serves":
                stage.poll(gateway)
            case "looks":
                stage.check_tails(gateway)
            case "beats":
                stage.beat_gateway(gateway)
            case "loses records":
                stage.lose_inbox(gateway, whole=False)
            case "loses its inbox":
                stage.lose_inbox(gateway, whole=True)
            case "pauses":
                stage.let_leases_end([gateway.name])
            case "dies":
                self._replace_gateway(gateway)
            case "leaves":
                stage.leave_gateway(gateway)
                self._replace_gateway(gateway)
            case _:
                stage.check_answers(gateway)

    def _replace_gateway(self, gateway: Gateway) -> None:
        self.dead_gateways.append(gateway)
        self.orphans += [reader for reader in gateway.readers if reader.finish is None]
        gateway.readers = []
        gateways = self.stage.gateways
        door = gateways.index(gateway)
        self.stage.new_gateway()
        gateways[door] = gateways.pop()

    # Time ----------------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(TIMES),
        which=picks,
        slot=st.one_of(st.none(), slots),
    )
    def time_passes(self, kind: str, which: int, slot: int | None) -> None:
        match kind:
            case "leases of the dead":
                self._let_the_dead_go()
            case "queue deadline":
                self._pass_queue_deadline(which, slot)
            case "run limit":
                for target in _one([it for it in self.stage.living() if it.epoch], which):
                    self.stage.view.pass_run_limit(target.id)
                    self.stage.reap()
            case "grace":
                for target in _one([it for it in self.stage.living() if it.is_unread], which):
                    self.stage.view.pass_grace(target.id)
                    self.stage.reap()
            case "patience":
                for target in _one([it for it in self.stage.living() if it.is_suspect], which):
                    self.stage.view.pass_patience(target.id)
            case "version":
                self.stage.view.silence_version(_pick(VERSIONS, which))
                self.stage.reap()
            case _:
                self.stage.sleep(restarted=kind == "restart")

    def _let_the_dead_go(self) -> None:
        self.stage.let_leases_end(it.name for it in (*self.dead_workers, *self.dead_gateways))

    def _pass_queue_deadline(self, which: int, slot: int | None) -> None:
        """Noticed by a reap, or by the claim of whoever comes first, unless a suspect keeps it."""
        waiting = [it for it in self.stage.reference.of_state("Q") if not it.epoch]
        has_suspects = any(it.is_suspect for it in self.stage.living())
        for target in _one(waiting, which):
            self.stage.view.pass_queue_deadline(target.id)
            if slot is None or has_suspects:
                self.stage.reap()
            else:
                self.stage.reference.time_out(target)
                self.stage.claim(self.stage.workers[slot])

    # The end -------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.stage.is_sound and self.stage.gateways:
                self._check_that_everything_ends()
        finally:
            self.stage.close()

    def _check_that_everything_ends(self) -> None:
        """Invariant 9, with one worker and one gateway."""
        stage = self.stage
        worker, gateway = stage.workers[0], stage.gateways[0]
        for other in stage.workers[1:]:
            self._replace_worker(other)
        self._replace_gateway(stage.gateways[1])
        stage.view.silence_version("m@2")
        stage.let_leases_end(
            it.name for it in (*self.dead_workers, *self.dead_gateways, *stage.workers[1:])
        )
        stage.beat_gateway(gateway)
        while self.orphans:
            stage.attach(gateway, self.orphans.pop())
        for _ in range(4 * MAX_LIVING):
            if not stage.living():
                break
            stage.beat(worker)
            stage.claim(worker, max_generations=4)
            stage.step(worker, [2])
            stage.poll(gateway)
            stage.check_tails(gateway)
        assert not stage.living(), "something stalls"
        stage.poll(gateway)
        stage.check_tails(gateway)
        assert all(reader.finish is not None for reader in gateway.readers), "somebody waits"
        left = {*stage.seen.zsets, *stage.seen.sets} - {"leases", "gateways", "versions"}
        assert not left


def _pick(items: Sequence[T], which: int) -> T:
    return items[which % len(items)]


def _one(items: Sequence[T], which: int) -> Sequence[T]:
    """One of them, if there is any."""
    return [_pick(items, which)] if items else []


@pytest.mark.timeout(600)  # only a failure takes long: the search for its shortest form
def test_invariants_hold_under_any_interleaving(any_redis_server: RedisServer) -> None:
    """No order of steps, losses, delays and deaths breaks a promise or leaves anybody waiting."""

    class Machine(BrokerMachine):
        url = any_redis_server.url

    run_state_machine_as_test(Machine, settings=searched(40, steps=40))
