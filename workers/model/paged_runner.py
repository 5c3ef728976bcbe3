"""Runs steps over pages, each of them launched while the one before it is still computed.

What a step chooses stays on the device until the next one has been launched with it, so between two
steps the device waits for nobody: neither for numbers on their way to the processor and back, nor
for what the processor does with them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.engine.batching import Outcome, count_tokens
from workers.engine.scheduler import Chunk
from workers.model.attention import Stretch
from workers.model.runner import Choosing, StepInputs, device_errors
from workers.model.sampler import PlainChoice, SamplesToCome


class TakesDeviceTokens(Protocol):
    """A :class:`workers.model.runner.Forward` whose ``tokens`` may lie on its device already."""

    def __call__(
        self, tokens: list[int] | torch.Tensor, stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor: ...


class PadsSteps(Protocol):
    """What of :class:`workers.model.paged_forward.PagedForward` says how large its steps are."""

    def num_places(self, num_tokens: int, num_decodes: int) -> int: ...


def count_places(forward: PadsSteps, chunks: list[Chunk]) -> int:
    """Tokens that ``forward`` computes for ``chunks``, padding included; there is none in a step
    with adapters, which is not recorded.
    """
    num_tokens = count_tokens(chunks)
    if any(chunk.sequence.adapter for chunk in chunks):
        return num_tokens
    return forward.num_places(num_tokens, sum(chunk.count == 1 for chunk in chunks))


class PagedRunner:
    """Implements :class:`workers.engine.batching.Runner` and ``Launcher``.

    A cache of pages needs nothing between steps, so there is none to name. ``choose_plainly``
    are kernels of its device, where there are any.
    """

    def __init__(
        self, forward: TakesDeviceTokens, choose_plainly: PlainChoice | None = None
    ) -> None:
        self._forward = forward
        self._choose_plainly = choose_plainly

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See the protocol.

        Raises:
            DeviceMemoryError: the step did not fit; it may be tried again in parts.
            DeviceLostError: nothing can be computed on the device any more.
        """
        step = self.launch(chunks)
        step.choose()
        return step.outcomes()

    def launch(self, chunks: list[Chunk]) -> "PagedStep":
        """Raises as :meth:`run`."""
        inputs = StepInputs(chunks)
        return PagedStep(self._forward, self._choose_plainly, inputs, inputs.tokens)


class PagedStep:
    """Implements :class:`workers.engine.batching.Launched`; raises as :class:`PagedRunner`."""

    def __init__(
        self,
        forward: TakesDeviceTokens,
        choose_plainly: PlainChoice | None,
        inputs: StepInputs,
        tokens: list[int] | torch.Tensor,
    ) -> None:
        self._forward = forward
        self._choose_plainly = choose_plainly
        self._inputs = inputs
        with torch.inference_mode(), device_errors():
            logits = forward(tokens, inputs.stretches, inputs.rows)
            inputs.score_prompts(logits)
        self._logits = logits[inputs.num_scored :]

    def choose(self) -> None:
        self._choosing = Choosing(self._inputs)
        if self._choosing.rows:
            with torch.inference_mode(), device_errors():
                self._to_come = SamplesToCome(
                    self._logits, self._choosing.rows, self._choose_plainly
                )
        del self._logits  # may lie where the next step's will

    def follow(self, chunks: list[Chunk]) -> "PagedStep":
        inputs = StepInputs(chunks)
        rows = {chunk.slot: row for row, chunk in enumerate(self._inputs.sampled)}
        with torch.inference_mode(), device_errors():
            tokens = self._to_come.tokens([rows[c.slot] for c in inputs.sampled])
        return PagedStep(self._forward, self._choose_plainly, inputs, tokens)

    def outcomes(self) -> list[Outcome]:
        if not self._choosing.rows:
            return []
        with device_errors():
            return self._choosing.outcomes(self._to_come.samples())
