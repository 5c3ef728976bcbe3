"""Makes the overview of a pool, once a second: one process of all that try (:func:`keep_overview`).

What it looks at are counts and what processes say of themselves in their beats, so a look costs the
same however many streams there are.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from common.batches import BatchRecord
from common.broker import (
    Broker,
    Census,
    CountedGateway,
    CountedWorker,
    DeadLetters,
    Memory,
)
from common.clock import monotonic_s
from common.diagnosis import Diagnoser
from common.failures import KINDS, Failure, is_callers_fault
from common.figures import Figures, Spread
from common.logs import get_logger
from common.messages import LANES, Lane
from common.overview import (
    BatchView,
    ErrorCount,
    GatewayView,
    LaneView,
    Latency,
    Loss,
    Overview,
    Quantiles,
    RedisView,
    Requests,
    Stats,
    WorkerView,
)

log = get_logger()

INTERVAL_S = 1.0
_BATCHES_S = 5.0
_DISK_S = 60.0
MAX_BATCHES = 20
MAX_ERRORS = 20
_SPEED_S = 6.0
"""Workers beat every 1.5 s: over less their speed would jump."""
_RATE_S, _MINUTE_S, _FIVE_S, _HOUR_S = 10.0, 60.0, 300.0, 3600.0
_FORGET_S = 600.0
"""After this a process that is gone does not come back under its name."""
_LAG_STEP_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """All that one second is made of."""

    census: Census
    memory: Memory
    rtt_s: float
    durability_gap: str = ""
    batches: Sequence[BatchRecord] = ()
    dead: DeadLetters = DeadLetters({}, 0)  # noqa: RUF009 - it is frozen


class _Grown:
    """Adds up what processes counted, each since it was first seen here, or since its start if that
    was later; so no restart, of theirs or ours, looks like a burst.
    """

    def __init__(self) -> None:
        self.figures = Figures()
        self.tokens = 0
        self._began_s = monotonic_s()
        self._figures: dict[str, tuple[float, Figures]] = {}
        self._tokens: dict[str, tuple[float, int]] = {}

    def take(self, census: Census, now_s: float) -> None:
        for gateway in census.gateways:
            if gateway.presence is None:
                continue
            newest = gateway.presence.figures
            fresh = Figures() if self._is_young(gateway.presence.up_s) else newest
            _, before = self._figures.get(gateway.name, (0.0, fresh))
            self.figures.add(newest.since(before))
            self._figures[gateway.name] = (now_s, newest)
        for worker in census.workers:
            if worker.presence is None:
                continue
            tokens = worker.presence.generated_tokens
            _, known = self._tokens.get(
                worker.name, (0.0, 0 if self._is_young(worker.presence.up_s) else tokens)
            )
            self.tokens += max(0, tokens - known)
            self._tokens[worker.name] = (now_s, tokens)
        for seen in (self._figures, self._tokens):
            for name in [it for it, (at_s, _) in seen.items() if now_s - at_s > _FORGET_S]:
                del seen[name]

    def _is_young(self, up_s: float) -> bool:
        """Whether it began while we looked already."""
        return 0 < up_s < monotonic_s() - self._began_s


@dataclass(frozen=True, slots=True)
class _Then:
    at_s: float
    figures: Figures
    tokens: int


class _Memories:
    """What had been counted at times in the past: each second of the last minute, ten seconds
    apart up to five minutes ago, a minute apart up to an hour.
    """

    def __init__(self) -> None:
        self._kept: deque[_Then] = deque()

    def keep(self, then: _Then) -> None:
        if self._kept and then.at_s < self._kept[-1].at_s:  # the clock was set back
            self._kept.clear()
        self._kept.append(then)
        thinned: deque[_Then] = deque()
        for kept in self._kept:
            age_s = then.at_s - kept.at_s
            step_s = 0.0 if age_s <= _MINUTE_S + 1 else 10.0 if age_s <= _FIVE_S + 10 else 60.0
            is_new = not thinned or kept.at_s - thinned[-1].at_s >= step_s
            if age_s <= _HOUR_S + 60 and is_new:
                thinned.append(kept)
        self._kept = thinned

    def ago(self, seconds: float) -> _Then:
        """The latest that is so old, else the oldest there is."""
        newest_s = self._kept[-1].at_s
        for kept in reversed(self._kept):
            if newest_s - kept.at_s >= seconds - 0.5:
                return kept
        return self._kept[0]


@dataclass(slots=True)
class _Speed:
    """Tokens per second of a worker, between its beats."""

    samples: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def note(self, at_s: float, tokens: int) -> None:
        if self.samples and at_s - self.samples[-1][0] < 0.2:
            return  # the same beat
        if self.samples and tokens < self.samples[-1][1]:
            self.samples.clear()
        self.samples.append((at_s, tokens))
        while len(self.samples) > 2 and at_s - self.samples[1][0] >= _SPEED_S:
            self.samples.popleft()

    @property
    def tokens_per_second(self) -> float:
        if len(self.samples) < 2:
            return 0.0
        (began_s, first), (ended_s, last) = self.samples[0], self.samples[-1]
        return max(0, last - first) / (ended_s - began_s)


class PoolWatch:
    """Turns one look after the other into overviews; knows nothing of Redis or of time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._grown = _Grown()
        self._memories = _Memories()
        self._speeds: dict[str, _Speed] = {}
        self._lags: dict[str, deque[tuple[float, Spread, Spread]]] = {}
        self._diagnoser = Diagnoser()

    def note(self, look: Look) -> Overview:
        """The overview of the second in which ``look`` was taken."""
        census, at_s = look.census, look.census.at_ms / 1000
        self._grown.take(census, at_s)
        figures = self._grown.figures.since(Figures())
        self._memories.keep(_Then(at_s, figures, self._grown.tokens))
        workers = [self._worker(worker, at_s) for worker in census.workers]
        version = _version_of(census)
        minute = figures.since(self._memories.ago(_MINUTE_S).figures)
        overview = Overview(
            at=at_s,
            model=self._model,
            model_version=version,
            stats=self._stats(_MINUTE_S, version),
            stats_5m=self._stats(_FIVE_S, version),
            stats_1h=self._stats(_HOUR_S, version),
            requests=self._requests(minute, sum(worker.held for worker in workers)),
            lanes=[_lane(census, lane) for lane in LANES],
            workers=sorted(workers, key=lambda worker: (worker.host, worker.name)),
            gateways=[self._gateway(gateway, at_s) for gateway in census.gateways],
            latency=Latency(
                ttft=_quantiles(minute.ttft), inter_token=_quantiles(minute.inter_token)
            ),
            errors=_errors(minute.outcomes, figures.outcomes),
            streams=sum(map(_streams, census.gateways)),
            batches=[_batch(record) for record in look.batches],
            dead_letters=census.dead_letters,
            redis=RedisView(
                used_bytes=look.memory.used_bytes,
                max_bytes=look.memory.max_bytes,
                rtt_s=round(look.rtt_s, 6),
                evicts=look.memory.evicts,
                evicted_keys=look.memory.evicted_keys,
                durability_gap=look.durability_gap,
            ),
            losses=[
                Loss(
                    at=lost.at_ms / 1000,
                    role=lost.role,
                    name=lost.name,
                    host=lost.host,
                    cause="seen" if lost.is_seen else "lease",
                )
                for lost in census.lost
            ],
        )
        self._forget(census)
        return msgspec.structs.replace(overview, diagnosis=self._diagnoser.look(overview))

    def _forget(self, census: Census) -> None:
        names = {worker.name for worker in census.workers}
        self._speeds = {name: it for name, it in self._speeds.items() if name in names}
        names = {gateway.name for gateway in census.gateways}
        self._lags = {name: it for name, it in self._lags.items() if name in names}

    def _stats(self, window_s: float, version: str) -> Stats:
        now, then = self._memories.ago(0), self._memories.ago(window_s)
        over_s = now.at_s - then.at_s
        grown = now.figures.since(then.figures)
        tokens = now.tokens - then.tokens
        return Stats(
            queue_time=_rounded(grown.queue_time.mean_s),
            generation_time=_rounded(grown.generation_time.mean_s),
            tokens_per_second=round(tokens / over_s, 3) if over_s else 0.0,
            error_rate=round(error_rate(grown.outcomes), 6),
            model_version=version,
            over_s=round(over_s, 3),
        )

    def _requests(self, minute: Figures, running: int) -> Requests:
        now, then = self._memories.ago(0), self._memories.ago(_RATE_S)
        passed_s = now.at_s - then.at_s
        num_ended = sum(now.figures.since(then.figures).outcomes.values())
        outcomes = minute.outcomes
        return Requests(
            per_s=round(num_ended / passed_s, 3) if passed_s else 0.0,
            running=running,
            ok=outcomes.get("ok", 0),
            failed=sum(number for code, number in outcomes.items() if code in KINDS),
            cancelled=outcomes.get("cancelled", 0) + outcomes.get("disconnected", 0),
        )

    def _worker(self, worker: CountedWorker, now_s: float) -> WorkerView:
        age_s = (worker.heartbeat_age_ms or 0) / 1000
        told = worker.presence
        if told is None:
            return WorkerView(name=worker.name, heartbeat_age_s=age_s, held=worker.held)
        speed = self._speeds.setdefault(worker.name, _Speed())
        speed.note(now_s - age_s, told.generated_tokens)
        return WorkerView(
            name=worker.name,
            host=told.host,
            state=told.state if worker.expires_in_ms > 0 else "dead",
            model_version=told.model_version,
            batch_size=round(told.batch_size, 2),
            max_batch_size=told.max_batch_size,
            kv_used=round(told.kv_used, 4),
            tokens_per_second=round(speed.tokens_per_second, 2),
            rss_bytes=told.rss_bytes,
            gpu_mem_bytes=told.gpu_mem_bytes,
            gpu_mem_total_bytes=told.gpu_mem_total_bytes,
            heartbeat_age_s=age_s,
            held=worker.held,
            pid=told.pid,
            up_s=told.up_s,
            drain_cause=worker.drain_cause,
        )

    def _gateway(self, gateway: CountedGateway, now_s: float) -> GatewayView:
        told = gateway.presence
        if told is None:
            return GatewayView(name=gateway.name, streams=gateway.reading)
        relay_lag, loop_lag = self._lags_of(gateway.name, told.figures, now_s)
        return GatewayView(
            name=gateway.name,
            streams=told.streams,
            relay_lag_p99_s=_rounded(relay_lag.quantile_s(0.99)) or 0.0,
            loop_lag_s=_rounded(loop_lag.quantile_s(0.99)) or 0.0,
            host=told.host,
            state=told.state,
            up_s=told.up_s,
        )

    def _lags_of(self, name: str, figures: Figures, now_s: float) -> tuple[Spread, Spread]:
        """What a gateway observed within the last minute."""
        kept = self._lags.setdefault(name, deque())
        if not kept or now_s - kept[-1][0] >= _LAG_STEP_S:
            kept.append((now_s, figures.relay_lag, figures.loop_lag))
        while now_s - kept[0][0] > _MINUTE_S:
            kept.popleft()
        _, relay_lag, loop_lag = kept[0]
        return figures.relay_lag.since(relay_lag), figures.loop_lag.since(loop_lag)


