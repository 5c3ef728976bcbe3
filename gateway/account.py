"""What became of a request: gathered on its way, told once at its end, as log line and metrics."""

from collections import deque
from collections.abc import Collection, Mapping
from math import ceil
from typing import Any

from common.clock import monotonic_s, wall_ms
from common.failures import Failure
from common.logs import get_logger
from common.messages import Finish, FinishReason, Timing
from common.metrics import GatewayMetrics
from common.request_metrics import RequestEnd
from gateway.client_window import ClientWindow
from gateway.stream import Batch, Reader

log = get_logger()


_MAX_SAMPLES = 512
"""Of each kind and answer, the newest: enough for a 99th percentile, and quickly sorted."""


class Account:
    """One request for a generation, from its arrival to the last byte of its answer.

    ``fields`` are what the log line shall say beside the timings; never the prompt. Its line is
    ``request.finished``, or for a reader that came later, whose api is ``resume``,
    ``stream.closed``.
    """

    def __init__(
        self,
        metrics: GatewayMetrics,
        api: str,
        arrived_at: float,
        *,
        span: dict[str, Any] | None = None,
        lane: str = "",
        tenant_class: str = "",
        model_version: str = "",
        **fields: Any,
    ) -> None:
        self.api = api
        self._span = span
        self.arrived_at = arrived_at
        self.fields = fields
        self.timing: Timing | None = None
        self._metrics = metrics
        self._lane = lane
        self._tenant_class = tenant_class
        self._model_version = model_version
        self._validate_s = monotonic_s() - arrived_at
        self._inter_token_s = metrics.requests.inter_token_s.labels(api)
        self._num_tokens = 0
        """Of all choices, with those before the cursors of a stream that is resumed."""
        self._first_token_at: float | None = None
        self._finish: Finish | None = None
        self._flagged = ""
        self._failure: Failure | None = None
        self._left_at: float | None = None
        self._is_promised = False
        self._is_closed = False
        self._num_bytes = 0
        self._lags_s: deque[float] = deque(maxlen=_MAX_SAMPLES)
        self._gaps_s: deque[float] = deque(maxlen=_MAX_SAMPLES)

    @property
    def age_s(self) -> float:
        return monotonic_s() - self.arrived_at

    def note_batch(self, batch: Batch) -> None:
        """Tokens or the end arrived at the gateway."""
        if batch.gap_s is not None:
            self._num_tokens += len(batch.tokens)
            self._gaps_s.append(batch.gap_s)
            gap_s = batch.gap_s / len(batch.tokens)
            self._inter_token_s.observe(gap_s)
            self._metrics.tally.figures.inter_token.observe(gap_s)
        elif batch.tokens:
            self._num_tokens += batch.start + len(batch.tokens)
            self._note_first(batch)
        if batch.lag_s is not None:
            self._lags_s.append(batch.lag_s)
        if batch.finish is not None and not self._has_failed:
            self._finish, self.timing = batch.finish, batch.timing
            self._flagged = self._flagged or batch.finish.flagged

    def _note_first(self, batch: Batch) -> None:
        """The first tokens of a choice."""
        if self._first_token_at is None:
            self._first_token_at = now = monotonic_s()
            if batch.start == 0:
                after_s = now - self.arrived_at
                self._metrics.requests.note_first_token(after_s, self._model_version)
                self._metrics.tally.figures.ttft.observe(after_s)

    @property
    def _has_failed(self) -> bool:
        return self._finish is not None and self._finish.reason == FinishReason.FAILED

    def note_bytes(self, num_bytes: int) -> None:
        """Of the answer's body."""
        self._num_bytes += num_bytes

    def note_stream(self, stream: Reader) -> None:
        """How the relay fared, where it was not smooth."""
        self.fields |= {
            name: count for name, count in (("heals", stream.heals), ("lags", stream.lags)) if count
        }

    def note_window(self, window: ClientWindow) -> None:
        """How the client took its answer, where it was slow to."""
        window.look()
        if window.blocked_s > 0:
            self.fields["blocked_time"] = round(window.blocked_s, 3)
            self.fields["unsent_bytes"] = window.unsent_bytes

    def note_failure(self, failure: Failure) -> None:
        self._failure = failure

    def note_promise(self) -> None:
        """It was queued, and its answer is that it was."""
        self._is_promised = True

    def note_disconnect(self) -> None:
        self._left_at = self.age_s

    def close(self, status: int) -> None:
        """Tell the outcome; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        outcome = self._outcome()
        self._metrics.requests.note_end(self._end(outcome))
        self._tell_tally(outcome)
        first = self._first_token_at
        told: dict[str, Any] = {
            "status": status,
            "code": outcome,
            "finish_reason": self._finish.reason if self._finish else None,
            "ttft": None if first is None else round(first - self.arrived_at, 6),
            "tokens": self._num_tokens,
            "duration": round(self.age_s, 6),
            "disconnected_after": None if self._left_at is None else round(self._left_at, 6),
            "bytes": self._num_bytes,
            "relay_lag_p99": _p99(self._lags_s),
            "inter_token_p99": _p99(self._gaps_s),
            **self.fields,
        }
        timing = {} if self.timing is None else self._tell_timing(self.timing)
        if self._span is not None:
            self._span |= span_attributes(outcome, timing | told)
        if self.api == "resume":
            log.info("stream.closed", reason=outcome, **told)
        else:
            flagged = {"flagged": self._flagged} if self._flagged else {}
            log.info("request.finished", api=self.api, **timing, **told, **flagged)

    def _tell_tally(self, outcome: str) -> None:
        """Not of who reads again what somebody else asked for."""
        if self.api != "resume":
            self._metrics.tally.note_end(
                outcome,
                request_id=self.fields.get("stream_id", ""),
                api=self.api,
                at_s=wall_ms() / 1000,
                timing=self.timing,
                num_tokens=self._num_tokens,
            )

    def _end(self, outcome: str) -> RequestEnd:
        fields = self.fields
        return RequestEnd(
            api=self.api,
            code=outcome,
            lane=self.timing.lane if self.timing else self._lane,
            tenant_class=self._tenant_class,
            age_s=self.age_s,
            validate_s=self._validate_s,
            timing=self.timing,
            num_prompt=fields.get("prompt_tokens", 0),
            num_tokens=self._num_tokens,
            max_new_tokens=fields.get("max_tokens", 0),
            num_choices=fields.get("n", 1),
        )

    def _tell_timing(self, timing: Timing) -> dict[str, Any]:
        return {
            "queue_time": timing.queue_time_s,
            "generation_time": timing.generation_time_s,
            "tokens_per_second": round(timing.tokens_per_second(self._num_tokens), 3),
            "model_version": timing.model_version,
            "attempts": timing.attempts,
            "deaths": timing.deaths,
            "worker": timing.worker,
        }

    def _outcome(self) -> str:
        """A word of a closed set: ok, cancelled, disconnected, or a failure code."""
        if self._failure is not None:
            return self._failure.code
        if self._is_promised:
            return "ok"
        if self._finish is None or self._left_at is not None:
            return "disconnected"
        if self._has_failed:
            return self._finish.code or "INTERNAL"
        return "cancelled" if self._finish.reason == FinishReason.CANCELLED else "ok"


def _p99(samples_s: Collection[float]) -> float | None:
    """The smallest one that at most 1 % are above; None where there are none."""
    return round(sorted(samples_s)[ceil(0.99 * len(samples_s)) - 1], 6) if samples_s else None


_FINE = frozenset({"ok", "cancelled", "disconnected"})


def span_attributes(outcome: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the span of a request says beside its beginning, from what its log line says.

    The names are those of the GenAI semantic conventions.
    """
    reason = told.get("finish_reason")
    return {
        "gen_ai.usage.input_tokens": told.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": told.get("tokens"),
        "gen_ai.response.finish_reasons": [reason] if reason else None,
        "gen_ai.response.model": told.get("model_version"),
        "gen_ai.latency.time_in_queue": told.get("queue_time"),
        "gen_ai.latency.time_to_first_token": told.get("ttft"),
        "gen_ai.latency.e2e": told.get("duration"),
        "headrace.outcome": outcome,
        "error.type": "" if outcome in _FINE else outcome,
    }
