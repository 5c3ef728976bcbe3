"""Guessing what comes next from what came before: prompt lookup (Saxena 2023).

Who sums up, edits or quotes says much again that stands in the prompt or in the answer so far. A
guess costs nothing to make, and whoever computes the next token can compute whether guessed ones
are right for little more. How good the guesses have been says how many are worth that.
"""

MAX_DRAFT_TOKENS = 10
"""Longest guess: when nine in ten are right, the eleventh in a row is so in one case of three."""

_FIRST_HIT_RATE = 0.4
_GAIN = 0.2
"""Weight of the newest guess in the average: a copied passage is known for one after some tokens,
and its end soon, too."""


class Lookup:
    """Follows one list of tokens as it grows.

    Every pair of tokens leads to where it stood last. From there the text is expected to go on as
    it did; while it does, that place is kept, and after each difference another one is looked for.
    The next token is guessed whether or not anybody asks, so ``hit_rate`` is always of late.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._behind: dict[tuple[int, int], int] = {}
        """Pair of tokens -> position behind its last occurrence that has one."""
        self._num_read = 1
        self._source: int | None = None
        """Position of what is expected next."""
        self.hit_rate = _FIRST_HIT_RATE
        """How likely one guess is right behind others that were: a moving average."""
        while self._num_read < len(tokens):
            self._source = None
            self._learn()

    def draft(self, max_tokens: int, price: float) -> list[int]:
        """What may come next: no longer than it is as likely as ``price`` that all of it is right.

        The price is at most 1, where a guess is worth nothing.
        """
        self._catch_up()
        if self._source is None:
            return []
        count, likelihood = 0, self.hit_rate
        while count < max_tokens and likelihood > price:
            count += 1
            likelihood *= self.hit_rate
        # What repeats itself goes on to do so beyond the last token.
        period = len(self._tokens) - self._source
        return [self._tokens[self._source + place % period] for place in range(count)]

    def _catch_up(self) -> None:
        while self._num_read < len(self._tokens):
            if self._source is not None:
                is_hit = self._tokens[self._source] == self._tokens[self._num_read]
                self.hit_rate += _GAIN * (is_hit - self.hit_rate)
                self._source = self._source + 1 if is_hit else None
            self._learn()

    def _learn(self) -> None:
        """Enter the pair that the next token ends, and look up where it was before."""
        end = self._num_read + 1
        pair = (self._tokens[end - 2], self._tokens[end - 1])
        if self._source is None:
            self._source = self._behind.get(pair)
        self._behind[pair] = end
        self._num_read = end
