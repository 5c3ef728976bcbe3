"""Measures each step of an engine: a few looks at a clock, whatever the size of the batch."""

from time import perf_counter

from workers.engine.port import StepWork
from workers.engine.scheduler import Scheduler

_NOTHING = StepWork()


class StepWatch:
    """Told where a step stands; :meth:`end` says what it was."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._since_s = 0.0
        self._num_rows = self._num_places = 0
        self._was_refused = False
        self._plan_s = self._forward_s = self._leave_s = 0.0
        self._joined = self._preempted = self._queried = self._found = 0

    def begin(self) -> None:
        self._num_rows = 0
        self._plan_s = self._leave_s = 0.0
        self._since_s = perf_counter()

    def planned(self) -> None:
        now_s = perf_counter()
        self._plan_s, self._since_s = now_s - self._since_s, now_s

    def computed(self, num_rows: int, num_places: int, *, was_refused: bool = False) -> None:
        """All of its tokens are chosen; they had ``num_places``, padding included."""
        now_s = perf_counter()
        self._forward_s, self._since_s = now_s - self._since_s, now_s
        self._num_rows, self._num_places = num_rows, num_places
        self._was_refused = was_refused

    def left(self, began_s: float) -> None:
        """One sequence has been taken out since ``began_s`` of :func:`time.perf_counter`."""
        self._leave_s += perf_counter() - began_s

    def end(self, used_tokens: int) -> StepWork:
        """What the step was; ``used_tokens`` of the cache belong to somebody now."""
        scheduler = self._scheduler
        joined, self._joined = scheduler.num_joined - self._joined, scheduler.num_joined
        preempted = scheduler.num_preempted - self._preempted
        self._preempted = scheduler.num_preempted
        queried, self._queried = scheduler.queried_tokens - self._queried, scheduler.queried_tokens
        found, self._found = scheduler.found_tokens - self._found, scheduler.found_tokens
        if not self._num_rows:
            return _NOTHING
        return StepWork(
            num_rows=self._num_rows,
            num_tokens=scheduler.last_tokens,
            num_prefill_tokens=scheduler.last_prefill_tokens,
            num_padding=self._num_places - scheduler.last_tokens,
            num_joined=joined,
            num_preempted=preempted,
            queried_tokens=queried,
            found_tokens=found,
            used_tokens=used_tokens,
            was_refused=self._was_refused,
            plan_s=self._plan_s,
            forward_s=self._forward_s,
            text_s=perf_counter() - self._since_s,
            leave_s=self._leave_s,
        )
