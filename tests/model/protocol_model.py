"""The protocol as a state machine small enough to be searched whole: protocol.md, section 10.

One generation, two workers, two gateways, one client. A state is a tuple; a step is one call of one
script of section 4 with what its caller does with the answer. Read the file from top to bottom:

1. what is varied: the faults, the rules that can be switched off, the engine;
2. the state: Redis, workers, gateways, client, and what the network still holds;
3. the scripts, each a function of Redis and its arguments, named as in section 4;
4. what the processes do between the scripts: worker, gateway, client, Redis itself;
5. the faults;
6. all steps of a state, its normal form, and what must hold.

A token's value is the name of the attempt that made it: two attempts never agree, the worst that a
bf16 engine can do. A chain is modelled by the tokens themselves, a nonce by the attempt's name, the
turn of a claim by its nonce. Time is modelled by what it allows: a lease is reaped only of who is
dead or asleep, the settle window ends when all that are awake are back, a grace time ends only when
the client stays away, and what a worker forgets after three seconds is on disk by then.

Not modelled: lengths of timers, several generations, fairness, quotas, idempotency. Poison has a
model of its own, ``probation_model``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import NamedTuple, TypeVar

# --- 1. What is varied -------------------------------------------------------------------------


class Fault:
    """What goes wrong, each at most once, one bit each; the last two are events, not faults."""

    ROLLBACK = 1
    """Redis restarts with what was on its disk: any state that it had before."""
    WORKER_CRASH = 2
    ZOMBIE = 4
    """A worker sleeps past its lease and past the settle window, and wakes up some time."""
    LOST_CLAIM = 8
    """A claim is executed and its answer never arrives."""
    LOST_RECORD = 16
    """An inbox loses a record."""
    GATEWAY_CRASH = 32
    DROP = 64
    """A connection breaks: a client's, a gateway's to Redis, or a worker's while it publishes."""
    LATE_COPY = 128
    """A second copy of a publish is executed some time later."""
    CLIENT_GONE = 256
    CANCEL = 512
    """The client sends DELETE."""
    PREEMPT = 1024
    """A worker hands its generation back."""


EVENTS = Fault.CANCEL | Fault.PREEMPT
FAULTS = Fault.CANCEL - 1
"""All that section 10 counts as a fault."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of the protocol that can be switched off, to see what each is for."""

    nonce: bool = True
    """A fence holds a nonce, not the epoch alone."""
    chain: bool = True
    """publish, restore and a worker that realigns compare chains, not positions alone."""
    cursor: bool = True
    """A gateway compares the chain at its client's cursor with the log's."""
    reconcile: bool = True
    """beat_worker hands back what the worker does not name."""
    resubmit: bool = True
    """A gateway admits again what Redis has forgotten."""
    tail: bool = True
    """A gateway looks after streams that are quiet."""
    gap: bool = True
    """A gateway never delivers a record that starts behind the cursor."""
    settle: bool = True
    """No claims, and no verdicts on what is lost, for a while after Redis went back."""
    restore: bool = True
    """A worker puts back what Redis has forgotten of its generations."""
    keep: bool = True
    """A worker keeps what it ended until that is on disk (3 s)."""
    keep_released: bool = True
    """It keeps what it handed back as long."""
    name_kept: bool = True
    """A worker's beat names what it keeps, not only what it runs."""
    claim_lease: bool = True
    """claim renews the lease of the worker, which may have lost it in its sleep."""
    own_finish: bool = True
    """publish answers ok, not gone, to the finish that it holds already."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One model to search: its rules, which faults may come and how many of them."""

    rules: Rules = Rules()
    faults: int = FAULTS
    max_faults: int = 2
    num_tokens: int = 2
    exact: bool = False
    """The engine is a pure function: every attempt makes the same tokens."""
    lossless: bool = False
    """Redis restarts, but had written everything to disk."""
    excused: int = 0
    """After any of these faults an error is honest; otherwise only as HONEST says."""
    forbidden: str = ""
    """An error that no client may see, whatever has happened."""


# --- 2. The state ------------------------------------------------------------------------------

Tokens = tuple[int, ...]

WORKERS = (0, 1)
GATEWAYS = (0, 1)
NOBODY = -1
ADMITTING = 0
"""The gateway that the request came to; only it holds the spec."""

QUEUED, RUNNING, ENDED = "Q", "R", "T"
LENGTH, CANCELLED = "length", "cancelled"


class Record(NamedTuple):
    """A log entry. ``tokens`` are all up to its end: position and chain in one."""

    start: int
    tokens: Tokens
    finish: str


class Gen(NamedTuple):
    """``gen:<id>`` and its log, and where it stands in lane, held and subs: all move together."""

    state: str
    epoch: int
    nonce: int
    """0: the fence is empty."""
    owner: int
    log: Tokens
    finish: str
    readers: int
    """The subscribed gateways, one bit each."""


Inbox = tuple[Record, ...]


class Redis(NamedTuple):
    gen: Gen | None
    leases: int
    """The workers that have one, one bit each."""
    inboxes: tuple[Inbox, Inbox]
    """Not read yet, or read and still in the gateway's mailbox for its client."""
    settling: bool
    broken: str
    """The invariant that a script has just broken."""


