"""How much of a step those may take who give way: learnt from how long steps take.

Generations of the lanes ``flex`` and ``batch`` give way to the interactive ones. They are paused by
being left out of steps: they keep their place in the cache and go on when there is room. On most
machines a step of few rows takes as long as one of several, so the interactive rows of a step leave
something over; how much is found by trying, a little more after each step that was short enough and
less after one that was not. So it follows whatever else steps depend on: contexts, machine, model.
"""

_STRETCH_BESIDE = 1.2
"""A step with interactive rows may take so many times as long as with these alone."""
_STRETCH_BETWEEN = 2.2
"""So many times that may a step take without any of them, while they come and go: whoever arrives
waits for its end. Smaller steps cost throughput: with 1.4, a batch beside two readers a second had
348 tokens/s, with this 419 (SmolLM2-135M on two cores, `headrace bench batch`)."""
_BETWEEN_S = 60.0
"""An engine that has computed for so long without anything interactive belongs to the others."""
_GROWTH, _SHRINKAGE = 0.025, 0.075
"""Of the limit, per step that took no longer than aimed at, and per step that did: on a machine
whose steps are uneven, a quarter of them do.
"""
_LOOK_EVERY_STEPS = 16
"""So often a step beside interactive rows leaves the others out, to see what these take alone; and
so often one with interactive prompts, which otherwise has nobody beside them, lets some in."""
_OWED_TOKENS = 4
"""So many of them: enough to go on at all where interactive prompts never end."""


class Share:
    """Limits of the next step for those who give way. All times in seconds."""

    def __init__(self, max_rows: int) -> None:
        self._beside = _Limit(8.0)
        """Tokens of a step in which interactive rows decode, these and their guesses included."""
        self._between = _Limit(float(max_rows))
        self._since_interactive_s = _BETWEEN_S
        self._num_beside = 0
        """Steps since the last look."""
        self._num_passed_over = 0

    def room_beside(self, num_tokens: int, alone_s: float | None, *, has_prompt: bool) -> int:
        """Most tokens of those who give way, beside ``num_tokens`` of interactive ones.

        ``alone_s`` is what the interactive ones take; None as long as that is not known.
        """
        if has_prompt:
            return self.num_owed
        if alone_s is None or self._num_beside >= _LOOK_EVERY_STEPS:
            return 0
        return max(1, int(self._beside.tokens) - num_tokens)

    @property
    def num_owed(self) -> int:
        """Tokens of the next step that are theirs, be it full of interactive prompts."""
        return _OWED_TOKENS if self._num_passed_over >= _LOOK_EVERY_STEPS else 0

    def room_between(self, alone_s: float | None) -> int | None:
        """Most tokens of a step without anything interactive; None: whatever it can carry."""
        if alone_s is None or self._since_interactive_s >= _BETWEEN_S:
            return None
        return int(self._between.tokens)

    def note_interactive(self, *, has_prompt: bool) -> None:
        """A step left out all who give way, or there were none."""
        self._since_interactive_s = 0.0
        self._num_passed_over += 1
        if not has_prompt:
            self._num_beside = 0

    def note_beside(
        self, num_tokens: int, duration_s: float, alone_s: float | None, *, has_prompt: bool
    ) -> None:
        """Both were in a step, with ``num_tokens`` in all."""
        self._since_interactive_s = 0.0
        self._num_passed_over = 0
        self._num_beside += 1
        if alone_s is not None and not has_prompt:
            self._beside.note(num_tokens, duration_s, _STRETCH_BESIDE * alone_s)

    def note_between(self, num_tokens: int, duration_s: float, alone_s: float | None) -> None:
        """Nothing interactive was in a step of ``num_tokens``."""
        self._num_passed_over = 0
        if alone_s is not None and self._since_interactive_s < _BETWEEN_S:
            self._between.note(num_tokens, duration_s, _STRETCH_BETWEEN * alone_s)
        self._since_interactive_s += duration_s


class _Limit:
    """A number of tokens with which most steps take no longer than they may."""

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens

    def note(self, num_tokens: int, duration_s: float, most_s: float) -> None:
        if duration_s > most_s:
            self.tokens = max(1.0, self.tokens * (1 - _SHRINKAGE))
        elif num_tokens >= int(self.tokens):  # else it says nothing about more of them
            self.tokens += max(1.0, self.tokens) * _GROWTH
