"""The engine itself: continuous batching over any runner. ``torch`` and ``simulated`` differ below.

A step reads as its stages: plan, run, take the chosen tokens. One generation's fault ends that one
generation, and a step that the device has no memory for is run in parts; only a fault of the runner
is a fault of the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import msgspec
from msgspec.structs import replace

from common.clock import monotonic_s
from common.failures import KINDS
from common.logs import get_logger
from common.messages import Finish, FinishReason, TopTokens, escape_piece
from workers.engine.grammar import GrammarError
from workers.engine.places import Places, SlotPlaces
from workers.engine.port import (
    Adapters,
    CacheSize,
    Device,
    DeviceMemoryError,
    EngineLoad,
    EngineRequest,
    Joined,
    StepOutput,
    StepWork,
)
from workers.engine.scheduler import Chunk, Limits, Scheduler
from workers.engine.sequence import Sequence, TextRules
from workers.engine.step_watch import StepWatch

log = get_logger()


class Choice(msgspec.Struct, frozen=True, gc=False):
    """A chosen token and the natural logarithm of its probability."""

    token: int
    logprob: float
    top: TopTokens | None = None
    """Where the request asks for the likeliest."""


Outcome = list[Choice] | GrammarError | None
"""Of one sequence: None stands for logits that are not finite."""


class Runner(Protocol):
    """What computes a step."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """Compute all chunks and choose the next tokens of each one that ``samples``, in order.

        There is one token, and one more for each token of the chunk's draft that was chosen before
        it. What a prompt's logits say goes into the ``prompt_scores`` of its sequence. Before it
        computes, it copies what chunks want copied; the same chunks, or parts, may come again after
        a DeviceMemoryError.

        Raises:
            DeviceMemoryError: the device has no memory for so much; a part of it may fit.
        """
        ...


class Launched(Protocol):
    """A step that the device computes by itself, in stages that are gone through once each."""

    def choose(self) -> None:
        """Have the next tokens chosen when there are logits. All tokens before these are known by
        now, but for those of sequences that have ended: these may get any.

        Raises:
            DeviceMemoryError: there is no memory for that; the step may be tried again in parts.
        """
        ...

    def follow(self, chunks: list[Chunk]) -> "Launched":
        """Launch the next step. Each chunk is foreseen: the token is what is chosen here.

        Raises:
            DeviceMemoryError: the device has no memory for that; this step is not affected.
        """
        ...

    def outcomes(self) -> list[Outcome]:
        """As :meth:`Runner.run`; waits for the device."""
        ...


class Launcher(Protocol):
    """What starts a step without waiting for it, on a device that computes in the order asked."""

    def launch(self, chunks: list[Chunk]) -> Launched:
        """As :meth:`Runner.run`, but for what it returns."""
        ...


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that was launched; since then, some of its sequences may have ended."""

    chunks: list[Chunk]
    sampled: list[Sequence]
    """Those that get a token, in the order of the outcomes."""
    launched: Launched
    launched_s: float


@dataclass(slots=True)
class _Computed:
    """What came out of a step."""

    outcomes: list[tuple[Sequence, Outcome]] = field(default_factory=list[tuple[Sequence, Outcome]])
    refused: list[Sequence] = field(default_factory=list[Sequence])
    """Those for whose next token alone the device has no memory."""
    was_split: bool = False


def count_tokens(chunks: list[Chunk]) -> int:
    """Token places of a step without padding."""
    return sum(chunk.count for chunk in chunks)


def _newcomers(chunks: list[Chunk], num_places: Callable[[list[Chunk]], int]) -> tuple[Joined, ...]:
    newcomers = [chunk for chunk in chunks if not chunk.sequence.has_joined]
    if not newcomers:
        return ()
    pad_ratio = 1 - count_tokens(chunks) / num_places(chunks)
    joined: list[Joined] = []
    for chunk in newcomers:
        sequence = chunk.sequence
        sequence.has_joined = True
        cached = sequence.num_cached or 0
        joined.append(Joined(sequence.id, chunk.slot, len(chunks), cached, pad_ratio))
    return tuple(joined)