@unique
class Duty(IntEnum):
    """What a worker or gateway must do next with Redis; anything else waits for it."""

    NONE = 0
    BEAT = 1
    """First command on a new connection."""
    PUBLISH = 2
    """Send everything that is not known to be on disk."""
    RESTORE = 3
    RELEASE = 4
    """Hand back: its tokens are not those of the log, or it had handed it back before."""
    ATTACH = 5
    RESUBMIT = 6
    """The generation is unknown and this gateway holds its spec: admit it again."""
    DEAD = 7


class Job(NamedTuple):
    """A generation as its worker knows it: running, or ended or handed back, and kept."""

    epoch: int
    nonce: int
    tokens: Tokens
    acked: int
    """Position acknowledged by this Redis; one more than all tokens: the finish is, too."""
    released: bool


class Worker(NamedTuple):
    """() stands for no job, so that workers can be sorted."""

    duty: Duty
    asleep: bool
    job: Job | tuple[()]
    awaited: Job | tuple[()]
    """The answer of a claim, on its way."""


NEW, LIVE, AWAY, GONE, DONE = "new", "live", "away", "gone", "done"
NOT_FOUND, STREAM_DIVERGED = "NOT_FOUND", "STREAM_DIVERGED"
ANSWERED = frozenset({DONE, NOT_FOUND, STREAM_DIVERGED})
NOT_WAITING = ANSWERED | {GONE}

HONEST = {
    NOT_FOUND: Fault.GATEWAY_CRASH,
    STREAM_DIVERGED: Fault.WORKER_CRASH | Fault.ZOMBIE,
}
"""The errors that a client may see, and what must have happened beside a rollback (section 7)."""


class Client(NamedTuple):
    status: str
    gateway: int
    """The one that it is connected to; NOBODY unless it is live."""
    cancelled_at: int
    """The gateway that took its DELETE and will repeat it."""
    shown: Tokens
    doubt: bool
    """Its gateway must read the log."""
    broken: str
    """The promise to it that was just broken."""


class Publication(NamedTuple):
    epoch: int
    nonce: int
    record: Record


class State(NamedTuple):
    used: int
    """The faults and events so far."""
    redis: Redis
    disk: tuple[Gen | None] | tuple[()]
    """What a rollback returns to; () when none can come any more."""
    workers: tuple[Worker, Worker]
    gateways: tuple[Duty, Duty]
    client: Client
    copy: Publication | tuple[()]
    """A publish that the network still holds."""


IDLE = Worker(Duty.NONE, asleep=False, job=(), awaited=())

INITIAL = State(
    used=0,
    redis=Redis(gen=None, leases=0b11, inboxes=((), ()), settling=False, broken=""),
    disk=(None,),
    workers=(IDLE, IDLE),
    gateways=(Duty.NONE, Duty.NONE),
    client=Client(NEW, NOBODY, NOBODY, shown=(), doubt=False, broken=""),
    copy=(),
)

T = TypeVar("T")


def _put(pair: tuple[T, T], place: int, value: T) -> tuple[T, T]:
    return (value, pair[1]) if place == 0 else (pair[0], value)


# --- 3. The scripts ----------------------------------------------------------------------------


def admit(redis: Redis, reader: int) -> Redis:
    """Queue the generation; leave a known one alone. ``reader`` NOBODY: the client has left."""
    if redis.gen is not None:
        return redis
    readers = 0 if reader == NOBODY else 1 << reader
    return redis._replace(gen=Gen(QUEUED, 0, 0, NOBODY, (), "", readers))


def claim(rules: Rules, redis: Redis, worker: int, nonce: int) -> tuple[Redis, Job]:
    """Give the waiting generation to ``worker`` under a new fence. Asked only when it waits."""
    gen = _known(redis)
    leases = redis.leases | 1 << worker if rules.claim_lease else redis.leases
    gen = gen._replace(state=RUNNING, epoch=gen.epoch + 1, nonce=nonce, owner=worker)
    job = Job(gen.epoch, nonce, gen.log, len(gen.log), released=False)
    return redis._replace(gen=gen, leases=leases), job


def publish(rules: Rules, redis: Redis, message: Publication) -> tuple[Redis, str]:
    """Append to the log, or answer ok (a repeat), unknown, gone, lost or realign."""
    gen, record = redis.gen, message.record
    if gen is None:
        return redis, "unknown"
    fenced = _is_fence(rules, gen, message)
    end = len(record.tokens)
    if gen.state == ENDED:
        repeated = fenced and record.finish and end == len(gen.log) and rules.own_finish
        return redis, "ok" if repeated else "gone"
    if gen.state != RUNNING or not fenced:
        return redis, "lost"
    if end <= len(gen.log) and not record.finish:
        return redis, "ok"
    follows = record.tokens[: record.start] == gen.log
    if record.start != len(gen.log) or (rules.chain and not follows):
        return redis, "realign"
    broken = ""
    if gen.nonce != message.nonce:
        broken = "two owners: an attempt published under the fence of another one's claim"
    elif not follows:
        broken = "the log mixes attempts: an entry does not follow from the one before"
    return _append(redis, record)._replace(broken=broken), "ok"


