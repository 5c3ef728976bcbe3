"""What must hold of a partition at any moment (protocol.md, section 9), judged from its raw keys.

Nothing here knows what was called before: each rule compares keys with one another, and
:func:`check_step` one snapshot with the next.
"""

from common.ids import request_of
from common.messages import LANES, chain_next, chain_start, chain_text
from tests.support.broker_view import Entry, Snapshot

Fields = dict[str, str]

_RANK_WIDTH = 1e13
_SUSPECTS_FROM = 5e12
_SUSPECT_DEATHS = 2
_PROGRESS_TOKENS = 8
_WAITING, _RUNNING, _ENDED = "Q", "R", "T"


def check_invariants(snapshot: Snapshot) -> None:
    """Raises: AssertionError, naming what does not fit together."""
    _check_states(snapshot)
    _check_strays(snapshot)
    _check_probation(snapshot)
    _check_logs(snapshot)
    _check_backlog(snapshot)
    _check_subscriptions(snapshot)
    _check_due(snapshot)
    _check_times_to_live(snapshot)
    _check_ended(snapshot)


def check_step(before: Snapshot, after: Snapshot) -> None:
    """What no step may do: lower an epoch, rewrite a log, or bring an ended generation back."""
    for generation_id, was in before.generations.items():
        now = after.generations.get(generation_id)
        assert now is not None, f"{generation_id} was deleted"
        if is_tombstone(was):
            assert now == was, f"the tombstone {generation_id} changed"
            continue
        assert int(now["epoch"]) >= int(was["epoch"]), f"the epoch of {generation_id} fell"
        assert int(now["deaths"]) >= int(was["deaths"]), f"a death of {generation_id} was undone"
        if was["st"] == _ENDED:
            assert now == was, f"{generation_id} changed after its end"
        elif was["subs"] and not now["subs"] and now["mode"] == "attached" and now["st"] != _ENDED:
            grace_ends = after.now_ms + int(now["grace"])
            assert after.zset("due")[generation_id] <= grace_ends, "its last reader left"
        log = before.logs.get(generation_id, [])
        assert after.logs.get(generation_id, [])[: len(log)] == log, (
            f"the log of {generation_id} was rewritten"
        )


def is_tombstone(generation: Fields) -> bool:
    return "t0" not in generation


def limit_of(generation: Fields) -> int:
    """The last moment of a generation: its queue deadline, after the first claim its run limit."""
    claimed_at = int(generation["t1"])
    return claimed_at + int(generation["run_limit"]) if claimed_at else int(generation["deadline"])


def _living(snapshot: Snapshot) -> dict[str, Fields]:
    return {
        generation_id: generation
        for generation_id, generation in snapshot.generations.items()
        if generation["st"] != _ENDED
    }


def _check_states(snapshot: Snapshot) -> None:
    """Invariant 3: the state of a generation says where its id stands, and nowhere else."""
    due = snapshot.zset("due")
    for generation_id, generation in snapshot.generations.items():
        queues = snapshot.queues_of(generation_id)
        holders = snapshot.holders_of(generation_id)
        state = generation["st"]
        place = (state, queues, holders, generation_id in due)
        if state == _WAITING:
            assert place == (state, [generation["q"]], [], True), (generation_id, place)
            assert generation["fence"] == generation["own"] == "", generation_id
            assert snapshot.zset(generation["q"])[generation_id] == _score(generation)
        elif state == _RUNNING:
            assert place == (state, [], [generation["own"]], True), (generation_id, place)
            epoch, _, nonce = generation["fence"].partition(".")
            assert epoch == generation["epoch"], generation_id
            assert nonce, generation_id
        else:
            assert place == (_ENDED, [], [], False), (generation_id, place)


def _score(generation: Fields) -> float:
    """A fresh one waits by its tag; one handed back by rank and age, suspects behind the others."""
    if generation["q"].startswith("lane:"):
        return float(generation["tag"])
    behind = _SUSPECTS_FROM if _is_suspect(generation) else 0
    rank = LANES.index(generation["lane"])  # pyright: ignore[reportArgumentType] stored as text
    return rank * _RANK_WIDTH + behind + int(generation["t0"])


def _is_suspect(generation: Fields) -> bool:
    came_on = int(generation["next"]) - int(generation.get("died_at", 0))
    return int(generation.get("fruitless", 0)) >= _SUSPECT_DEATHS and came_on < _PROGRESS_TOKENS


def _check_probation(snapshot: Snapshot) -> None:
    """At most one suspect runs on a worker, by whose presence it is named."""
    for worker, held in snapshot.named("held:", snapshot.zsets).items():
        running = [snapshot.generations[generation_id] for generation_id in held]
        suspects = [it for it in running if it["st"] == _RUNNING and _is_suspect(it)]
        assert len(suspects) <= 1, f"{worker} runs several suspects"
        presence = snapshot.hashes.get(f"worker:{worker}", {})
        if suspects:
            assert presence["probation"] in held, worker
            assert suspects[0]["probation"] == suspects[0]["fence"], worker


def _check_strays(snapshot: Snapshot) -> None:
    """What stands in a queue, with a worker or in ``due`` is a living generation."""
    living = _living(snapshot)
    for key, members in snapshot.zsets.items():
        if key == "due" or key.startswith(("lane:", "again:", "held:")):
            assert members.keys() <= living.keys(), (key, members.keys() - living.keys())
    leases = snapshot.zset("leases")
    for worker, held in snapshot.named("held:", snapshot.zsets).items():
        assert worker in leases, f"nobody would notice the death of {worker}, which holds {held}"


