"""The engine itself: continuous batching over any runner. ``torch`` and ``simulated`` differ below.

A step reads as its stages: plan, run, take the chosen tokens. One generation's fault ends that one
generation; only a fault of the runner is a fault of the engine.
"""

from dataclasses import dataclass
from typing import Protocol

from common.failures import KINDS
from common.messages import Finish, FinishReason, escape_piece
from workers.engine.port import EngineLoad, EngineRequest, StepOutput
from workers.engine.scheduler import Chunk, Limits, Scheduler
from workers.engine.sequence import Sequence, TextRules


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token and the natural logarithm of its probability."""

    token: int
    logprob: float


class Runner(Protocol):
    """What computes a step."""

    def run(self, chunks: list[Chunk]) -> list[Choice | None]:
        """Compute all chunks and choose the next token of each one that ``samples``, in order.

        None stands for logits that are not finite.
        """
        ...


class BatchingEngine:
    """Implements :class:`workers.engine.port.Engine`."""

    def __init__(
        self,
        runner: Runner,
        rules: TextRules,
        limits: Limits,
        *,
        model_version: str,
        max_cost: int,
        vocab_size: int,
    ) -> None:
        self.model_version = model_version
        self.max_cost = min(max_cost, limits.cache_tokens)
        self._runner = runner
        self._rules = rules
        self._limits = limits
        self._vocab_size = vocab_size
        self._scheduler = Scheduler(limits)
        self._sequences: dict[str, Sequence] = {}
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
        except Exception as error:  # noqa: BLE001 - one generation's fault must not end the others
            finish = _failed("ENGINE_ERROR", error)
            self._ended.append(_ending(request.id, len(request.logged), finish))
            return
        if sequence.finish is not None:
            finish = Finish(sequence.finish)
            self._ended.append(_ending(request.id, len(request.logged), finish))
            return
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)
        self._ended = [output for output in self._ended if output.id != id]

    def step(self) -> list[StepOutput]:
        outputs, self._ended = self._ended, []
        chunks = self._scheduler.plan()
        if chunks:
            choices = self._runner.run(chunks)
            self._scheduler.complete(chunks)
            sampled = [chunk.sequence for chunk in chunks if chunk.samples]
            outputs += [self._take(*pair) for pair in zip(sampled, choices, strict=True)]
        return outputs

    def load(self) -> EngineLoad:
        running, waiting = self._scheduler.num_running, self._scheduler.num_waiting
        return EngineLoad(
            running=running,
            waiting=waiting,
            free_tokens=max(0, self._limits.cache_tokens - self._scheduler.promised_tokens),
            free_slots=max(0, self._limits.max_sequences - running - waiting),
        )

    def _refusal(self, request: EngineRequest) -> Finish | None:
        """Why this engine cannot run ``request`` at all."""
        if not request.prompt:
            return _failed("BAD_REQUEST", "The prompt has no tokens.")
        if request.cost > self.max_cost:
            message = f"{request.cost} tokens are needed and {self.max_cost} allowed."
            return _failed("CONTEXT_LENGTH_EXCEEDED", message)
        if max(request.prompt) >= self._vocab_size or max(request.logged, default=0) >= (
            self._vocab_size
        ):
            return _failed("TOKENIZER_MISMATCH", "A token id lies outside of the vocabulary.")
        return None

    def _take(self, sequence: Sequence, choice: Choice | None) -> StepOutput:
        """Append the chosen token; ends the sequence if it was its last, or at fault."""
        position = sequence.num_generated
        if choice is None:
            return self._end(sequence, _ending(sequence.id, position, _failed("NAN_LOGITS")))
        try:
            piece = escape_piece(sequence.append(choice.token))
        except Exception as error:  # noqa: BLE001 - as in `submit`
            return self._end(
                sequence, _ending(sequence.id, position, _failed("ENGINE_ERROR", error))
            )
        output = StepOutput(
            id=sequence.id,
            start=position,
            tokens=[choice.token],
            pieces=[piece],
            logprobs=[choice.logprob],
            finish=None if sequence.finish is None else Finish(sequence.finish),
        )
        return output if output.finish is None else self._end(sequence, output)

    def _end(self, sequence: Sequence, output: StepOutput) -> StepOutput:
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)
        return output


def _ending(id: str, position: int, finish: Finish) -> StepOutput:
    return StepOutput(id=id, start=position, tokens=[], pieces=[], logprobs=[], finish=finish)


def _failed(code: str, cause: Exception | str = "") -> Finish:
    """Of an exception only the type is told: its text may hold somebody's prompt."""
    detail = type(cause).__name__ if isinstance(cause, Exception) else cause
    return Finish(FinishReason.FAILED, code, detail or KINDS[code].meaning)