def error_rate(outcomes: dict[str, int]) -> float:
    """The share that failed through no fault of the caller, of all but the callers' own faults."""
    ours = {code: number for code, number in outcomes.items() if not is_callers_fault(code)}
    failed = sum(number for code, number in ours.items() if code in KINDS)
    ended = sum(ours.values())
    return failed / ended if ended else 0.0


def _errors(minute: dict[str, int], since_start: dict[str, int]) -> list[ErrorCount]:
    found = [
        ErrorCount(code=code, count_1m=minute.get(code, 0), total=number)
        for code, number in since_start.items()
        if code in KINDS
    ]
    found.sort(key=lambda error: (-error.count_1m, -error.total, error.code))
    return found[:MAX_ERRORS]


def _lane(census: Census, name: Lane) -> LaneView:
    lane = census.lanes[name]
    wait_s = lane.wait_ms / 1000 if lane.wait_ms or not lane.backlog_tokens else None
    return LaneView(
        lane=name,
        depth=lane.depth,
        oldest_age_s=lane.oldest_ms / 1000,
        backlog_tokens=lane.backlog_tokens,
        est_wait_s=wait_s,
    )


def _batch(record: BatchRecord) -> BatchView:
    counts = record.counts
    return BatchView(
        id=record.id,
        status=record.status,
        total=counts.total,
        completed=counts.completed,
        failed=counts.failed,
    )


