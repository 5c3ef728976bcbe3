"""Causes that events tell of, each with the requests that it would have touched.

A cause here is no more than a suspicion: an interval, a scope and a mechanism. Whether the bad
requests are those that it would have touched is for :mod:`ops.incident.why` to count, in the same
way as for a trait such as a worker or a tenant. What somebody injected for a test
(``fault.injected``) is never used: who has to be told has not found anything.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from duckdb import DuckDBPyConnection

from ops.incident.statistics import scan
from ops.incident.symptoms import TRAITS, Symptom, Window, bucket_width, series

_CLUSTER_S = 20.0
"""Signs of one loss come within about a lease of one another."""
_RECOVERY_S = 30.0
"""How long a loss is felt when nothing says that the process came back."""
_LATE_S = 5.0
_CLOCK_OFF_S = 1.0
"""A clock that is so far off misleads whoever reads the log; sampling it errs by milliseconds."""
_STANDSTILL_S = 2.0
_SAME_PAUSE_S = 2.0
"""Processes that stood still together say so within this."""
_MANY = frozenset({"queue", "first_token", "pace"})
_LOAD_CODES = "('QUEUE_FULL','QUEUE_TIMEOUT','NO_WORKERS','GENERATION_TIMEOUT','RATE_LIMITED')"
_UNEXPECTED = ("worker.crashed", "engine.failed", "engine.stalled")


@dataclass(frozen=True, slots=True)
class Cause:
    """One suspicion. ``exposed`` are SQL conditions over ``judged``; the one that fits counts."""

    kind: str
    words: str
    subject: dict[str, str]
    start: float
    end: float
    exposed: tuple[str, ...]
    command: str
    """The next one of `headrace incident`, with its options but for the logs."""
    plausibility: float = 1.0
    """How much of what it fits it may claim: below 1 for what happens all the time."""
    inherent: float = 0.0
    """Evidence, in nats, of its own: what is worth saying even where no request suffered."""
    facts: tuple[str, ...] = ()
    explains: frozenset[str] | None = None
    """Kinds of symptoms that it can bring about; None: any."""


def find_causes(db: DuckDBPyConnection, symptoms: Sequence[Symptom]) -> list[Cause]:
    """All suspicions of this log; ``judged`` must exist."""
    log = _Log(db)
    return [
        *_of_redis(log),
        *_of_processes(log),
        *_of_poison(log),
        *_of_changes(log),
        *_of_pauses(log),
        *_of_clocks(log),
        *_of_storage(log),
        *_of_capacity(log),
        *_of_standstills(log, symptoms),
        *_of_load(log, symptoms),
        *_of_codes(log),
    ]


@dataclass(frozen=True, slots=True)
class Event:
    t: float
    event: str
    service: str
    instance: str
    worker: str
    code: str
    job_id: str
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """The worker that it is about, else the process that says it."""
        return self.worker or self.instance


_TELLING = (
    "redis.disconnected",
    "redis.reconnected",
    "process.exited",
    "process.paused",
    "process.started",
    "process.restarted",
    "worker.started",
    "worker.ready",
    "worker.state",
    "worker.draining",
    "worker.stopped",
    "gateway.started",
    "gateway.ready",
    "gateway.stopped",
    "background.started",
    *_UNEXPECTED,
    "engine.memory_refused",
    "job.requeued",
    "job.dead",
    "deploy.started",
    "deploy.promoted",
    "deploy.rolled_back",
    "config.changed",
    "clock.sampled",
    "storage.failed",
    "webhook.dead",
    "webhook.failed",
    "log.dropped",
    "gateway.draining",
    "supervisor.ready",
    "supervisor.stopped",
)


class _Log:
    """The few telling lines of a log, by event, in order of time."""

    def __init__(self, db: DuckDBPyConnection) -> None:
        self.db = db
        self._events: dict[str, list[Event]] = defaultdict(list)
        span = db.execute("SELECT min(arrived), max(gone) FROM judged").fetchone()
        self.start, self.end = span if span and span[0] is not None else (0.0, 0.0)
        names = ", ".join(f"'{name}'" for name in _TELLING)
        for row in db.execute(
            f"""SELECT t, event, service, instance, worker, code, job_id, CAST(fields AS VARCHAR)
                FROM events WHERE event IN ({names}) ORDER BY t"""
        ).fetchall():
            fields: dict[str, Any] = json.loads(row[7]) if row[7] else {}
            event, service, instance, worker, code, job_id = (str(word or "") for word in row[1:7])
            told = Event(row[0], event, service, instance, worker, code, job_id, fields)
            self._events[event].append(told)
        self._instances = self._instances_by_pid()

    def all(self, *names: str) -> list[Event]:
        found = [event for name in names for event in self._events[name]]
        return sorted(found, key=lambda event: event.t)

    def _instances_by_pid(self) -> dict[int, str]:
        started = self.all("worker.started", "worker.ready", "gateway.started", "gateway.ready")
        return {
            int(event.fields["pid"]): event.instance
            for event in started
            if event.fields.get("pid") is not None
        }

    def instance_of(self, event: Event) -> str:
        """The incarnation that the supervisor's line is about, as it names itself."""
        pid = event.fields.get("child_pid")
        known = self._instances.get(int(pid)) if pid is not None else None
        return known or slot_of(event)


