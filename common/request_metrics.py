"""Figures of requests for generations, as a gateway tells them: each request once, at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from common.failures import KINDS, is_callers_fault
from common.instruments import (
    FIRST_TOKEN_BUCKETS_S,
    INTER_TOKEN_BUCKETS_S,
    PHASE_BUCKETS_S,
    TGI_DURATION_BUCKETS_S,
    Counts,
    Distributions,
)
from common.messages import RANKS, Lane, Timing
from common.settings import Compat

MAX_REQUEST_SERIES = 700
"""Of the counter with the most labels. A gateway has one model and knows some sixty codes, so only
a flood of everything at once comes so far; the rest is then counted together."""
_MAX_SERIES = 10
"""Of a histogram, each of which counts in Prometheus as one per bucket: model versions that a pool
has one after the other, APIs, lanes."""
_TGI_STEPS = 100
_CHOICE_BUCKETS = (1, 2, 5, 10, 20)
_OVERLOADED = frozenset(
    {
        "BROKER_FULL",
        "DRAINING",
        "NO_WORKERS",
        "QUEUE_FULL",
        "QUEUE_TIMEOUT",
        "QUOTA_EXHAUSTED",
        "RATE_LIMITED",
    }
)
_TGI_ERRORS = {"template_error": "template", "incomplete_generation": "incomplete"}
"""Its metrics' words for its types of errors, where the two differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """What became of a request. ``code`` is ``ok``, ``cancelled``, ``disconnected`` or a failure's;
    times in seconds.
    """

    api: str
    code: str
    lane: str = ""
    tenant_class: str = ""
    age_s: float = 0.0
    validate_s: float | None = None
    """From its arrival until it was queued; None: it never was."""
    timing: Timing | None = None
    num_prompt: int = 0
    num_tokens: int = 0
    max_new_tokens: int = 0
    num_choices: int = 1


def tenant_class_of(key_id: str, lane: Lane) -> str:
    """A word for who asks, of a closed set, since a tenant is never a label."""
    if not key_id:
        return "anonymous"
    return "batch" if RANKS[lane] else "interactive"


class RequestMetrics:
    """Of one gateway, which serves ``model``; ``max_tokens`` is the longest prompt plus answer."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model: str,
        model_version: str,
        max_tokens: int,
        compat: Sequence[Compat],
    ) -> None:
        self._model, self._version = model, model_version
        self._tgi = _TgiRequests(registry, max_tokens) if "tgi" in compat else None
        self.requests = Counts(
            "headrace_requests_total",
            "Requests that came to their end. The code: ok, cancelled, disconnected, or that of a"
            " failure; the outcome: ok, cancelled, disconnected, failed, or rejected (not queued).",
            ["model", "model_version", "lane", "tenant_class", "outcome", "code", "api"],
            max_series=MAX_REQUEST_SERIES,
        )
        self.request_s = Distributions(
            "headrace_request_duration_seconds",
            "From the arrival of a request to the last byte of its answer.",
            ["api"],
            PHASE_BUCKETS_S,
            max_series=_MAX_SERIES,
        )
        self.phase_s = Distributions(
            "headrace_request_phase_seconds",
            "Where the time of a request goes: validate (until it is queued), queue, prefill,"
            " decode, relay (what the way to the client adds to these).",
            ["phase"],
            PHASE_BUCKETS_S,
        )
        self.first_token_s = Distributions(
            "headrace_time_to_first_token_seconds",
            "From the arrival of a request to its first token at the gateway.",
            ["model_version"],
            FIRST_TOKEN_BUCKETS_S,
            max_series=_MAX_SERIES,
        )
        self.inter_token_s = Distributions(
            "headrace_inter_token_latency_seconds",
            "Between two arrivals of tokens of one streamed answer, per token.",
            ["api"],
            INTER_TOKEN_BUCKETS_S,
            max_series=_MAX_SERIES,
        )
        self.queue_s = Distributions(
            "headrace_queue_time_seconds",
            "From admission to the first claim by a worker, by one clock: that of Redis.",
            ["lane"],
            PHASE_BUCKETS_S,
            max_series=_MAX_SERIES,
        )
        self.tokens = Counts(
            "headrace_tokens_total",
            "Tokens of finished generations, kind prompt or generated.",
            ["kind"],
        )
        shown = [
            self.requests, self.request_s, self.phase_s, self.first_token_s, self.inter_token_s,
            self.queue_s, self.tokens,
        ]  # fmt: skip
        self._refused = Counts(
            "vllm:admission_rejections_total",
            "Requests that were refused for want of room.",
            ["model_name", "engine"],
        )
        self._choices = Distributions(
            "vllm:request_params_n",
            "Answers that were asked for at once.",
            ["model_name", "engine"],
            _CHOICE_BUCKETS,
        )
        self._refused.add(0, model, "gateway")
        if set(compat) & {"vllm-current", "vllm-0.10"}:
            shown += [self._refused, self._choices]
        for collector in shown:
            registry.register(collector)

    def note_first_token(self, after_s: float, model_version: str) -> None:
        self.first_token_s.labels(model_version or self._version).observe(after_s)

    def note_end(self, end: RequestEnd) -> None:
        """Once for each request, also for those that were refused."""
        is_rejected = end.validate_s is None
        version = end.timing.model_version if end.timing else ""
        self.requests.add(
            1,
            self._model,
            version or self._version,
            end.lane or "none",
            end.tenant_class or "unknown",
            _outcome_of(end.code, is_rejected=is_rejected),
            end.code,
            end.api,
        )
        if self._tgi is not None and end.api not in ("resume", "file"):
            self._tgi.note_end(end)
        if end.code in _OVERLOADED and is_rejected:
            self._refused.add(1, self._model, "gateway")
        if end.validate_s is not None:
            self.request_s.labels(end.api).observe(end.age_s)
            self.phase_s.labels("validate").observe(end.validate_s)
            self._choices.labels(self._model, "gateway").observe(end.num_choices)
            if end.timing is not None:
                self._note_phases(end, end.timing, end.validate_s)

    def _note_phases(self, end: RequestEnd, timing: Timing, validate_s: float) -> None:
        self.queue_s.labels(timing.lane).observe(timing.queue_time_s)
        self.tokens.add(end.num_tokens, "generated")
        self.tokens.add(end.num_prompt, "prompt")
        phases = {"queue": timing.queue_time_s}
        if timing.claimed and timing.first_token:
            phases["prefill"] = max(0, timing.first_token - timing.claimed) / 1000
            phases["decode"] = max(0, timing.ended - timing.first_token) / 1000
        if end.api != "resume":
            worked_s = max(0, timing.ended - timing.admitted) / 1000
            phases["relay"] = max(0.0, end.age_s - validate_s - worked_s)
        for phase, seconds in phases.items():
            self.phase_s.labels(phase).observe(seconds)