def _streams(gateway: CountedGateway) -> int:
    return gateway.presence.streams if gateway.presence else gateway.reading


def _version_of(census: Census) -> str:
    """What most workers run; without workers, what the gateways expect."""
    told = [it.presence.model_version for it in census.workers if it.presence]
    told = told or [it.presence.model_version for it in census.gateways if it.presence]
    return max(sorted(set(told)), key=told.count, default="")


def _quantiles(spread: Spread) -> Quantiles:
    return Quantiles(p50=_rounded(spread.quantile_s(0.5)), p99=_rounded(spread.quantile_s(0.99)))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


# The writer --------------------------------------------------------------------------------------


async def keep_overview(
    broker: Broker, owner: str, *, on_look: Callable[[Look | None, bool], None] | None = None
) -> None:
    """Look each second, until cancelled, and write what is seen unless another process does.

    Any number of processes may run this: one holds the lease, the others look on, so that whoever
    goes on from it knows the last hour as well. ``on_look`` is told of every look and whether its
    overview is written here, or of None while Redis is away, which only delays the next.
    """
    watch, looker = PoolWatch(broker.pool), _Looker(broker)
    is_away = False
    due_s = monotonic_s()
    try:
        while True:
            try:
                look = await looker.look()
                overview = watch.note(look)
                store = broker.overview_store
                is_writer = await store.take_lease(owner)
                if is_writer:
                    await store.append(overview)
                if on_look is not None:
                    on_look(look, is_writer)
                if is_away:
                    log.info("redis.reconnected")
                is_away = False
            except Failure as failure:
                if not is_away:
                    log.warning("redis.disconnected", error=str(failure)[:200])
                is_away = True
                if on_look is not None:
                    on_look(None, False)
            due_s = max(due_s + INTERVAL_S, monotonic_s())
            await asyncio.sleep(due_s - monotonic_s())
    finally:
        await _leave(broker, owner)


