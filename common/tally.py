"""What a gateway says of itself in its beats: figures since its start, and its latest failures."""

from collections import deque

from common.broker import FailureNote
from common.failures import KINDS
from common.figures import Figures
from common.messages import Timing

MAX_UNTOLD = 500
"""Failures between two beats that are kept; under a flood the newest are enough."""


class Tally:
    """Counts what ends; belongs to the event loop."""

    def __init__(self) -> None:
        self.figures = Figures()
        self._untold: deque[FailureNote] = deque(maxlen=MAX_UNTOLD)

    def note_end(
        self, outcome: str, *, request_id: str, api: str, at_s: float, timing: Timing | None = None,
        num_tokens: int = 0,
    ) -> None:  # fmt: skip
        """A request ended ``at_s`` seconds after 1970: ``ok``, ``cancelled``, ``disconnected``, or
        with a failure's code.
        """
        figures = self.figures
        figures.outcomes[outcome] = figures.outcomes.get(outcome, 0) + 1
        figures.tokens += num_tokens
        if timing is not None:
            figures.queue_time.observe(timing.queue_time_s)
            if timing.claimed:
                figures.generation_time.observe(timing.generation_time_s)
        if outcome in KINDS:
            self._untold.append(
                FailureNote(
                    code=outcome,
                    request_id=request_id,
                    at=round(at_s, 3),
                    api=api,
                    worker=timing.worker if timing else "",
                    model_version=timing.model_version if timing else "",
                )
            )

    @property
    def untold(self) -> list[FailureNote]:
        """Failures that Redis does not know yet, in order."""
        return list(self._untold)

    def note_told(self, number: int) -> None:
        """Redis knows so many of them."""
        for _ in range(min(number, len(self._untold))):
            self._untold.popleft()
