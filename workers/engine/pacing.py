"""How many prompt tokens a step carries beside those that decode: learnt from how long steps take.

A prompt token makes everybody's step longer, by how much depends on machine, model and context. So
two moving averages are kept: of steps without prompt tokens, and of what a prompt token adds. Two
things are wanted: who streams should not notice that others arrive, and who arrives should not wait
for ever.
"""

_STRETCH = 1.9
"""A step with prompt tokens may take so many times as long as usual: then the longest gaps between
a reader's tokens stay under three times the usual one, with room for a machine's own unevenness."""
_CROWD = 4
_MAX_PRESSURE = 4.0
"""More prompts than a crowd at once are a burst, in which few read and many wait: then prompts may
add up to so many times as much to a step. Readers of the same burst see it in one gap of a hundred
at most; in a burst of 32 prompts half of them have their first token a sixth earlier."""
_MIN_PREFILL_TOKENS = 16
"""Prompts go on at least by this much per step, however slow the machine."""
_GAIN = 0.3
"""Weight of the newest step in the averages."""
_FORGETTING = 0.1
"""How much of what was usual is forgotten per step without prompts. In a burst of prompts few rows
decode at first; measured by their short steps, the last prompts would wait much longer."""
_LOOK_EVERY_STEPS = 16
"""While prompts or guesses keep coming, every so-manieth step carries none of them: what decoding
takes by itself changes with the rows and their contexts, and cannot be told from mixed steps."""
_DRAFT_MARGIN = 1.5
_MAX_DRAFT_MARGIN = 12.0
"""A guess must promise so many times what its time would bring otherwise: estimates are rough, and
free text should not pay for them. More while steps with guesses bring less than steps without."""
_DISTRUST = 1.15
"""How much more it must promise after each step with guesses, while they have not paid of late."""
_PAYOFF_GAIN = 0.1
"""Weight of the newest step with guesses in what they have brought of late."""
_FADING = 0.005
"""How much of what a guess is said to cost is forgotten per step without any: what was dear once,
beside many others or by a hiccup of the machine, is tried again some hundred steps later."""


