"""What should be true: the protocol's states told again in plain Python, step by step.

The reference predicts the answer of each step and the state behind it from protocol.md, section 4,
and :meth:`Reference.check` compares it with what stands in Redis. It knows nothing of keys, scores
or times to live; those are judged by ``broker_invariants``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.broker import Admission, Claimed, Publication
from common.ids import generation_id as name_of
from common.ids import request_of
from common.messages import Lane
from tests.support.broker_actors import Reader
from tests.support.broker_invariants import is_tombstone, limit_of
from tests.support.broker_view import Snapshot

SUSPECT_DEATHS = 2
POISON_DEATHS = 2
PROGRESS_TOKENS = 8
MAX_DEATHS = 10
SUSPECT_PATIENCE_MS = 5_000
_LEASES_AT_ONCE = 4
_NO_WORKER_GRACE_MS = 30_000
_VERSION_SILENCE_MS = 60_000
_RETRYABLE = ("QUEUE_TIMEOUT", "ENGINE_ERROR")


@dataclass
class Expected:
    """One generation. ``state`` is Q (waiting), R (running) or T (ended), as in Redis."""

    id: str
    admission: Admission
    state: str = "Q"
    epoch: int = 0
    fence: str = ""
    owner: str = ""
    turn: int = 0
    version: str = ""
    tokens: list[int] = field(default_factory=list[int])
    chain: str = ""
    deaths: int = 0
    died_at: int = 0
    fruitless: int = 0
    probation: str = ""
    """The fence under which it was put on probation last."""
    probation_deaths: int = 0
    began_at: int = 0
    """Where it stood when it was claimed."""
    readers: set[str] = field(default_factory=set[str])
    reason: str = ""
    code: str = ""
    message: str = ""

    @property
    def next(self) -> int:
        return len(self.tokens)

    @property
    def is_unread(self) -> bool:
        return self.admission.attached and not self.readers

    @property
    def is_suspect(self) -> bool:
        return self.fruitless >= SUSPECT_DEATHS and self.next < self.died_at + PROGRESS_TOKENS

    @property
    def is_on_probation(self) -> bool:
        return self.state == "R" and self.probation == self.fence and self.is_suspect

    @property
    def queue(self) -> str:
        if self.state != "Q":
            return ""
        if self.next:
            return f"again:{self.version}"
        return "again:any" if self.is_suspect else f"lane:{self.admission.lane}"


class Reference:
    """All generations that were ever admitted, and the tombstones of those that never were."""

    def __init__(self) -> None:
        self.generations: dict[str, Expected] = {}
        self.tombstones: dict[str, str] = {}
        self.idempotent: dict[tuple[str, str], tuple[str, str]] = {}

    def of_state(self, *states: str) -> list[Expected]:
        return [it for it in self.generations.values() if it.state in states]

    # Admission -----------------------------------------------------------------------------------

    def admit(self, admission: Admission, before: Snapshot) -> tuple[str, str]:
        """(``accepted``, ``existing`` or a failure code; the request that answers)."""
        key = (admission.tenant, admission.idempotency_key)
        if admission.idempotency_key and key in self.idempotent:
            fingerprint, request = self.idempotent[key]
            if fingerprint != admission.fingerprint:
                return "IDEMPOTENCY_CONFLICT", ""
            return "existing", request
        names = {name_of(admission.request_id, i) for i in range(admission.num_choices)}
        if names & (self.generations.keys() | self.tombstones.keys()):
            return "existing", admission.request_id
        refusal = "" if admission.resubmit else _refusal(admission, before)
        if refusal:
            return refusal, ""
        for choice in range(admission.num_choices):
            generation_id = name_of(admission.request_id, choice)
            readers = {admission.gateway} if admission.gateway else set[str]()
            self.generations[generation_id] = Expected(generation_id, admission, readers=readers)
        if admission.idempotency_key:
            self.idempotent[key] = (admission.fingerprint, admission.request_id)
        return "accepted", admission.request_id

    def cancel(self, generation_id: str, tenant: str) -> str:
        expected = self.generations.get(generation_id)
        if expected is None:
            if generation_id not in self.tombstones:
                self.tombstones[generation_id] = tenant
                return "unknown"
            return "ended" if self.tombstones[generation_id] == tenant else "unknown"
        if expected.admission.tenant != tenant:
            return "unknown"
        if expected.state == "T":
            return "ended"
        self.end(expected, "cancelled")
        return "cancelled"

    # Workers -------------------------------------------------------------------------------------

    def claimed(self, worker: str, nonce: str, turn: int, version: str, row: Claimed) -> None:
        """Raises: AssertionError: this worker could not be given this generation."""
        expected = self.generations[row.id]
        assert expected.state == "Q", f"{row.id} was claimed twice"
        assert not expected.next or expected.version == version, "continued by another version"
        assert (row.next, row.chain, row.deaths) == (
            expected.next,
            expected.chain,
            expected.deaths,
        ), row.id
        expected.state = "R"
        expected.epoch += 1
        expected.fence = f"{expected.epoch}.{nonce}"
        assert row.fence == expected.fence
        expected.owner, expected.turn, expected.version = worker, turn, version
        expected.began_at = expected.next
        assert row.clear_at == (expected.died_at + PROGRESS_TOKENS if expected.is_suspect else 0)
        if expected.is_suspect:
            expected.probation = expected.fence

    def suspect_on(self, worker: str) -> str:
        """Whom this worker sees through before it is given anything else; empty: nobody."""
        held = [it for it in self.of_state("R") if it.owner == worker and it.is_on_probation]
        return held[0].id if held else ""

    def is_clear(self, worker: str) -> bool:
        """Whether all that it holds has come further there."""
        held = [it for it in self.of_state("R") if it.owner == worker]
        return all(it.next >= it.began_at + PROGRESS_TOKENS for it in held)

    def could_take(
        self, version: str, left: Mapping[Lane, int], *, suspects: bool
    ) -> list[Expected]:
        """What a claim with so much left for each lane must not pass over."""
        queues = {f"again:{version}", "again:any"}
        return [
            it
            for it in self.of_state("Q")
            if it.admission.cost <= left[it.admission.lane]
            and (it.queue in queues or it.queue[:5] == "lane:")
            and (suspects or not it.is_suspect)
        ]

    def publish(self, items: Sequence[Publication]) -> list[tuple[str, str, int, str]]:
        """The refusals, as (id, kind, next, chain)."""
        answers = [(item, self._append(item)) for item in items]
        refusals: list[tuple[str, str, int, str]] = []
        for item, (kind, at, chain) in answers:
            if kind:
                refusals.append((item.id, kind, at, chain))
        return refusals

    def _append(self, item: Publication) -> tuple[str, int, str]:
        record, finish = item.record, item.record.finish
        if item.id in self.tombstones:
            return "gone", 0, ""
        expected = self.generations.get(item.id)
        if expected is None:
            return "unknown", 0, ""
        at = (expected.next, expected.chain)
        if expected.state == "T":
            is_own = expected.fence == item.fence and finish is not None
            return ("", 0, "") if is_own and record.end == expected.next else ("gone", *at)
        if expected.state != "R" or expected.fence != item.fence:
            return "lost", *at
        if record.end <= expected.next and finish is None:
            return "", 0, ""
        ends_here = (record.end, record.chain) == at
        if not ends_here:
            if (record.start, item.prev_chain) != at:
                return "realign", *at
            expected.tokens += record.tokens
            expected.chain = record.chain
        if finish is not None:
            self.end(expected, finish.reason, finish.code, finish.message)
        return "", 0, ""

    def release(self, held: Iterable[tuple[str, str]]) -> None:
        for generation_id, fence in held:
            expected = self.generations.get(generation_id)
            if expected is not None and expected.state == "R" and expected.fence == fence:
                self.hand_back(expected)

    def beat(self, worker: str, seen: int, holding: Iterable[str]) -> set[str]:
        """What goes back because its owner does not name it."""
        named = set(holding)
        lost = [
            it
            for it in self.of_state("R")
            if it.owner == worker and it.turn <= seen and it.id not in named
        ]
        for expected in lost:
            self.hand_back(expected)
        return {expected.id for expected in lost}

    def leave_worker(self, worker: str) -> None:
        for expected in self.of_state("R"):
            if expected.owner == worker:
                self.hand_back(expected)

    # Readers -------------------------------------------------------------------------------------

    def attach(self, gateway: str, generation_id: str, tenant: str) -> bool:
        expected = self.generations.get(generation_id)
        if expected is None or expected.admission.tenant != tenant:
            return False
        if expected.state != "T":
            expected.readers.add(gateway)
        return True

    def detach(self, gateway: str, generation_id: str) -> None:
        expected = self.generations.get(generation_id)
        if expected is not None and expected.state != "T" and gateway in expected.readers:
            expected.readers.discard(gateway)
            if expected.is_unread and expected.admission.grace_ms == 0:
                self.end(expected, "cancelled")

    def leave_gateway(self, gateway: str) -> None:
        for expected in self.of_state("Q", "R"):
            self.detach(gateway, expected.id)

    # Time ----------------------------------------------------------------------------------------

    def reap(self, before: Snapshot) -> None:
        """What the leases, dues and versions of ``before`` demand of one reap."""
        for gateway in _past(before, "gateways", before.now_ms)[:_LEASES_AT_ONCE]:
            self.leave_gateway(gateway)
        for worker in _past(before, "leases", before.now_ms)[:_LEASES_AT_ONCE]:
            self._die(worker)
        for generation_id in _past(before, "due", before.now_ms):
            self._look_at(self.generations[generation_id], before)
        for version in _past(before, "versions", before.now_ms - _VERSION_SILENCE_MS):
            for expected in self.of_state("Q"):
                if expected.queue == f"again:{version}":
                    self.end(expected, "failed", "MODEL_VERSION_GONE")

    def _die(self, worker: str) -> None:
        for expected in self.of_state("R"):
            if expected.owner == worker:
                came_on = (
                    expected.deaths > 0 and expected.next >= expected.died_at + PROGRESS_TOKENS
                )
                failed = expected.probation_deaths + expected.is_on_probation
                expected.probation_deaths = 0 if came_on else failed
                expected.fruitless = 1 if came_on else expected.fruitless + 1
                expected.deaths += 1
                expected.died_at = expected.next
                if expected.probation_deaths >= POISON_DEATHS or expected.deaths >= MAX_DEATHS:
                    self.end(expected, "failed", "POISON_REQUEST")
                else:
                    self.hand_back(expected)

    def _look_at(self, expected: Expected, before: Snapshot) -> None:
        if expected.state == "T":
            return
        if expected.is_unread:
            self.end(expected, "cancelled")
        elif limit_of(before.generations[expected.id]) <= before.now_ms:
            self.time_out(expected)

    def time_out(self, expected: Expected) -> None:
        self.end(expected, "failed", "GENERATION_TIMEOUT" if expected.epoch else "QUEUE_TIMEOUT")

    # Moves ---------------------------------------------------------------------------------------

    def hand_back(self, expected: Expected) -> None:
        expected.state, expected.fence, expected.owner = "Q", "", ""

    def end(self, expected: Expected, reason: str, code: str = "", message: str = "") -> None:
        expected.state, expected.owner = "T", ""
        expected.readers = set()
        expected.reason, expected.code, expected.message = reason, code, message
        siblings = [
            it for it in self.generations.values() if request_of(it.id) == request_of(expected.id)
        ]
        is_last = all(it.state == "T" for it in siblings)
        is_void = code in _RETRYABLE and not expected.tokens and is_last
        key = (expected.admission.tenant, expected.admission.idempotency_key)
        _, holder = self.idempotent.get(key, ("", ""))
        if holder == request_of(expected.id) and (is_void or reason == "cancelled"):
            del self.idempotent[key]

    # Comparison ----------------------------------------------------------------------------------

    def check(self, snapshot: Snapshot) -> None:
        """Raises: AssertionError: Redis and the reference disagree."""
        known = snapshot.generations
        assert known.keys() == self.generations.keys() | self.tombstones.keys()
        assert {it for it in known if is_tombstone(known[it])} == self.tombstones.keys()
        for expected in self.generations.values():
            self._check_generation(expected, snapshot)
        idempotent = {
            f"{len(tenant)}:{tenant}:{key}": f"{fingerprint} {request}"
            for (tenant, key), (fingerprint, request) in self.idempotent.items()
        }
        assert snapshot.named("idem:", snapshot.strings) == idempotent
        self._check_ended(snapshot)

    def _check_ended(self, snapshot: Snapshot) -> None:
        """What billing, quotas and webhooks are told of each end."""
        for row in snapshot.streams.get("ended", []):
            told = {name: text.decode() for name, text in row.items()}
            expected = self.generations[told["id"]]
            admission = expected.admission
            room = admission.spec.sampling.max_new_tokens
            assert told == {
                "id": expected.id,
                "tenant": admission.tenant,
                "lane": admission.lane,
                "in": str(admission.cost - room),
                "out": str(expected.next),
                "reason": expected.reason,
                "code": expected.code,
                "quota": "",
                "api": admission.presentation.api,
                "background": "0",
            }
        poisoned = [it.id for it in self.of_state("T") if it.code == "POISON_REQUEST"]
        quarantined = [row["id"].decode() for row in snapshot.streams.get("dead", [])]
        assert sorted(quarantined) == sorted(poisoned)

    def _check_generation(self, expected: Expected, snapshot: Snapshot) -> None:
        stored = snapshot.generations[expected.id]
        readers = " ".join(sorted(stored["subs"].split()))
        assert {
            **{name: stored[name] for name in ("st", "fence", "own", "ver", "chain", "q")},
            **{name: int(stored[name]) for name in ("epoch", "next", "deaths")},
            "subs": readers,
            "end": stored.get("end", ""),
        } == {
            "st": expected.state,
            "fence": expected.fence,
            "own": expected.owner,
            "ver": expected.version,
            "chain": expected.chain,
            "q": expected.queue,
            "epoch": expected.epoch,
            "next": expected.next,
            "deaths": expected.deaths,
            "subs": " ".join(sorted(expected.readers)),
            "end": expected.code or expected.reason,
        }, expected.id
        if expected.state == "R":
            held = snapshot.zset(f"held:{expected.owner}")
            assert held[expected.id] == expected.turn, expected.id
        entries = snapshot.logs.get(expected.id, [])
        shown = [token for entry in entries for token in entry.record.tokens]
        assert shown == expected.tokens, expected.id
        if expected.state == "T":
            finish = entries[-1].record.finish
            assert finish is not None
            assert (finish.reason, finish.code, finish.message) == (
                expected.reason,
                expected.code,
                expected.message,
            ), expected.id

    def check_reader(self, reader: Reader) -> None:
        """Invariant 1: what a client saw is the log, from where it began, with at most one end."""
        target = self.generations[reader.id]
        assert reader.tokens == target.tokens[reader.start : reader.cursor], reader
        if reader.finish is not None:
            assert target.state == "T", reader
            assert reader.cursor == target.next, reader
            shown = (reader.finish.reason, reader.finish.code, reader.finish.message)
            assert shown == (target.reason, target.code, target.message), reader


def _refusal(admission: Admission, before: Snapshot) -> str:
    leases = before.zset("leases")
    live = [worker for worker, end_ms in leases.items() if end_ms >= before.now_ms]
    if not live:
        last_beat_ms = max(before.zset("versions").values(), default=0)
        if before.now_ms - last_beat_ms >= _NO_WORKER_GRACE_MS:
            return "NO_WORKERS"
    max_costs = [before.hashes.get(f"worker:{worker}", {}).get("max_cost") for worker in live]
    if live and all(cost is not None and int(cost) < admission.cost for cost in max_costs):
        return "CONTEXT_LENGTH_EXCEEDED"
    tokens, _ = before.backlog(admission.lane)
    is_full = tokens + admission.cost * admission.num_choices > admission.lane_cap_tokens
    return "QUEUE_FULL" if is_full else ""


def _past(snapshot: Snapshot, key: str, moment_ms: int) -> list[str]:
    members = snapshot.zset(key)
    return sorted((m for m in members if members[m] <= moment_ms), key=lambda m: (members[m], m))
