"""Arguments and answers of the protocol's steps; all times in milliseconds of Redis ``TIME``."""

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from common.failures import Failure
from common.figures import Figures
from common.keys import Limits
from common.messages import GenerationSpec, Lane, LogEntry, TokenRecord


class Presentation(msgspec.Struct, frozen=True, array_like=True):  # close() reads it by place
    """How the answer of a request is shown, so that any gateway can show it alike (field ``out``).

    ``api`` is ``tgi``, ``chat`` or ``completion``; ``created`` is in seconds; ``flags`` are the
    API's own bits (see ``gateway/frames.py``). Packed it must stay under 64 bytes.
    """

    api: str
    flags: int
    created: int
    prompt_tokens: int
    seed: int | None = None
    """Shown by TGI when it samples."""
    num_choices: int = 1
    prompt_characters: int = 0
    """Length of the prompt where the answer begins with it."""
    is_background: bool = False
    """A response that nobody waits for: its end is told by webhooks."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Whose limits a request counts against."""

    key_id: str
    limits: Limits
    num_requests: int = 1
    """What it counts as: 0 for what comes with another one, as the next prompt of one body."""


@dataclass(frozen=True, slots=True)
class QuotaState:
    """What is left of a key's limits per minute, and when its buckets are full again."""

    limits: Limits
    requests: int
    requests_full_in_ms: int
    tokens: int
    tokens_full_in_ms: int


