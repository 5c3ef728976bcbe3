"""Logs of a pool that never ran: requests through gateways, a queue and workers, with faults.

Small enough to know what the truth is, and real enough that waiting follows from load: workers have
slots, the earliest free one takes the next request, and what stops a worker delays what it holds.
"""

import gzip
import hashlib
import heapq
import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from common.failures import KINDS

START_S = 1_795_000_000.0
"""When the log begins, in seconds since the epoch."""
_LEASE_S = 3.0

Line = dict[str, Any]


def tenant_hash(name: object) -> str:
    """What logs call a tenant."""
    return hashlib.sha256(f"tenant {name}".encode()).hexdigest()[:12]


def pid_of(instance: str) -> int:
    """The process of an instance."""
    return 100 + zlib.crc32(instance.encode()) % 30_000


@dataclass
class Request:
    """One request as the simulation knows it; ``t`` in seconds after the log's start."""

    id: str
    t: float
    tenant: str
    gateway: str
    lane: str = "default"
    api: str = "chat"
    stream: bool = True
    prompt_tokens: int = 100
    max_tokens: int = 64
    n: int = 1
    grammar: str | None = None
    sampling: str = "greedy"
    adapter: str | None = None
    user_agent: str = "openai-python"


@dataclass
class Worker:
    name: str
    host: str
    model_version: str = "v1"
    slots: int = 8
    gpu: str | None = None
    free: list[float] = field(default_factory=list[float])
    stalls: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Intervals in which it makes no step."""
    dead: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """From a kill until another process has its place."""
    slow: Callable[[float], float] = lambda _: 1.0

    def runs(self, start: float, work: float) -> float:
        """When ``work`` seconds, begun at ``start``, are done."""
        end = start + work
        for began, went_on in self.stalls:
            if start < went_on and end > began:
                end += went_on - max(began, start)
        return end


@dataclass
class Pool:
    """Fill in what is wrong, then :meth:`lines`."""

    seed: int = 1
    seconds: float = 600.0
    rate: float = 8.0
    num_workers: int = 4
    slots: int = 8
    num_gateways: int = 2
    tenants: int = 12
    noise: float = 0.25
    fails: Callable[[Request, Worker, float], str | None] = lambda *_: None
    """The code with which a request fails at a worker at a time."""
    refuses: Callable[[Request], str | None] = lambda _: None
    """The code with which a gateway refuses it at once."""
    blocks: Callable[[Request], float] = lambda _: 0.0
    """For how many seconds its client takes nothing of an answer."""
    extra: list[Callable[[random.Random], Iterator[Request]]] = field(
        default_factory=list[Callable[[random.Random], Iterator[Request]]]
    )
    gateway_dies: dict[str, float] = field(default_factory=dict[str, float])
    events: list[Line] = field(default_factory=list[Line])
    workers: list[Worker] = field(default_factory=list[Worker])

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.workers = [
            Worker(f"w{number}-{self.seed:02x}", f"host{number}", slots=self.slots)
            for number in range(1, self.num_workers + 1)
        ]

    # Faults ------------------------------------------------------------------------------------

    def event(self, t: float, event: str, service: str, instance: str, **fields: Any) -> None:
        self.events.append(
            {"t": t, "event": event, "service": service, "instance": instance, **fields}
        )

    def kill(self, worker: Worker, t: float, back: float, *, slot: str) -> None:
        worker.dead.append((t, back))
        self.event(
            t, "process.exited", "supervisor", "supervisor-1", role="worker", name=slot,
            child_pid=pid_of(worker.name), exit_code=-9, signal="SIGKILL", level="warning",
            cause="ended by SIGKILL",
        )  # fmt: skip
        self.event(back, "worker.ready", "worker", f"{worker.name}b", model_version="v1")

    def kill_gateway(self, name: str, t: float) -> None:
        self.gateway_dies[name] = t
        self.event(
            t + 0.1, "process.exited", "supervisor", "supervisor-1", role="gateway",
            name=f"gateway {name[1:]}", child_pid=pid_of(name), exit_code=-9, signal="SIGKILL",
            level="warning", cause="ended by SIGKILL",
        )  # fmt: skip

    def pause_all(self, start: float, end: float) -> None:
        for worker in self.workers:
            worker.stalls.append((start, end))

    # The run -----------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        found = list(self._usual())
        for source in self.extra:
            found += list(source(self.random))
        return sorted(found, key=lambda request: request.t)

    def _usual(self) -> Iterator[Request]:
        t = 0.0
        while (t := t + self.random.expovariate(self.rate)) < self.seconds:
            yield self.request(t)

    def request(self, t: float, **fields: Any) -> Request:
        chance = self.random
        alive = [
            f"g{number}"
            for number in range(1, self.num_gateways + 1)
            if t < self.gateway_dies.get(f"g{number}", math.inf)
        ]
        made: dict[str, Any] = {
            "id": f"{chance.getrandbits(64):016x}",
            "t": t,
            "tenant": tenant_hash(min(int(chance.expovariate(0.4)), self.tenants)),
            "gateway": chance.choice(alive),
            "lane": "default" if chance.random() < 0.85 else "batch",
            "api": chance.choice(["chat", "chat", "completions", "tgi"]),
            "stream": chance.random() < 0.8,
            "prompt_tokens": int(chance.lognormvariate(4.8, 0.9)) + 1,
            "max_tokens": chance.choice([16, 32, 64, 64, 128]),
            "n": 1 if chance.random() < 0.95 else 2,
            "grammar": "json_schema" if chance.random() < 0.1 else None,
            "sampling": "sample" if chance.random() < 0.4 else "greedy",
            "user_agent": chance.choice(["openai-python", "openai-python", "curl", "langchain"]),
        }
        return Request(**(made | fields))

    def lines(self) -> list[Line]:
        """Everything that the pool would have logged, in order of time."""
        lines: list[Line] = list(self.events)
        for worker in self.workers:
            worker.free = [0.0] * worker.slots
            lines.append({"t": 0.0, "event": "worker.ready", "service": "worker",
                          "instance": worker.name,
                          "model_version": worker.model_version})  # fmt: skip
        lines += [
            {"t": 0.0, "event": "gateway.ready", "service": "gateway", "instance": name,
             "url": f"http://{name}"}
            for name in ("g1", "g2")
        ]  # fmt: skip
        for name in [*(worker.name for worker in self.workers), "g1", "g2"]:
            service = "gateway" if name.startswith("g") else "worker"
            lines += [
                {"t": minute * 60.0, "event": "clock.sampled", "service": service,
                 "instance": name, "offset_s": 0.001}
                for minute in range(int(self.seconds / 60) + 1)
            ]  # fmt: skip
        for request in self.requests():
            lines += self._serve(request)
        # A process that has died says nothing more.
        kept = [
            line
            for line in lines
            if line["t"] <= self.gateway_dies.get(str(line["instance"]), math.inf)
        ]
        return [_stamped(line) for line in sorted(kept, key=lambda line: line["t"])]

    def _serve(self, request: Request) -> list[Line]:
        asked = {
            "api": request.api, "stream": request.stream, "prompt_tokens": request.prompt_tokens,
            "max_tokens": request.max_tokens, "n": request.n, "grammar": request.grammar,
            "sampling": request.sampling, "adapter": request.adapter or "",
            "user_agent": request.user_agent, "best_of": 1, "tools": False,
            "temperature": None if request.sampling == "greedy" else 0.8,
            "prompt_sha256": request.id,
        }  # fmt: skip
        base = {"request_id": request.id, "tenant_hash": request.tenant, "lane": request.lane}
        job = base | {"job_id": f"{request.id}.0"}
        told: list[Line] = []

        def tell(t: float, event: str, service: str, instance: str, **fields: Any) -> None:
            told.append(
                {"t": t, "event": event, "service": service, "instance": instance, **fields}
            )

        at_gateway = ("gateway", request.gateway)
        if (code := self.refuses(request)) is not None:
            tell(request.t, "gateway.rejected", *at_gateway, **base, code=code, status=400,
                 duration=0.001, **asked)  # fmt: skip
            tell(request.t + 0.001, "request.finished", *at_gateway, **base, code=code, status=400,
                 duration=0.001, tokens=0, ttft=None, finish_reason=None, **asked)  # fmt: skip
            return told
        tell(request.t, "gateway.accepted", *at_gateway, **base, **asked)
        tell(request.t + 0.002, "queue.enqueued", *at_gateway, **base, depth_before=0,
             stream_id=request.id, est_wait_s=0.0)  # fmt: skip
        waits_from, attempt, first_token = request.t, 0, None
        while True:
            attempt += 1
            worker, start = self._next_free(waits_from)
            place = {"worker": worker.name, "host": worker.host, "attempt": attempt,
                     "model_version": worker.model_version}  # fmt: skip
            factor = worker.slow(start) * self.random.lognormvariate(0, self.noise)
            prefill_s = (0.02 + request.prompt_tokens * 0.0002) * factor
            first = worker.runs(start, prefill_s)
            pace_s = 0.01 * worker.slow(first) * self.random.lognormvariate(0, self.noise / 2)
            end = worker.runs(first, pace_s * request.max_tokens)
            in_batch = 1 + sum(free > start for free in worker.free)
            tell(start, "worker.claimed", "worker", worker.name, **job, **place, next=0,
                 claim_lag_s=0.002, deaths=attempt - 1, gpu_uuid=worker.gpu)  # fmt: skip
            tell(start + 0.001, "batch.joined", "worker", worker.name, **job, **place,
                 batch_size=in_batch, batch_id=1, cached_tokens=0, pad_ratio=0.0, slot=0,
                 prompt_tokens=request.prompt_tokens)  # fmt: skip
            died = next((dead for dead in worker.dead if start <= dead[0] < end), None)
            if died is None:
                break
            heapq.heapreplace(worker.free, died[1])
            requeued = died[0] + _LEASE_S
            tell(requeued, "job.requeued", "gateway", request.gateway, **job,
                 cause="lease", worker=worker.name, attempt=attempt)  # fmt: skip
            waits_from = requeued
        heapq.heapreplace(worker.free, end)
        first_token = first
        code = self.fails(request, worker, start) or "ok"
        tokens = request.max_tokens if code == "ok" else 0
        end = end if code == "ok" else first + 0.01
        told_of_it = {
            "code": code, "finish_reason": "length" if code == "ok" else "failed",
            "completion_tokens": tokens, "new_tokens": tokens, "end": tokens, "cached_tokens": 0,
            "prompt_tokens": request.prompt_tokens, "queue_time": start - request.t,
            "ttft": first - request.t, "prefill_time": first - start,
            "generation_time": end - start, "tokens_per_second": tokens / (end - start),
            "batch_size_mean": float(in_batch), "batch_size_max": in_batch, "deaths": attempt - 1,
        }  # fmt: skip
        if code == "ok":
            tell(first, "worker.first_token", "worker", worker.name, **job, **place,
                 prefill_time=first - start)  # fmt: skip
            tell(end, "worker.finished", "worker", worker.name, **job, **place, **told_of_it)
        else:
            kind = KINDS[code]
            tell(end, "worker.failed", "worker", worker.name, **job, **place, **told_of_it,
                 level="warning", actor=kind.actor.value, retryable=kind.retryable)  # fmt: skip
        if self.random.random() < 0.01 and code == "ok":
            code = "disconnected"
        blocked_s = self.blocks(request)
        slowly = {"blocked_time": blocked_s, "unsent_bytes": 4000} if blocked_s else {}
        tell(end + 0.003, "request.finished", *at_gateway, **base, code=code, status=200,
             finish_reason=told_of_it["finish_reason"], queue_time=start - request.t,
             ttft=first_token - request.t, generation_time=end - start,
             duration=end - request.t, tokens=tokens, tokens_per_second=tokens / (end - start),
             worker=worker.name, model_version=worker.model_version, attempts=attempt,
             deaths=attempt - 1, **asked, **slowly)  # fmt: skip
        return told

    def _next_free(self, t: float) -> tuple[Worker, float]:
        def free_at(worker: Worker) -> float:
            at = max(t + 0.003, worker.free[0])
            for died, back in worker.dead:
                if died <= at < back:
                    at = back
            for began, went_on in worker.stalls:
                if began <= at < went_on:
                    at = went_on + 0.001
            return at

        # The emptiest of those that are free first, as claiming workers share themselves out.
        soonest = min(free_at(worker) for worker in self.workers)
        able = [worker for worker in self.workers if free_at(worker) <= soonest]
        worker = min(
            able, key=lambda one: (sum(free > t for free in one.free), self.random.random())
        )
        return worker, soonest


def _stamped(line: Line) -> Line:
    t = START_S + line.pop("t")
    stamp = datetime.fromtimestamp(t, UTC).isoformat(timespec="microseconds")
    return {
        "ts": stamp.replace("+00:00", "Z"),
        "ts_redis_ms": int(t * 1000),
        "level": "info",
        "schema": 1,
        "pid": pid_of(line["instance"]),
        "host": "host0",
        "version": "0.1.0",
        "git_sha": "",
    } | line


def write(lines: list[Line], path: Path) -> Path:
    """As JSON lines; packed where the name ends in .gz."""
    data = b"\n".join(orjson.dumps(line) for line in lines) + b"\n"
    path.write_bytes(gzip.compress(data, compresslevel=1) if path.suffix == ".gz" else data)
    return path
