"""From overviews to plain words: what is wrong, why we think so, and the one command to run.

Written for somebody who has never seen the system and is asked what is going on. Each case is a
function that looks at one second; :class:`Diagnoser` lets it speak once it has held for a while,
and be silent once it has not held for a while, so that a busy pool does not flicker.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import msgspec

from common.failures import KINDS, is_callers_fault
from common.overview import SEVERITIES, Diagnosis, Overview, Severity, WorkerView

_HOLD_S = 5.0
"""A case must hold for so long before it is told, unless it says that it is sure at once."""
_RELEASE_S = 10.0
"""And must be over for so long before it is not told any more."""
_TREND_S = 40.0
_RECENT_LOSS_S = 300.0
_LONG_WAIT_S = 30.0
"""Half of the usual limit of the queue."""
_NOTICED_WAIT_S = 3.0
_SLOW_SHARE = 0.4
"""Of what the other workers make per generation."""
_MIN_FAILURES = 5
_MEMORY_WARNING, _MEMORY_CRITICAL = 0.85, 0.95
_MIXED_LONG_S = 900.0

Past = Sequence[Overview]
"""Overviews of the last ``_TREND_S``, the newest last and ours."""
Case = Callable[[Overview, Past], Iterator[Diagnosis]]


class Diagnoser:
    """Looks at each second's overview, one after the other."""

    def __init__(self) -> None:
        self._past: deque[Overview] = deque()
        self._since: dict[str, float] = {}
        """When what is the case now began to be."""
        self._told: dict[str, tuple[float, Diagnosis]] = {}
        """What is being told: when it last held, and in which words."""

    def look(self, overview: Overview) -> list[Diagnosis]:
        """What to say of ``overview``, the worst first; never nothing."""
        now_s = overview.at
        if self._past and now_s < self._past[-1].at:  # the clock was set back
            self._past.clear()
            self._since.clear()
        self._past.append(overview)
        while now_s - self._past[0].at > _TREND_S:
            self._past.popleft()
        found = {found.code: found for case in _CASES for found in case(overview, self._past)}
        self._since = {code: self._since.get(code, now_s) for code in found}
        for code, diagnosis in found.items():
            is_sure = code in _SURE_AT_ONCE or now_s - self._since[code] >= _HOLD_S
            if is_sure or code in self._told:
                self._told[code] = (now_s, diagnosis)
        self._told = {
            code: (held_s, diagnosis)
            for code, (held_s, diagnosis) in self._told.items()
            if 0 <= now_s - held_s < (0.001 if code in _SURE_AT_ONCE else _RELEASE_S)
        }
        return ranked([diagnosis for _, diagnosis in self._told.values()]) or [well(overview)]


def ranked(found: list[Diagnosis]) -> list[Diagnosis]:
    """The worst first; among equals, in the order of the cases."""
    return sorted(found, key=lambda it: (SEVERITIES.index(it.severity), _ORDER.index(it.code)))


def well(overview: Overview) -> Diagnosis:
    """What is told when nothing else is."""
    ready = [worker for worker in overview.workers if worker.state == "ready"]
    running = overview.requests.running
    return Diagnosis(
        severity="ok",
        code="well",
        what="Everything is well.",
        why=f"{counted(len(ready), 'worker')} ready, {counted(running, 'answer')} being written, "
        f"{counted(sum(lane.depth for lane in overview.lanes), 'question')} waiting.",
        command="headrace top",
    )


def without_news(last: Overview, quiet_s: float) -> Overview:
    """The last overview there is, once nobody makes any more."""
    words = Diagnosis(
        severity="critical",
        code="exporter_stale",
        what="This picture is old: nobody collects its figures any more.",
        why=f"The exporter, which does so once a second, has said nothing for {quiet_s:.0f} s. "
        "Questions may be answered as ever.",
        command="headrace status",
    )
    return msgspec.structs.replace(last, diagnosis=[words])