def slot_of(event: Event) -> str:
    """How the supervisor names the place of a process, such as ``worker 1``."""
    told = event.fields.get("name") or event.instance
    return str(told)


def _clusters(events: Iterable[Event], gap_s: float = _CLUSTER_S) -> Iterator[list[Event]]:
    cluster: list[Event] = []
    for event in events:
        if cluster and event.t - cluster[-1].t > gap_s:
            yield cluster
            cluster = []
        cluster.append(event)
    if cluster:
        yield cluster


def shown_since(at: float) -> str:
    """A minute before, as an option takes it."""
    return datetime.fromtimestamp(at - 60, UTC).isoformat(timespec="seconds")[:19]


def quoted(text: str) -> str:
    """As an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def _alive(start: float, end: float) -> str:
    """Requests that were there at some time of the interval."""
    return f"(arrived <= {end!r} AND gone >= {start!r})"


def _arrived(start: float, end: float) -> str:
    return f"(arrived BETWEEN {start!r} AND {end!r})"


# Redis ---------------------------------------------------------------------------------------


def _of_redis(log: _Log) -> Iterator[Cause]:
    gone = [
        event
        for event in log.all("process.exited")
        if event.fields.get("role") == "server" and _is_unexpected(event)
    ]
    signs = sorted([*log.all("redis.disconnected"), *gone], key=lambda event: event.t)
    back = log.all("redis.reconnected")
    for cluster in _clusters(signs):
        start = cluster[0].t
        places = {event.instance for event in cluster}
        ends = [event.t for event in back if event.t >= start and event.instance in places]
        end = max([cluster[-1].t, *[t for t in ends if t < cluster[-1].t + 120]]) + 1
        died = any(event.event == "process.exited" for event in cluster)
        alone = len(places) == 1 and not died and _num_processes(log) > 2
        where = f"{next(iter(places))} alone" if alone else f"{len(places)} processes"
        scope = [f"(worker = {quoted(place)} OR gateway = {quoted(place)})" for place in places]
        limits = f" AND ({' OR '.join(scope)})" if alone else ""
        yield Cause(
            kind="redis",
            words="Redis ended and was started again" if died else "Redis could not be reached",
            subject={"component": "redis"} | ({"instance": next(iter(places))} if alone else {}),
            start=start,
            end=end,
            exposed=(
                _alive(start - 1, end) + limits,
                _alive(start - _LATE_S, end + _LATE_S) + limits,
            ),
            command=f"changes --since {shown_since(start)}",
            inherent=20.0,
            facts=(f"redis.disconnected of {where}, for {end - start:.0f} s",),
        )


def _num_processes(log: _Log) -> int:
    row = log.db.execute(
        "SELECT count(DISTINCT instance) FROM events WHERE service IN ('gateway', 'worker')"
    ).fetchone()
    return row[0] if row else 0


# Processes -----------------------------------------------------------------------------------


def _is_unexpected(event: Event) -> bool:
    """An exit that nobody asked for: by a signal, or with a code that says failure."""
    if event.fields.get("cause") == "asked":
        return False
    code = event.fields.get("exit_code")
    told = event.fields.get("signal")
    return bool(told and told not in {"SIGTERM", "SIGINT", 15, 2}) or bool(code)


@dataclass
class _Loss:
    """What is known of one process that was lost."""

    place: str
    slot: str
    role: str
    signs: list[Event] = field(default_factory=list[Event])

    @property
    def t(self) -> float:
        return self.signs[0].t

    @property
    def last(self) -> float:
        return self.signs[-1].t


def _losses(log: _Log) -> list[_Loss]:
    """Signs of one process in a short time are one loss."""
    signs: dict[str, list[Event]] = defaultdict(list)
    slots: dict[str, tuple[str, str]] = {}
    for event in log.all("process.exited"):
        role = str(event.fields.get("role", ""))
        if role != "server" and _is_unexpected(event):
            place = log.instance_of(event)
            slots[place] = (slot_of(event), role)
            signs[place].append(event)
    for event in log.all(*_UNEXPECTED, "job.requeued", "worker.state"):
        if event.event == "job.requeued" and not _is_by_loss(event):
            continue
        if event.event == "worker.state" and event.fields.get("to") != "dead":
            continue
        if event.event == "job.requeued" and not event.worker:
            continue
        signs[event.place].append(event)
        slots.setdefault(event.place, (event.place, "worker"))
    return [
        _Loss(place, *slots[place], cluster)
        for place, events in signs.items()
        for cluster in _clusters(sorted(events, key=lambda event: event.t))
    ]


def _is_by_loss(event: Event) -> bool:
    return event.fields.get("cause") in {"lease", "beat", "dead", "worker_dead", "lost", "death"}


def _of_processes(log: _Log) -> Iterator[Cause]:
    losses = _losses(log)
    by_slot: dict[tuple[str, str], list[_Loss]] = defaultdict(list)
    for loss in losses:
        by_slot[loss.slot, loss.role].append(loss)
    for (slot, role), own in by_slot.items():
        yield _lost(log, slot, role, own)
    if len(by_slot) > 1:
        for cluster in _groups(losses):
            if len({loss.slot for loss in cluster}) > 1:
                yield _lost_together(log, cluster)


def _groups(losses: list[_Loss]) -> Iterator[list[_Loss]]:
    ordered = sorted(losses, key=lambda loss: loss.t)
    group: list[_Loss] = []
    for loss in ordered:
        if group and loss.t - group[-1].t > _CLUSTER_S:
            yield group
            group = []
        group.append(loss)
    if group:
        yield group


def _lost(log: _Log, slot: str, role: str, losses: list[_Loss]) -> Cause:
    signs = [sign for loss in losses for sign in loss.signs]
    start = losses[0].t
    end = max(_back(log, loss) for loss in losses)
    places = sorted({loss.place for loss in losses})
    touched = _touched(log, losses)
    how = _how(signs)
    times = "" if len(losses) == 1 else f", {len(losses)} times"
    return Cause(
        kind="process_lost" if role != "worker" else "worker_lost",
        words=f"{slot} {how}{times}",
        subject={role or "process": places[0] if len(places) == 1 else slot, "slot": slot},
        start=start,
        end=end,
        exposed=(touched, f"({touched} OR {_alive(start, end)})"),
        command=f"changes --since {shown_since(start)}",
        inherent=15.0 if any(sign.event != "job.requeued" for sign in signs) else 6.0,
        facts=tuple(_facts(signs)),
    )


def _lost_together(log: _Log, losses: list[_Loss]) -> Cause:
    slots = sorted({loss.slot for loss in losses})
    start, end = losses[0].t, max(_back(log, loss) for loss in losses)
    touched = _touched(log, losses)
    return Cause(
        kind="workers_lost",
        words=f"{len(slots)} processes were lost at about the same time: {', '.join(slots)}",
        subject={
            "component": "workers",
            "workers": ", ".join(sorted({loss.place for loss in losses})),
        },
        start=start,
        end=end,
        exposed=(touched, f"({touched} OR {_alive(start, end)})"),
        command=f"changes --since {shown_since(start)}",
        plausibility=0.97,
        inherent=15.0,
        facts=tuple(_facts([sign for loss in losses for sign in loss.signs])),
    )


def _touched(log: _Log, losses: Sequence[_Loss]) -> str:
    """Requests that the lost process was working on, or had open, at its end."""
    ids: set[str] = set()
    for loss in losses:
        rows = log.db.execute(
            """SELECT request_id FROM attempts
               WHERE worker = $place AND claimed <= $last AND coalesce(ended, 1e18) >= $t - 1
               UNION SELECT request_id FROM judged
               WHERE gateway = $place AND arrived <= $last AND (ended IS NULL OR gone >= $t)""",
            {"place": loss.place, "t": loss.t, "last": loss.last},
        ).fetchall()
        ids |= {str(row[0]) for row in rows}
    return _among(ids)


def _among(ids: Iterable[str]) -> str:
    listed = ", ".join(map(quoted, sorted(ids)))
    return f"(request_id IN ({listed}))" if listed else "false"


def _back(log: _Log, loss: _Loss) -> float:
    """When the place was taken again; a while later where nobody says so."""
    ready = [
        event.t
        for event in log.all(
            "worker.ready", "gateway.ready", "process.restarted", "process.started"
        )
        if event.t > loss.t and event.instance != loss.place
    ]
    return min([t for t in ready if t < loss.last + 120], default=loss.last + _RECOVERY_S)


_SIGNALS = {9: "SIGKILL", 11: "SIGSEGV", 6: "SIGABRT", 7: "SIGBUS", 15: "SIGTERM", 4: "SIGILL"}


def _how(signs: Sequence[Event]) -> str:
    """The most telling sign in words."""
    by_name = {sign.event: sign for sign in reversed(signs)}
    if "engine.stalled" in by_name:
        return "hung: its engine made no step"
    if (ended := by_name.get("process.exited")) is not None:
        told = ended.fields.get("signal") or -(ended.fields.get("exit_code") or 0)
        if isinstance(told, str) or told > 0:
            return f"was ended by {_SIGNALS.get(told, told) if isinstance(told, int) else told}"
        code = ended.fields.get("exit_code")
        engine = _how_engine_failed(by_name)
        return f"{engine} and ended" if engine else f"ended with exit code {code}"
    if engine := _how_engine_failed(by_name):
        return engine
    if "worker.crashed" in by_name:
        return f"could not go on ({by_name['worker.crashed'].code or 'no code'})"
    return "was lost: its lease ended while it held work"


def _how_engine_failed(by_name: Mapping[str, Event]) -> str:
    """Empty: it did not."""
    failed = by_name.get("engine.failed")
    if failed is None:
        return ""
    return "lost its GPU to a fault" if failed.code == "GPU_HW_FAULT" else "failed in its engine"


def _facts(signs: Sequence[Event]) -> list[str]:
    counts: dict[str, int] = defaultdict(int)
    for sign in signs:
        counts[sign.event] += 1
    return [f"{name} ×{count}" for name, count in counts.items()]


# Prompts that kill -----------------------------------------------------------------------------


def _of_poison(log: _Log) -> Iterator[Cause]:
    dead = {event.job_id.split(".")[0]: event.t for event in log.all("job.dead") if event.job_id}
    rows = log.db.execute(
        "SELECT request_id, gone, tenant_hash FROM judged WHERE code = 'POISON_REQUEST'"
    ).fetchall()
    dead |= {str(row[0]): float(row[1]) for row in rows}
    if not dead:
        return
    last = max(dead.values())
    losses = [loss for loss in _losses(log) if loss.t <= last + 1]
    own = _among(dead)
    start = min([*dead.values(), *(loss.t for loss in losses)])
    end = max([last, *(_back(log, loss) for loss in losses)])
    first = min(dead, key=lambda id: dead[id])
    more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
    askers = {str(row[2]) for row in rows if row[2]}
    asker = {"tenant_hash": askers.pop()} if len(askers) == 1 else {}
    whose = f", all of tenant {asker['tenant_hash']}" if asker and more else ""
    touched = f"({own} OR {_touched(log, losses)})" if losses else own
    yield Cause(
        kind="poison_request",
        words=f"request {first}{more}{whose}: each worker that runs it ends",
        subject={"request_id": first} | asker,
        start=start,
        end=end,
        exposed=(own, touched, f"({touched} OR {_alive(start, end)})"),
        command=f"show {first}",
        plausibility=1.1,  # it brings about the losses of workers, which stand beside it
        inherent=22.0,
        facts=(f"requests given up as poison: {len(dead)}", f"workers lost: {len(losses)}"),
    )


# What somebody changed -------------------------------------------------------------------------


def _of_changes(log: _Log) -> Iterator[Cause]:
    yield from _of_restarts(log)
    ends = [event.t for event in log.all("deploy.rolled_back")]
    stops = [event.t for event in log.all("supervisor.stopped", "gateway.draining")]
    ready = [event.t for event in log.all("supervisor.ready")]
    for event in log.all("deploy.started", "deploy.promoted", "config.changed"):
        end = min([t for t in ends if t > event.t], default=log.end + 1)
        version = str(event.fields.get("to_version") or "")
        by_version = (
            (f"model_version = {quoted(version)}", f"git_sha = {quoted(version)}")
            if version
            else ()
        )
        is_config = event.event == "config.changed"
        diff = json.dumps(event.fields.get("diff", {}), sort_keys=True)
        what = str(event.fields.get("what") or "version")
        yield Cause(
            kind="config" if is_config else "deploy",
            words=f"the configuration changed: {diff[:200]}"
            if is_config
            else f"{what} {version} was deployed",
            subject={"config": diff[:200]} if is_config else {"model_version": version},
            start=event.t,
            end=end,
            exposed=(
                _arrived(event.t - 1, end),
                # What came while it was carried out, which begins with the end of what ran before.
                _arrived(
                    began := min([t for t in stops if 0 < event.t - t < 60] or [event.t]), end
                ),
                _arrived(began, min([t for t in ready if t > event.t] or [event.t]) + 10),
                *by_version,
            ),
            command=f"changes --since {shown_since(event.t)}",
            plausibility=0.97,
            facts=(f"{event.event} at {event.t:.0f}",),
        )


def _of_restarts(log: _Log) -> Iterator[Cause]:
    """Everything stopped on purpose and started again."""
    ready = log.all("supervisor.ready")
    changed = [event.t for event in log.all("deploy.started", "config.changed")]
    for stopped in log.all("supervisor.stopped"):
        back = next((event.t for event in ready if event.t > stopped.t), None)
        if back is None or stopped.t >= log.end:
            continue  # the end of it all
        if any(stopped.t < t < back for t in changed):
            continue  # it was to bring that about, and is told with it
        leaving = [t.t for t in log.all("gateway.draining") if stopped.t - 60 < t.t < stopped.t]
        start = min([*leaving, stopped.t])
        yield Cause(
            kind="restart",
            words=f"everything was stopped and started again, which took {back - start:.0f} s",
            subject={"component": "restart"},
            start=start,
            end=back,
            exposed=(_alive(start, back), _arrived(start, back + 10)),
            command=f"changes --since {shown_since(start)}",
            plausibility=0.9,
            facts=("supervisor.stopped", "supervisor.ready"),
        )


def _of_pauses(log: _Log) -> Iterator[Cause]:
    """Processes that stood still and say so now: one, or several at the same time."""
    paused = [event for event in log.all("process.paused") if event.t - _paused_s(event) < log.end]
    for cluster in _clusters(paused, _SAME_PAUSE_S):
        start = min(event.t - _paused_s(event) for event in cluster)
        end = max(event.t for event in cluster)
        places = sorted({event.place for event in cluster})
        services = {event.service for event in cluster}
        longest_s = max(map(_paused_s, cluster))
        touched = " OR ".join(
            f"worker = {quoted(one)} OR gateway = {quoted(one)}" for one in places
        )
        if len(places) == 1:
            who, subject = places[0], {cluster[0].service: places[0]}
        else:
            who = f"{len(places)} processes ({', '.join(places)})"
            part = "workers" if services == {"worker"} else "machine"
            subject = {"component": part, "workers": ", ".join(places)}
        yield Cause(
            kind="paused",
            words=f"{who} stood still for {longest_s:.1f} s without computing: stopped, or starved",
            subject=subject,
            start=start,
            end=end,
            exposed=(f"({_alive(start, end)} AND ({touched}))", _alive(start, end)),
            command=f"changes --since {shown_since(start)}",
            plausibility=0.98,
            inherent=6.0 if longest_s >= _STANDSTILL_S else 0.0,
            facts=(f"process.paused ×{len(cluster)}",),
            explains=_MANY | {"relay", "moved"},
        )


def _paused_s(event: Event) -> float:
    return float(event.fields.get("paused_s") or 0.0)


def _of_clocks(log: _Log) -> Iterator[Cause]:
    worst: dict[str, Event] = {}
    for event in log.all("clock.sampled"):
        offset = abs(float(event.fields.get("offset_s") or 0.0))
        known = worst.get(event.instance)
        if offset >= _CLOCK_OFF_S and (
            known is None or offset > abs(float(known.fields["offset_s"]))
        ):
            worst[event.instance] = event
    for instance, event in worst.items():
        offset = float(event.fields["offset_s"])
        name = "worker" if event.service == "worker" else "gateway"
        yield Cause(
            kind="clock",
            words=f"the clock of {instance} differs from Redis' by {abs(offset):.0f} s",
            subject={name: instance, "component": "clock"},
            start=event.t,
            end=log.end,
            exposed=(f"(worker = {quoted(instance)} OR gateway = {quoted(instance)})",),
            command="verify",
            inherent=25.0,
            facts=(f"clock.sampled offset_s={offset:.3f}",),
            explains=frozenset(),
        )


def _of_storage(log: _Log) -> Iterator[Cause]:
    kinds = (
        ("storage.failed", "storage", "the storage of files failed", 15.0),
        ("webhook.dead", "webhook", "events were given up that a webhook did not take", 8.0),
        ("webhook.failed", "webhook", "events could not be delivered to a webhook", 7.0),
        ("log.dropped", "log_lost", "", 0.0),
        ("engine.memory_refused", "memory", "a device had no memory for a step", 8.0),
    )
    for name, kind, words, inherent in kinds:
        for cluster in _clusters(log.all(name), 60.0):
            start, end = cluster[0].t, cluster[-1].t
            places = sorted({event.place for event in cluster})
            place = {cluster[0].service: places[0]} if len(places) == 1 else {}
            alone = bool(place) and kind == "memory"
            if kind == "log_lost":
                yield from _of_lost_lines(log, cluster)
                continue
            limits = f" AND worker = {quoted(places[0])}" if alone else ""
            codes = {"storage": "code LIKE 'STORAGE_%'", "memory": "code = 'CUDA_OOM'"}.get(kind)
            yield Cause(
                kind=kind,
                words=f"{words}, at {places[0]}" if alone else words,
                subject={"component": kind} | place,
                start=start,
                end=end,
                exposed=(
                    _alive(start - 1, end + 1) + limits,
                    *((f"({codes})",) if codes and kind == "storage" else ()),
                ),
                command=f"changes --since {shown_since(start)}",
                plausibility=0.9,
                inherent=inherent,
                facts=(f"{name} ×{len(cluster)} of {', '.join(places[:3])}",),
            )


def _of_lost_lines(log: _Log, dropped: Sequence[Event]) -> Iterator[Cause]:
    """The requests whose end is missing because a process could not write its lines."""
    for event in dropped:
        row = log.db.execute(
            """SELECT max(t) FROM events WHERE instance = ? AND t < ? AND event <> 'log.dropped'""",
            [event.instance, event.t - 0.001],
        ).fetchone()
        start = row[0] if row and row[0] is not None else log.start
        lines = event.fields.get("lines", "some")
        yield Cause(
            kind="log_lost",
            words=f"{event.instance} lost {lines} log lines: what it did then is not known",
            subject={"component": "log_lost", event.service or "instance": event.instance},
            start=start,
            end=event.t,
            exposed=(
                f"(gateway = {quoted(event.instance)} AND ended IS NULL)",
                f"(gateway = {quoted(event.instance)} AND {_alive(start, event.t)})",
            ),
            command="verify",
            inherent=6.0,
            facts=(f"log.dropped lines={lines}",),
            explains=frozenset({"unfinished"}),
        )


# Capacity and load -----------------------------------------------------------------------------


def _of_capacity(log: _Log) -> Iterator[Cause]:
    """Workers that were taken out on purpose."""
    leaving = [
        event
        for event in log.all("worker.state", "worker.draining")
        if event.event == "worker.draining" or event.fields.get("to") in {"draining", "drained"}
    ]
    ready = [
        event
        for event in log.all("worker.ready", "worker.state")
        if event.event == "worker.ready" or event.fields.get("to") == "ready"
    ]
    for cluster in _clusters(leaving):
        start = cluster[0].t
        places = sorted({event.place for event in cluster})
        end = min([event.t for event in ready if event.t > cluster[-1].t], default=log.end)
        if start >= log.end:
            continue  # everything was stopped at the end
        yield Cause(
            kind="capacity",
            words=f"{', '.join(places)} left: there was less to compute with",
            subject={"worker": ", ".join(places), "component": "capacity"},
            start=start,
            end=end,
            exposed=(_alive(start, end), f"({_alive(start, end)} AND code IN {_LOAD_CODES})"),
            command=f"changes --since {shown_since(start)}",
            plausibility=0.95,
            facts=(f"{cluster[0].event} of {', '.join(places)}",),
            explains=_MANY | {"errors"},
        )


_HELD = "held_s"
_LOADS = {
    "1": "requests came",
    # Apart: a token of an answer takes a step, those of a prompt share one.
    "coalesce(prompt_tokens, 0)": "tokens of prompts came",
    "coalesce(max_tokens, 0)": "tokens of answers were asked for",
    _HELD: "seconds of the workers' time were taken",
}
"""What one request brings, by different measures: SQL over ``judged``."""


@dataclass(frozen=True, slots=True)
class _Rise:
    """More came than before, by one measure; ``inside`` and ``before`` are of each bucket."""

    measure: str
    words: str
    window: Window
    gain: float
    inside: float
    before: float


def _of_load(log: _Log, symptoms: Sequence[Symptom]) -> Iterator[Cause]:
    """More, or more costly, requests than before, and whose they were: by what rose most clearly,
    and by what was asked for sooner than by what it took.
    """
    sudden = [one.window for one in symptoms if one.window is not None]
    for rise in sorted(_rises(log, sudden), key=lambda rise: (rise.measure == _HELD, -rise.gain)):
        window = rise.window
        trait, value, share = _whose(log, window, rise.measure)
        if rise.measure == _HELD and not _holds_longer(log, window, trait, value):
            continue  # where workers are slow, everybody holds them longer
        whose = f", {share:.0%} of the rise from {trait} {value}" if trait else ""
        until = max([one.end for one in sudden if one.start <= window.end + 30] + [window.end])
        yield Cause(
            kind="load",
            words=f"{rise.inside / rise.before:.1f} times as many {rise.words} as before{whose}",
            subject={trait: value, "component": "load"} if trait else {"component": "load"},
            start=window.start,
            end=until,
            exposed=(
                _arrived(window.start - window.bucket_s, until),
                f"({_alive(window.start, until)} AND code IN {_LOAD_CODES})",
                *((f"(t_{trait} = {quoted(value)})",) if trait else ()),
            ),
            command=f"top --since {shown_since(window.start)}",
            plausibility=1.0 if trait else 0.9,
            facts=(
                f"{rise.words}: {rise.before:.3g} → {rise.inside:.3g} per {window.bucket_s:.0f} s",
            ),
            explains=_MANY | {"errors", "refused", "left", "asked"},
        )
        return


def _rises(log: _Log, sudden: Sequence[Window]) -> Iterator[_Rise]:
    """What rose, by each measure, about when the trouble began."""
    last = _last_arrival(log)
    if not sudden or last - log.start < 5:
        return
    width = bucket_width(last - log.start)
    source = "SELECT *, arrived AS moment FROM judged"
    for measure, words in _LOADS.items():
        figures = f"sum({measure})"
        rows = series(log.db, figures, source=source, start=log.start, end=last, width=width)
        counts = [row[0] for row in rows]
        unit = _lump(log, measure)
        if not unit:
            continue
        found = scan([count / unit for count in counts], [1.0] * len(counts))
        if found is None or found.p_value > 1e-4 or found.inside < 1.4 * found.outside:
            continue
        before = sum(counts[: found.start]) / unit / max(found.start, 1)
        if not before or found.inside < 1.4 * before:
            continue  # before it nobody came, or as many: that is a beginning and no rise
        rise = Window(log.start + found.start * width, log.start + found.end * width, width)
        if any(one.start <= rise.end + 30 and one.end >= rise.start - width for one in sudden):
            yield _Rise(measure, words, rise, found.gain, found.inside * unit, before * unit)


def _lump(log: _Log, measure: str) -> float:
    """What comes at once: sums counted in such vary like independent things, which one long
    prompt of a thousand tokens is not (the index of dispersion of a compound Poisson process).
    """
    row = log.db.execute(
        f"SELECT sum(({measure}) * ({measure})) / nullif(sum({measure}), 0) FROM judged"
    ).fetchone()
    return float(row[0] or 0.0) if row else 0.0


def _last_arrival(log: _Log) -> float:
    row = log.db.execute("SELECT max(arrived) FROM judged").fetchone()
    return row[0] if row and row[0] is not None else log.start


def _holds_longer(log: _Log, rise: Window, trait: str, value: str) -> bool:
    """Whether those requests held workers' places far longer each than others of that time."""
    if not trait:
        return False
    is_own = f"t_{trait} = {quoted(value)}"
    row = log.db.execute(
        f"""SELECT avg(held_s) FILTER ({is_own}), avg(held_s) FILTER (NOT {is_own}) FROM judged
            WHERE {_arrived(rise.start, rise.end)}"""
    ).fetchone()
    return row is not None and None not in row and row[0] > 2 * row[1]