def restore(rules: Rules, redis: Redis, worker: int, job: Job) -> tuple[Redis, str]:
    """Put back under the worker's own fence what Redis has forgotten, or answer lost.

    The log stays as it is: what is behind it is published as ever.
    """
    gen = redis.gen
    if gen is None:
        gen = Gen(RUNNING, job.epoch, job.nonce, worker, (), "", 0)
    elif gen.state == ENDED or gen.epoch >= job.epoch or not _agrees(rules, job, gen.log):
        return redis, "lost"
    else:
        gen = gen._replace(state=RUNNING, epoch=job.epoch, nonce=job.nonce, owner=worker)
    broken = ""
    if job.tokens[: len(gen.log)] != gen.log:
        broken = "the log mixes attempts: restore extended what another attempt wrote"
    return redis._replace(gen=gen, leases=redis.leases | 1 << worker, broken=broken), "ok"


def close(redis: Redis, finish: str) -> Redis:
    """End the generation where its log stands."""
    log = _known(redis).log
    return _append(redis, Record(len(log), log, finish))


def release(rules: Rules, redis: Redis, job: Job) -> Redis:
    """Hand back, if the fence is still this job's."""
    gen = redis.gen
    if gen is None or gen.state != RUNNING or not _is_fence(rules, gen, job):
        return redis
    return _requeue(redis)


def cancel(redis: Redis) -> Redis:
    """Write the end, whoever owns it; of an unknown id leave a tombstone."""
    if redis.gen is None:
        return redis._replace(gen=Gen(ENDED, 0, 0, NOBODY, (), CANCELLED, 0))
    return redis if redis.gen.state == ENDED else close(redis, CANCELLED)


def beat_worker(redis: Redis, worker: int, unseen: int, *, named: bool) -> Redis:
    """Renew the lease; take back what is held and not named, unless the claim's answer may come.

    ``unseen`` is the nonce of the one claim whose turn is above the beat's ``seen``.
    """
    redis = redis._replace(leases=redis.leases | 1 << worker)
    gen = redis.gen
    if gen is None or gen.owner != worker or named or gen.nonce == unseen:
        return redis
    return _requeue(redis)


def beat_gateway(redis: Redis, gateway: int) -> Redis:
    """Tell where the inbox ends, which is where to read on: all before counts as read."""
    return redis._replace(inboxes=_put(redis.inboxes, gateway, ()))


def attach(redis: Redis, gateway: int) -> Redis:
    """Subscribe, unless ended; the caller gets state and log in the same step."""
    gen = redis.gen
    if gen is None or gen.state == ENDED:
        return redis
    return redis._replace(gen=gen._replace(readers=gen.readers | 1 << gateway))


def detach(redis: Redis, gateway: int) -> Redis:
    """Unsubscribe; with nobody left the grace time begins."""
    gen = _known(redis)
    return redis._replace(gen=gen._replace(readers=gen.readers & ~(1 << gateway)))


def look(redis: Redis, gateway: int) -> tuple[str, int, bool]:
    """State ("" for unknown), position and whether ``gateway`` is subscribed."""
    gen = redis.gen
    if gen is None:
        return "", 0, False
    return gen.state, len(gen.log), bool(gen.readers >> gateway & 1)


def reap_gateway(redis: Redis, gateway: int) -> Redis:
    """A gateway is past its lease: detach all that it read."""
    return detach(redis, gateway)


def reap_worker(redis: Redis, worker: int) -> Redis:
    """A worker is past its lease: what it holds waits again, then the lease goes."""
    redis = redis._replace(leases=redis.leases & ~(1 << worker))
    gen = redis.gen
    return _requeue(redis) if gen is not None and gen.owner == worker else redis


def reap_due(redis: Redis) -> Redis:
    """A grace time is past and nobody reads."""
    return close(redis, CANCELLED)


def _known(redis: Redis) -> Gen:
    assert redis.gen is not None
    return redis.gen


def _is_fence(rules: Rules, gen: Gen, of: Publication | Job) -> bool:
    return gen.epoch == of.epoch and (gen.nonce == of.nonce or not rules.nonce)


def _agrees(rules: Rules, job: Job, log: Tokens) -> bool:
    """Whether the job's chain at the end of ``log`` is the log's."""
    return job.tokens[: len(log)] == log if rules.chain else len(job.tokens) >= len(log)


def _append(redis: Redis, record: Record) -> Redis:
    """XADD to the log and to the inbox of each reader; a finish closes."""
    gen = _known(redis)
    assert gen.state != ENDED
    inboxes = redis.inboxes
    for g in GATEWAYS:
        if gen.readers >> g & 1:
            inboxes = _put(inboxes, g, (*inboxes[g], record))
    log = gen.log + record.tokens[record.start :]
    if record.finish:
        gen = gen._replace(state=ENDED, owner=NOBODY, log=log, finish=record.finish, readers=0)
    else:
        gen = gen._replace(log=log)
    return redis._replace(gen=gen, inboxes=inboxes)


def _requeue(redis: Redis) -> Redis:
    """R→Q: the tokens stay in the log, the fence is emptied, the epoch stays."""
    gen = _known(redis)
    assert gen.state == RUNNING
    return redis._replace(gen=gen._replace(state=QUEUED, nonce=0, owner=NOBODY))


# --- 4. The processes --------------------------------------------------------------------------

