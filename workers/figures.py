"""What a worker knows of itself: figures of its steps and of its generations, kept as they happen.

All of it is noted in the event loop, per step and per generation; of tokens only the gaps between
them are, at a fifth of a microsecond each. Anybody may read it, from any thread: the beat, the log
and ``/metrics``. Counts and distributions are of the life of the process; what is said to be of the
last minute is of so long at most.
"""

import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

from common.clock import monotonic_s
from common.instruments import (
    FIRST_TOKEN_BUCKETS_S,
    INTER_TOKEN_BUCKETS_S,
    PHASE_BUCKETS_S,
    STEP_BUCKETS_S,
    TGI_DURATION_BUCKETS_S,
    Distribution,
    quantile_of,
)
from common.messages import FinishReason
from workers.attempts import Attempt
from workers.device_watch import DeviceWatch
from workers.engine.loop import StepReport
from workers.engine.port import CacheSize, StepOutput

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""vLLM's of ``iteration_tokens_total``."""
_SPAN_S = 5.0
_SPANS_OF_A_MINUTE = 12
_SPANS_OF_NOW = 2
"""A rate is of the 5 to 10 s before now: fewer would jump, more would lag."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ENDS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.FAILED: "error",
}
"""vLLM's words."""


class _Span:
    """Some seconds of steps."""

    __slots__ = (
        "began_s",
        "durations",
        "max_rows",
        "num_padding",
        "num_places",
        "num_rows",
        "num_steps",
        "num_tokens",
    )

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.num_steps = self.num_rows = self.max_rows = self.num_tokens = 0
        self.num_places = self.num_padding = 0
        self.durations = Distribution(STEP_BUCKETS_S)


class MethodFigures:
    """Steps with prompts in them (``prefill``), or those without (``decode``); times in seconds,
    in the buckets of TGI, which tells them apart as well.
    """

    def __init__(self) -> None:
        self.num_refused = 0
        """Steps that the device had no memory for."""
        self.whole_s = Distribution(TGI_DURATION_BUCKETS_S)
        self.forward_s = Distribution(TGI_DURATION_BUCKETS_S)
        self.text_s = Distribution(TGI_DURATION_BUCKETS_S)
        self.join_s = Distribution(TGI_DURATION_BUCKETS_S)
        """Planning, where somebody came in."""
        self.leave_s = Distribution(TGI_DURATION_BUCKETS_S)
        """Taking out who ended."""


class GenerationFigures:
    """Of all generations that this worker had; ``max_tokens`` is the longest it could have."""

    def __init__(self, max_tokens: int) -> None:
        self.finished: Counter[str] = Counter()
        """By reason: stop, length, abort or error."""
        self.num_corrupted = 0
        """Those whose logits were not finite."""
        self.flagged: Counter[str] = Counter()
        """Answers by what was seen to be wrong with them."""
        self.first_token_s = Distribution(FIRST_TOKEN_BUCKETS_S)
        """From admission, by Redis' clock, to the first token."""
        self.inter_token_s = Distribution(INTER_TOKEN_BUCKETS_S)
        """Per token, between two of one generation."""
        self.per_token_s = Distribution(INTER_TOKEN_BUCKETS_S)
        """Per generation: its decode time over its tokens but the first."""
        self.queue_s = Distribution(PHASE_BUCKETS_S)
        """From admission to the first claim, by Redis' clock."""
        self.prefill_s = Distribution(PHASE_BUCKETS_S)
        """From the claim to the first token."""
        self.decode_s = Distribution(PHASE_BUCKETS_S)
        """From the first token to the end."""
        self.inference_s = Distribution(PHASE_BUCKETS_S)
        """From the claim to the end."""
        self.whole_s = Distribution(PHASE_BUCKETS_S)
        """From admission to the end."""
        sizes = _one_two_five(max_tokens)
        self.prompt_sizes = Distribution(sizes)
        self.answer_sizes = Distribution(sizes)
        self.allowed_sizes = Distribution(sizes)
        """The ``max_new_tokens`` that were asked for."""
        self.guessed_sizes = Distribution((0, *sizes))
        """Tokens that were guessed and came out right."""
        self.redeliveries: Counter[str] = Counter()
        """Claims of what another worker had, by cause: lease (a worker died with it, now or before)
        or release (it was handed back)."""
        self.num_resumed = 0
        """Generations that were gone on with behind tokens of another attempt."""
        self.recovered_tokens = 0
        """Tokens of other attempts that did not have to be made again."""
        self.num_diverged = 0
        """Generations given back because their log is not what was computed here."""
        self.num_suppressed = 0
        """Generations whose results Redis refused, since somebody else has them."""

    def note_claimed(self, attempt: Attempt) -> None:
        passed = attempt.passed()
        if passed.is_first:
            self.queue_s.observe(passed.queue_s)
        if attempt.is_redelivery:
            self.redeliveries["lease" if attempt.deaths else "release"] += 1
        if attempt.base:
            self.num_resumed += 1
            self.recovered_tokens += attempt.base

    def note_first_token(self, attempt: Attempt) -> None:
        """Its first one here."""
        passed = attempt.passed()
        if passed.prefill_s is None:
            return
        self.prefill_s.observe(passed.prefill_s)
        if passed.is_first:
            self.first_token_s.observe(passed.queue_s + passed.prefill_s)

    def note_gap(self, gap_s: float, num_tokens: int) -> None:
        """``num_tokens`` of a generation came ``gap_s`` after the ones before."""
        self.inter_token_s.observe(gap_s / num_tokens, num_tokens)

    def note_finished(self, attempt: Attempt) -> None:
        """Its end is in Redis."""
        finish, passed = attempt.finish, attempt.passed()
        if finish is None:
            return
        self.finished[_ENDS[FinishReason(finish.reason)]] += 1
        self.num_corrupted += finish.code == "NAN_LOGITS"
        if finish.flagged:
            self.flagged[finish.flagged] += 1
        self.inference_s.observe(passed.generation_s)
        self.whole_s.observe(passed.queue_s + passed.generation_s)
        self.guessed_sizes.observe(attempt.num_guessed)
        if attempt.request is not None:
            self.prompt_sizes.observe(len(attempt.request.prompt))
            self.answer_sizes.observe(attempt.end)
            self.allowed_sizes.observe(attempt.request.sampling.max_new_tokens)
        if passed.prefill_s is None:
            return
        decode_s = passed.generation_s - passed.prefill_s
        self.decode_s.observe(decode_s)
        if passed.num_tokens > 1:
            self.per_token_s.observe(decode_s / (passed.num_tokens - 1))

    def note_cancelled(self) -> None:
        """Nobody wants it any more."""
        self.finished["abort"] += 1


