"""Who is served next: tenants share a lane by weight, lanes follow their rank, nobody starves.

Invariant 10 of protocol.md, section 9, and the order of a claim as section 4 describes it.
"""

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count, groupby
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.broker import Claimed, Reserve, Room
from common.messages import LANES, RANKS, Finish, Lane
from tests.support.broker_actors import Worker
from tests.support.broker_stage import BIG, Stage
from tests.support.depth import searched
from tests.support.redis_server import RedisServer

DEPTH = 4
"""Generations of each tenant that always wait: more than one claim takes."""
HEAD_LIMIT_MS = {"priority": 5_000, "default": 5_000, "flex": 60_000, "batch": 1_800_000}
RESERVE_AFTER_MS = 2_000
MAX_COST = 10_000
NOT_YET_MS = -60_000
"""Age of what must count as fresh however slow this machine is: admitted in the future."""

costs = st.lists(st.integers(1, 200), min_size=1, max_size=6)
claim_sizes = st.lists(st.integers(1, DEPTH - 1), min_size=5, max_size=20)


@contextmanager
def opened(server: RedisServer) -> Generator[Stage]:
    stage = Stage(server.url)
    try:
        yield stage
    finally:
        stage.close()


class Rivals:
    """Tenants who refill a lane as soon as they are served."""

    def __init__(
        self, stage: Stage, weights: dict[str, float], costs: dict[str, list[int]]
    ) -> None:
        self.served: defaultdict[str, int] = defaultdict(int)
        self._stage = stage
        self._weights = weights
        self._costs = costs
        self._numbers = {tenant: count() for tenant in weights}
        self._tenants: dict[str, str] = {}

    @property
    def bound(self) -> float:
        """Two of the largest costs, each in units of its tenant's weight."""
        return sum(max(self._costs[tenant]) / weight for tenant, weight in self._weights.items())

    def join(self, tenant: str) -> None:
        for _ in range(DEPTH):
            self._admit(tenant)

    def serve(self, row: Claimed, used: int | None = None) -> None:
        """Count a claimed generation as served, with all its cost unless ``used`` says less."""
        assert row.spec is not None
        tenant = self._tenants[row.id]
        cost = len(row.spec.prompt) // 4 + row.spec.sampling.max_new_tokens
        self.served[tenant] += cost if used is None else used
        self._admit(tenant)

    def tenant_of(self, row: Claimed) -> str:
        return self._tenants[row.id]

    def gap(self, first: str, second: str) -> float:
        a, b = (self.served[tenant] / self._weights[tenant] for tenant in (first, second))
        return abs(a - b)

    def _admit(self, tenant: str) -> None:
        own_costs = self._costs[tenant]
        cost = own_costs[next(self._numbers[tenant]) % len(own_costs)]
        admission = self._stage.admission(
            tenant=tenant,
            weight=self._weights[tenant],
            prompt_tokens=0,
            room=cost,
            attached=False,
        )
        self._stage.do(self._stage.broker.admit(admission))
        self._tenants[f"{admission.request_id}.0"] = tenant


@searched(80)
@given(
    ann=costs,
    bob=costs,
    weights=st.sampled_from(((1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.5, 3.0))),
    sizes=claim_sizes,
)
def test_tenants_share_a_lane_by_their_weights(
    redis_server: RedisServer,
    ann: list[int],
    bob: list[int],
    weights: tuple[float, float],
    sizes: list[int],
) -> None:
    """While both wait, what they were served differs by at most two of the largest costs."""
    with opened(redis_server) as stage:
        worker = stage.new_worker()
        rivals = Rivals(stage, {"ann": weights[0], "bob": weights[1]}, {"ann": ann, "bob": bob})
        rivals.join("ann")
        rivals.join("bob")
        for size in sizes:
            for row in stage.do(worker.claim(max_generations=size)).generations:
                rivals.serve(row)
                assert rivals.gap("ann", "bob") <= rivals.bound + 1


@searched(50)
@given(ann=costs, bob=costs, head_start=st.integers(1, 12), sizes=claim_sizes)
def test_a_newcomer_neither_waits_for_the_past_nor_makes_up_for_it(
    redis_server: RedisServer, ann: list[int], bob: list[int], head_start: int, sizes: list[int]
) -> None:
    """Who was alone until now owes nothing; from the arrival of the second on, both share."""
    with opened(redis_server) as stage:
        worker = stage.new_worker()
        rivals = Rivals(stage, {"ann": 1.0, "bob": 1.0}, {"ann": ann, "bob": bob})
        rivals.join("ann")
        for _ in range(head_start):
            for row in stage.do(worker.claim(max_generations=1)).generations:
                rivals.serve(row)
        rivals.served.clear()
        rivals.join("bob")
        for size in sizes:
            for row in stage.do(worker.claim(max_generations=size)).generations:
                rivals.serve(row)
                assert rivals.gap("ann", "bob") <= rivals.bound + 1