Step = tuple[str, State]
"""Who did what, and the state after it. A label that begins with "!" is no progress: a fault, an
event, a late copy, a choice of the scheduler. No promise may depend on one of those."""


def worker_steps(scenario: Scenario, s: State, w: int) -> Iterator[Step]:
    """What worker ``w`` may do: its duty first, then its work; its claim's answer at any time."""
    worker, gen = s.workers[w], s.redis.gen
    if worker.duty == Duty.DEAD:
        return
    if worker.asleep:
        yield f"worker {w}: wakes up", _with_worker(s, w, worker._replace(asleep=False))
        return
    if worker.awaited:
        yield f"worker {w}: gets the answer of its claim", _start(scenario, s, w)
    if worker.duty != Duty.NONE:
        yield from _worker_duty(scenario, s, w)
        return
    redis = _beat(scenario, s, w)
    if redis != s.redis:
        yield f"worker {w}: beat_worker", s._replace(redis=redis)
    if worker.job and _runs(scenario, worker.job):
        yield from _publish_steps(scenario, s, w)
        if _may(scenario, s, Fault.PREEMPT):
            yield f"!worker {w}: release, to make room", _preempt(scenario, s, w)
    if gen is not None and gen.state == QUEUED and not s.redis.settling and not worker.awaited:
        yield from _claim_steps(scenario, s, w)


def _worker_duty(scenario: Scenario, s: State, w: int) -> Iterator[Step]:
    worker = s.workers[w]
    job = worker.job
    if worker.duty == Duty.BEAT:
        yield f"worker {w}: beat_worker on a new connection", _reconnect(scenario, s, w)
        if job and _runs(scenario, job) and not _is_complete(scenario, job):
            ahead = _with_worker(s, w, worker._replace(job=_next_token(scenario, job)))
            yield f"!worker {w}: goes on without Redis", ahead
    elif worker.duty == Duty.PUBLISH:
        yield from _publish_steps(scenario, s, w)
    elif worker.duty == Duty.RESTORE:
        yield f"worker {w}: restore", _restore(scenario, s, w)
    else:
        assert job
        after = worker._replace(duty=Duty.NONE, job=job if job.released else ())
        redis = release(scenario.rules, s.redis, job)
        yield f"worker {w}: release", _with_worker(s._replace(redis=redis), w, after)


def _with_worker(s: State, w: int, worker: Worker) -> State:
    return s._replace(workers=_put(s.workers, w, worker))


def _runs(scenario: Scenario, job: Job) -> bool:
    """Still to be worked on: neither handed back nor ended and acknowledged."""
    return job.acked <= scenario.num_tokens and not job.released


def _is_complete(scenario: Scenario, job: Job) -> bool:
    return len(job.tokens) == scenario.num_tokens


def _next_token(scenario: Scenario, job: Job) -> Job:
    return job._replace(tokens=(*job.tokens, 0 if scenario.exact else job.nonce))


def _beat(scenario: Scenario, s: State, w: int) -> Redis:
    worker, rules = s.workers[w], scenario.rules
    named = bool(worker.job)
    if worker.job and not rules.name_kept:
        named = not worker.job.released and not _is_complete(scenario, worker.job)
    unseen = worker.awaited.nonce if worker.awaited else NOBODY
    return beat_worker(s.redis, w, unseen, named=named or not rules.reconcile)


def _reconnect(scenario: Scenario, s: State, w: int) -> State:
    """A claim's answer that has not come by now never will; then all that may be lost is sent."""
    worker = s.workers[w]
    duty = Duty.PUBLISH if worker.job else Duty.NONE
    s = _with_worker(s, w, worker._replace(awaited=(), duty=duty))
    return s._replace(redis=_beat(scenario, s, w))


def _claim_steps(scenario: Scenario, s: State, w: int) -> Iterator[Step]:
    redis, answer = claim(scenario.rules, s.redis, w, _fresh_attempt(s))
    s = s._replace(redis=redis)
    label = f"worker {w}: claim → {answer.epoch}.{answer.nonce}"
    yield label, _with_worker(s, w, s.workers[w]._replace(awaited=answer))
    if _may(scenario, s, Fault.LOST_CLAIM):
        yield f"!{label}, and the answer is lost", _use(s, Fault.LOST_CLAIM)


def _start(scenario: Scenario, s: State, w: int) -> State:
    """A claimed id that is held already replaces the attempt, whose tokens stay if they agree."""
    worker = s.workers[w]
    job, old = worker.awaited, worker.job
    assert job
    if old and _agrees(scenario.rules, old, job.tokens):
        job = job._replace(tokens=old.tokens)
    return _with_worker(s, w, worker._replace(job=job, awaited=()))


