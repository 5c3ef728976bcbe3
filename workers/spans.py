"""Spans of attempts: one for each, and one for what the first of them waited in the queue."""

import time
from collections.abc import Mapping
from typing import Any

from common.clock import monotonic_s
from common.redis_clock import RedisClock
from common.spans import Kind, Spans
from workers.attempts import Attempt

_ERRORS = frozenset({"worker.failed", "generation.diverged", "generation.lost"})


class AttemptSpans:
    """Of one worker, which serves the pool ``pool``."""

    def __init__(self, spans: Spans, clock: RedisClock, pool: str) -> None:
        self._spans = spans
        self._clock = clock
        self._pool = pool

    def tell(self, event: str, attempt: Attempt, summary: Mapping[str, Any]) -> None:
        """The attempt ended with ``event``, whose line has ``summary``."""
        trace, sent = attempt.trace, attempt.sent
        if trace is None or sent is None:
            return
        ended_s = time.time()
        began_s = ended_s - (monotonic_s() - attempt.claimed_s)
        shared = {
            "messaging.system": "redis",
            "messaging.destination.name": self._pool,
            "messaging.message.id": attempt.id,
            "headrace.lane": summary["lane"],
        }
        if attempt.epoch == 1:
            offset_s = self._clock.offset_s or 0.0
            self._spans.tell(
                f"queue {self._pool}",
                Kind.INTERNAL,
                sent.child(),
                parent=sent,
                began_s=attempt.admitted_s - offset_s,
                ended_s=attempt.first_claimed_s - offset_s,
                attributes=shared,
            )
        reason = summary["finish_reason"]
        self._spans.tell(
            f"process {self._pool}",
            Kind.CONSUMER,
            trace,
            parent=sent,
            link=sent,
            began_s=began_s,
            ended_s=ended_s,
            error=str(summary["code"] or event) if event in _ERRORS else "",
            attributes=shared
            | {
                "messaging.operation.type": "process",
                "gen_ai.provider.name": "headrace",
                "gen_ai.request.model": self._pool,
                "gen_ai.response.model": summary["model_version"],
                "gen_ai.usage.input_tokens": summary["prompt_tokens"],
                "gen_ai.usage.output_tokens": summary["completion_tokens"],
                "gen_ai.response.finish_reasons": [reason] if reason else None,
                "gen_ai.latency.time_in_queue": summary["queue_time"],
                "gen_ai.latency.time_to_first_token": summary["ttft"],
                "gen_ai.latency.time_in_model_prefill": summary["prefill_time"],
                "headrace.attempt": attempt.epoch,
                "headrace.event": event,
                "headrace.worker": summary["worker"],
            },
        )
