"""What this worker holds: one attempt per generation, with every token that it made of it.

An attempt knows what Redis has (``acked``) and what exists (``end``), so the next publication is a
cut of what lies between, however many engine steps made it. Nothing here does I/O.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from common.broker import Claimed, Publication, Restoration
from common.clock import awake_or_not_s
from common.ids import request_of
from common.messages import (
    RANKS,
    Finish,
    GenerationSpec,
    Lane,
    PromptLogprobs,
    TokenRecord,
    TopTokens,
    chain_next,
    chain_start,
    chain_text,
)
from common.tracing import Trace, parse_parent
from workers.engine.port import EngineRequest, StepOutput

_NUM_RANKS = 1 + max(RANKS.values())
_MAX_REALIGNMENTS = 3
"""In a row, without an accepted publication between them: after that the logs cannot agree."""


@dataclass(frozen=True, slots=True)
class Passed:
    """Where the time of an attempt went, in seconds."""

    queue_s: float
    """From admission to this claim, by Redis' clock."""
    prefill_s: float | None
    """From the claim to the first token here; None without one."""
    generation_s: float
    """From the claim to the end."""
    num_tokens: int
    """Made here."""
    is_first: bool
    """Nobody had it before."""


class Attempt:
    """One claim of one generation.

    Positions count generated tokens from the start of the log; ``base`` is from where on they are
    known here. ``engine_id`` names it in the engine: never used twice, so that output of an attempt
    that was replaced cannot be taken for output of its successor.
    """

    def __init__(self, claimed: Claimed, turn: int, model_version: str, now_s: float) -> None:
        self.id = claimed.id
        self.fence = claimed.fence
        self.engine_id = f"{claimed.id}#{turn}"
        self.base = claimed.next
        self.acked = claimed.next
        self.finish: Finish | None = None
        self.is_finish_acked = False
        self.request: EngineRequest | None = None
        self.spec: GenerationSpec | None = None
        self._claimed = claimed
        self._began_at = claimed.next
        self._model_version = model_version
        self._tokens: list[int] = []
        self._pieces: list[bytes] = []
        self._logprobs: list[float] = []
        self._tops: list[TopTokens] = []
        self._prompt: PromptLogprobs | None = None
        self.cached_tokens = 0
        """Tokens of the prompt that the engine did not have to compute."""
        self.num_guessed = 0
        """Tokens that came with others in one step, since they had been guessed right."""
        start = chain_start(self.id, model_version)
        self._chains = [int(claimed.chain, 16) if claimed.next else start]
        self._realignments = 0
        self._context: dict[str, str] = {}
        self.sent: Trace | None = None
        """Where it was queued, in its caller's trace."""
        self.trace: Trace | None = None
        """Where this attempt stands in that trace."""
        self._num_steps = 0
        self._batch_sizes = 0
        self._max_batch_size = 0
        self._claimed_s = now_s
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._finished_s: float | None = None
        self.heard_s = now_s
        """When Redis last confirmed or refused it."""
        self.confirmed_s = awake_or_not_s()
        """When it was last known to be ours, sleep of the machine included."""
        self.ended_s = 0.0

    @property
    def end(self) -> int:
        """Tokens that exist, in the log or only here."""
        return self.base + len(self._tokens)

    @property
    def num_unacknowledged(self) -> int:
        return self.end - self.acked

    @property
    def is_unpublished(self) -> bool:
        return self.acked < self.end or (self.finish is not None and not self.is_finish_acked)

    @property
    def is_in_engine(self) -> bool:
        """Whether it takes room there: from the claim until its finish."""
        return self.finish is None

    @property
    def lane(self) -> Lane:
        return self._claimed.lane

    @property
    def deaths(self) -> int:
        """Workers that died of it or with it."""
        return self._claimed.deaths

    @property
    def is_on_probation(self) -> bool:
        """Whether Redis gives its worker nothing else, until it is seen to come further."""
        return self.acked < self._claimed.clear_at

    @property
    def is_redelivery(self) -> bool:
        """Another worker had it before."""
        return not self.fence.startswith("1.")

    @property
    def rank(self) -> int:
        """Whom it gives way to: those of a lower rank."""
        return RANKS[self._claimed.lane]

    @property
    def num_to_recompute(self) -> int:
        """Tokens that whoever goes on with it must compute before the next one."""
        return len(self.request.prompt) + self.end if self.request else 0

    @property
    def cost(self) -> int | None:
        """Tokens of cache that it may need; None until its spec has been read."""
        return self.request.cost if self.request else None

    def chain_at(self, position: int) -> str:
        """The chain as Redis stores it: empty at position 0."""
        return chain_text(self._chains[position - self.base]) if position else ""

    def agrees(self, position: int, chain: str) -> bool:
        """Whether this attempt's own tokens reach ``position`` by that chain."""
        return self.base <= position <= self.end and self.chain_at(position) == chain

    def recall(self, logged: Sequence[TokenRecord]) -> None:
        """Know what was logged before this attempt, so that Redis can be told should it forget.

        Before the engine has made anything.
        """
        if any(record.logprobs is None for record in logged):
            return
        self.base = 0
        self._chains = [chain_start(self.id, self._model_version)]
        for record in logged:
            self._append(record)

    def restoration(self, position: int, chain: str) -> Restoration | None:
        """What it takes to go on from where the log now ends; None: that is not ours to go on from.

        ``position`` 0 is also for a generation that Redis does not know at all.
        """
        if not self.agrees(position, chain):
            return None
        return Restoration(
            self.id,
            self.fence,
            position,
            chain,
            self._model_version,
            self.spec,
            self._claimed.head,
        )

    def go_back(self, position: int) -> None:
        """Redis has nothing behind ``position`` any more."""
        self.acked = position
        self.is_finish_acked = False

    def begin(self, spec: GenerationSpec) -> None:
        """Know what it is: from here on lines about it name its trace and its tenant."""
        self.spec = spec
        self.sent = parse_parent(spec.trace)
        self.trace = self.sent and self.sent.child()
        told = {"request_id": spec.request_id, "tenant_hash": spec.tenant_hash}
        told |= {"key_id": spec.key_id} | (self.trace.names() if self.trace else {})
        self._context = {name: value for name, value in told.items() if value}

    def extend(self, output: StepOutput, now_s: float, *, batch_size: int = 1) -> float | None:
        """Take what one engine step made of it, and of ``batch_size`` generations in all; returns
        how long after the tokens before it came.
        """
        self._num_steps += 1
        self._batch_sizes += batch_size
        self._max_batch_size = max(self._max_batch_size, batch_size)
        gap_s = None
        if output.tokens:
            self.num_guessed += len(output.tokens) - 1
            if self._last_token_s is None:
                self._first_token_s = now_s
            else:
                gap_s = now_s - self._last_token_s
            self._last_token_s = now_s
        self._append(output)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.finish is not None:
            finish = output.finish
            self.end_with(msgspec.structs.replace(finish, cached_tokens=self.cached_tokens), now_s)
        return gap_s

    def _append(self, made: StepOutput | TokenRecord) -> None:
        for token in made.tokens:
            self._chains.append(chain_next(self._chains[-1], token))
        self._tokens += made.tokens
        self._pieces += made.pieces
        self._logprobs += made.logprobs or []
        self._tops += made.tops or []
        self._prompt = made.prompt or self._prompt

    def end_with(self, finish: Finish, now_s: float) -> None:
        self.finish = finish
        self._finished_s = now_s

    def publication(self) -> Publication:
        """Everything that Redis does not have yet, as one record."""
        i = self.acked - self.base
        record = TokenRecord(
            start=self.acked,
            chain=self.chain_at(self.end),
            tokens=self._tokens[i:],
            pieces=self._pieces[i:],
            logprobs=self._logprobs[i:],
            finish=self.finish,
            tops=self._tops[i:] if self._tops else None,
            prompt=self._prompt if self.acked == 0 else None,
        )
        return Publication(self.id, self.fence, self.chain_at(self.acked), record)

    def acknowledge(self, record: TokenRecord) -> None:
        """Redis has ``record`` and everything before it."""
        self.acked = max(self.acked, record.end)
        self.is_finish_acked = self.is_finish_acked or record.finish is not None
        self._realignments = 0

    def realign(self, position: int, chain: str) -> bool:
        """Go on from what Redis has; False when these are not our tokens (or it never settles)."""
        self._realignments += 1
        if not self.agrees(position, chain) or self._realignments > _MAX_REALIGNMENTS:
            return False
        self.acked = position
        return True

    def adopt(self, claimed: Claimed) -> None:
        """Go on under a new claim of the same generation, whose log is a prefix of ours."""
        self._claimed = claimed
        self.fence = claimed.fence
        self.acked = claimed.next
        self.is_finish_acked = False
        self._realignments = 0

    def doubt(self) -> None:
        """Have the finish sent once more: Redis may have lost it."""
        self.acked = self.end
        self.is_finish_acked = False

    def passed(self) -> Passed:
        """Of one that has ended."""
        claimed, first_s = self._claimed, self._first_token_s
        return Passed(
            queue_s=max(0, claimed.claimed_ms - claimed.admitted_ms) / 1000,
            prefill_s=None if first_s is None else first_s - self._claimed_s,
            generation_s=(self._finished_s or self._claimed_s) - self._claimed_s,
            num_tokens=self.end - self._began_at,
            is_first=self._began_at == 0 and self.fence.startswith("1."),
        )

    def summary(self, now_s: float) -> dict[str, object]:
        """The canonical fields of this attempt; times in seconds."""
        claimed = self._claimed
        queue_s = max(0, claimed.claimed_ms - claimed.admitted_ms) / 1000
        generation_s = (self._finished_s or now_s) - self._claimed_s
        new_tokens = self.end - self._began_at
        first_s = self._first_token_s
        # Behind an earlier attempt, when the first token came is not ours to say.
        is_first = self._began_at == 0 and self.fence.startswith("1.")
        num_steps = self._num_steps
        whole = {"output_sha256": self._output_hash()} if self.base == 0 else {}
        return {
            **self.names(),
            **whole,
            "prefill_time": round(first_s - self._claimed_s, 6) if first_s else None,
            "batch_size_mean": round(self._batch_sizes / num_steps, 3) if num_steps else None,
            "batch_size_max": self._max_batch_size,
            "end": self.end,
            "queue_time": round(queue_s, 6),
            "generation_time": round(generation_s, 6),
            "ttft": round(queue_s + first_s - self._claimed_s, 6) if first_s and is_first else None,
            "tokens_per_second": round(new_tokens / generation_s, 3) if generation_s > 0 else 0.0,
            "prompt_tokens": len(self.request.prompt) if self.request else None,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.end,
            "new_tokens": new_tokens,
            "finish_reason": self.finish.reason if self.finish else None,
            "code": self.finish.code if self.finish and self.finish.code else None,
        }

    def _output_hash(self) -> str:
        tokens = struct.pack(f"<{len(self._tokens)}I", *self._tokens)
        return hashlib.sha256(tokens).hexdigest()[:16]

    def names(self) -> dict[str, object]:
        """Who it is, for any line about it."""
        return {
            "request_id": request_of(self.id),
            "job_id": self.id,
            "lane": self._claimed.lane,
            "attempt": self.epoch,
            "deaths": self._claimed.deaths,
            **self._context,
        }

    @property
    def epoch(self) -> int:
        """Which claim of its generation this is, from 1."""
        return int(self.fence.partition(".")[0])

    @property
    def claimed_s(self) -> float:
        """When this attempt began, on the monotonic clock."""
        return self._claimed_s

    @property
    def admitted_s(self) -> float:
        """Seconds since 1970 on Redis' clock; as :attr:`first_claimed_s`."""
        return self._claimed.admitted_ms / 1000

    @property
    def first_claimed_s(self) -> float:
        return self._claimed.claimed_ms / 1000

    def claim_lag_s(self, redis_now_s: float | None) -> float:
        """From admission to this claim; ``redis_now_s`` is the time on Redis' clock, as far as it
        is known: the claim itself only tells the time of the first one.
        """
        claimed = self._claimed
        if self.epoch > 1 and redis_now_s is not None:
            return max(0.0, redis_now_s - claimed.admitted_ms / 1000)
        return max(0, claimed.claimed_ms - claimed.admitted_ms) / 1000

    def first_token(self) -> dict[str, object]:
        """What is told when its first token is made."""
        summary_s = (self._first_token_s or 0.0) - self._claimed_s
        return {**self.names(), "prefill_time": round(summary_s, 6)}

    @property
    def has_token(self) -> bool:
        """Whether this attempt made any."""
        return self._first_token_s is not None