class LimitReached(Failure):
    """RATE_LIMITED or QUOTA_EXHAUSTED, with what is left."""

    def __init__(
        self, code: str, message: str, quota: QuotaState, *, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(code, message, retry_after_ms=retry_after_ms)
        self.quota = quota


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request that asks to be queued. ``cost`` is prompt tokens plus allowed new tokens."""

    request_id: str
    spec: GenerationSpec
    cost: int
    presentation: Presentation
    gateway: str
    """Subscribes this gateway's inbox; empty: nobody reads yet."""
    lane: Lane = "default"
    tenant: str = "public"
    weight: float = 1.0
    num_choices: int = 1
    attached: bool = True
    """True: cancelled when nobody has read it for ``grace_ms``. False: runs on without readers."""
    grace_ms: int = 5_000
    queue_limit_ms: int = 60_000
    run_limit_ms: int = 600_000
    retention_ms: int = 600_000
    lane_cap_tokens: int = 4_000_000
    lane_cap_bytes: int = 256 * 1024 * 1024
    idempotency_key: str = ""
    fingerprint: str = ""
    resubmit: bool = False
    """After Redis went back in time: admitted before, so no capacity check."""
    quota: Quota | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """Queued, or found: ``existing`` when the same id or idempotency key was known already."""

    request_id: str
    existing: bool
    position: int
    """Generations that wait ahead of this one."""
    wait_ms: int
    model_version: str
    """The newest live version of the pool; empty while no worker has said so."""
    quota: QuotaState | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """One generation that this worker now owns."""

    id: str
    fence: str
    next: int
    """Tokens already in the log; the worker reads them and continues there."""
    chain: str
    deaths: int
    lane: Lane
    admitted_ms: int
    claimed_ms: int
    body_bytes: int
    spec: GenerationSpec | None
    """None when the body is large, or damaged: :meth:`Broker.read_spec` reads it, or says so."""
    head: bytes = b""
    """All else that Redis knows of it, for :class:`Restoration`; nobody but Redis reads it."""
    clear_at: int = 0
    """> 0: it is on probation. Nothing else is given to this worker until it has ended, or so many
    tokens are in the log."""


class Room(NamedTuple):
    """What a worker may still be given of a lane."""

    slots: int
    tokens: int


class Reserve(NamedTuple):
    """A large generation waits at the head of ``lane``.

    Nothing of it and of the lanes behind it shall be claimed until this room is free; if the lane
    is starved, nothing at all.
    """

    tokens: int
    lane: Lane
    is_starved: bool


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    generations: list[Claimed]
    reserve: Reserve | None = None
    settling_ms: int = 0
    """> 0: Redis may have gone back in time; nothing is claimed for so long."""
    suspect: str = ""
    """To whom this worker is devoted, so that it is given nothing else: on probation there, or
    waiting until nobody else there may yet kill."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What one generation produced in one engine step.

    ``prev_chain`` is the chain that the record continues ("" at position 0).
    """

    id: str
    fence: str
    prev_chain: str
    record: TokenRecord


@dataclass(frozen=True, slots=True)
class Restoration:
    """A claim that Redis forgot, to be put back by its worker."""

    id: str
    fence: str
    position: int
    """Where the log in Redis ends now, 0 where it knows nothing of the generation."""
    chain: str
    """The worker's own chain there."""
    model_version: str
    spec: GenerationSpec | None
    head: bytes
    """With the spec what it takes to make again what is not known at all."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a publication was not accepted: ``lost``, ``gone``, ``unknown``, ``realign``, or
    ``forgotten``, where Redis does not know the claim any more.
    """

    id: str
    kind: str
    next: int = 0
    chain: str = ""


@dataclass(frozen=True, slots=True)
class PublishAnswer:
    refusals: list[Refusal]
    waiting: dict[Lane, int]
    """Tokens of work that wait: a busy worker claims only when something waits."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """State and first page of a stream that now flows into the gateway's inbox (unless ended)."""

    state: str
    """``Q`` waiting, ``R`` running, ``T`` ended."""
    next: int
    chain: str
    model_version: str
    presentation: Presentation
    attached: bool
    retention_ms: int
    entries: list[LogEntry]
    """Entries that end at or behind the cursor, oldest first; more may follow by ``read``."""


@dataclass(frozen=True, slots=True)
class Page:
    state: str
    next: int
    chain: str
    entries: list[LogEntry]


@dataclass(frozen=True, slots=True)
class Look:
    """State of a stream in Redis. ``state`` is empty for an unknown id."""

    id: str
    state: str
    next: int
    subscribed: bool
    ahead: int
    """While it waits: generations before it, in its own lane and in those served first; else -1."""
    wait_ms: int | None
    """Time to do their work at the pool's rate; None when it does not wait or no rate is known."""


class WorkerPresence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker says of itself in each beat."""

    model_version: str
    max_cost: int
    """Largest cost in tokens that this worker could ever take."""
    tokens_per_second: float = 0.0
    """Its own measured rate of work; used before the lane's drain rate is known."""
    state: str = "ready"
    pid: int = 0
    host: str = ""
    free_tokens: int = 0
    steps: int = 0
    """Engine steps so far: progress, for ``/ready`` and for people."""
    max_batch_size: int = 0
    """Most generations in one step; 0: not said."""
    batch_size: float = 0.0
    """Generations in the last step, or on average in those of the last second."""
    kv_used: float = 0.0
    """Share of its cache that is taken, 0 to 1."""
    generated_tokens: int = 0
    """Since its start."""
    rss_bytes: int = 0
    gpu_mem_bytes: int = 0
    """What it has taken of its GPU's memory, and all that this has; 0: it has no GPU."""
    gpu_mem_total_bytes: int = 0
    up_s: float = 0.0
    """How long ago it started."""
    held_in: dict[str, int] = {}
    """Generations that it holds, by lane."""


class GatewayPresence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a gateway says of itself in each beat."""

    model_version: str = ""
    state: str = "ready"
    pid: int = 0
    host: str = ""
    streams: int = 0
    """Answers that it relays now, streamed or not."""
    up_s: float = 0.0
    figures: Figures = msgspec.field(default_factory=Figures)
    """Since its start."""


class FailureNote(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request that failed, for who looks into it; ``at`` in seconds since 1970."""

    code: str
    request_id: str
    at: float
    api: str = ""
    worker: str = ""
    """Where it ran last; empty: nowhere."""
    model_version: str = ""


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    returned: list[str]
    """Generations that Redis handed back because a claim's answer had been lost."""
    drain_cause: str = ""
    """Who asked this worker to rest; empty: nobody, or no longer."""


@dataclass(frozen=True, slots=True)
class GatewayBeat:
    recreated: bool
    """The inbox did not exist: everything must be attached again."""
    last_id: str
    """Where to read the inbox from when it was recreated."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One end of a generation, as the pool's outbox keeps it for a day."""

    cursor: str
    id: str
    tenant: str
    reason: str
    """A finish reason; ``failed`` with a failure's code."""
    code: str
    at_ms: int
    is_background: bool
    """A response that nobody waits for."""


@dataclass(frozen=True, slots=True)
class Moved:
    """One generation that reap moved: ``requeued``, ``detached`` or ``closed`` with a code."""

    id: str
    move: str
    cause: str
    code: str = ""


@dataclass(frozen=True, slots=True)
class WorkerState:
    name: str
    expires_in_ms: int
    presence: WorkerPresence | None
    held: list[str]


@dataclass(frozen=True, slots=True)
class GatewayState:
    name: str
    expires_in_ms: int
    streams: int


@dataclass(frozen=True, slots=True)
class CountedWorker:
    """A worker in a census. ``heartbeat_age_ms`` is None where it has not said since when."""

    name: str
    expires_in_ms: int
    heartbeat_age_ms: int | None
    held: int
    drain_cause: str
    presence: WorkerPresence | None
    suspect: str = ""
    """The generation for which it claims nothing else; empty: none."""


@dataclass(frozen=True, slots=True)
class CountedGateway:
    name: str
    expires_in_ms: int
    reading: int
    """Generations that it is subscribed to."""
    presence: GatewayPresence | None


@dataclass(frozen=True, slots=True)
class CountedLane:
    """``depth`` counts those handed back as well. ``wait_ms`` is what one who came now would wait;
    0: nothing waits, or no rate is known.
    """

    depth: int
    backlog_tokens: int
    oldest_ms: int
    wait_ms: int
    handed_back: int = 0
    """Of ``depth``, those that a worker had before."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker or gateway that left without a word."""

    at_ms: int
    role: str
    name: str
    is_seen: bool
    """Its supervisor saw it end; else it was silent for too long."""
    host: str


@dataclass(frozen=True, slots=True)
class Census:
    """One look at a pool that costs little: counts, without any id of what is held."""

    at_ms: int
    workers: list[CountedWorker]
    """Those with a lease, and those that load."""
    gateways: list[CountedGateway]
    lanes: dict[Lane, CountedLane]
    dead_letters: int
    lost: list[Lost]
    """Of the last ten minutes, the newest first."""
    drain_rate: float
    """Tokens per second; 0.0 before the first measure."""


@dataclass(frozen=True, slots=True)
class LiveGeneration:
    """One that runs or waits; times in milliseconds, None: not begun."""

    id: str
    worker: str
    """Empty: it waits."""
    lane: str
    age_ms: int
    running_ms: int | None
    tokens: int
    prompt_tokens: int
    deaths: int


@dataclass(frozen=True, slots=True)
class Memory:
    """``max_bytes`` 0: no limit."""

    used_bytes: int
    max_bytes: int
    evicts: bool
    evicted_keys: int


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says of itself."""

    name: str
    """``Redis`` or ``Valkey``."""
    version: str
    eviction: str
    """``maxmemory-policy``."""
    has_append_only_file: bool
    clock_offset_s: float
    """Its clock less this machine's."""
    fsync: str = ""
    """``appendfsync``; empty where this user may not ask."""

    @property
    def is_valkey(self) -> bool:
        return self.name == "Valkey"

    @property
    def version_numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split(".") if part.isdigit())


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """Generations that were kept aside because workers died of them."""

    num_in: dict[str, int]
    """By lane, those that are still kept."""
    num_ever: int
    """As long as the server remembers: without any for a week it begins anew."""
    last_id: str = ""


@dataclass(frozen=True, slots=True)
class PoolState:
    """One look at a pool, for ``/ready``, ``headrace status`` and metrics."""

    workers: list[WorkerState]
    gateways: list[GatewayState]
    waiting: dict[str, int]
    """Generations per lane, without those handed back."""
    handed_back: int
    backlog_tokens: dict[str, int]
    oldest_wait_ms: int
    drain_rate: float
    """Tokens per second; 0.0 before the first measure."""
