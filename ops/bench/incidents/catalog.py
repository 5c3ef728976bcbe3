"""The incidents: what breaks, in whom, and what a finding may name as the cause.

Each is a function that is called when the fault is to begin. It breaks something on the stage,
comes back when the fault is over or set, and says what it did. Which worker or tenant is hit comes
from the seed. What clients do wrong stands in ``intruders``: sources that begin with the fault.
"""

import http.server
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from common import keys
from common.broker import Broker
from common.keys import Limits
from common.webhooks import EVENTS, Endpoint, new_endpoint_id, new_salt
from ops.batch_client import BatchClient
from ops.bench.incidents.places import find_addresses
from ops.bench.incidents.stage import TENANTS, Stage
from ops.bench.incidents.traffic import Source
from ops.bench.incidents.truth import Cause
from ops.bench.incidents.worker import Flaw, Orders
from ops.gateways import Gateways
from ops.keys import with_broker

_PERIOD_S = 10.0
"""Of peace before the fault, and of the fault: long enough for some hundred requests each."""

AGENTS = ("mill-client/1.0", "sluice-sdk/2.3", "weir-app/0.9")
_LANE_AGENT = "night-run/3.1"

Act = Callable[[Stage], list[Cause]]
Extra = Callable[[Stage], list[Source]]


def _nothing(_: Stage) -> list[Cause]:
    return []


def _nobody(_: Stage) -> list[Source]:
    return []


@dataclass(frozen=True, slots=True)
class Incident:
    """One fault and the pool that it happens in. Seconds are those of real time."""

    name: str
    kind: str
    seed: int
    symptom: str
    act: Act = _nothing
    intruders: Extra = _nobody
    workers: int = 3
    gateways: int = 2
    env: Mapping[str, object] = field(default_factory=dict[str, object])
    limits: Callable[[Stage], Mapping[str, Limits]] = lambda _: {}
    rate: float = 12.0
    """Requests per second of all ordinary clients together."""
    tail_s: float = 2.0
    """How long clients go on behind the fault."""
    lead_s: float = _PERIOD_S
    fault_s: float = _PERIOD_S
    batches: bool = False
    """Whether a tenant hands in small batches all the time."""

    def sources(self, stage: Stage) -> list[Source]:
        """The ordinary clients: five tenants with three programs between them, and what else is."""
        usual = [
            Source(
                key=stage.keys[tenant],
                rate=self.rate / len(TENANTS),
                user_agent=AGENTS[number % len(AGENTS)],
            )
            for number, tenant in enumerate(TENANTS)
        ]
        return usual + self.intruders(stage)


SPEED = {"SIMULATED_FIRST_TOKEN_MS": 20, "SIMULATED_INTER_TOKEN_MS": 20, "MAX_BATCH_SIZE": 8}
"""Of every run: answers of half a second, and room for three times what is asked."""
NARROW = {"MAX_BATCH_SIZE": 4, "QUEUE_LIMIT_S": 20}
"""Room for little more than what is asked, so that anything more waits."""


def all_incidents() -> list[Incident]:
    return [*_of_workers(), *_of_models(), *_of_clients(), *_of_redis(), *_of_the_rest()]


def healthy_runs() -> list[Incident]:
    """Nothing happens; some are busier than others."""
    rates = (6, 8, 10, 12, 12, 14, 14, 16, 16, 18)
    return [
        Incident(f"healthy-{n}", "healthy", 900 + n, "", rate=rate)
        for n, rate in enumerate(rates, start=1)
    ]


def _worker(stage: Stage, process: str) -> list[Cause]:
    """The process in a slot now, and, as those that follow it have its orders, the slot."""
    return [Cause("worker", stage.instance(process)), Cause("slot", process)]


# --- workers -------------------------------------------------------------------------------------


def _ordered(orders: Orders, *also: Cause) -> Act:
    """One worker misbehaves from now on."""

    def act(stage: Stage) -> list[Cause]:
        process = stage.any_worker()
        stage.order(process, orders)
        return [*_worker(stage, process), *also]

    return act