@searched(20)
@given(cost=st.integers(20, 100), num_rounds=st.integers(30, 50))
def test_what_a_tenant_did_not_use_is_given_back(
    redis_server: RedisServer, cost: int, num_rounds: int
) -> None:
    """Ann's generations stop after one token, Bob's use all they asked for: tokens are shared.

    What waited already when the first of Ann's ended was still charged in full, hence the depth.
    """
    with opened(redis_server) as stage:
        worker = stage.new_worker()
        rivals = Rivals(stage, {"ann": 1.0, "bob": 1.0}, {"ann": [cost], "bob": [cost]})
        rivals.join("ann")
        rivals.join("bob")
        for _ in range(num_rounds):
            (row,) = stage.do(worker.claim(max_generations=1)).generations
            used = 1 if rivals.tenant_of(row) == "ann" else cost
            end = worker.attempts[row.id].make(used, Finish("eos_token"))
            stage.do(worker.publish([end]))
            rivals.serve(row, used)
        assert rivals.gap("ann", "bob") <= rivals.bound + DEPTH * cost


def test_what_was_cancelled_before_it_ran_costs_nothing(redis_server: RedisServer) -> None:
    """Neither its allowed tokens nor its prompt: nobody has read it."""
    with opened(redis_server) as stage:
        worker = stage.new_worker()
        for _ in range(10):
            cancelled = stage.admission(tenant="ann", prompt_tokens=100, attached=False)
            stage.admit(cancelled)
            stage.cancel(f"{cancelled.request_id}.0", "ann")
        rivals = Rivals(stage, {"ann": 1.0, "bob": 1.0}, {"ann": [100], "bob": [100]})
        rivals.join("bob")
        rivals.join("ann")
        for _ in range(10):
            (row,) = stage.do(worker.claim(max_generations=1)).generations
            rivals.serve(row)
            assert rivals.gap("ann", "bob") <= rivals.bound + 1


def test_what_is_handed_back_does_not_turn_the_time_of_its_lane_back(
    redis_server: RedisServer,
) -> None:
    """Ann was alone and is served on; a generation of long ago comes back and is claimed again.

    A newcomer then starts where Ann is now, not where that generation once stood.
    """
    with opened(redis_server) as stage:
        worker = stage.new_worker()
        rivals = Rivals(stage, {"ann": 1.0, "bob": 1.0}, {"ann": [100], "bob": [100]})
        rivals.join("ann")
        oldest, *_ = stage.do(worker.claim()).generations
        rivals.join("ann")
        stage.do(worker.claim())
        stage.do(stage.broker.release(worker.name, [(oldest.id, oldest.fence)]))
        stage.do(worker.claim())
        rivals.join("bob")
        rivals.join("ann")
        for _ in range(10):
            (row,) = stage.do(worker.claim(max_generations=1)).generations
            rivals.serve(row)
            assert rivals.gap("ann", "bob") <= rivals.bound + 1


# The order of one claim -------------------------------------------------------------------------

waiting = st.lists(
    st.fixed_dictionaries(
        {
            "lane": st.sampled_from(LANES),
            "cost": st.integers(2, 60),
            "age_ms": st.sampled_from((NOT_YET_MS, NOT_YET_MS, 3_000, 6_000, 70_000, 1_900_000)),
            "shown_by": st.sampled_from(("", "", "", "m@1", "m@2")),
        }
    ),
    min_size=1,
    max_size=14,
)


rooms = st.tuples(
    *[
        st.builds(Room, st.integers(0, 16), st.sampled_from((BIG, BIG, 100, 40)))
        for _ in range(max(RANKS.values()) + 1)
    ]
).map(lambda drawn: [Room(*map(max, zip(*drawn[rank:], strict=True))) for rank in range(3)])
"""By rank, each with no less than those that give way to it."""


class Waiting:
    """One generation that waits, as the order of a claim sees it."""

    def __init__(self, id: str, lane: Lane, cost: int, age_ms: int, shown_by: str) -> None:
        self.id = id
        self.lane: Lane = lane
        self.cost = cost
        self.age_ms = age_ms
        self.shown_by = shown_by
        self.score = 0.0

    @property
    def queue(self) -> tuple[int, bool]:
        """Place of its queue: by lane, and in a lane what was handed back goes first."""
        return LANES.index(self.lane), not self.shown_by

    @property
    def place(self) -> tuple[tuple[int, bool], float, str]:
        return self.queue, self.score, self.id