_ASKERS = (
    "tenant_hash",
    "user_agent",
    "lane",
    "api",
    "prompt_tokens",
    "max_tokens",
    "grammar",
    "adapter",
    "n",
)
"""Traits that say who asks for what; the others are ours."""


def _whose(log: _Log, rise: Window, measure: str) -> tuple[str, str, float]:
    """Who brought most of the rise: trait, value and its share of it; ("", "", 0) for everybody."""
    inside = max(rise.end - rise.start, 1e-9)
    outside = max(_last_arrival(log) - log.start - inside, 1e-9)
    best: list[tuple[float, str, str, float]] = []
    is_in = _arrived(rise.start, rise.end)
    for trait in _ASKERS:
        rows = log.db.execute(
            f"""SELECT t_{trait}, coalesce(sum({measure}) FILTER ({is_in}), 0) / {inside!r},
                coalesce(sum({measure}) FILTER (NOT {is_in}), 0) / {outside!r}
                FROM judged GROUP BY 1"""
        ).fetchall()
        rises = sum(row[1] - row[2] for row in rows)
        if rises <= 0 or len(rows) < 2:
            continue
        for value, now, before in rows:
            share = (now - before) / rises
            ratio = now / max(before, 0.02 * now, 1e-9)
            rest = sum(row[1] for row in rows) - now, sum(row[2] for row in rows) - before
            rest_ratio = rest[0] / max(rest[1], 1e-9)
            is_most = before > 0.8 * sum(row[2] for row in rows)
            if value and not is_most and share >= 0.5 and ratio > 2 * max(rest_ratio, 0.5):
                best.append(
                    (min(share, 1.0) * min(ratio / max(rest_ratio, 1), 20), trait, value, share)
                )
    best.sort(key=lambda one: one[0], reverse=True)
    order = list(TRAITS)
    top = [one for one in best if one[0] >= 0.9 * best[0][0]]
    top.sort(key=lambda one: order.index(one[1]) if one[1] != "tenant_hash" else -1)
    _, trait, value, share = top[0] if top else (0.0, "", "", 0.0)
    return trait, value, min(share, 1.0)


