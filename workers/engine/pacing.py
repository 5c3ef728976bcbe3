"""How many prompt tokens a step carries beside those that decode: learnt from how long steps take.

A prompt token makes everybody's step longer, by how much depends on machine, model and context. The
duration of a step is taken as ``decode + token * prompt tokens``, and the two are followed from
step to step. Two things are wanted: who streams should not notice that others arrive, and who
arrives should not wait for ever.
"""

_STRETCH = 1.5
"""Prompt tokens may add so much to a step, as a share of what it takes without them: a reader's
longest gap stays well under three times the usual one."""
_MIN_PREFILL_TOKENS = 16
"""Prompts go on at least by this much per step, however slow the machine."""
_GAIN = 0.3
"""Weight of the newest step."""
_TYPICAL_TOKENS = 64.0
"""Scale of prompt tokens against the constant one, by which an error is divided between the two."""


class Pace:
    """Limits of the next step, from the durations of those before. All times in seconds."""

    def __init__(self, max_step_tokens: int) -> None:
        self.step_tokens = max_step_tokens
        """Most tokens in the next step; less than allowed after the device had no memory for it."""
        self._max_step_tokens = max_step_tokens
        self._decode_s = 0.0
        self._token_s = 0.0

    def max_rows(self, *, is_alone: bool) -> int:
        """Most rows of one token; not ``is_alone``: some room is kept for prompts."""
        kept = 0 if is_alone else min(_MIN_PREFILL_TOKENS, self.step_tokens // 2)
        return self.step_tokens - kept

    def prefill_tokens(self, num_decoding: int) -> int:
        """Most prompt tokens beside ``num_decoding`` rows of one token."""
        room = self.step_tokens - num_decoding
        if num_decoding == 0 or self._decode_s == 0.0 or self._token_s == 0.0:
            return room
        affordable = int(_STRETCH * self._decode_s / self._token_s)
        return min(room, max(affordable, _MIN_PREFILL_TOKENS))

    def note(self, num_prefill_tokens: int, duration_s: float) -> None:
        """Learn from a step that ran (normalized least mean squares, Widrow and Hoff 1960)."""
        self.step_tokens = min(self.step_tokens + 1, self._max_step_tokens)
        if self._decode_s == 0.0 and num_prefill_tokens == 0:
            self._decode_s = duration_s
        if self._token_s == 0.0 and num_prefill_tokens > 0:
            self._token_s = max(duration_s - self._decode_s, 0.0) / num_prefill_tokens
        expected_s = self._decode_s + self._token_s * num_prefill_tokens
        # A step of twice the time or more may be the machine's hiccup; if it is not, more come.
        error_s = min(duration_s - expected_s, expected_s)
        scaled = num_prefill_tokens / _TYPICAL_TOKENS
        share_s = _GAIN * error_s / (1 + scaled * scaled)
        if self._decode_s > 0.0:
            self._decode_s = max(self._decode_s + share_s, 0.0)
        self._token_s = max(self._token_s + share_s * scaled / _TYPICAL_TOKENS, 0.0)

    def shrink(self) -> None:
        """The device had no memory for the last step: half as much, then a token more per step."""
        self.step_tokens = max(1, self.step_tokens // 2)