def _publish_steps(scenario: Scenario, s: State, w: int) -> Iterator[Step]:
    """Make the next token if all before it are acknowledged; send what is not."""
    worker = s.workers[w]
    job = worker.job
    assert job
    if worker.duty == Duty.NONE and job.acked == len(job.tokens) < scenario.num_tokens:
        job = _next_token(scenario, job)
    finish = LENGTH if _is_complete(scenario, job) else ""
    record = Record(min(job.acked, len(job.tokens)), job.tokens, finish)
    message = Publication(job.epoch, job.nonce, record)
    redis, answer = publish(scenario.rules, s.redis, message)
    sent, worker = s._replace(redis=redis), worker._replace(job=job)
    label = f"worker {w}: publish {_span(record)} → {answer}"
    after = _with_worker(sent, w, _answered(scenario, redis, worker, answer))
    yield label, after
    if _may(scenario, s, Fault.LATE_COPY):
        copied = _use(after, Fault.LATE_COPY)._replace(copy=message)
        yield f"!{label}, and the network keeps a copy", copied
    if _may(scenario, s, Fault.DROP):
        cut = _with_worker(sent, w, worker._replace(duty=Duty.BEAT))
        yield f"!{label}, but the connection breaks before the answer", _use(cut, Fault.DROP)


def _answered(scenario: Scenario, redis: Redis, worker: Worker, answer: str) -> Worker:
    """What a worker does with the answer of publish."""
    job, gen = worker.job, redis.gen
    assert job
    if answer == "ok":
        return _settled(scenario, worker, job)
    if answer == "realign":
        log = _known(redis).log
        if not _agrees(scenario.rules, job, log):
            return worker._replace(duty=Duty.RELEASE)
        return worker._replace(job=job._replace(acked=len(log)))
    forgotten = gen is None or gen.epoch < job.epoch
    if answer != "gone" and scenario.rules.restore and forgotten:
        return worker._replace(duty=Duty.RESTORE)
    return worker._replace(duty=Duty.NONE, job=())


def _settled(scenario: Scenario, worker: Worker, job: Job) -> Worker:
    """Redis has all of the job: go on, or keep it if it has ended, or hand it back once more."""
    ended = _is_complete(scenario, job)
    if ended and not scenario.rules.keep:
        return worker._replace(duty=Duty.NONE, job=())
    duty = Duty.RELEASE if job.released and not ended else Duty.NONE
    return worker._replace(duty=duty, job=job._replace(acked=len(job.tokens) + ended))


def _restore(scenario: Scenario, s: State, w: int) -> State:
    worker = s.workers[w]
    job = worker.job
    assert job
    redis, answer = restore(scenario.rules, s.redis, w, job)
    worker = worker._replace(duty=Duty.NONE, job=())
    if answer == "ok":
        back = job._replace(acked=len(_known(redis).log))
        worker = worker._replace(duty=Duty.PUBLISH, job=back)
    return _with_worker(s._replace(redis=redis), w, worker)


def _preempt(scenario: Scenario, s: State, w: int) -> State:
    worker = s.workers[w]
    assert worker.job
    s = s._replace(redis=release(scenario.rules, s.redis, worker.job))
    kept = worker.job._replace(released=True) if scenario.rules.keep_released else ()
    return _use(_with_worker(s, w, worker._replace(job=kept)), Fault.PREEMPT)


def gateway_steps(scenario: Scenario, s: State, g: int) -> Iterator[Step]:
    """What gateway ``g`` may do for its client, or for one that is not there any more."""
    duty, redis, client = s.gateways[g], s.redis, s.client
    state, position, subscribed = look(redis, g)
    if duty == Duty.DEAD:
        if subscribed:
            yield f"reap: gateway {g} is past its lease", s._replace(redis=reap_gateway(redis, g))
        return
    if redis.inboxes[g]:
        yield f"gateway {g}: takes {_span(redis.inboxes[g][0])}", _deliver_record(scenario, s, g)
    if duty != Duty.NONE:
        yield from _gateway_duty(scenario, s, g)
    elif client.gateway != g:
        if subscribed:
            yield f"gateway {g}: detach", s._replace(redis=detach(redis, g))
    elif client.doubt:
        after = s._replace(client=client._replace(doubt=False))
        yield f"gateway {g}: read", _show_log(scenario, after)
    elif scenario.rules.tail and not redis.inboxes[g]:
        if state == ENDED or (subscribed and position > len(client.shown)):
            yield f"gateway {g}: look: more", s._replace(client=client._replace(doubt=True))
        elif not subscribed:
            after = _attach(scenario, s, g)
            if after != s:
                yield f"gateway {g}: look: not subscribed; attach", after


def _gateway_duty(scenario: Scenario, s: State, g: int) -> Iterator[Step]:
    duty = s.gateways[g]
    if duty == Duty.BEAT:
        after = _with_gateway(s, g, Duty.ATTACH)
        label = f"gateway {g}: beat_gateway on a new connection"
        yield label, after._replace(redis=beat_gateway(s.redis, g))
        if s.redis.inboxes[g]:
            yield f"!{label}, its mailbox not empty", after
    elif duty == Duty.ATTACH:
        yield f"gateway {g}: attaches all", _reattach(scenario, s, g)
    else:
        yield f"gateway {g}: admits again", _resubmit(s, g)


def _with_gateway(s: State, g: int, duty: Duty) -> State:
    return s._replace(gateways=_put(s.gateways, g, duty))


def _reattach(scenario: Scenario, s: State, g: int) -> State:
    """After a reconnect: cancel again, attach; admit again, also for a client that has left."""
    s = _with_gateway(s, g, Duty.NONE)
    if s.client.cancelled_at == g:
        s = s._replace(redis=cancel(s.redis))
    if s.client.gateway == g:
        return _attach(scenario, s, g)
    if g == ADMITTING and scenario.rules.resubmit and s.client.status not in ANSWERED:
        return _with_gateway(s, g, Duty.RESUBMIT)
    return s