# Standing still --------------------------------------------------------------------------------

_STEPS = "'worker.claimed', 'batch.joined', 'worker.first_token', 'worker.finished'"


def _of_standstills(log: _Log, symptoms: Sequence[Symptom]) -> Iterator[Cause]:
    """Times in which nothing went on although there was work: everywhere, or at one worker."""
    windows = [one.window for one in symptoms if one.window is not None]
    if not windows:
        return
    start = min(one.start for one in windows) - 60
    end = max(one.end for one in windows) + 60
    for who in ("'everybody'", "worker"):
        rows = log.db.execute(
            f"""
            WITH told AS (
                SELECT t, coalesce(worker, instance) AS worker FROM events
                WHERE event IN ({_STEPS}) AND t BETWEEN {start!r} AND {end!r}
            ), steps AS (
                SELECT {who} AS who, t, lead(t) OVER (PARTITION BY {who} ORDER BY t) AS next
                FROM told
            ), usual AS (
                SELECT who, quantile_cont(next - t, 0.98) AS gap FROM steps GROUP BY who
            )
            SELECT who, t, next FROM steps JOIN usual USING (who)
            WHERE next - t > greatest({_STANDSTILL_S}, 8 * gap)
            ORDER BY next - t DESC LIMIT 6
            """
        ).fetchall()
        for name, began, went_on in rows:
            found = _standstill(log, "" if who != "worker" else name, began, went_on)
            if found is not None:
                yield found


