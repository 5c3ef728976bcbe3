"""Made-up logs of a pool: what its processes would have written, consistent in all times and ids.

For tests and measurements that need a known history, or a million lines. A history is a function of
its plan: arrivals are random by the seed, requests wait for a free slot of a worker, batches fill
and empty. Each file is in the order of time, as real ones are.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import orjson

Line = dict[str, Any]

START_S = 1_795_000_000.0
"""2026-11-18 11:06:40 UTC."""
_SLOTS = 8
_STEP_S = 0.02
"""Of one token at a batch of one; each further row of the batch adds a twentieth."""
_PREFILL_S = 0.0002
"""Of one token of a prompt."""
_HOP_S = 0.002
"""From one process to the next, over Redis."""
_NOTICED_AFTER_S = 0.05
_BACK_AFTER_S = 3.0
_MINUTE_S = 60.0
_LANES = ("default", "default", "default", "priority", "flex")
_CLIENTS = ("openai-python", "curl", "langchain", "python-httpx")
_RATE_OF_LEAVERS = 0.005
_RATE_OF_REFUSALS = 0.01


@dataclass(frozen=True, slots=True)
class Trouble:
    """What befalls requests that arrive in ``[since, until)``, shares of the whole time.

    ``where`` names fields of the request's lines with the value that is hit, or a function of it;
    of those requests the share ``rate`` fails with ``code``, or takes ``slow`` times as long.
    """

    where: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code: str = ""
    slow: float = 1.0
    rate: float = 1.0
    since: float = 0.5
    until: float = 1.0

    def hits(self, facts: Line, share: float, rng: Random) -> bool:
        if not self.since <= share < self.until:
            return False
        return all(_is_so(facts.get(k), v) for k, v in self.where.items()) and (
            self.rate >= 1 or rng.random() < self.rate
        )


def _is_so(value: Any, wanted: Any) -> bool:
    return bool(wanted(value)) if callable(wanted) else value == wanted


@dataclass(frozen=True, slots=True)
class Plan:
    """``deaths`` are pairs of a worker's number and when it is killed, as a share of the time."""

    requests: int = 1000
    seed: int = 1
    per_s: float = 10.0
    gateways: int = 2
    workers: int = 4
    tenants: int = 12
    model_version: str = "f3a0c9d2e1b4"
    new_version: str = ""
    """From the middle on, on all workers, where it is given."""
    mean_tokens: float = 40.0
    deaths: Sequence[tuple[int, float]] = ()
    troubles: Sequence[Trouble] = ()

    @property
    def length_s(self) -> float:
        return self.requests / self.per_s


@dataclass(slots=True)
class _Worker:
    """One incarnation, with the moments at which what it runs will end."""

    number: int
    name: str
    host: str
    version: str
    began: float
    dies: float
    running: list[float] = field(default_factory=list[float])

    def batch_size(self, at_s: float) -> int:
        while self.running and self.running[0] <= at_s:
            heapq.heappop(self.running)
        return len(self.running) + 1


@dataclass(frozen=True, slots=True)
class _Attempt:
    worker: _Worker
    number: int
    claimed: float
    first_token: float
    ended: float
    batch_size: int
    slot: int
    next: int
    is_death: bool


class _Book:
    """Lines on their way into the files: those before the present are written, in order."""

    def __init__(self, folder: Path) -> None:
        self._waiting: list[tuple[float, int, str, Line]] = []
        self._num = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {
            role: (folder / f"{role}.jsonl").open("wb")
            for role in ("gateway", "worker", "background", "supervisor")
        }

    def add(self, at_s: float, role: str, line: Line) -> None:
        self._num += 1
        heapq.heappush(self._waiting, (at_s, self._num, role, line))

    def write_until(self, at_s: float) -> None:
        while self._waiting and self._waiting[0][0] < at_s:
            _, _, role, line = heapq.heappop(self._waiting)
            self._files[role].write(orjson.dumps(line) + b"\n")

    def close(self) -> int:
        """The number of lines."""
        self.write_until(float("inf"))
        for file in self._files.values():
            file.close()
        return self._num