async def _leave(broker: Broker, owner: str) -> None:
    try:
        await broker.overview_store.drop_lease(owner)
    except Failure:
        return  # it ends by itself


class _Looker:
    """Asks Redis: for most each second, for what changes slowly less often."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._batches: list[BatchRecord] = []
        self._batches_at_s = self._disk_at_s = float("-inf")
        self._durability_gap = ""
        self._dead: DeadLetters | None = None

    async def look(self) -> Look:
        """Raises: Failure BROKER_UNAVAILABLE."""
        now_s = monotonic_s()
        if now_s - self._batches_at_s >= _BATCHES_S:
            self._batches = await self._active_batches()
            self._batches_at_s = now_s
        if now_s - self._disk_at_s >= _DISK_S:
            facts = await self._broker.facts()
            self._durability_gap = (
                "" if facts.has_append_only_file else "It keeps no append-only file on its disk"
            )
            self._disk_at_s = now_s
        self._dead = await self._broker.count_dead(self._dead)
        return Look(
            dead=self._dead,
            census=await self._broker.census(),
            memory=await self._broker.memory(),
            rtt_s=await self._broker.round_trip_s(),
            durability_gap=self._durability_gap,
            batches=self._batches,
        )

    async def _active_batches(self) -> list[BatchRecord]:
        store = self._broker.batch_store
        ids = await store.active(self._broker.pool)
        found = [await store.get(id) for id in ids[-MAX_BATCHES:]]
        return [record for record in reversed(found) if record is not None]