def order_of_a_claim(
    items: list[Waiting], rooms: dict[Lane, Room], limit: int
) -> tuple[list[str], Reserve | None]:
    """(what a worker of version m@1 is given, what to reserve room for), from the protocol."""
    left_slots = {lane: room.slots for lane, room in rooms.items()}
    left_tokens = {lane: room.tokens for lane, room in rooms.items()}
    left = sorted((it for it in items if it.shown_by != "m@2"), key=lambda it: it.place)
    taken: list[str] = []
    starved = starved_head([it for it in left if left_slots[it.lane] > 0])
    groups = [[starved]] if starved else []
    groups += [list(group) for _, group in groupby(left, key=lambda it: it.queue)]
    for number, group in enumerate(groups):
        candidates = [it for it in group if it.id not in taken]
        for i, item in enumerate(candidates):
            if left_slots[item.lane] <= 0:
                break
            if len(taken) == limit:
                return taken, None
            if item.cost <= left_tokens[item.lane]:
                taken.append(item.id)
                for lane in LANES:
                    if RANKS[lane] >= RANKS[item.lane]:
                        left_slots[lane] -= 1
                        left_tokens[lane] -= item.cost
            elif i == 0 and item.age_ms > RESERVE_AFTER_MS:
                return taken, Reserve(item.cost, item.lane, bool(starved) and number == 0)
    return taken, None


def starved_head(items: list[Waiting]) -> Waiting | None:
    """The head of the lowest lane whose head has waited beyond its limit."""
    for lane in reversed(LANES):
        fresh = [it for it in items if it.lane == lane and not it.shown_by]
        if fresh and fresh[0].age_ms > HEAD_LIMIT_MS[lane]:
            return fresh[0]
    return None


@searched(150)
@given(drawn=waiting, by_rank=rooms, limit=st.integers(1, 16))
def test_a_claim_takes_what_the_order_says(
    redis_server: RedisServer, drawn: list[dict[str, Any]], by_rank: list[Room], limit: int
) -> None:
    """Handed back before fresh, lanes by rank, tags within; one pick for the lowest starved lane;
    what does not fit is passed over, unless it is a head that has waited for room. No lane is given
    more than its room, of which others that give way take nothing."""
    by_lane: dict[Lane, Room] = {lane: by_rank[RANKS[lane]] for lane in LANES}
    with opened(redis_server) as stage:
        workers = {version: stage.new_worker(version, MAX_COST) for version in ("m@1", "m@2")}
        items = [_admit(stage, **spec) for spec in drawn if spec["shown_by"] == "m@2"]
        _show(stage, workers["m@2"])
        items += [_admit(stage, **spec) for spec in drawn if spec["shown_by"] == "m@1"]
        _show(stage, workers["m@1"])
        items += [_admit(stage, **spec) for spec in drawn if not spec["shown_by"]]
        zsets = stage.view.look().zsets
        for item in items:
            item.score = next(zsets[key][item.id] for key in zsets if _queues(key, item.id, zsets))
        answer = stage.do(workers["m@1"].claim(max_generations=limit, rooms=by_lane))
        given_out = ([row.id for row in answer.generations], answer.reserve)
        assert given_out == order_of_a_claim(items, by_lane, limit)


def _queues(key: str, generation_id: str, zsets: dict[str, dict[str, float]]) -> bool:
    return key.startswith(("lane:", "again:")) and generation_id in zsets[key]


def _admit(stage: Stage, lane: Lane, cost: int, age_ms: int, shown_by: str) -> Waiting:
    admission = stage.admission(lane=lane, prompt_tokens=1, room=cost - 1, attached=False)
    stage.do(stage.broker.admit(admission))
    generation_id = f"{admission.request_id}.0"
    stage.view.age(generation_id, age_ms)
    return Waiting(generation_id, lane, cost, age_ms, shown_by)


def _show(stage: Stage, worker: Worker) -> None:
    """Let ``worker`` show a token of whatever waits, and hand it back."""
    stage.do(worker.claim())
    if worker.attempts:
        stage.do(worker.publish([attempt.make(1) for attempt in worker.attempts.values()]))
        held = [(attempt.id, attempt.fence) for attempt in worker.attempts.values()]
        stage.do(stage.broker.release(worker.name, held))