def write_history(folder: Path, plan: Plan) -> int:
    """Write the logs of ``plan`` into ``folder``, a file for each role; how many lines.

    About eight lines for each request: a million takes a quarter of a minute.
    """
    return _Writer(folder, plan).write()


class _Writer:
    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan = plan
        self._rng = Random(plan.seed)
        self._book = _Book(folder)
        self._gateways = [self._name("g") for _ in range(plan.gateways)]
        self._tenants = [self._hex(12) for _ in range(plan.tenants)]
        self._workers = self._make_workers()
        self._free: list[tuple[float, int, int, int]] = []
        """Slots by the moment at which they are free: worker, slot."""
        for index, worker in enumerate(self._workers):
            for slot in range(_SLOTS):
                heapq.heappush(self._free, (worker.began, slot, index, slot))

    def write(self) -> int:
        self._tell_processes()
        now = START_S + 2.0
        for number in range(self._plan.requests):
            now += self._rng.expovariate(self._plan.per_s)
            self._book.write_until(now)
            self._tell_request(now, (now - START_S) / self._plan.length_s, number)
        return self._book.close()

    # --- processes -------------------------------------------------------------------------------

    def _make_workers(self) -> list[_Worker]:
        """All incarnations: one ends by a death, or in the middle for a new version."""
        plan = self._plan
        middle = START_S + plan.length_s / 2
        workers: list[_Worker] = []
        for number in range(plan.workers):
            ends = sorted(START_S + at * plan.length_s for who, at in plan.deaths if who == number)
            if plan.new_version:
                ends = sorted([*ends, middle])
            began = START_S
            for dies in [*ends, float("inf")]:
                is_new = bool(plan.new_version) and began > middle
                version = plan.new_version if is_new else plan.model_version
                host = f"node-{number % 3}"
                workers.append(_Worker(number, self._name("w"), host, version, began, dies))
                began = dies + _BACK_AFTER_S
        return workers

    def _tell_processes(self) -> None:
        supervisor, background = self._name("s"), self._name("b")
        self._say(START_S, "supervisor", supervisor, "supervisor.started", data_dir="var")
        for name in self._gateways:
            self._say(START_S + 0.5, "gateway", name, "gateway.started", url="")
            self._say(START_S + 1.0, "gateway", name, "gateway.ready", url="http://127.0.0.1:8080")
        self._tell_minutes("background", background, "node-0", START_S, self._end())
        for name in self._gateways:
            self._tell_minutes("gateway", name, "node-0", START_S, self._end())
        if self._plan.new_version:
            self._tell_deploy(supervisor)
        for worker in self._workers:
            self._tell_worker(worker, supervisor)

    def _tell_deploy(self, supervisor: str) -> None:
        versions = {
            "from_version": self._plan.model_version,
            "to_version": self._plan.new_version,
            "what": "model_version",
        }
        middle = START_S + self._plan.length_s / 2
        self._say(middle, "supervisor", supervisor, "deploy.started", **versions)
        promoted = middle + _BACK_AFTER_S + 1.0
        self._say(promoted, "supervisor", supervisor, "deploy.promoted", **versions)

    def _tell_worker(self, worker: _Worker, supervisor: str) -> None:
        who = ("worker", worker.name)
        of = {"host": worker.host, "model_version": worker.version}
        slot = f"worker {worker.number}"
        began = worker.began
        is_first = began <= START_S
        self._say(
            began,
            "supervisor",
            supervisor,
            "process.started" if is_first else "process.restarted",
            name=slot,
            role="worker",
            host=worker.host,
            child_pid=self._pid(worker.name),
            **({} if is_first else {"cause": "exit"}),
        )
        self._say(began + 0.1, *who, "worker.started", **of, engine="simulated")
        self._say(began + 0.5, *who, "worker.ready", **of, device="cpu")
        self._say(
            began + 0.5,
            *who,
            "worker.state",
            **{"from": "loading"},
            to="ready",
            cause="",
            worker=worker.name,
            **of,
        )
        self._tell_minutes(*who, worker.host, began, min(worker.dies, self._end()))
        if worker.dies < self._end():
            self._say(
                worker.dies + _NOTICED_AFTER_S,
                "supervisor",
                supervisor,
                "process.exited",
                name=slot,
                role="worker",
                host=worker.host,
                child_pid=self._pid(worker.name),
                exit_code=-9,
                signal="SIGKILL",
                cause="signal",
            )
            self._say(
                worker.dies + _NOTICED_AFTER_S,
                "supervisor",
                supervisor,
                "worker.state",
                **{"from": "ready"},
                to="dead",
                cause="exit",
                worker=worker.name,
            )

    def _tell_minutes(self, role: str, name: str, host: str, began: float, ended: float) -> None:
        at_s = began + self._rng.random()
        while at_s < ended:
            self._say(at_s, role, name, "clock.sampled", host=host, offset_s=0.0)
            at_s += _MINUTE_S

    def _end(self) -> float:
        return START_S + self._plan.length_s

    # --- requests --------------------------------------------------------------------------------

    def _tell_request(self, arrived: float, share: float, number: int) -> None:
        rng = self._rng
        gateway = rng.choice(self._gateways)
        prompt_tokens = max(4, int(rng.lognormvariate(4.5, 1.0)))
        tokens = max(1, int(rng.expovariate(1 / self._plan.mean_tokens)))
        samples = rng.random() < 0.4
        facts: Line = {
            "request_id": f"{number:08x}{self._hex(24)}",
            "tenant_hash": rng.choice(self._tenants),
            "lane": rng.choice(_LANES),
            "api": rng.choice(("chat", "chat", "completion", "tgi", "response")),
            "stream": rng.random() < 0.8,
            "prompt_tokens": prompt_tokens,
            "max_tokens": tokens if rng.random() < 0.5 else 256,
            "prompt_sha256": self._hex(16),
            "n": 1,
            "best_of": 1,
            "grammar": "json_schema" if rng.random() < 0.05 else None,
            "sampling": "sample" if samples else "greedy",
            "temperature": 0.7 if samples else None,
            "adapter": "",
            "tools": False,
            "user_agent": rng.choice(_CLIENTS),
            "model": "SmolLM2-135M-Instruct",
        }
        if rng.random() < _RATE_OF_REFUSALS:
            self._tell_refusal(arrived, gateway, facts)
            return
        say = self._speaker("gateway", gateway, facts)
        say(arrived + 0.001, "gateway.accepted")
        admitted = arrived + _HOP_S
        waiting = int(max(0.0, self._free[0][0] - admitted) * 4)
        job_id = f"{facts['request_id']}.0"
        identity = {name: facts[name] for name in ("request_id", "tenant_hash", "lane", "model")}
        self._book_line(
            admitted,
            "gateway",
            gateway,
            "queue.enqueued",
            {**identity, "job_id": job_id, "stream_id": facts["request_id"]}
            | {"depth_before": waiting, "est_wait_s": waiting / 4},
        )
        leaves = rng.random() < _RATE_OF_LEAVERS
        attempts, code = self._run(admitted + _HOP_S, share, facts, tokens)
        for attempt in attempts:
            self._tell_attempt(attempt, job_id, admitted, facts, tokens, code)
        self._tell_end(gateway, facts, attempts, arrived, admitted, tokens, code, leaves=leaves)

    def _tell_refusal(self, arrived: float, gateway: str, facts: Line) -> None:
        told = {"code": "CONTEXT_LENGTH_EXCEEDED", "status": 400, "duration": 0.001}
        told |= {"field": "max_tokens", "message": "longer than the model allows"}
        self._book_line(arrived + 0.001, "gateway", gateway, "gateway.rejected", facts | told)

    def _run(
        self, ready: float, share: float, facts: Line, tokens: int
    ) -> tuple[list[_Attempt], str]:
        """Claims until one worker lives to the end, and the code that it ends with."""
        attempts: list[_Attempt] = []
        position = 0
        while True:
            free_at, _, index, slot = heapq.heappop(self._free)
            worker = self._workers[index]
            claimed = max(ready, free_at) + 0.001
            if claimed >= worker.dies:
                continue
            batch_size = worker.batch_size(claimed)
            known = facts | {
                "worker": worker.name,
                "worker_number": worker.number,
                "model_version": worker.version,
                "host": worker.host,
                "batch_size": batch_size,
                "gateway": None,
            }
            hit = [one for one in self._plan.troubles if one.hits(known, share, self._rng)]
            slow = max((one.slow for one in hit), default=1.0)
            code = next((one.code for one in hit if one.code), "ok")
            step_s = _STEP_S * (1 + batch_size / 20) * slow * self._rng.uniform(0.95, 1.05)
            prefill_s = 0.01 + (facts["prompt_tokens"] + position) * _PREFILL_S * slow
            first_token = claimed + prefill_s
            made = 0 if code != "ok" else tokens - position
            ended = first_token + step_s * made
            is_death = ended >= worker.dies
            if is_death:
                ended = worker.dies
            else:
                heapq.heappush(self._free, (ended, slot, index, slot))
            heapq.heappush(worker.running, ended)
            attempts.append(
                _Attempt(
                    worker,
                    len(attempts) + 1,
                    claimed,
                    first_token,
                    ended,
                    batch_size,
                    slot,
                    position,
                    is_death,
                )
            )
            if not is_death:
                return attempts, code
            position += max(0, min(tokens - position - 1, int((ended - first_token) / step_s)))
            ready = ended + 2 * _NOTICED_AFTER_S

    def _tell_attempt(
        self,
        attempt: _Attempt,
        job_id: str,
        admitted: float,
        facts: Line,
        tokens: int,
        code: str,
    ) -> None:
        worker = attempt.worker
        context = {name: facts[name] for name in ("request_id", "tenant_hash", "lane", "model")}
        context |= {
            "job_id": job_id,
            "attempt": attempt.number,
            "model_version": worker.version,
            "host": worker.host,
            "worker": worker.name,
        }
        say = self._speaker("worker", worker.name, context)
        lag = round(attempt.claimed - admitted, 6)
        say(
            attempt.claimed,
            "worker.claimed",
            gpu_uuid=None,
            claim_lag_s=lag,
            next=attempt.next,
            deaths=attempt.number - 1,
        )
        say(
            attempt.claimed + 0.0005,
            "batch.joined",
            batch_id=int(attempt.claimed * 50) % 1_000_000,
            batch_size=attempt.batch_size,
            slot=attempt.slot,
            pad_ratio=0.0,
            prompt_tokens=facts["prompt_tokens"],
            cached_tokens=0,
        )
        has_token = attempt.first_token < attempt.ended
        prefill_time = round(attempt.first_token - attempt.claimed, 6)
        if has_token:
            say(
                attempt.first_token,
                "worker.first_token",
                prefill_time=prefill_time,
            )
        if attempt.is_death:
            self._book_line(
                attempt.ended + _NOTICED_AFTER_S,
                "gateway",
                self._gateways[0],
                "job.requeued",
                {name: context[name] for name in ("request_id", "job_id", "lane")}
                | {"cause": "lease", "worker": worker.name},
            )
            return
        end = tokens if code == "ok" else attempt.next
        generation_time = round(attempt.ended - attempt.claimed, 6)
        told: Line = {
            "finish_reason": "length" if code == "ok" else "failed",
            "code": None if code == "ok" else code,
            "prompt_tokens": facts["prompt_tokens"],
            "completion_tokens": end,
            "new_tokens": end - attempt.next,
            "queue_time": lag,
            "prefill_time": prefill_time,
            "generation_time": generation_time,
            "tokens_per_second": round((end - attempt.next) / max(generation_time, 1e-6), 3),
            "ttft": round(attempt.first_token - admitted, 6),
            "cached_tokens": 0,
            "batch_size_mean": float(attempt.batch_size),
            "batch_size_max": attempt.batch_size,
            "kv_peak_bytes": (facts["prompt_tokens"] + end) * 23040,
            "gpu_mem_peak_bytes": 0,
            "deaths": attempt.number - 1,
            "end": end,
        }
        if code == "ok":
            told["output_sha256"] = hashlib.sha256(job_id.encode()).hexdigest()[:16]
            say(attempt.ended, "worker.finished", **told)
        else:
            say(attempt.ended, "worker.failed", retryable=True, actor="operator", **told)

    def _tell_end(
        self,
        gateway: str,
        facts: Line,
        attempts: Sequence[_Attempt],
        arrived: float,
        admitted: float,
        tokens: int,
        code: str,
        *,
        leaves: bool,
    ) -> None:
        last = attempts[-1]
        ended = last.ended + _HOP_S
        shown = next((one for one in attempts if one.first_token < one.ended), None)
        left_at = self._rng.uniform(admitted + 0.001, ended) if leaves else None
        closed = left_at if left_at is not None else ended
        made = tokens if code == "ok" and left_at is None else 0
        generation_time = round(last.ended - attempts[0].claimed, 3)
        self._book_line(
            closed,
            "gateway",
            gateway,
            "request.finished",
            facts
            | {
                "job_id": f"{facts['request_id']}.0",
                "stream_id": facts["request_id"],
                "model_version": last.worker.version,
                "status": 200 if code == "ok" else 500,
                "code": "disconnected" if left_at is not None else code,
                "finish_reason": ("length" if code == "ok" else "failed")
                if left_at is None
                else None,
                "queue_time": round(attempts[0].claimed - admitted, 3),
                "generation_time": generation_time,
                "tokens_per_second": round(made / max(generation_time, 1e-3), 3),
                "attempts": len(attempts),
                "deaths": len(attempts) - 1,
                "worker": last.worker.name,
                "ttft": None
                if shown is None or code != "ok"
                else round(shown.first_token + _HOP_S - arrived, 6),
                "tokens": made,
                "duration": round(closed - arrived, 6),
                "disconnected_after": None if left_at is None else round(left_at - arrived, 6),
                "relay_lag_p99": 0.001,
                "inter_token_p99": 0.03,
                "bytes": made * 120,
            },
        )

    # --- lines -----------------------------------------------------------------------------------

    def _speaker(self, role: str, name: str, context: Line) -> Callable[..., None]:
        def say(at_s: float, event: str, /, **fields: Any) -> None:
            self._book_line(at_s, role, name, event, context | fields)

        return say

    def _say(self, at_s: float, role: str, name: str, event: str, /, **fields: Any) -> None:
        self._book_line(at_s, role, name, event, fields)

    def _book_line(self, at_s: float, role: str, name: str, event: str, fields: Line) -> None:
        self._book.add(at_s, role, _stamped(at_s, role, name, self._pid(name), event, fields))

    def _pid(self, name: str) -> int:
        return int(name[1:7], 16) % 30_000 + 1000

    def _hex(self, num_digits: int) -> str:
        return f"{self._rng.getrandbits(4 * num_digits):0{num_digits}x}"

    def _name(self, letter: str) -> str:
        return letter + self._hex(11)


def _stamped(at_s: float, role: str, name: str, pid: int, event: str, fields: Line) -> Line:
    level = "warning" if event in ("worker.failed", "process.exited") else "info"
    return {
        "ts": shown_moment(at_s),
        "ts_redis_ms": int(at_s * 1000),
        "level": level,
        "event": event,
        "schema": 1,
        "service": role,
        "instance": name,
        "pid": pid,
        "host": "node-0",
        "version": "0.1.0",
        "git_sha": "090bf6e",
        **fields,
    }


def shown_moment(at_s: float) -> str:
    """As in the lines: UTC, microseconds, ``Z``."""
    moment = datetime.fromtimestamp(at_s, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def read_lines(folder: Path) -> Iterator[Line]:
    """All lines of a history, file by file."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from map(orjson.loads, path.read_bytes().splitlines())