def _attach(scenario: Scenario, s: State, g: int) -> State:
    """Subscribe and show the first page; who holds the spec of an unknown id admits it again."""
    if s.redis.gen is None and g == ADMITTING and scenario.rules.resubmit:
        return _with_gateway(s, g, Duty.RESUBMIT)
    return _show_log(scenario, s._replace(redis=attach(s.redis, g)))


def _resubmit(s: State, g: int) -> State:
    """If somebody was faster, this gateway is not subscribed: look() will tell it."""
    reader = g if s.client.gateway == g else NOBODY
    return _with_gateway(s._replace(redis=admit(s.redis, reader)), g, Duty.NONE)


def _deliver_record(scenario: Scenario, s: State, g: int) -> State:
    """Take one record from the inbox; show it if it applies to the client at its cursor."""
    record, *rest = s.redis.inboxes[g]
    s = s._replace(redis=s.redis._replace(inboxes=_put(s.redis.inboxes, g, tuple(rest))))
    client = s.client
    cursor, end = len(client.shown), len(record.tokens)
    if client.gateway != g or (end <= cursor and not record.finish):
        return s
    applies = record.tokens[:cursor] == client.shown or not scenario.rules.cursor
    if end < cursor or not applies or (record.start > cursor and scenario.rules.gap):
        return s._replace(client=client._replace(doubt=True))
    return _show(s, record)


def _show_log(scenario: Scenario, s: State) -> State:
    """Compare the log with what was shown: show the rest, wait, or say honestly that it is over."""
    client, gen = s.client, s.redis.gen
    cursor = len(client.shown)
    if gen is None:
        return s if s.redis.settling else _answer(s, NOT_FOUND)
    if len(gen.log) >= cursor:
        if gen.log[:cursor] == client.shown or not scenario.rules.cursor:
            return _show(s, Record(cursor, gen.log, gen.finish))
    elif gen.state != ENDED:
        return s
    elif gen.finish == CANCELLED:
        return _answer(s, DONE)
    return s if s.redis.settling else _answer(s, STREAM_DIVERGED)


def _show(s: State, record: Record) -> State:
    """Send the client what is behind its cursor, and the end."""
    client = s.client
    cursor = len(client.shown)
    broken = ""
    if record.start > cursor:
        broken = "the client was shown a position without the one before it"
    elif record.tokens[:cursor] != client.shown:
        broken = "the client was shown the continuation of another attempt"
    s = s._replace(client=client._replace(shown=record.tokens, broken=broken))
    return _answer(s, DONE) if record.finish and not broken else s


def _answer(s: State, status: str) -> State:
    return s._replace(client=s.client._replace(status=status, gateway=NOBODY))


def client_steps(scenario: Scenario, s: State) -> Iterator[Step]:
    """Ask once; come back after a lost connection, to any gateway; perhaps cancel."""
    client = s.client
    if client.status == NEW:
        asked = client._replace(status=LIVE, gateway=ADMITTING)
        after = s._replace(redis=admit(s.redis, ADMITTING), client=asked)
        yield f"gateway {ADMITTING}: admit", after
    elif client.status == AWAY:
        for g in GATEWAYS:
            if s.gateways[g] == Duty.NONE:
                back = s._replace(client=client._replace(status=LIVE, gateway=g))
                yield f"client: comes back to gateway {g}", _attach(scenario, back, g)
    elif client.status == LIVE and _may(scenario, s, Fault.CANCEL):
        g = client.gateway
        if s.gateways[g] == Duty.NONE:
            asked = client._replace(cancelled_at=g)
            after = s._replace(redis=cancel(s.redis), client=asked)
            yield f"!gateway {g}: cancel", _use(after, Fault.CANCEL)


def redis_steps(scenario: Scenario, s: State) -> Iterator[Step]:
    """What time brings: leases and grace times end, the settle window ends, all is on disk."""
    redis, gen = s.redis, s.redis.gen
    awake = [worker.duty for worker in s.workers if not worker.asleep]
    if redis.settling and all(duty in (Duty.NONE, Duty.DEAD) for duty in (*awake, *s.gateways)):
        yield "the settle window ends", s._replace(redis=redis._replace(settling=False))
    for w, worker in enumerate(s.workers):
        if (worker.duty == Duty.DEAD or worker.asleep) and redis.leases >> w & 1:
            yield f"reap: worker {w} is past its lease", s._replace(redis=reap_worker(redis, w))
    unread = gen is not None and gen.state != ENDED and not gen.readers
    if unread and s.client.status in NOT_WAITING:
        yield "reap: nobody came back", s._replace(redis=reap_due(redis))
    if s.disk and s.disk[0] != gen and not scenario.lossless:
        yield "Redis: all so far is on disk", s._replace(disk=(gen,))


# --- 5. The faults -----------------------------------------------------------------------------


def _may(scenario: Scenario, s: State, fault: int) -> bool:
    if fault & s.used or not fault & scenario.faults:
        return False
    return fault & EVENTS != 0 or (s.used & FAULTS).bit_count() < scenario.max_faults


def _use(s: State, fault: int) -> State:
    return s._replace(used=s.used | fault)