def _standstill(log: _Log, worker: str, start: float, end: float) -> Cause | None:
    """``worker`` is empty where all stood still."""
    scope = f" AND worker = {quoted(worker)}" if worker else ""
    row = log.db.execute(
        f"""SELECT count(*) FROM judged
            WHERE arrived < {end - 0.5!r} AND gone > {start + 0.5!r}{scope}"""
    ).fetchone()
    queued = log.db.execute(
        f"""SELECT count(*) FROM events WHERE event = 'queue.enqueued'
            AND t BETWEEN {start + 0.2!r} AND {end - 0.2!r}"""
    ).fetchone()
    if row is None or row[0] < 3:
        return None
    lasted = f"{end - start:.1f} s"
    if worker:
        words, subject = f"{worker} did nothing for {lasted} while it held work", {"worker": worker}
    elif queued is not None and queued[0]:
        words = f"no worker made a step for {lasted}, while requests were still queued"
        subject = {"component": "workers"}
    else:
        words = f"nothing went on anywhere for {lasted}: Redis, or the machine, stood still"
        subject = {"component": "redis"}
    return Cause(
        kind="standstill",
        words=words,
        subject=subject,
        start=start,
        end=end,
        exposed=(_alive(start, end) + scope, _alive(start - 1, end + 2) + scope),
        command=f"changes --since {shown_since(start)}",
        plausibility=0.98,
        facts=(f"no step for {lasted}; {row[0]} requests were there",),
    )


