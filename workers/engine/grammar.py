"""What the engine asks of a grammar: which tokens may come next, and to follow those that came."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Matcher(Protocol):
    """One generation's place in its grammar. Not thread-safe; a function of the tokens taken."""

    def mask(self) -> NDArray[np.int32]:
        """Allowed next tokens, one bit each, ``[ceil(vocabulary / 32)]``, low bits first.

        Raises:
            GrammarError: the grammar needs more work than a step may cost.
        """
        ...

    def accept(self, token: int) -> None:
        """Take the next token.

        Raises:
            GrammarError: it is not allowed here.
        """
        ...

    def count_allowed(self, tokens: list[int]) -> int:
        """How many of ``tokens``, one behind the other, could come next; takes none of them."""
        ...

    def masks(self, tokens: list[int]) -> list[NDArray[np.int32]]:
        """The mask here and behind each of ``tokens``, which must be allowed; takes none."""
        ...


class GrammarError(Exception):
    """Of one generation, which cannot go on; the text may be shown to its client."""