class Pace:
    """Limits of the next step, from the durations of those before. All times in seconds."""

    def __init__(self, max_step_tokens: int, *, patience_s: float = 0.0) -> None:
        """A step of prompts may take ``patience_s``, whatever is usual; and, if that is not 0, no
        longer even when nobody decodes.
        """
        self.step_tokens = max_step_tokens
        """Most tokens in the next step; less than allowed after the device had no memory for it."""
        self._max_step_tokens = max_step_tokens
        self._patience_s = patience_s
        self._decode_s: float | None = None
        self._usual_s = 0.0
        """The longest of late that steps without prompts took on average."""
        self._token_s: float | None = None
        self._draft_s: float | None = None
        """What a guessed token adds; before the first one, what a prompt's token does."""
        self._margin = _DRAFT_MARGIN
        self._due = 0.0
        """Steps without guesses that would have fitted in the time of those with them, of late."""
        self._brought = 0.0
        """What those brought, in tokens per row: as many steps without guesses."""
        self._num_weighed = 1
        """Rows of the last step with guesses."""
        self._steps_since_look = 0

    @property
    def decode_s(self) -> float | None:
        """What a step without prompts and guesses takes; None before the first one."""
        return self._decode_s

    def max_rows(self, *, is_alone: bool) -> int:
        """Most rows of one token; not ``is_alone``: some room is kept for prompts."""
        kept = 0 if is_alone else min(_MIN_PREFILL_TOKENS, self.step_tokens // 2)
        return self.step_tokens - kept

    def prefill_tokens(self, num_decoding: int, num_starting: int) -> int:
        """Most prompt tokens beside ``num_decoding`` rows of one token; 0: this step is a look.

        ``num_starting`` prompts would be computed now if there were no limit.
        """
        room = self.step_tokens - num_decoding
        if num_decoding == 0:
            if not self._patience_s or not self._token_s:
                return room
            return min(room, max(int(self._patience_s / self._token_s), _MIN_PREFILL_TOKENS))
        if self._decode_s is None or self._steps_since_look >= _LOOK_EVERY_STEPS:
            return 0
        if not self._token_s:
            return room
        pressure = min(max(2 * (num_starting - _CROWD) / num_decoding, 1.0), _MAX_PRESSURE)
        affordable_s = pressure * (_STRETCH * self._usual_s - self._decode_s)
        affordable_s = max(affordable_s, self._patience_s - self._decode_s)
        return min(room, max(int(affordable_s / self._token_s), _MIN_PREFILL_TOKENS))

    def draft_tokens(self, num_decoding: int) -> int:
        """Most guessed tokens beside ``num_decoding`` rows, in a step without prompts."""
        if self._decode_s is None or self._steps_since_look >= _LOOK_EVERY_STEPS:
            return 0
        room = self.step_tokens - num_decoding
        cost_s = self._draft_s or self._token_s
        if not cost_s:
            return room
        affordable_s = _STRETCH * self._usual_s - self._decode_s
        return max(0, min(room, int(affordable_s / cost_s)))

    def draft_price(self, num_decoding: int) -> float:
        """How likely a guess must be right to bring more than its time would bring without it.

        A guessed token that takes ``c`` and is right with probability ``p`` speeds up a step that
        takes ``d`` for ``n`` tokens as long as ``p / c > n / d``.
        """
        cost_s = self._draft_s or self._token_s
        if not cost_s or not self._decode_s:
            return 0.0
        return min(1.0, self._margin * cost_s * num_decoding / self._decode_s)

    def note(
        self,
        num_decoding: int,
        num_prefill_tokens: int,
        duration_s: float,
        num_draft_tokens: int = 0,
    ) -> None:
        """Learn from a step that ran; guesses and prompts are never in one."""
        self.step_tokens = min(self.step_tokens + 1, self._max_step_tokens)
        if num_draft_tokens:
            self._steps_since_look += 1
            added_s = max(duration_s - (self._decode_s or 0.0), 0.0)
            self._draft_s = _moved(self._draft_s, added_s / num_draft_tokens)
            self._weigh(num_decoding, duration_s)
            return
        if self._draft_s:
            self._draft_s *= 1 - _FADING
        self._margin = max(_DRAFT_MARGIN, self._margin * (1 - _FADING))
        if num_prefill_tokens == 0:
            self._steps_since_look = 0
            self._decode_s = _moved(self._decode_s, duration_s)
            usual_s = self._usual_s + _FORGETTING * (self._decode_s - self._usual_s)
            self._usual_s = max(usual_s, self._decode_s)
        else:
            self._steps_since_look += 1
            alone_s = self._decode_s or 0.0 if num_decoding else 0.0
            added_s = max(duration_s - alone_s, 0.0)
            self._token_s = _moved(self._token_s, added_s / num_prefill_tokens)

    def credit(self, num_right: int) -> None:
        """So many guesses of one row of the step noted last were right."""
        self._brought += _PAYOFF_GAIN * num_right / self._num_weighed

    def _weigh(self, num_decoding: int, duration_s: float) -> None:
        """Whether guesses have paid so far, and what this step must bring.

        What a guess costs and how likely it is are estimates, and both may be wrong for a machine,
        for a number of rows, or for a text. This compares what really came with what would have.
        """
        is_paying = self._brought >= self._due
        self._margin *= 1 / _DISTRUST if is_paying else _DISTRUST
        self._margin = min(max(self._margin, _DRAFT_MARGIN), _MAX_DRAFT_MARGIN)
        # As elsewhere, twice the usual may be the machine's hiccup.
        due = min(duration_s / self._decode_s, 2.0) if self._decode_s else 1.0
        self._due += _PAYOFF_GAIN * (due - self._due)
        self._brought += _PAYOFF_GAIN * (1.0 - self._brought)
        self._num_weighed = num_decoding

    def shrink(self) -> None:
        """The device had no memory for the last step: half as much, then a token more per step."""
        self.step_tokens = max(1, self.step_tokens // 2)


def _moved(average_s: float | None, newest_s: float) -> float:
    """The average with one more value; the first value is the average."""
    if not average_s:
        return newest_s
    # Twice the usual or more may be the machine's hiccup; if it is not, more of it come.
    return average_s + _GAIN * (min(newest_s, 2 * average_s) - average_s)