def fault_steps(scenario: Scenario, s: State) -> Iterator[Step]:
    """Every fault that may still come; those that spoil one step stand above, beside it."""
    if s.client.status == NEW:
        return
    if _may(scenario, s, Fault.ROLLBACK):
        yield "!Redis: restarts with what is on disk", _roll_back(scenario, s)
    yield from _worker_faults(scenario, s)
    yield from _gateway_faults(scenario, s)
    yield from _client_faults(scenario, s)
    if s.copy:
        redis, answer = publish(scenario.rules, s.redis, s.copy)
        after = s._replace(redis=redis, copy=())
        yield f"!network: the copy of publish {_span(s.copy.record)} → {answer}", after


def _worker_faults(scenario: Scenario, s: State) -> Iterator[Step]:
    for w, worker in enumerate(s.workers):
        if worker.duty == Duty.DEAD:
            continue
        if _may(scenario, s, Fault.WORKER_CRASH):
            crashed = _with_worker(s, w, IDLE._replace(duty=Duty.DEAD))
            yield f"!worker {w}: crashes", _use(crashed, Fault.WORKER_CRASH)
        if _may(scenario, s, Fault.ZOMBIE):
            asleep = _with_worker(s, w, worker._replace(asleep=True))
            yield f"!worker {w}: falls asleep", _use(asleep, Fault.ZOMBIE)


def _gateway_faults(scenario: Scenario, s: State) -> Iterator[Step]:
    for g in GATEWAYS:
        inbox = s.redis.inboxes[g]
        if inbox and _may(scenario, s, Fault.LOST_RECORD):
            redis = s.redis._replace(inboxes=_put(s.redis.inboxes, g, inbox[1:]))
            after = _use(s._replace(redis=redis), Fault.LOST_RECORD)
            yield f"!gateway {g}: its inbox loses {_span(inbox[0])}", after
        if _may(scenario, s, Fault.GATEWAY_CRASH):
            after = _leave(s, AWAY) if s.client.gateway == g else s
            after = _use(_with_gateway(after, g, Duty.DEAD), Fault.GATEWAY_CRASH)
            yield f"!gateway {g}: crashes", after
        if s.client.gateway == g and s.gateways[g] == Duty.NONE and _may(scenario, s, Fault.DROP):
            after = _use(_with_gateway(s, g, Duty.BEAT), Fault.DROP)
            yield f"!gateway {g}: loses its connection to Redis", after


def _client_faults(scenario: Scenario, s: State) -> Iterator[Step]:
    if s.client.status == LIVE and _may(scenario, s, Fault.DROP):
        yield "!client: loses its connection", _use(_leave(s, AWAY), Fault.DROP)
    if s.client.status in (LIVE, AWAY) and _may(scenario, s, Fault.CLIENT_GONE):
        yield "!client: leaves for good", _use(_leave(s, GONE), Fault.CLIENT_GONE)


def _leave(s: State, status: str) -> State:
    return s._replace(client=s.client._replace(status=status, gateway=NOBODY, doubt=False))


def _roll_back(scenario: Scenario, s: State) -> State:
    """Redis has what was on disk, every connection is broken, guard() renews every lease.

    Who would have nothing to say on its new connection is back at once: nothing that it could have
    missed depends on when, and the states are a third.
    """
    redis = s.redis._replace(settling=scenario.rules.settle)
    if not scenario.lossless:
        assert s.disk
        gen, leases = s.disk[0], redis.leases
        if gen is not None and gen.owner != NOBODY:
            leases |= 1 << gen.owner
        redis = redis._replace(gen=gen, leases=leases)
    s = _use(s._replace(redis=redis), Fault.ROLLBACK)
    return s._replace(
        workers=(_cut_off(s, 0), _cut_off(s, 1)),
        gateways=(_cut_off_gateway(s, 0), _cut_off_gateway(s, 1)),
    )


def _cut_off(s: State, w: int) -> Worker:
    worker, gen = s.workers[w], s.redis.gen
    holds = worker.job or worker.awaited or (gen is not None and gen.owner == w)
    if worker.duty == Duty.DEAD or not holds:
        return worker
    job = worker.job._replace(acked=0) if worker.job else ()
    return worker._replace(duty=Duty.BEAT, job=job)


def _cut_off_gateway(s: State, g: int) -> Duty:
    holds_spec = g == ADMITTING and s.client.status not in ANSWERED
    concerned = holds_spec or g in (s.client.gateway, s.client.cancelled_at)
    if s.gateways[g] == Duty.DEAD or not concerned:
        return s.gateways[g]
    return Duty.BEAT


# --- 6. All steps, the normal form, what must hold ---------------------------------------------


def steps(scenario: Scenario, s: State) -> Iterator[Step]:
    """Every step that anybody may take in ``s``."""
    yield from client_steps(scenario, s)
    for g in GATEWAYS:
        yield from gateway_steps(scenario, s, g)
    for w in WORKERS:
        yield from worker_steps(scenario, s, w)
    yield from redis_steps(scenario, s)
    yield from fault_steps(scenario, s)