def without_redis(last: Overview, quiet_s: float) -> Overview:
    """The last overview there is, as long as Redis does not answer."""
    redis = msgspec.structs.replace(last.redis, is_up=False)
    words = Diagnosis(
        severity="critical",
        code="redis_away",
        what="The queue (Redis) cannot be reached, so no question can be answered.",
        why=f"It has not answered for {quiet_s:.0f} s. Nothing that was accepted is lost while its "
        "disk is whole.",
        command="headrace doctor",
    )
    return msgspec.structs.replace(last, redis=redis, diagnosis=[words])


def without_gateway(last: Overview, quiet_s: float) -> Overview:
    """The last overview there is, as long as the gateway that told it does not answer."""
    words = Diagnosis(
        severity="critical",
        code="gateway_away",
        what="The gateway cannot be reached: what is shown here is old.",
        why=f"It has not answered for {quiet_s:.0f} s. Other gateways may answer as ever.",
        command="headrace status",
    )
    return msgspec.structs.replace(last, diagnosis=[words])


# Cases -----------------------------------------------------------------------------------------


def _no_worker(now: Overview, _: Past) -> Iterator[Diagnosis]:
    states = [worker.state for worker in now.workers]
    if "ready" in states:
        return
    waiting = sum(lane.depth for lane in now.lanes)
    if resting := [it for it in now.workers if it.state in ("draining", "drained")]:
        yield Diagnosis(
            severity="critical",
            code="no_worker",
            what="No question can be answered: every worker was asked to rest.",
            why=f"{_names(resting)} stopped taking work ({resting[0].drain_cause or 'stopping'}); "
            f"{counted(waiting, 'question')} waiting.",
            command=f"headrace workers resume {resting[0].name}",
        )
    elif "loading" in states:
        yield Diagnosis(
            severity="warning",
            code="no_worker",
            what="The model is being loaded; answers begin when that is done.",
            why=f"{counted(states.count('loading'), 'worker')} loading, none ready; "
            f"{counted(waiting, 'question')} waiting.",
            command="headrace status",
        )
    else:
        yield Diagnosis(
            severity="critical",
            code="no_worker",
            what="No question can be answered: no worker is running.",
            why="Workers run the model. None has said for five seconds that it lives; "
            f"{counted(waiting, 'question')} waiting.",
            command="headrace worker",
        )


def _worker_lost(now: Overview, _: Past) -> Iterator[Diagnosis]:
    lost = [loss for loss in now.losses if loss.role == "worker" and _is_recent(loss.at, now)]
    if not lost:
        return
    newest = lost[0]
    ready = sum(worker.state == "ready" for worker in now.workers)
    replaced = any(it.up_s < now.at - newest.at for it in now.workers if it.state == "ready")
    after = "another one has taken its place" if replaced else "none has taken its place yet"
    many = f"{len(lost)} workers died, the last one" if len(lost) > 1 else "A worker died"
    yield Diagnosis(
        severity="warning",
        code="worker_lost",
        what=f"{many} {_ago(now.at - newest.at)}; its work was handed to others.",
        why=f"{newest.name}{f' on {newest.host}' if newest.host else ''} "
        f"{'ended' if newest.cause == 'seen' else 'fell silent'} though nobody stopped it; "
        f"{after}, {counted(ready, 'worker')} ready.",
        command="headrace incident report -o report.html",
    )


def _gateway_lost(now: Overview, _: Past) -> Iterator[Diagnosis]:
    lost = [loss for loss in now.losses if loss.role == "gateway" and _is_recent(loss.at, now)]
    if lost:
        newest = lost[0]
        yield Diagnosis(
            severity="warning",
            code="gateway_lost",
            what=f"A gateway died {_ago(now.at - newest.at)}; its clients had to connect again.",
            why=f"{newest.name}{f' on {newest.host}' if newest.host else ''} fell silent though "
            f"nobody stopped it; {counted(len(now.gateways), 'gateway')} left.",
            command="headrace incident report -o report.html",
        )


