"""A partition on a real server with its actors, where every step is compared with the reference.

A test says who does what, in whichever order; each call here is executed by the server, predicted
by the reference, and followed by a look at every key (:meth:`Stage.settle`). So a test of an
interleaving needs no assertions of its own.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from redis import Redis

from common.broker import Admission, Broker, ClaimAnswer, Presentation, Publication, connect
from common.failures import Failure
from common.ids import generation_id as name_of
from common.messages import (
    LANES,
    RANKS,
    Finish,
    GenerationSpec,
    Sampling,
    chain_next,
    chain_start,
    chain_text,
)
from tests.support.broker_actors import LEASE_MS, Gateway, Reader, Worker
from tests.support.broker_invariants import check_invariants, check_step
from tests.support.broker_reference import SUSPECT_PATIENCE_MS, Expected, Reference
from tests.support.broker_view import PartitionView

T = TypeVar("T")

POOL = "test"
HOUR_MS = 3_600_000
BIG = 1_000_000
"""A budget that never limits a claim."""


class Stage:
    """Empties the server behind ``url``; close it at the end."""

    def __init__(self, url: str) -> None:
        self.broker = Broker(connect(url), POOL)
        self.reference = Reference()
        self.requests: list[Admission] = []
        self.workers: list[Worker] = []
        self.gateways: list[Gateway] = []
        self.claims: list[tuple[Worker, tuple[str, str]]] = []
        self.sent: list[tuple[str, Publication]] = []
        self.beats: list[tuple[Worker, int, list[str]]] = []
        self.is_sound = True
        self._runner = asyncio.Runner()
        self._redis = Redis.from_url(url)
        self._redis.flushdb()
        self.view = PartitionView(self._redis, POOL)
        self.seen = self.view.look()
        self._num_incarnations = 0
        self._clock_seen_s = 0.0

    def close(self) -> None:
        self._runner.run(self.broker.close())
        self._runner.close()
        self._redis.close()

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        """Execute a step; no time has passed since the one before, however slow this machine is."""
        self.is_sound = False
        if time.monotonic() - self._clock_seen_s > 1:
            self.view.look_at_the_clock()
            self._clock_seen_s = time.monotonic()
        return self._runner.run(call)

    def settle(self) -> None:
        """Look at every key. Raises: AssertionError: something does not hold."""
        self.is_sound = False
        after = self.view.look()
        check_step(self.seen, after)
        check_invariants(after)
        self.reference.check(after)
        for gateway in self.gateways:
            for reader in gateway.readers:
                self.reference.check_reader(reader)
        self.seen = after
        self.is_sound = True

    def living(self) -> list[Expected]:
        return self.reference.of_state("Q", "R")

    # Requests ------------------------------------------------------------------------------------

    def admission(
        self,
        *,
        prompt_tokens: int = 4,
        room: int = 4,
        gateway: Gateway | None = None,
        **options: Any,
    ) -> Admission:
        """A new request; it waits and runs as long as it likes unless ``options`` say otherwise."""
        request = f"request-{len(self.requests)}"
        limits: dict[str, Any] = {"queue_limit_ms": 2 * HOUR_MS, "run_limit_ms": HOUR_MS}
        admission = Admission(
            request_id=request,
            spec=GenerationSpec(b"\0" * 4 * prompt_tokens, Sampling(room, seed=1), request),
            cost=prompt_tokens + room,
            presentation=Presentation("tgi", 0, 0, prompt_tokens),
            gateway=gateway.name if gateway else "",
            **limits | options,
        )
        self.requests.append(admission)
        return admission

    def admit(self, admission: Admission) -> None:
        expected = self.reference.admit(admission, self.seen)
        answer = self.do(_or_code(self.broker.admit(admission)))
        if isinstance(answer, str):
            assert (answer, "") == expected
        else:
            kind = "existing" if answer.existing else "accepted"
            assert (kind, answer.request_id) == expected
            if not answer.existing:
                self._open_readers(admission)
        self.settle()

    def _open_readers(self, admission: Admission) -> None:
        for gateway in self.gateways:
            if gateway.name == admission.gateway:
                gateway.readers += [
                    Reader(name_of(admission.request_id, choice), admission.tenant)
                    for choice in range(admission.num_choices)
                ]

    def cancel(self, generation_id: str, tenant: str) -> None:
        expected = self.reference.cancel(generation_id, tenant)
        assert self.do(self.broker.cancel(generation_id, tenant)) == expected
        self.settle()

    # Workers -------------------------------------------------------------------------------------

    def new_worker(self, version: str = "m@1", max_cost: int = 10_000) -> Worker:
        """Another incarnation, which has beaten once."""
        worker = Worker(self.broker, self._new_name("w"), version, max_cost)
        self.workers.append(worker)
        self.beat(worker)
        return worker

    def claim(
        self,
        worker: Worker,
        *,
        budget: int = BIG,
        max_generations: int = 32,
        loses_answer: bool = False,
    ) -> None:
        nonce = worker.next_nonce()
        suspect = self.reference.suspect_on(worker.name)
        is_clear = self.reference.is_clear(worker.name)
        answer = self.do(
            worker.claim(budget=budget, max_generations=max_generations, loses_answer=loses_answer)
        )
        left = dict.fromkeys(LANES, budget)
        for row in answer.generations:
            self.reference.claimed(worker.name, nonce, worker.turn, worker.version, row)
            self.claims.append((worker, (row.id, row.fence)))
            for lane in LANES:
                if RANKS[lane] >= RANKS[row.lane]:
                    left[lane] -= self.reference.generations[row.id].admission.cost
        assert left["default"] >= 0
        assert len(answer.generations) <= max_generations
        self._check_probation(worker, answer, suspect, budget if is_clear else 0)
        if len(answer.generations) < max_generations and not (answer.reserve or answer.suspect):
            suspects = is_clear and not answer.generations
            passed = self.reference.could_take(worker.version, left, suspects=suspects)
            assert not passed, "passed over"
        self.settle()

    def _check_probation(
        self, worker: Worker, answer: ClaimAnswer, suspect: str, clear_budget: int
    ) -> None:
        """A suspect comes alone, beside nobody who may yet kill, and nothing comes after it."""
        taken = [self.reference.generations[row.id] for row in answer.generations]
        if suspect or any(it.is_suspect for it in taken):
            assert not (suspect and taken), f"{worker.name} was given more"
            assert suspect or (len(taken) == 1 and clear_budget), f"{taken} beside others"
            assert answer.suspect == self.reference.suspect_on(worker.name)
        elif answer.suspect:  # it waits until this worker is clear
            awaited = self.reference.generations[answer.suspect]
            assert awaited.is_suspect
            assert awaited.state != "R"
            waited_ms = self.view.now_ms() - int(self.seen.generations[awaited.id]["died_ms"])
            assert waited_ms > SUSPECT_PATIENCE_MS, "it has not waited for long"
            assert taken or awaited.admission.cost > clear_budget, "it could have been taken"

    def step(
        self,
        worker: Worker,
        counts: Sequence[int],
        finishes: Sequence[Finish | None] = (None,),
        way: str = "sent",
    ) -> None:
        """One engine step of the whole batch, and what became of its publish call.

        The i-th generation makes ``counts[i]`` tokens and ends with ``finishes[i]``, both taken in
        turn; one whose room is used up ends by its length.
        """
        for i, attempt in enumerate(worker.attempts.values()):
            if any(item.record.finish for item in attempt.unacknowledged):
                continue
            count, finish = counts[i % len(counts)], finishes[i % len(finishes)]
            attempt.make(count, Finish("length") if count >= attempt.room else finish)
        items = worker.unacknowledged()
        if not items or way == "call lost":
            return
        self.sent += [(worker.name, item) for item in items]
        if way == "twice":
            items = [*items, *items]
        elif way == "backwards":
            items = items[::-1]
        self.publish(worker, items, loses_answer=way == "answer lost")

    def publish(
        self, worker: Worker, items: Sequence[Publication], *, loses_answer: bool = False
    ) -> None:
        expected = self.reference.publish(items)
        if loses_answer:
            answer = self.do(self.broker.publish(worker.name, items, lease_ms=LEASE_MS))
        else:
            answer = self.do(worker.publish(items))
        assert [(it.id, it.kind, it.next, it.chain) for it in answer.refusals] == expected
        waiting = sum(it.admission.cost for it in self.reference.of_state("Q"))
        assert sum(answer.waiting.values()) == waiting
        self.settle()

    def publish_raw(self, name: str, item: Publication, *, must_be_refused: bool = False) -> None:
        """A copy that comes late, or a forgery: nobody waits for the answer."""
        expected = self.reference.publish([item])
        assert expected or not must_be_refused
        answer = self.do(self.broker.publish(name, [item], lease_ms=LEASE_MS))
        assert [(it.id, it.kind, it.next, it.chain) for it in answer.refusals] == expected
        self.settle()

    def release(self, worker: Worker, keep: int = 0) -> None:
        """All but the first ``keep`` go back."""
        held = [(it.id, it.fence) for it in list(worker.attempts.values())[keep:]]
        for generation_id, _ in held:
            del worker.attempts[generation_id]
        self.release_raw(worker, held)

    def release_raw(self, worker: Worker, held: Sequence[tuple[str, str]]) -> None:
        """A release that perhaps comes late."""
        self.reference.release(held)
        self.do(self.broker.release(worker.name, held))
        self.settle()

    def beat(self, worker: Worker) -> None:
        self.beats.append((worker, worker.turn, list(worker.attempts)))
        expected = self.reference.beat(worker.name, worker.turn, worker.attempts)
        assert set(self.do(worker.beat())) == expected
        self.settle()

    def beat_late(self, worker: Worker, turn: int, holding: list[str]) -> None:
        """An old beat judges only turns that it knew: nothing that its worker holds goes back."""
        held = {it.id for it in self.living() if worker.holds(it.id, it.fence)}
        expected = self.reference.beat(worker.name, turn, holding)
        assert worker not in self.workers or not expected & held
        call = self.broker.beat_worker(
            worker.name, worker.presence, seen=turn, holding=holding, lease_ms=LEASE_MS
        )
        assert set(self.do(call).returned) == expected
        self.settle()

    def leave_worker(self, worker: Worker) -> None:
        self.reference.leave_worker(worker.name)
        self.do(self.broker.leave_worker(worker.name))
        self.settle()

    # Readers -------------------------------------------------------------------------------------

    def new_gateway(self) -> Gateway:
        gateway = Gateway(self.broker, self._new_name("g"))
        self.gateways.append(gateway)
        self.do(gateway.beat())
        self.settle()
        return gateway

    def reader(self, target: Expected, *, position: int = 0, tenant: str = "") -> Reader:
        """A client that has seen the first tokens already, as many as ``position`` says."""
        chain = chain_start(target.id, target.version)
        seen = target.tokens[:position]
        for token in seen:
            chain = chain_next(chain, token)
        return Reader(
            target.id,
            tenant or target.admission.tenant,
            len(seen),
            chain_text(chain) if seen else "",
        )

    def attach(self, gateway: Gateway, reader: Reader) -> None:
        expected = self.reference.attach(gateway.name, reader.id, reader.tenant)
        assert self.do(gateway.attach(reader)) == expected
        self.settle()

    def detach(self, gateway: Gateway, generation_id: str) -> None:
        self.reference.detach(gateway.name, generation_id)
        self.do(gateway.detach(generation_id))
        self.settle()

    def poll(self, gateway: Gateway) -> None:
        """Where nothing was lost, the inbox alone brings everything."""
        is_whole = gateway.is_whole and f"inbox:{gateway.name}" in self.seen.streams
        self.do(gateway.poll())
        self.settle()
        for reader in gateway.readers if is_whole else ():
            self._check_up_to_date(reader)

    def check_tails(self, gateway: Gateway) -> None:
        """With a look at each stream nothing can stay lost."""
        self._expect_joins(gateway)
        self.do(gateway.check_tails())
        self.settle()
        for reader in gateway.readers:
            self._check_up_to_date(reader)

    def _check_up_to_date(self, reader: Reader) -> None:
        target = self.reference.generations[reader.id]
        shown = (reader.cursor, reader.finish is not None)
        assert shown == (target.next, target.state == "T"), reader

    def beat_gateway(self, gateway: Gateway) -> None:
        is_known = gateway.name in self.seen.zset("gateways")
        if not is_known or f"inbox:{gateway.name}" not in self.seen.streams:
            self._expect_joins(gateway)
        self.do(gateway.beat())
        self.settle()

    def lose_inbox(self, gateway: Gateway, *, whole: bool) -> None:
        """It expired, or only what it held was trimmed before anybody read it."""
        gateway.is_whole = False
        if whole:
            self.view.lose_inbox(gateway.name)
        else:
            self.view.lose_inbox_records(gateway.name)
        self.settle()

    def leave_gateway(self, gateway: Gateway) -> None:
        self.reference.leave_gateway(gateway.name)
        self.do(self.broker.leave_gateway(gateway.name))
        self.settle()

    def check_answers(self, gateway: Gateway) -> None:
        """What quiet streams, people and ``/ready`` are told."""
        ids = [*self.reference.generations, "request-unknown.0"]
        for look in self.do(self.broker.look(gateway.name, ids)):
            target = self.reference.generations.get(look.id)
            shown = (look.state, look.next, look.subscribed)
            if target is None:
                assert shown == ("", 0, False)
                continue
            assert shown == (target.state, target.next, gateway.name in target.readers)
            assert (look.ahead >= 0) == (look.state == "Q")
        state = self.do(self.broker.state())
        held = {generation_id for worker in state.workers for generation_id in worker.held}
        assert held == {it.id for it in self.reference.of_state("R")}
        num_waiting = len(self.reference.of_state("Q"))
        assert sum(state.waiting.values()) + state.handed_back == num_waiting
        self.settle()

    def _expect_joins(self, gateway: Gateway) -> None:
        for reader in gateway.readers:
            if reader.finish is None:
                self.reference.attach(gateway.name, reader.id, reader.tenant)

    # Time ----------------------------------------------------------------------------------------

    def reap(self) -> None:
        """One reap, after whatever ``view`` has let pass."""
        self.reference.reap(self.view.look())
        self.do(self.broker.reap())
        self.settle()

    def let_leases_end(self, processes: Iterable[str]) -> None:
        """Reap until nothing is left of these: one reap moves a bounded part."""
        gone = set(processes)
        for gateway in self.gateways:
            if gateway.name in gone:
                gateway.is_whole = False
        for _ in range(1 + len(gone)):
            self.view.pass_lease(*gone)
            self.reap()
            if gone.isdisjoint(self.seen.zset("leases").keys() | self.seen.zset("gateways").keys()):
                return
        raise AssertionError(f"{gone} cannot be reaped")

    def sleep(self, *, restarted: bool = False) -> None:
        """The machine slept, or the server started anew: nobody has died of that."""
        if restarted:
            self.view.restart()
        else:
            self.view.sleep(10 * 60_000)
        self.is_sound = False
        moved = self._runner.run(self.broker.reap())
        assert not moved
        if restarted:
            self._nobody_claims()
            self.view.end_settling()
        self.view.pass_lease()
        self.settle()

    def _nobody_claims(self) -> None:
        """While owners may put back what the other server lost."""
        answer = self._runner.run(
            self.broker.claim("nobody", "0", 1, budget=BIG, max_generations=32, model_version="m@1")
        )
        assert not answer.generations
        assert answer.settling_ms > 0

    def _new_name(self, role: str) -> str:
        self._num_incarnations += 1
        return f"{role}{self._num_incarnations:011d}"


async def _or_code(call: Coroutine[Any, Any, T]) -> T | str:
    """The answer, or the code of the failure."""
    try:
        return await call
    except Failure as refusal:
        return refusal.code
