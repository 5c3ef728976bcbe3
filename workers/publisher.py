"""From engine step to Redis: one publish call per step, and what its refusals mean.

The publisher is driven by the worker's loop, which awaits each of its calls before the next: so
claim, publish and release reach Redis in order. When publishing is slower than stepping, what
several steps made goes out as one record. When it is much slower, or Redis is away, the engine
pauses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from common.broker import Broker, Publication, Refusal, Restoration
from common.clock import awake_or_not_s, monotonic_s
from common.failures import KINDS
from common.logs import get_logger
from common.messages import FinishReason, Lane
from workers.attempts import Attempt, Ledger
from workers.engine.port import Joined, StepOutput
from workers.figures import Figures
from workers.spans import AttemptSpans

log = get_logger()

MAX_BATCH = 256
"""Publications per call (protocol 4)."""
MAX_UNACKNOWLEDGED_TOKENS = 256
"""Per generation: what may be computed ahead of Redis and die with this process (protocol 5)."""
MAX_BEHIND_S = 10.0
"""The same limit in time."""
CHECK_SILENT_S = 0.25
"""A generation that waits in the engine, or whose prompt takes many steps, publishes nothing. So
often it sends a publication without tokens all the same, to learn that it was cancelled."""
REVIVE_LIMIT_S = 30.0
"""What Redis forgot is put back by who knew it to be his so recently. Who slept longer may hold
what has long ended and expired; its sleep counts."""
KEEP_ENDED_S = 3.0
"""Connected time after which an end counts as durable: an AOF everysec may forget two seconds."""


_CAUSES = {
    "generation.released": "release",
    "generation.yielded": "yield",
    "generation.diverged": "diverged",
}
"""Why a generation went back, by the event that ends its attempt here."""


class EngineControl(Protocol):
    """What of the engine loop the publisher needs; all of it safe to call from the event loop."""

    def cancel(self, id: str) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Publisher:
    """Publishes for the whole batch. ``wake`` asks the worker's loop for another round."""

    def __init__(
        self,
        broker: Broker,
        worker: str,
        ledger: Ledger,
        engine: EngineControl,
        *,
        lease_ms: int,
        model_version: str,
        wake: Callable[[], None],
        figures: Figures | None = None,
        spans: AttemptSpans | None = None,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        self._broker = broker
        self._worker = worker
        self._ledger = ledger
        self._engine = engine
        self._lease_ms = lease_ms
        self._model_version = model_version
        self._wake = wake
        self._spans = spans
        self._figures = figures or Figures()
        self._generations = self._figures.generations
        self._clock = clock
        self._behind_since_s: float | None = None
        self.is_paused = False

    def take(
        self, outputs: Sequence[StepOutput], joined: Iterable[Joined] = (), *, step: int = 0
    ) -> None:
        """Note what the step numbered ``step`` made, and who came into it; output of an attempt
        that was dropped meanwhile is ignored.
        """
        now_s = self._clock()
        for newcomer in joined:
            self._tell_joined(newcomer, step)
        for output in outputs:
            attempt = self._ledger.in_engine(output.id)
            if attempt is not None:
                gap_s = attempt.extend(output, now_s, batch_size=len(outputs))
                if gap_s is not None:
                    self._generations.note_gap(gap_s, len(output.tokens))
                elif output.tokens:
                    self._generations.note_first_token(attempt)
                    log.info("worker.first_token", worker=self._worker, **attempt.first_token())
        if self._behind_since_s is None:
            self._behind_since_s = now_s
        self.throttle()
        self._wake()

    async def publish(self) -> Mapping[Lane, int]:
        """Send everything that Redis does not have; returns the tokens that wait in the pool.

        Nothing waits as far as is known when there was nothing to send. What was refused is
        dropped, realigned or given back here.

        Raises:
            Failure: Redis did not answer; nothing is lost, call again.
        """
        waiting: Mapping[Lane, int] = {}
        began_s = self._clock()
        to_send = self._ledger.unpublished() + self._ledger.silent_since(began_s - CHECK_SILENT_S)
        for i in range(0, len(to_send), MAX_BATCH):
            sent = [(it, it.publication()) for it in to_send[i : i + MAX_BATCH]]
            answer = await self._broker.publish(
                self._worker, [publication for _, publication in sent], lease_ms=self._lease_ms
            )
            waiting = answer.waiting
            await self._settle(sent, answer.refusals)
        self._ledger.forget_ended_before(self._clock() - KEEP_ENDED_S)
        self._behind_since_s = began_s if self._ledger.unpublished() else None
        self.throttle()
        return waiting

    def doubt_ended(self) -> None:
        """After a lost connection: send recent ends again, and start their waiting time anew."""
        now_s = self._clock()
        for attempt in self._ledger.ended():
            attempt.doubt()
            attempt.ended_s = now_s

    async def release(self, attempts: Sequence[Attempt], *, event: str, **fields: object) -> None:
        """Give generations back for another worker to continue; their tokens stay in the log."""
        if not attempts:
            return
        for attempt in attempts:
            self._drop(attempt, event, **fields)
        await self._broker.release(self._worker, [(it.id, it.fence) for it in attempts])
        for it in attempts:
            log.info(
                "job.requeued",
                cause=_CAUSES[event],
                worker=self._worker,
                position=it.acked,
                **it.names(),
            )

    def throttle(self) -> None:
        """Pause the engine while too much is known only here; let it go on afterwards."""
        behind_s = self._clock() - self._behind_since_s if self._behind_since_s is not None else 0
        unacknowledged = self._ledger.most_unacknowledged()
        must_wait = behind_s > MAX_BEHIND_S or unacknowledged >= MAX_UNACKNOWLEDGED_TOKENS
        if must_wait and not self.is_paused:
            self.is_paused = True
            self._engine.pause()
            log.warning("engine.paused", behind_s=round(behind_s, 3), unacknowledged=unacknowledged)
        elif self.is_paused and not must_wait:
            self.is_paused = False
            self._engine.resume()
            log.info("engine.resumed")

    async def _settle(
        self, sent: list[tuple[Attempt, Publication]], refusals: list[Refusal]
    ) -> None:
        refused = {refusal.id: refusal for refusal in refusals}
        forgotten: list[tuple[Attempt, Restoration]] = []
        for attempt, publication in sent:
            attempt.heard_s = self._clock()
            refusal = refused.get(attempt.id)
            if refusal is not None:
                restoration = self._restoration(attempt, refusal)
                if restoration is not None:
                    forgotten.append((attempt, restoration))
                else:
                    await self._handle(attempt, refusal)
                continue
            attempt.confirmed_s = awake_or_not_s()
            attempt.acknowledge(publication.record)
            if attempt.is_finish_acked and self._ledger.is_running(attempt):
                self._ledger.end(attempt, self._clock())
                self._generations.note_finished(attempt)
                self._tell_end(attempt)

        if forgotten:
            await self._put_back(forgotten)

    def _restoration(self, attempt: Attempt, refusal: Refusal) -> Restoration | None:
        """What puts back the claim of a publication that Redis refused; None: it is not ours."""
        if refusal.kind not in ("unknown", "forgotten"):
            return None
        if awake_or_not_s() - attempt.confirmed_s > REVIVE_LIMIT_S:
            return None
        return attempt.restoration(refusal.next, refusal.chain)

    async def _put_back(self, forgotten: list[tuple[Attempt, Restoration]]) -> None:
        """Have again what Redis forgot that we had; what is behind it goes out with the next call.

        Raises: Failure, with nothing changed here: the next publication is refused the same way.
        """
        answer = await self._broker.restore(self._worker, [it for _, it in forgotten])
        refused = {refusal.id: refusal for refusal in answer}
        for attempt, restoration in forgotten:
            refusal = refused.get(attempt.id)
            if refusal is not None:
                await self._handle(attempt, refusal)
                continue
            attempt.confirmed_s = awake_or_not_s()
            attempt.go_back(restoration.position)
            log.warning(
                "generation.restored",
                worker=self._worker,
                position=restoration.position,
                **attempt.names(),
            )
            self._wake()

    async def _handle(self, attempt: Attempt, refusal: Refusal) -> None:
        match refusal.kind:
            case "realign" if attempt.realign(refusal.next, refusal.chain):
                log.info(
                    "generation.realigned",
                    worker=self._worker,
                    position=refusal.next,
                    **attempt.names(),
                )
                self._wake()
            case "realign":
                self._generations.num_diverged += 1
                await self.release([attempt], event="generation.diverged", position=refusal.next)
            case "gone":
                self._generations.note_cancelled()
                self._drop(attempt, "generation.cancelled")
            case _:  # "lost": it has another owner, or waits for one
                self._generations.num_suppressed += 1
                self._drop(attempt, "generation.lost", cause=refusal.kind)

    def _drop(self, attempt: Attempt, event: str, **fields: object) -> None:
        if self._ledger.is_running(attempt):
            self._tell(event, attempt, **fields)
        self._ledger.forget(attempt)
        self._engine.cancel(attempt.engine_id)

    def _tell_joined(self, newcomer: Joined, step: int) -> None:
        attempt = self._ledger.in_engine(newcomer.id)
        if attempt is None or attempt.request is None:
            return
        log.info(
            "batch.joined",
            worker=self._worker,
            batch_id=step,
            batch_size=newcomer.batch_size,
            slot=newcomer.slot,
            pad_ratio=round(newcomer.pad_ratio, 4),
            prompt_tokens=len(attempt.request.prompt),
            cached_tokens=newcomer.cached_tokens,
            **attempt.names(),
        )

    def _tell_end(self, attempt: Attempt) -> None:
        figures, finish = self._figures, attempt.finish
        memory = {
            "kv_peak_bytes": figures.cache.bytes_of(attempt.num_to_recompute),
            "gpu_mem_peak_bytes": figures.gpu_mem_peak_bytes,
        }
        if finish is None or finish.reason != FinishReason.FAILED:
            flagged = {"flagged": finish.flagged} if finish and finish.flagged else {}
            self._tell("worker.finished", attempt, **memory, **flagged)
            return
        kind = KINDS.get(finish.code, KINDS["INTERNAL"])
        self._tell("worker.failed", attempt, retryable=kind.retryable, actor=kind.actor, **memory)

    def _tell(self, event: str, attempt: Attempt, **fields: object) -> None:
        """The canonical line: each attempt ends here in exactly one of its events."""
        summary = attempt.summary(self._clock())
        summary |= {"worker": self._worker, "model_version": self._model_version}
        write = log.warning if event == "worker.failed" else log.info
        write(
            event,
            **summary,
            **fields,
        )
        if self._spans is not None:
            self._spans.tell(event, attempt, summary)