def _queue_grows(now: Overview, past: Past) -> Iterator[Diagnosis]:
    """Waits become longer although all workers work. A queue that stands is no case of its own."""
    ready = [worker for worker in now.workers if worker.state == "ready"]
    before = [it for it in past if now.at - it.at >= _TREND_S / 2]
    if not ready or not before or before[-1].at - before[0].at < _TREND_S / 4:
        return
    recent = [it for it in past if now.at - it.at < _TREND_S / 4]
    was, tokens = median(map(_backlog, before)), median(map(_backlog, recent))
    lane = max(now.lanes, key=lambda it: (it.lane != "batch", it.est_wait_s or 0.0), default=None)
    wait_s = _wait_s(now)
    if lane is None or tokens <= 1.2 * was or wait_s < _NOTICED_WAIT_S:
        return
    yield Diagnosis(
        severity="critical" if wait_s >= _LONG_WAIT_S else "warning",
        code="queue_grows",
        what="Questions come faster than they are answered: waits become longer.",
        why=f"{counted(sum(it.depth for it in now.lanes), 'question')} waiting; a new one would "
        f"wait about {wait_s:.0f} s. What is to be written grew from {was:.0f} to {tokens:.0f} "
        f"tokens within half a minute, with {counted(len(ready), 'worker')} ready: start another.",
        command="headrace worker",
    )


def _slow_worker(now: Overview, past: Past) -> Iterator[Diagnosis]:
    """One makes far less for each of its generations than others with about as many of them."""
    if len(past) < _TREND_S / 4:
        return
    speeds: dict[str, list[float]] = {}
    for overview in list(past)[-int(_TREND_S / 2) :]:
        for worker in overview.workers:
            if worker.state == "ready" and worker.batch_size >= 1:
                speed = worker.tokens_per_second / worker.batch_size
                speeds.setdefault(worker.name, []).append(speed)
    usual = {name: median(seen) for name, seen in speeds.items() if len(seen) >= _TREND_S / 4}
    by_name = {worker.name: worker for worker in now.workers}
    for name, speed in usual.items():
        worker = by_name.get(name)
        if worker is None or worker.state != "ready":
            continue
        others = [
            usual[it.name]
            for it in now.workers
            if it.name in usual and it.name != name and _are_alike(it, worker)
        ]
        if len(others) >= 2 and speed < _SLOW_SHARE * median(others):
            yield Diagnosis(
                severity="warning",
                code="slow_worker",
                what=f"One worker is much slower than the others: {name}.",
                why=f"It makes {speed:.1f} tokens a second for each answer, the others "
                f"{median(others):.1f}{f'; it runs on {worker.host}' if worker.host else ''}.",
                command=f"headrace workers drain {name}",
            )
            return


def _are_alike(one: WorkerView, other: WorkerView) -> bool:
    """A full batch is slower for each of its generations than a small one."""
    small, large = sorted((max(1.0, one.batch_size), max(1.0, other.batch_size)))
    return large <= 2 * small


def _errors(now: Overview, _: Past) -> Iterator[Diagnosis]:
    ours = [error for error in now.errors if error.count_1m and not is_callers_fault(error.code)]
    num_failed = sum(error.count_1m for error in ours)
    if num_failed < _MIN_FAILURES:
        return
    share = now.stats.error_rate
    usual = now.stats_1h.error_rate if now.stats_1h.over_s > 600 else 0.0
    if share < 0.02 or share < 3 * usual:
        return
    worst = max(ours, key=lambda error: error.count_1m)
    kind = KINDS.get(worst.code)
    yield Diagnosis(
        severity="critical" if share >= 0.2 else "warning",
        code="errors",
        what=f"{_percent(share)} of the requests of the last minute failed, "
        f"{'all' if len(ours) == 1 else 'most of them'} with {worst.code}.",
        why=(kind.meaning if kind else "No table knows this code.")
        + f" {num_failed} failed in the last minute"
        + (f"; usual is {_percent(usual)}." if now.stats_1h.over_s > 600 else "."),
        command=f"headrace explain {worst.code}",
    )