def _fresh_attempt(s: State) -> int:
    """The smallest name that nothing in the state bears: as good as a new one, and states recur."""
    names: set[int] = {0, *s.client.shown}
    for gen in (s.redis.gen, *s.disk):
        if gen is not None:
            names.update(gen.log, (gen.nonce,))
    for worker in s.workers:
        for job in (worker.job, worker.awaited):
            if job:
                names.update(job.tokens, (job.nonce,))
    for inbox in s.redis.inboxes:
        for record in inbox:
            names.update(record.tokens)
    if s.copy:
        names.update(s.copy.record.tokens, (s.copy.nonce,))
    return min(set(range(len(names) + 1)) - names)


def trimmed(scenario: Scenario, s: State) -> State:
    """``s`` without what can no longer make a difference."""
    redis, client = s.redis, s.client
    if client.status in NOT_WAITING:
        redis = redis._replace(inboxes=((), ()))
        client = client._replace(cancelled_at=NOBODY, shown=(), doubt=False)
    for g in GATEWAYS:
        if s.gateways[g] == Duty.DEAD and redis.inboxes[g]:
            redis = redis._replace(inboxes=_put(redis.inboxes, g, ()))
    disk = s.disk if _may(scenario, s, Fault.ROLLBACK) else ()
    first, second = s.workers
    workers = _forget(scenario, disk, first), _forget(scenario, disk, second)
    return State(s.used, redis, disk, workers, s.gateways, client, s.copy)


def _forget(scenario: Scenario, disk: tuple[Gen | None] | tuple[()], worker: Worker) -> Worker:
    """Three seconds after a job ended or was handed back that is on disk, and is forgotten."""
    job = worker.job
    if not job or _runs(scenario, job) or worker.duty != Duty.NONE:
        return worker
    for gen in disk:
        if gen is None or gen.epoch < job.epoch:
            return worker
        if gen.nonce == job.nonce and gen.state != ENDED:
            return worker
    return worker._replace(job=())


def sorted_workers(s: State) -> State:
    """The two workers are alike: of two states that differ by their names keep one."""
    first, second = s.workers
    if first < second or (first == second and _rank(s, 0) <= _rank(s, 1)):
        return s
    redis = s.redis
    leases = redis.leases >> 1 | (redis.leases & 1) << 1
    return s._replace(
        redis=redis._replace(gen=_other_owner(redis.gen), leases=leases),
        disk=(_other_owner(s.disk[0]),) if s.disk else (),
        workers=(second, first),
    )


def _rank(s: State, w: int) -> tuple[bool, ...]:
    owns = (gen is not None and gen.owner == w for gen in (s.redis.gen, *s.disk))
    return (bool(s.redis.leases >> w & 1), *owns)


def _other_owner(gen: Gen | None) -> Gen | None:
    return gen if gen is None or gen.owner == NOBODY else gen._replace(owner=1 - gen.owner)


def violation(scenario: Scenario, s: State) -> str:
    """The promise that is broken in ``s``; "" if none is."""
    if s.redis.broken or s.client.broken:
        return s.redis.broken or s.client.broken
    status = s.client.status
    if status not in HONEST:
        return ""
    if status == scenario.forbidden:
        return f"{status} was forbidden"
    if status == STREAM_DIVERGED and scenario.exact:
        return f"{status} although every attempt makes the same tokens"
    if s.used & scenario.excused:
        return ""
    if not s.used & Fault.ROLLBACK:
        return f"{status} although Redis never went back"
    beside = HONEST[status]
    if s.used & Fault.CANCEL:
        beside |= Fault.GATEWAY_CRASH  # the cancel is forgotten with the gateway that took it
    return "" if s.used & beside else f"{status} after a rollback, without a lost process"


def is_good_end(scenario: Scenario, s: State) -> bool:
    """The client has its final event or has left, the generation is over, no worker runs it."""
    gen = s.redis.gen
    if s.client.status not in NOT_WAITING or (gen is not None and gen.state != ENDED):
        return False
    return not any(
        worker.awaited or (worker.job and _runs(scenario, worker.job))
        for worker in s.workers
        if not worker.asleep
    )


def describe(s: State) -> str:
    """A state in one line, without what stands idle."""
    gen, client = s.redis.gen, s.client
    parts = ["nothing known" if gen is None else _describe_gen(gen)]
    parts += ["settling"] if s.redis.settling else []
    for w, worker in enumerate(s.workers):
        words = [worker.duty.name.lower()] if worker.duty else []
        words += ["asleep"] if worker.asleep else []
        for verb, job in (("has", worker.job), ("awaits", worker.awaited)):
            words += [f"{verb} {job.epoch}.{job.nonce} {_list(job.tokens)}"] if job else []
        parts += [f"worker {w} " + " ".join(words)] if words else []
    parts += [f"gateway {g} {duty.name.lower()}" for g, duty in enumerate(s.gateways) if duty]
    parts.append(f"client {client.status} {_list(client.shown)}")
    return " · ".join(parts)


def _describe_gen(gen: Gen) -> str:
    fence = f"{gen.epoch}.{gen.nonce or '–'}"
    return f"{gen.state} {fence} {_list(gen.log)} {gen.finish}".rstrip()


def _span(record: Record) -> str:
    return f"{record.start}:{_list(record.tokens[record.start :])} {record.finish}".rstrip()


def _list(tokens: Tokens) -> str:
    return "[" + ",".join(map(str, tokens)) + "]"