class Ledger:
    """All attempts of this worker: those that run, and for a while those that ended here.

    ``seen`` is the highest claim turn whose answer was handled or given up; with
    :meth:`holding` it is what a beat says.
    """

    def __init__(self) -> None:
        self._running: dict[str, Attempt] = {}
        self._by_engine_id: dict[str, Attempt] = {}
        self._ended: dict[str, Attempt] = {}
        self.seen = 0
        self.done_tokens = 0
        """Cost of what ended here, over the life of the process: a measure of work done."""

    def hold(self, attempt: Attempt) -> None:
        self._ended.pop(attempt.id, None)
        self._running[attempt.id] = attempt
        self._by_engine_id[attempt.engine_id] = attempt

    def forget(self, attempt: Attempt) -> None:
        """Drop it without a trace: it is somebody else's, or over."""
        self._by_engine_id.pop(attempt.engine_id, None)
        for kept in (self._running, self._ended):
            if kept.get(attempt.id) is attempt:
                del kept[attempt.id]

    def end(self, attempt: Attempt, now_s: float) -> None:
        """Its finish is in Redis; keep it until that is sure to be durable."""
        self.forget(attempt)
        attempt.ended_s = now_s
        self.done_tokens += attempt.cost or 0
        self._ended[attempt.id] = attempt

    def forget_ended_before(self, time_s: float) -> None:
        for attempt in [kept for kept in self._ended.values() if kept.ended_s < time_s]:
            del self._ended[attempt.id]

    def adapters(self) -> set[str]:
        """Versions that generations in the engine, or on their way into it, compute with."""
        running = [attempt for attempt in self._running.values() if attempt.is_in_engine]
        return {attempt.request.adapter for attempt in running if attempt.request is not None}

    def ended(self) -> Iterable[Attempt]:
        return self._ended.values()

    def running(self) -> list[Attempt]:
        return list(self._running.values())

    def count_by_lane(self) -> dict[str, int]:
        """What runs."""
        return dict(Counter(attempt.lane for attempt in self.running()))

    def get(self, id: str) -> Attempt | None:
        return self._running.get(id) or self._ended.get(id)

    def in_engine(self, engine_id: str) -> Attempt | None:
        return self._by_engine_id.get(engine_id)

    def is_running(self, attempt: Attempt) -> bool:
        return self._running.get(attempt.id) is attempt

    def holding(self) -> list[str]:
        """Ids for the beat, those that ended too: else Redis, had it lost the end, would hand them
        back before the end is sent again.
        """
        return [*self._running, *self._ended]

    def unpublished(self) -> list[Attempt]:
        known = (*self._running.values(), *self._ended.values())
        return [attempt for attempt in known if attempt.is_unpublished]

    def silent_since(self, time_s: float) -> list[Attempt]:
        """What runs, has nothing to publish, and was not heard of since ``time_s``."""
        running = self._running.values()
        return [kept for kept in running if kept.heard_s < time_s and not kept.is_unpublished]

    def most_unacknowledged(self) -> int:
        return max((attempt.num_unacknowledged for attempt in self._running.values()), default=0)

    def promised(self) -> list[tuple[int, int | None]]:
        """Per rank, (slots, tokens) promised in the engine to those who do not give way to it.

        No tokens, but None, while one of their specs is not read yet.
        """
        costs: list[list[int | None]] = [[] for _ in range(_NUM_RANKS)]
        for attempt in self._running.values():
            if attempt.is_in_engine:
                costs[attempt.rank].append(attempt.cost)
        promised: list[tuple[int, int | None]] = []
        known: list[int] = []
        slots = 0
        for of_rank in costs:
            slots += len(of_rank)
            known += [cost for cost in of_rank if cost is not None]
            promised.append((slots, sum(known) if len(known) == slots else None))
        return promised