def _dead_letters(now: Overview, _: Past) -> Iterator[Diagnosis]:
    if now.dead_letters:
        one = now.dead_letters == 1
        yield Diagnosis(
            severity="warning",
            code="dead_letters",
            what=f"{counted(now.dead_letters, 'question')} "
            f"{'was' if one else 'were'} set aside, because workers died of "
            f"{'it' if one else 'them'}.",
            why="What ended two workers beside others, and two more alone, is not given to a "
            "fifth. Somebody has to look at it, and ask it again or discard it.",
            command="headrace dead list",
        )


def _redis(now: Overview, _: Past) -> Iterator[Diagnosis]:
    redis = now.redis
    if redis.evicted_keys or redis.evicts:
        yield Diagnosis(
            severity="critical" if redis.evicted_keys else "warning",
            code="redis_evicts",
            what="The queue (Redis) throws away questions and answers, as its memory is full."
            if redis.evicted_keys
            else "The queue (Redis) will throw away questions and answers once its memory is full.",
            why="It is set to make room so (its maxmemory-policy is not noeviction); "
            f"{redis.evicted_keys} of its entries are gone.",
            command="headrace doctor",
        )
    used = redis.used_bytes / redis.max_bytes if redis.max_bytes else 0.0
    if used >= _MEMORY_WARNING:
        yield Diagnosis(
            severity="critical" if used >= _MEMORY_CRITICAL else "warning",
            code="redis_memory",
            what=f"The memory of the queue (Redis) is {_percent(used)} full; once it is full, no "
            "new question is accepted.",
            why=f"{_megabytes(redis.used_bytes)} of {_megabytes(redis.max_bytes)} are used.",
            command="headrace doctor",
        )
    if redis.durability_gap:
        yield Diagnosis(
            severity="warning",
            code="durability",
            what="If the queue (Redis) stopped now, what waits in it could be lost.",
            why=f"{redis.durability_gap}.",
            command="headrace doctor",
        )


def _versions(now: Overview, _: Past) -> Iterator[Diagnosis]:
    ready = [worker for worker in now.workers if worker.state == "ready"]
    versions = sorted({worker.model_version for worker in ready})
    if len(versions) < 2:
        return
    is_long = all(worker.up_s > _MIXED_LONG_S for worker in ready)
    severity: Severity = "warning" if is_long else "ok"
    yield Diagnosis(
        severity=severity,
        code="versions",
        what=f"{len(versions)} versions of the model answer side by side"
        f"{', for a long time by now' if is_long else ': one is being rolled out'}.",
        why="; ".join(
            f"{version} on {counted(sum(it.model_version == version for it in ready), 'worker')}"
            for version in versions
        )
        + ".",
        command="headrace status",
    )


_CASES: tuple[Case, ...] = (
    _no_worker, _redis, _errors, _queue_grows, _worker_lost, _gateway_lost, _slow_worker,
    _dead_letters, _versions,
)  # fmt: skip
_ORDER = (
    "redis_away", "exporter_stale", "no_worker", "redis_evicts", "redis_memory", "errors",
    "queue_grows", "worker_lost", "gateway_lost", "slow_worker", "dead_letters", "durability",
    "versions", "well",
)  # fmt: skip
_SURE_AT_ONCE = frozenset(
    {"worker_lost", "gateway_lost", "dead_letters", "durability", "redis_evicts", "versions"}
)
"""What is a fact, and no measurement that wavers."""


def _backlog(overview: Overview) -> int:
    """Batches may wait."""
    return sum(lane.backlog_tokens for lane in overview.lanes if lane.lane != "batch")


def _wait_s(overview: Overview) -> float:
    waits = [lane.est_wait_s or 0.0 for lane in overview.lanes if lane.lane != "batch"]
    return max(waits, default=0.0)


def _is_recent(at: float, now: Overview) -> bool:
    return now.at - at < _RECENT_LOSS_S


def _names(workers: Sequence[WorkerView]) -> str:
    named = ", ".join(worker.name for worker in workers[:3])
    return named if len(workers) <= 3 else f"{named} and {len(workers) - 3} more"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Such as ``1 worker`` or ``3 workers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    return f"{seconds:.0f} s ago" if seconds < 90 else f"{seconds / 60:.0f} minutes ago"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"