# Codes that say it -----------------------------------------------------------------------------

_SAID = {
    "BROKER_FULL": ("redis", "Redis is over its memory limit"),
    "BROKER_UNAVAILABLE": ("redis", "Redis cannot be reached"),
    "STORAGE_UNAVAILABLE": ("storage", "the storage of files cannot be reached"),
    "STORAGE_FULL": ("storage", "the storage of files has no room left"),
    "NO_WORKERS": ("capacity", "no worker was alive"),
    "MODEL_LOAD_FAILED": ("model_load", "a model could not be loaded"),
    "ACCESS_MISCONFIGURED": ("access", "API keys cannot be checked"),
}


def _of_codes(log: _Log) -> Iterator[Cause]:
    """Failure codes that name a component: good where nothing else fits better."""
    for code, count, start, end in log.db.execute(
        "SELECT code, count(*), min(ended), max(ended) FROM judged"
        " WHERE is_bad AND code IS NOT NULL AND ended IS NOT NULL GROUP BY 1"
    ).fetchall():
        if code in _SAID:
            component, words = _SAID[code]
            yield Cause(
                kind=component,
                words=f"{words} ({code})",
                subject={"component": component, "code": code},
                start=start,
                end=end,
                exposed=(f"code = {quoted(code)}",),
                command=f"top --bad 'code=\"{code}\"'",
                plausibility=0.8,
                facts=(f"{count} requests failed with {code}",),
                explains=frozenset({"errors", "asked"}),
            )