def _check_logs(snapshot: Snapshot) -> None:
    """Invariant 2: logs are dense, chained, and have one end, which is their last entry."""
    for generation_id, generation in snapshot.generations.items():
        if is_tombstone(generation):
            assert generation_id not in snapshot.logs, f"the tombstone {generation_id} has a log"
            continue
        entries = snapshot.logs.get(generation_id, [])
        position, chain = _follow(generation_id, generation["ver"], entries)
        assert (int(generation["next"]), generation["chain"]) == (position, chain), generation_id
        ends = [entry for entry in entries if entry.kind == 1]
        assert len(ends) == (generation["st"] == _ENDED), f"{generation_id} has {len(ends)} ends"
        if ends:
            _check_end(generation_id, generation, ends[0])


def _follow(generation_id: str, version: str, entries: list[Entry]) -> tuple[int, str]:
    """Position and chain at the end of a log; both as Redis stores them."""
    position, chain = 0, chain_start(generation_id, version)
    for i, entry in enumerate(entries):
        record = entry.record
        assert record.start == position, f"{generation_id}: {record} does not follow {position}"
        for token in record.tokens:
            chain = chain_next(chain, token)
        position += len(record.tokens)
        assert entry.position == record.end == position, generation_id
        assert (record.finish is not None) == (entry.kind == 1), generation_id
        assert entry.kind == 0 or i == len(entries) - 1, f"{generation_id} goes on after its end"
        if position:
            assert record.chain == chain_text(chain), f"{generation_id}: chain broken at {position}"
    return position, chain_text(chain) if position else ""


def _check_end(generation_id: str, generation: Fields, entry: Entry) -> None:
    finish, timing = entry.record.finish, entry.timing
    assert finish is not None
    assert timing is not None, f"the end of {generation_id} has no timing"
    assert generation["end"] == (finish.code or finish.reason), generation_id
    assert (timing.attempts, timing.deaths, timing.lane) == (
        int(generation["epoch"]),
        int(generation["deaths"]),
        generation["lane"],
    ), generation_id
    assert timing.admitted <= timing.ended, generation_id
    assert bool(timing.claimed) == (timing.attempts > 0), generation_id
    assert bool(timing.first_token) == (entry.position > 0), generation_id


def _check_backlog(snapshot: Snapshot) -> None:
    """Invariant 4: what a lane counts as waiting is what waits."""
    waiting = [g for g in snapshot.generations.values() if g["st"] == _WAITING]
    for lane in LANES:
        members = [generation for generation in waiting if generation["lane"] == lane]
        tokens = sum(int(generation["cost"]) for generation in members)
        size = sum(int(generation["bytes"]) for generation in members)
        assert snapshot.backlog(lane) == (tokens, size), lane


def _check_subscriptions(snapshot: Snapshot) -> None:
    """Invariant 5: a generation names its readers, and each reader names the generation."""
    by_gateway = {
        (gateway, generation_id)
        for gateway, generation_ids in snapshot.named("subs:", snapshot.sets).items()
        for generation_id in generation_ids
    }
    by_generation = {
        (gateway, generation_id)
        for generation_id, generation in snapshot.generations.items()
        for gateway in generation["subs"].split()
    }
    assert by_gateway == by_generation


def _check_due(snapshot: Snapshot) -> None:
    """A generation is looked at no later than its limit; one that is read, not before it."""
    for generation_id, generation in _living(snapshot).items():
        due, limit = snapshot.zset("due")[generation_id], limit_of(generation)
        is_unread = generation["mode"] == "attached" and not generation["subs"]
        assert due <= limit, generation_id
        assert is_unread or due == limit, f"{generation_id} is read, and would be ended early"


def _check_times_to_live(snapshot: Snapshot) -> None:
    """Invariant 7: every key expires, none that a living generation needs before its limit."""
    forever = [key for key, ttl_ms in snapshot.ttl_ms.items() if ttl_ms < 0]
    assert not forever, f"keys without a time to live: {forever}"
    for generation_id, generation in _living(snapshot).items():
        needed = [f"gen:{generation_id}", f"spec:{request_of(generation_id)}"]
        if int(generation["next"]):
            needed.append(f"log:{generation_id}")
        tenant = generation["tenant"]
        key = f"idem:{len(tenant)}:{tenant}:{generation['idem']}"
        if snapshot.strings.get(key, "").endswith(f" {request_of(generation_id)}"):
            needed.append(key)
        for key in needed:
            ends_at = snapshot.now_ms + snapshot.ttl_ms.get(key, 0)
            assert ends_at >= limit_of(generation), f"{key} expires under a living generation"
    specs = {request_of(generation_id) for generation_id in _living(snapshot)}
    kept = snapshot.named("spec:", snapshot.hashes).keys()
    assert kept == specs, f"prompts without, or missing for, a living generation: {kept ^ specs}"


def _check_ended(snapshot: Snapshot) -> None:
    """Invariant 8: one record for each end."""
    records = [row["id"].decode() for row in snapshot.streams.get("ended", [])]
    ended = [
        generation_id
        for generation_id, generation in snapshot.generations.items()
        if generation["st"] == _ENDED and not is_tombstone(generation)
    ]
    assert sorted(records) == sorted(ended)