class BatchingEngine:
    """Implements :class:`workers.engine.port.Engine`.

    ``places`` must be those that the cache of ``runner`` has: by default one slot per sequence.
    ``num_places`` says how many tokens a step of these chunks computes, padding included;
    ``token_bytes`` is what keys and values of one token take.

    With a ``launcher``, the device computes a step while the text of the one before it is made and
    told. Where that text ends a generation, its token of the next step is dropped; keys and values
    of it lie behind all that is proven, so nobody finds them, and whoever gets their place writes
    it anew before reading.
    """

    def __init__(
        self,
        runner: Runner,
        rules: TextRules,
        limits: Limits,
        *,
        model_version: str,
        max_cost: int,
        vocab_size: int,
        places: Places | None = None,
        adapters: Adapters | None = None,
        launcher: Launcher | None = None,
        num_places: Callable[[list[Chunk]], int] = count_tokens,
        token_bytes: int = 0,
        device: Device | None = None,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        places = places or SlotPlaces(limits.num_slots, limits.cache_tokens)
        self.model_version = model_version
        self.adapters = adapters
        self.max_cost = min(max_cost, places.capacity_tokens)
        self._runner = runner
        self._rules = rules
        self._limits = limits
        self.vocab_size = vocab_size
        self._clock = clock
        self._places = places
        self.cache_size = CacheSize(places.capacity_tokens, places.block_tokens, token_bytes)
        self.device = device
        self._num_places = num_places
        self._scheduler = Scheduler(limits, places, foresees=launcher is not None)
        self._watch = StepWatch(self._scheduler)
        self.last_step = StepWork()
        self._launcher = launcher
        self._under_way: _UnderWay | None = None
        """Launched ahead: what it brings is taken in the next step."""
        self._completed_s = 0.0
        """When the last step that was launched was over: the next one takes no time before that."""
        self._sequences: dict[str, Sequence] = {}
        self._joined: tuple[Joined, ...] = ()
        self._ended: list[StepOutput] = []
        """Generations that ended before any step: told with the next one."""

    def submit(self, request: EngineRequest) -> None:
        self.cancel(request.id)
        refusal = self._refusal(request)
        if refusal is not None:
            self._ended.append(_ending(request.id, len(request.logged), refusal))
            return
        try:
            sequence = Sequence(request, self._rules)
        except GrammarError as error:
            finish = _failed("GRAMMAR_REJECTED", str(error))
            self._ended.append(_ending(request.id, len(request.logged), finish))
            return
        except Exception as error:  # noqa: BLE001 - one generation's fault must not end the others
            finish = _failed("ENGINE_ERROR", error)
            self._ended.append(_ending(request.id, len(request.logged), finish))
            return
        if sequence.finish is not None:
            finish = Finish(sequence.finish, flagged=sequence.flaw())
            self._ended.append(_ending(request.id, len(request.logged), finish))
            return
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            sequence.finish = FinishReason.CANCELLED
            self._scheduler.remove(sequence)
        self._ended = [output for output in self._ended if output.id != id]

    def step(self) -> list[StepOutput]:
        self._watch.begin()
        outputs = self._advance()
        self.last_step = self._watch.end(self._places.used_tokens)
        return outputs

    def _advance(self) -> list[StepOutput]:
        outputs, self._ended = self._ended, []
        self._joined = ()
        step, self._under_way = self._under_way, None
        if step is None or all(sequence.finish for sequence in step.sampled):
            chunks = self._scheduler.plan()
            if not chunks:
                return outputs
            self._watch.planned()
            self._joined = _newcomers(chunks, self._num_places)
            step = self._launched(self._launcher.launch, chunks) if self._launcher else None
            if step is None:
                return outputs + self._run(chunks)
        return outputs + self._finish(step)

    def load(self) -> EngineLoad:
        running, waiting = self._scheduler.num_running, self._scheduler.num_waiting
        return EngineLoad(
            running=running,
            waiting=waiting,
            free_tokens=max(0, self.cache_size.capacity_tokens - self._scheduler.promised_tokens),
            free_slots=max(0, self._limits.max_sequences - running - waiting),
            spare_slots=self._limits.spare_sequences,
            joined=self._joined,
        )

    def _run(self, chunks: list[Chunk]) -> list[StepOutput]:
        """Compute ``chunks`` and wait for it."""
        began_s = self._clock()
        computed = _Computed()
        self._compute(chunks, computed)
        self._scheduler.complete(chunks, self._clock() - began_s)
        num_places = self._num_places(chunks)
        self._watch.computed(len(chunks), num_places, was_refused=computed.was_split)
        if computed.was_split:
            self._note_lack_of_memory(computed.refused)
        outputs = [self._take(*pair) for pair in computed.outcomes]
        return outputs + [self._fail(sequence, "CUDA_OOM") for sequence in computed.refused]

    def _launched(
        self, launch: Callable[[list[Chunk]], Launched], chunks: list[Chunk]
    ) -> _UnderWay | None:
        """None where the device has no memory for it: that is dealt with when one waits for it."""
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        launched_s = self._clock()
        try:
            return _UnderWay(chunks, sampled, launch(chunks), launched_s)
        except DeviceMemoryError:
            return None

    def _finish(self, step: _UnderWay) -> list[StepOutput]:
        """Take what ``step`` brings, while the device computes the next one if that is foreseen."""
        foreseen = self._scheduler.foresee(step.chunks)
        try:
            step.launched.choose()
        except DeviceMemoryError:
            left = [chunk for chunk in step.chunks if chunk.sequence.finish is None]
            return self._run([replace(chunk, is_foreseen=False) for chunk in left])
        if foreseen:
            self._under_way = self._launched(step.launched.follow, foreseen)
        outcomes = step.launched.outcomes()
        now_s = self._clock()
        self._scheduler.complete(step.chunks, now_s - max(step.launched_s, self._completed_s))
        self._completed_s = now_s
        self._watch.computed(len(step.chunks), self._num_places(step.chunks))
        return [
            self._take(sequence, outcome)
            for sequence, outcome in zip(step.sampled, outcomes, strict=True)
            if sequence.finish is None
        ]

    def _compute(self, chunks: list[Chunk], computed: _Computed) -> None:
        """Run ``chunks``; those that the device has no memory for by halves, down to one token."""
        chunks = [chunk for chunk in chunks if chunk.sequence not in computed.refused]
        if not chunks:
            return
        try:
            outcomes = self._runner.run(chunks)
        except DeviceMemoryError:
            computed.was_split = True
            halves = _halves(chunks)
            if not halves:
                computed.refused.append(chunks[0].sequence)
            for half in halves:
                self._compute(half, computed)
        else:
            sampled = [chunk.sequence for chunk in chunks if chunk.samples]
            computed.outcomes += zip(sampled, outcomes, strict=True)

    def _note_lack_of_memory(self, refused: list[Sequence]) -> None:
        self._scheduler.shrink()
        log.warning("engine.memory_refused", refused=[sequence.id for sequence in refused])

    def _refusal(self, request: EngineRequest) -> Finish | None:
        """Why this engine cannot run ``request`` at all."""
        if not request.prompt:
            return _failed("BAD_REQUEST", "The prompt has no tokens.")
        if request.cost > self.max_cost:
            message = f"{request.cost} tokens are needed and {self.max_cost} allowed."
            return _failed("CONTEXT_LENGTH_EXCEEDED", message)
        if max(request.prompt) >= self.vocab_size or max(request.logged, default=0) >= (
            self.vocab_size
        ):
            return _failed("TOKENIZER_MISMATCH", "A token id lies outside of the vocabulary.")
        named = (*request.sampling.stop_token_ids, *request.sampling.logit_bias)
        if not all(0 <= id < self.vocab_size for id in named):
            return _failed("BAD_REQUEST", "A token id lies outside of the vocabulary.")
        return None

    def _take(self, sequence: Sequence, outcome: Outcome) -> StepOutput:
        """Append the chosen tokens; ends the sequence if one was its last, or at fault."""
        position = sequence.num_generated
        if outcome is None:
            return self._fail(sequence, "NAN_LOGITS")
        if isinstance(outcome, GrammarError):
            return self._fail(sequence, "GRAMMAR_REJECTED", str(outcome))
        if sequence.sampling.max_new_tokens <= 0:  # only its prompt was asked about
            sequence.finish, outcome = FinishReason.LENGTH, []
        tokens: list[int] = []
        pieces: list[bytes] = []
        logprobs: list[float] = []
        for choice in outcome:
            try:
                pieces.append(escape_piece(sequence.append(choice.token)))
            except GrammarError as error:
                return self._fail(sequence, "GRAMMAR_REJECTED", str(error), position=position)
            except Exception as error:  # noqa: BLE001 - as in `submit`
                return self._fail(sequence, "ENGINE_ERROR", error, position=position)
            tokens.append(choice.token)
            logprobs.append(choice.logprob)
            if sequence.finish is not None:
                break
        self._scheduler.prove(sequence, num_drafted=max(0, len(tokens) - 1))
        finish = Finish(sequence.finish, flagged=sequence.flaw()) if sequence.finish else None
        has_tops, scores = sequence.sampling.top_logprobs > 0, sequence.prompt_scores
        output = StepOutput(
            id=sequence.id,
            start=position,
            tokens=tokens,
            pieces=pieces,
            logprobs=logprobs,
            finish=finish,
            cached_tokens=sequence.num_cached or 0,
            tops=[choice.top or [] for choice in outcome[: len(tokens)]] if has_tops else None,
            prompt=None if scores is None or position else scores.told(),
        )
        if output.finish is not None:
            self._forget(sequence)
        return output

    def _fail(
        self,
        sequence: Sequence,
        code: str,
        cause: Exception | str = "",
        *,
        position: int | None = None,
    ) -> StepOutput:
        """End a running sequence with ``code``, at ``position`` of its log or where it stands."""
        sequence.finish = FinishReason.FAILED
        self._forget(sequence, is_sound=code != "NAN_LOGITS")
        position = sequence.num_generated if position is None else position
        return _ending(sequence.id, position, _failed(code, cause))

    def _forget(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        began_s = perf_counter()
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence, is_sound=is_sound)
        self._watch.left(began_s)


def _halves(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Two parts that are computed one after the other; none of a single token."""
    if len(chunks) > 1:
        middle = len(chunks) // 2
        return [chunks[:middle], chunks[middle:]]
    (chunk,) = chunks
    if chunk.draft:
        count = chunk.count - len(chunk.draft)
        return [[replace(chunk, count=count, draft=())]]
    count = chunk.count // 2
    if count == 0:
        return []
    rest = replace(chunk, start=chunk.start + count, count=chunk.count - count, copied_from=None)
    return [[replace(chunk, count=count)], [rest]]


def _ending(id: str, position: int, finish: Finish) -> StepOutput:
    return StepOutput(id=id, start=position, tokens=[], pieces=[], logprobs=[], finish=finish)


def _failed(code: str, cause: Exception | str = "") -> Finish:
    """Of an exception only the type is told: its text may hold somebody's prompt."""
    detail = type(cause).__name__ if isinstance(cause, Exception) else cause
    return Finish(FinishReason.FAILED, code, detail or KINDS[code].meaning)