def _outcome_of(code: str, *, is_rejected: bool) -> str:
    if code not in KINDS:
        return code
    return "rejected" if is_rejected else "failed"


class _TgiRequests:
    """Under TGI's names, which have no labels; durations and sizes are of successes only."""

    def __init__(self, registry: CollectorRegistry, max_tokens: int) -> None:
        step = max(1.0, max_tokens / _TGI_STEPS)
        sizes = tuple(step * number for number in range(1, _TGI_STEPS + 1))
        self._count = Counts("tgi_request_count", "Requests for a generation, each once.")
        self._success = Counts("tgi_request_success", "Requests that ended well.")
        self._failure = Counts("tgi_request_failure", "Requests that failed.", ["err"])
        for err in ("overloaded", "validation", "template", "incomplete", "dropped", "generation"):
            self._failure.add(0, err)
        for collector in (self._count, self._success, self._failure):
            registry.register(collector)

        def made(name: str, meaning: str, bounds: Sequence[float]) -> Distributions:
            distributions = Distributions(f"tgi_request_{name}", meaning, [], bounds)
            registry.register(distributions)
            distributions.labels()
            return distributions

        self._duration = made("duration", "From arrival to the end.", TGI_DURATION_BUCKETS_S)
        self._validation = made(
            "validation_duration", "Until it was queued.", TGI_DURATION_BUCKETS_S
        )
        self._queue = made("queue_duration", "Time in the queue.", TGI_DURATION_BUCKETS_S)
        self._inference = made(
            "inference_duration", "From the claim to the end.", TGI_DURATION_BUCKETS_S
        )
        self._per_token = made(
            "mean_time_per_token_duration", "Inference over tokens.", TGI_DURATION_BUCKETS_S
        )
        self._input = made("input_length", "Tokens of the prompt.", sizes)
        self._generated = made("generated_tokens", "Tokens of the answer.", sizes)
        self._allowed = made("max_new_tokens", "Tokens that the answer might have.", sizes)

    def note_end(self, end: RequestEnd) -> None:
        self._count.add(1)
        if end.code != "ok":
            if end.code != "cancelled":
                self._failure.add(1, _tgi_error(end.code))
            return
        self._success.add(1)
        self._duration.labels().observe(end.age_s)
        self._validation.labels().observe(end.validate_s or 0.0)
        self._input.labels().observe(end.num_prompt)
        self._generated.labels().observe(end.num_tokens)
        self._allowed.labels().observe(end.max_new_tokens)
        if end.timing is not None:
            inference_s = end.timing.generation_time_s
            self._queue.labels().observe(end.timing.queue_time_s)
            self._inference.labels().observe(inference_s)
            self._per_token.labels().observe(inference_s / max(1, end.num_tokens))


def _tgi_error(code: str) -> str:
    if code == "disconnected":
        return "dropped"
    if code in _OVERLOADED:
        return "overloaded"
    told = KINDS[code].tgi_type if code in KINDS else ""
    return _TGI_ERRORS.get(told) or ("validation" if is_callers_fault(code) else "generation")