class Figures:
    """Of one worker. ``cache`` and ``max_batch_size`` are what there is room for; ``device`` is
    what looks after its GPU.
    """

    def __init__(
        self,
        *,
        model_version: str = "",
        max_batch_size: int = 0,
        max_tokens: int = 4096,
        cache: CacheSize = CacheSize(0, 0),  # noqa: B008 - it is frozen
        load_s: float = 0.0,
        device: DeviceWatch | None = None,
    ) -> None:
        self.model_version = model_version
        self.max_batch_size = max_batch_size
        self.cache = cache
        self.load_s = load_s
        """What loading the model took."""
        self.device = device
        """None: it computes on a processor."""
        self.running = 0
        """Generations that have a place in the cache."""
        self.waiting = 0
        """Those that the engine has and that have none yet."""
        self.free_tokens = cache.capacity_tokens
        """Cost that may still be claimed."""
        self.batch_size = 0
        """Generations in the last step; 0 when there is none to come."""
        self.used_tokens = 0
        """Of the cache."""
        self.num_steps = 0
        self.num_preempted = 0
        self.prompt_tokens = 0
        """Of generations that came into the engine, whether computed or found."""
        self.generated_tokens = 0
        self.queried_tokens = 0
        """Tokens of prompts for which a computed prefix was looked for."""
        self.found_tokens = 0
        self.joined = 0
        """Steps in which somebody came into a running batch."""
        self.batch_sizes = Distribution(BATCH_BUCKETS)
        self.joined_sizes = Distribution(BATCH_BUCKETS)
        """Of those who came in together."""
        self.step_tokens = Distribution(STEP_TOKEN_BUCKETS)
        self.step_s = Distribution(STEP_BUCKETS_S)
        self.prefill = MethodFigures()
        self.decode = MethodFigures()
        self.generations = GenerationFigures(max_tokens)
        self._spans: deque[_Span] = deque([_Span(monotonic_s())], maxlen=_SPANS_OF_A_MINUTE)

    def note_step(self, report: StepReport) -> None:
        load, work = report.load, report.work
        self.running, self.waiting = load.running, load.waiting
        self.free_tokens = load.free_tokens
        if not work.num_rows:
            self.batch_size = self.used_tokens = 0
            return
        self.batch_size = work.num_rows if load.running else 0
        self.used_tokens = work.used_tokens
        self.num_steps += 1
        self.num_preempted += work.num_preempted
        num_tokens = _num_tokens(report.outputs)
        self.generated_tokens += num_tokens
        self.step_tokens.observe(work.num_tokens)
        self.batch_sizes.observe(work.num_rows)
        self.step_s.observe(report.duration_s)
        method = self.prefill if work.num_prefill_tokens else self.decode
        method.whole_s.observe(report.duration_s)
        method.forward_s.observe(work.forward_s)
        method.text_s.observe(work.text_s)
        method.num_refused += work.was_refused
        if work.num_joined:
            self._note_joined(report, method)
        if work.leave_s:
            method.leave_s.observe(work.leave_s)
        span = self._span()
        span.num_steps += 1
        span.num_rows += work.num_rows
        span.max_rows = max(span.max_rows, work.num_rows)
        span.num_tokens += num_tokens
        span.num_places += work.num_tokens + work.num_padding
        span.num_padding += work.num_padding
        span.durations.observe(report.duration_s)

    def _note_joined(self, report: StepReport, method: MethodFigures) -> None:
        work = report.work
        self.prompt_tokens += work.queried_tokens
        self.queried_tokens += work.queried_tokens
        self.found_tokens += work.found_tokens
        self.joined_sizes.observe(work.num_joined)
        method.join_s.observe(work.plan_s)
        self.joined += work.num_rows > work.num_joined

    # What is asked -------------------------------------------------------------------------------

    @property
    def occupancy(self) -> float:
        """Share of the batch that the last step filled, 0 to 1."""
        return self.batch_size / self.max_batch_size if self.max_batch_size else 0.0

    @property
    def kv_used(self) -> float:
        """Share of the cache, slots or pages, that belongs to somebody: 0 to 1."""
        capacity = self.cache.capacity_tokens
        return min(1.0, self.used_tokens / capacity) if capacity else 0.0

    @property
    def batch_size_mean(self) -> float:
        """Per step of the last minute; 0.0 without any."""
        spans = self._recent()
        num_steps = sum(span.num_steps for span in spans)
        return sum(span.num_rows for span in spans) / num_steps if num_steps else 0.0

    @property
    def batch_size_max(self) -> int:
        """Of the last minute."""
        return max((span.max_rows for span in self._recent()), default=0)

    @property
    def pad_ratio(self) -> float:
        """Share of the token places of steps that held padding, over the last minute."""
        spans = self._recent()
        num_places = sum(span.num_places for span in spans)
        return sum(span.num_padding for span in spans) / num_places if num_places else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated in the last seconds."""
        spans = self._recent(_SPANS_OF_NOW)
        if not spans:
            return 0.0
        passed_s = max(1.0, monotonic_s() - spans[0].began_s)
        return sum(span.num_tokens for span in spans) / passed_s

    def step_quantile_s(self, share: float) -> float:
        """About the time that ``share`` of the steps of the last minute stayed below."""
        spans = self._recent()
        counts = [sum(counts) for counts in zip(*(it.durations.counts for it in spans))]  # noqa: B905
        return quantile_of(STEP_BUCKETS_S, counts, share) if counts else 0.0

    @property
    def step_p50_s(self) -> float:
        return self.step_quantile_s(0.5)

    @property
    def step_p99_s(self) -> float:
        return self.step_quantile_s(0.99)

    @property
    def rss_bytes(self) -> int:
        """Memory of this process; 0 where the system does not say."""
        try:
            return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE_BYTES
        except OSError:
            return 0

    @property
    def gpu_mem_bytes(self) -> int:
        """Of its GPU's memory, what this process has taken; 0: it has no GPU. All of the GPU are
        as of a second ago at most.
        """
        return self.device.memory.reserved_bytes if self.device else 0

    @property
    def gpu_mem_peak_bytes(self) -> int:
        """Most that tensors had of it so far."""
        return self.device.memory.peak_bytes if self.device else 0

    @property
    def gpu_mem_total_bytes(self) -> int:
        """All that the GPU has."""
        return self.device.total_bytes if self.device else 0

    # Spans ---------------------------------------------------------------------------------------

    def _span(self) -> _Span:
        """The one of now."""
        span, now_s = self._spans[-1], monotonic_s()
        if now_s - span.began_s < _SPAN_S:
            return span
        span = _Span(now_s)
        self._spans.append(span)
        return span

    def _recent(self, num_spans: int = _SPANS_OF_A_MINUTE) -> list[_Span]:
        """Those that began so many spans ago or later."""
        since_s = monotonic_s() - num_spans * _SPAN_S
        return [span for span in tuple(self._spans) if span.began_s > since_s]


def _num_tokens(outputs: Sequence[StepOutput]) -> int:
    return sum(len(output.tokens) for output in outputs)


def _one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10 and so on up to ``limit``, as vLLM's."""
    bounds: list[int] = []
    power = 1
    while power <= limit:
        bounds += [factor * power for factor in (1, 2, 5) if factor * power <= limit]
        power *= 10
    return tuple(bounds) or (1,)