def _stalled(seconds: float) -> Act:
    def act(stage: Stage) -> list[Cause]:
        process = stage.any_worker()
        causes = _worker(stage, process)
        stage.stall(process, seconds)
        return causes

    return act


def _killed(times: int, every_s: float, number: signal.Signals = signal.SIGKILL) -> Act:
    """The process in one worker's slot dies, and so do those that come after it."""

    def act(stage: Stage) -> list[Cause]:
        process = stage.any_worker()
        causes = [Cause("slot", process)]
        for n in range(times):
            if n:
                time.sleep(every_s)
                with suppress(click.ClickException):
                    stage.until_ready(process, lambda it: it.pid > 0)
            stage.send(process, number)
        return causes

    return act


def _all_stalled(seconds: float) -> Act:
    def act(stage: Stage) -> list[Cause]:
        names = [f"worker {n + 1}" for n in range(stage.num_workers)]
        threads = [threading.Thread(target=stage.stall, args=(name, seconds)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [Cause("component", "workers"), Cause("kind", "workers_lost")]

    return act


def _of_workers() -> list[Incident]:
    short_lease = {"LEASE_MS": 2000, "BEAT_MS": 500}
    stuck = short_lease | {"STEP_TIMEOUT_S": 3}
    return [
        Incident("slow-worker-decode", "slow worker", 101, "slow", _ordered(Orders(step_factor=6))),
        Incident("slow-worker-mild", "slow worker", 102, "slow", _ordered(Orders(step_factor=3))),
        Incident(
            "slow-worker-of-four",
            "slow worker",
            103,
            "slow",
            _ordered(Orders(step_factor=8)),
            workers=4,
        ),
        Incident(
            "slow-worker-prefill",
            "slow worker",
            104,
            "first token",
            _ordered(Orders(prefill_factor=60)),
        ),
        Incident("worker-paused", "paused worker", 105, "stalls", _stalled(6), env=short_lease),
        Incident("worker-paused-briefly", "paused worker", 106, "stalls", _stalled(3)),
        Incident("worker-killed", "worker killed", 107, "retries", _killed(1, 0), tail_s=10),
        Incident("worker-crash-loop", "crash loop", 108, "retries", _killed(4, 2.0), tail_s=4),
        Incident(
            "worker-segfaults",
            "crash loop",
            109,
            "retries",
            _killed(3, 2.5, signal.SIGSEGV),
            tail_s=4,
        ),
        Incident(
            "worker-stuck",
            "stuck engine",
            110,
            "stalls",
            _ordered(Orders(is_stuck=True)),
            env=stuck,
        ),
        Incident(
            "worker-out-of-memory",
            "out of memory",
            111,
            "CUDA_OOM",
            _ordered(Orders(memory_tokens=40)),
        ),
        Incident("all-workers-paused", "workers paused", 112, "stalls", _all_stalled(6)),
        Incident(
            "queue-timeouts",
            "workers paused",
            113,
            "QUEUE_TIMEOUT",
            _all_stalled(9),
            env={"QUEUE_LIMIT_S": 3},
        ),
        Incident(
            "clock-skew",
            "clock skew",
            114,
            "none but wrong times",
            _skewed(45.0),
        ),
    ]


def _skewed(ahead_s: float) -> Act:
    """A worker comes back from a restart with a wrong clock."""

    def act(stage: Stage) -> list[Cause]:
        process = stage.any_worker()
        stage.replace([process], Orders(clock_s=ahead_s))
        return [*_worker(stage, process), Cause("component", "clock")]

    return act


# --- models --------------------------------------------------------------------------------------


def _deployed(orders: Orders, *, count: int) -> Act:
    """So many workers are replaced by some that run another edition of the model."""

    def act(stage: Stage) -> list[Cause]:
        numbers = stage.chance.sample(range(1, stage.num_workers + 1), count)
        chosen = [f"worker {number}" for number in numbers]
        stage.replace(chosen, orders)
        return [Cause("version_of", chosen[0])]

    return act


def _flawed_everywhere(flaw: Flaw, *causes: Cause) -> Act:
    def act(stage: Stage) -> list[Cause]:
        for number in range(1, stage.num_workers + 1):
            stage.order(f"worker {number}", Orders(flaw=flaw))
        return list(causes)

    return act


def _out_of_memory_everywhere(memory_tokens: int, *causes: Cause) -> Act:
    def act(stage: Stage) -> list[Cause]:
        for number in range(1, stage.num_workers + 1):
            stage.order(f"worker {number}", Orders(memory_tokens=memory_tokens))
        return list(causes)

    return act


def _of_models() -> list[Incident]:
    failing = Orders(edition=2, flaw=Flaw(share=0.4))
    not_numbers = Orders(edition=3, flaw=Flaw(kind="numbers", share=0.6))
    slow = Orders(edition=4, step_factor=5)
    return [
        Incident(
            "version-fails",
            "bad model version",
            201,
            "ENGINE_ERROR",
            _deployed(failing, count=2),
            workers=4,
            tail_s=8,
        ),
        Incident(
            "version-not-finite",
            "bad model version",
            202,
            "NAN_LOGITS",
            _deployed(not_numbers, count=2),
            workers=4,
            tail_s=8,
        ),
        Incident(
            "version-slow",
            "bad model version",
            203,
            "slow",
            _deployed(slow, count=2),
            workers=4,
            tail_s=8,
        ),
        Incident(
            "version-slow-everywhere", "deploy", 204, "slow", _deployed(slow, count=3), tail_s=6
        ),
        Incident(
            "grammar-fails",
            "bad feature",
            205,
            "ENGINE_ERROR",
            _flawed_everywhere(
                Flaw(kind="numbers", is_guided=True),
                Cause("grammar", "json_schema"),
                Cause("grammar", "json"),
            ),
        ),
        Incident(
            "sampling-fails",
            "bad feature",
            206,
            "ENGINE_ERROR",
            _flawed_everywhere(
                Flaw(is_sampled=True), Cause("sampling", "sample"), Cause("temperature", 0.8)
            ),
        ),
        Incident(
            "long-prompts-fail",
            "bad prompt length",
            207,
            "NAN_LOGITS",
            _flawed_everywhere(
                Flaw(kind="numbers", min_prompt_tokens=300), Cause("prompt_tokens", (300, 1000))
            ),
        ),
        Incident(
            "long-answers-fail",
            "bad answer length",
            208,
            "NAN_LOGITS",
            _flawed_everywhere(
                Flaw(kind="numbers", min_position=36),
                Cause("max_tokens", (37, 1000)),
                Cause("tokens", (36, 1000)),
            ),
        ),
        Incident(
            "long-prompts-no-memory",
            "out of memory",
            209,
            "CUDA_OOM",
            _out_of_memory_everywhere(300, Cause("prompt_tokens", (250, 1000))),
        ),
        Incident(
            "full-batches-fail",
            "bad batch size",
            210,
            "ENGINE_ERROR",
            _flawed_everywhere(
                Flaw(min_batch=5, max_position=0),
                Cause("batch_size", (5, 64)),
                Cause("batch_size_max", (5, 64)),
                Cause("batch_size_mean", (3, 64)),
            ),
            workers=2,
            rate=14,
        ),
    ]


# --- clients -------------------------------------------------------------------------------------


def _of_tenant(*causes: Cause) -> Act:
    """The tenant that the seed chose, which is the first thing that is drawn from it."""

    def act(stage: Stage) -> list[Cause]:
        return [Cause("tenant", _guilty(stage)), *causes]

    return act


def _said(*causes: Cause) -> Act:
    return lambda _: list(causes)


def _guilty(stage: Stage) -> str:
    return TENANTS[stage.seed % len(TENANTS)]


def _from_tenant(**fields: object) -> Extra:
    def extra(stage: Stage) -> list[Source]:
        return [_source(stage, _guilty(stage), **fields)]

    return extra


def _from_all(**fields: object) -> Extra:
    return lambda stage: [_source(stage, tenant, **fields) for tenant in TENANTS]


def _source(stage: Stage, tenant: str, **fields: object) -> Source:
    agent = AGENTS[TENANTS.index(tenant) % len(AGENTS)]
    wanted = {"key": stage.keys[tenant], "start_s": stage.lead_s, "user_agent": agent} | fields
    return Source(**wanted)  # pyright: ignore[reportArgumentType]


def _poisoned(stage: Stage) -> list[Cause]:
    for number in range(1, stage.num_workers + 1):
        stage.order(f"worker {number}", Orders(crash_on=_POISON))
    return [
        Cause("marked", _POISON),
        Cause("tenant", _guilty(stage)),
        Cause("event", "job.dead"),
    ]


_POISON = "hemlock in the mill race"
_BOMB = {"type": "integer", "multipleOf": 1_000_003}
"""It takes an automaton with as many states, which no worker lets it have."""


def _of_clients() -> list[Incident]:
    quick_lease = {"LEASE_MS": 2000, "BEAT_MS": 500}
    return [
        Incident(
            "poison-prompt",
            "poison prompt",
            301,
            "POISON_REQUEST",
            _poisoned,
            _from_tenant(rate=0.35, words=_POISON, prompt_words=(5, 5)),
            env=quick_lease,
            workers=3,
            tail_s=4,
        ),
        Incident(
            "tenant-flood",
            "tenant flood",
            302,
            "queue",
            _of_tenant(),
            _from_tenant(rate=25.0),
            workers=2,
            env=NARROW,
            rate=7,
        ),
        Incident(
            "tenant-flood-other",
            "tenant flood",
            303,
            "queue",
            _of_tenant(),
            _from_tenant(rate=40.0, new_tokens=(4, 8), user_agent="scraper/0.1"),
            workers=2,
            env=NARROW,
            rate=7,
        ),
        Incident(
            "tenant-long-prompts",
            "long prompts",
            304,
            "first token",
            _of_tenant(Cause("prompt_tokens", (1500, 9000))),
            _from_tenant(rate=8.0, prompt_words=(450, 700)),
            workers=2,
        ),
        Incident(
            "tenant-long-answers",
            "long answers",
            305,
            "queue",
            _of_tenant(Cause("max_tokens", (300, 900))),
            _from_tenant(rate=3.0, new_tokens=(400, 500)),
            workers=2,
            env=NARROW,
            rate=7,
        ),
        Incident(
            "flood-of-all",
            "interactive flood",
            306,
            "queue",
            _said(Cause("component", "load")),
            _from_all(rate=6.0),
            workers=2,
            env=NARROW,
            rate=7,
        ),
        Incident(
            "flex-lane-crowded",
            "lane crowding",
            307,
            "queue",
            _of_tenant(Cause("lane", "flex"), Cause("user_agent", _LANE_AGENT)),
            _from_tenant(
                rate=14.0, tier="flex", apis=("completions", "chat"), user_agent=_LANE_AGENT
            ),
            workers=2,
            env=NARROW,
            rate=7,
        ),
        Incident(
            "key-limit",
            "key limit",
            308,
            "RATE_LIMITED",
            _of_tenant(Cause("code", "RATE_LIMITED")),
            _from_tenant(rate=12.0),
            limits=lambda stage: {_guilty(stage): Limits(requests_per_minute=60)},
        ),
        Incident(
            "grammar-bomb",
            "grammar bomb",
            309,
            "GRAMMAR_REJECTED",
            _of_tenant(
                Cause("user_agent", "bomber/1.0"),
                Cause("code", "GRAMMAR_REJECTED"),
            ),
            _from_tenant(
                rate=2.0,
                guided=1.0,
                apis=("chat",),
                schema={"type": "object", "properties": {"a": _BOMB}, "required": ["a"]},
                user_agent="bomber/1.0",
            ),
        ),
        Incident(
            "slow-readers",
            "slow readers",
            310,
            "slow reading",
            _of_tenant(Cause("user_agent", "modem/56")),
            _from_tenant(
                rate=2.0,
                is_slow=True,
                streams=1.0,
                user_agent="modem/56",
                apis=("chat",),
                new_tokens=(60, 100),
            ),
        ),
        Incident(
            "clients-leave",
            "disconnect wave",
            311,
            "disconnected",
            _of_tenant(Cause("user_agent", "mobile-app/7"), Cause("code", "disconnected")),
            _from_tenant(rate=8.0, leaves=True, streams=1.0, user_agent="mobile-app/7"),
        ),
        Incident(
            "bad-requests",
            "broken client",
            312,
            "BAD_REQUEST",
            _of_tenant(
                Cause("user_agent", "new-release/4"), Cause("code", "CONTEXT_LENGTH_EXCEEDED")
            ),
            _from_tenant(
                rate=5.0, new_tokens=(9000, 9000), user_agent="new-release/4", apis=("chat",)
            ),
        ),
    ]


# --- Redis ---------------------------------------------------------------------------------------


def _redis_stalled(seconds: float) -> Act:
    def act(stage: Stage) -> list[Cause]:
        stage.stall("server", seconds)
        return list(_REDIS_AWAY)

    return act


def _redis_paused(seconds: float) -> Act:
    """Redis takes no writes, but answers."""

    def act(stage: Stage) -> list[Cause]:
        stage.tell_server("CLIENT", "PAUSE", str(int(seconds * 1000)), "ALL")
        time.sleep(seconds)
        return list(_REDIS_AWAY)

    return act


def _redis_killed(stage: Stage) -> list[Cause]:
    pid = stage.process("server").pid
    stage.send("server", signal.SIGKILL)
    stage.until_ready("server", lambda it: it.pid != pid)
    return list(_REDIS_AWAY)


def _redis_full(stage: Stage) -> list[Cause]:
    stage.tell_server("CONFIG", "SET", "maxmemory", "1mb")
    time.sleep(6)
    stage.tell_server("CONFIG", "SET", "maxmemory", "0")
    return [Cause("code", "BROKER_FULL"), *_REDIS_AWAY]


_REDIS_AWAY = (
    Cause("component", "redis"),
    Cause("event", "redis.disconnected"),
    Cause("code", "BROKER_UNAVAILABLE"),
)


def _of_redis() -> list[Incident]:
    return [
        Incident("redis-stalled", "Redis paused", 401, "stalls", _redis_stalled(6), tail_s=5),
        Incident(
            "redis-stalled-briefly", "Redis paused", 402, "stalls", _redis_stalled(3), tail_s=5
        ),
        Incident("redis-paused", "Redis paused", 403, "stalls", _redis_paused(5), tail_s=5),
        Incident("redis-killed", "Redis restarted", 404, "stalls", _redis_killed, tail_s=8),
        Incident("redis-full", "Redis full", 405, "BROKER_FULL", _redis_full, tail_s=3),
    ]


# --- the rest ------------------------------------------------------------------------------------


def _gateway_killed(stage: Stage) -> list[Cause]:
    process = stage.any_gateway()
    causes = [Cause("gateway", stage.instance(process))]
    stage.send(process, signal.SIGKILL)
    return [*causes, Cause("slot", process)]


def _gateway_stutters(stage: Stage) -> list[Cause]:
    process = stage.any_gateway()
    causes = [Cause("gateway", stage.instance(process))]
    for _ in range(7):
        stage.stall(process, 0.9)
        time.sleep(0.3)
    return causes


def _reconfigured(env: Mapping[str, object], *causes: Cause) -> Act:
    def act(stage: Stage) -> list[Cause]:
        stage.restart(env)
        return [Cause("kind", "config"), *causes]

    return act


def _scaled_down(workers: int) -> Act:
    def act(stage: Stage) -> list[Cause]:
        stage.num_workers = workers
        stage.restart()
        return [Cause("kind", "config"), Cause("component", "capacity")]

    return act


def _storage_lost(stage: Stage) -> list[Cause]:
    """The folder of files is gone, and a file stands in its place."""
    files = stage.data_dir / "files"
    files.rename(files.with_name("files.lost"))
    files.write_bytes(b"")
    return [
        Cause("component", "storage"),
        Cause("event", "storage.failed"),
        Cause("code", "STORAGE_UNAVAILABLE"),
    ]


def _log_full(stage: Stage) -> list[Cause]:
    process = stage.any_gateway()
    with stage.full_disk_for(process):
        time.sleep(5)
    return [Cause("event", "log.dropped"), Cause("component", "log_lost")]


def _webhook_lost(stage: Stage) -> list[Cause]:
    """An endpoint is added at which nobody answers, and a batch ends."""
    with _receiver() as port:
        pass  # nobody listens there any more

    async def add(broker: Broker) -> None:
        pepper = keys.read_pepper("", stage.data_dir) or b""
        endpoint = Endpoint(
            id=new_endpoint_id(),
            tenant=_guilty(stage),
            url=f"http://127.0.0.1:{port}/",
            created_s=int(time.time()),
            salt=new_salt(),
            pepper=keys.fingerprint(pepper),
            events=EVENTS,
        )
        await broker.webhook_store.add_endpoint(endpoint)

    with_broker(stage.settings(), add)
    return [
        Cause("component", "webhook"),
        Cause("event", "webhook.failed"),
        Cause("event", "webhook.dead"),
    ]


@contextmanager
def _receiver() -> Generator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    try:
        yield server.server_address[1]
    finally:
        server.server_close()


@contextmanager
def batches_of(stage: Stage) -> Generator[None]:
    """While this lasts, a tenant hands in a batch of some lines each second."""
    has_ended = threading.Event()

    def keep_handing_in() -> None:
        urls = find_addresses(stage.data_dir)
        with (
            tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder,
            Gateways(urls, stage.keys[_guilty(stage)], lambda _: None) as gateways,
        ):
            client, path = BatchClient(gateways), Path(folder) / "lines.jsonl"
            while not has_ended.wait(1.0):
                path.write_text("".join(map(_line, range(5))))
                with suppress(click.ClickException):
                    client.create(client.upload(path), "/v1/completions")

    thread = threading.Thread(target=keep_handing_in, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()


def _line(number: int) -> str:
    body = {"model": "simulated", "prompt": f"{number}. A river is", "max_tokens": 8}
    asked = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(asked) + "\n"


def _of_the_rest() -> list[Incident]:
    return [
        Incident("gateway-killed", "gateway killed", 501, "cut off", _gateway_killed),
        Incident("gateway-stutters", "gateway slow", 502, "slow", _gateway_stutters, tail_s=2),
        Incident(
            "gateway-stutters-of-three",
            "gateway slow",
            503,
            "slow",
            _gateway_stutters,
            gateways=3,
            tail_s=2,
        ),
        Incident(
            "config-halves-batches",
            "config change",
            504,
            "queue",
            _reconfigured({"MAX_BATCH_SIZE": 2}),
            env=NARROW,
            tail_s=10,
        ),
        Incident(
            "config-small-queue",
            "config change",
            505,
            "QUEUE_FULL",
            _reconfigured({"MAX_CONCURRENT_REQUESTS": 2}),
            tail_s=10,
        ),
        Incident(
            "scaled-down",
            "scale-down",
            506,
            "queue",
            _scaled_down(1),
            env=NARROW,
            tail_s=10,
        ),
        Incident(
            "storage-lost", "storage failing", 507, "STORAGE", _storage_lost, batches=True, rate=6
        ),
        Incident(
            "webhook-lost",
            "webhook target down",
            508,
            "webhooks",
            _webhook_lost,
            batches=True,
            rate=6,
            env={"ALLOW_PRIVATE_WEBHOOKS": "true"},
        ),
        Incident("log-full", "log sink blocked", 509, "lines lost", _log_full, tail_s=5),
    ]
