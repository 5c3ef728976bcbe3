"""llguidance behind the engine's matcher: masks over the vocabulary of a model, at a bounded cost.

Its calls release the GIL while they work; its own limits bound each, and here what they add up to.
"""

from collections.abc import Generator
from contextlib import contextmanager
from time import thread_time

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from common.models.tokenizer import Tokenizer
from workers.engine.grammar import GrammarError
from workers.grammar_trial import LIMITS, explain

_FREE_S = 0.005
"""Processor time of a call that is not counted; most take 0.05 ms."""
_MAX_EXCESS_S = 0.25
"""Above that, over a generation: the others in its batch have waited for it."""


class Vocabulary:
    """The tokens that masks are over: those of ``tokenizer``, and what else the model can choose.

    Raises:
        GrammarError: the tokenizer is of a kind whose tokens are not known byte for byte.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._vocab_size = vocab_size
        try:
            self._tokenizer = LLTokenizer(
                tokenizer.to_json(),
                n_vocab=max(vocab_size, tokenizer.vocab_size),
                eos_token=eos_token_ids,
            )
        except Exception as error:  # the library does not say which
            raise _not_valid(f"none works with the tokenizer of this model: {error}") from error

    def matcher(self, definition: str) -> "LibraryMatcher":
        """At the start of a grammar that a trial has translated.

        Raises:
            GrammarError: it can not be compiled, or nothing matches it.
        """
        compiled = LLMatcher(self._tokenizer, definition, log_level=0, limits=LIMITS)
        matcher = LibraryMatcher(compiled, self._vocab_size)
        matcher.mask()  # what has no first token has no answer; and what it computes is kept
        return matcher


class LibraryMatcher:
    """Implements :class:`workers.engine.grammar.Matcher` with llguidance.

    The limits of the trial bound each operation; here is bounded what they add up to. Past the end
    of the grammar all of the model's end-of-sequence tokens are allowed, and nothing else.
    """

    def __init__(self, compiled: LLMatcher, vocab_size: int) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._excess_s = 0.0

    def mask(self) -> NDArray[np.int32]:
        with self._metered():
            words = np.frombuffer(self._compiled.compute_bitmask(), np.int32)
            return words[: -(-self._vocab_size // 32)].copy()  # torch shares only the writable

    def accept(self, token: int) -> None:
        with self._metered():
            self._compiled.consume_token(token)

    def count_allowed(self, tokens: list[int]) -> int:
        with self._metered():
            return self._compiled.validate_tokens(tokens)

    def masks(self, tokens: list[int]) -> list[NDArray[np.int32]]:
        with self._metered():
            # On a copy, as an end-of-sequence token can not always be rolled back.
            ahead = LibraryMatcher(self._compiled.deep_copy(), self._vocab_size)
            masks = [ahead.mask()]
            for token in tokens:
                ahead.accept(token)
                masks.append(ahead.mask())
            return masks

    @contextmanager
    def _metered(self) -> Generator[None]:
        """Raises GrammarError behind an operation that failed, or made this cost too much."""
        began_s = thread_time()  # of this thread alone: a busy machine is not the grammar's fault
        yield
        self._excess_s += max(0.0, thread_time() - began_s - _FREE_S)
        if self._compiled.is_error():
            raise _not_valid(explain(self._compiled.get_error()))
        if self._excess_s > _MAX_EXCESS_S:
            raise _not_valid("it needs too much work for each token")


def _not_valid(reason: str) -> GrammarError:
    return GrammarError(f"grammar is not valid: {reason}")  # TGI's words
