"""A grammar for tests that needs no library: rules over token ids, a function of those taken."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_model import EOS_TOKEN_IDS
from workers.engine.grammar import GrammarError

VOCABULARY = 300


@dataclass
class Residues:
    """Implements :class:`workers.engine.grammar.Matcher`: ids modulo 3 go round, from 1 on.

    ``length`` tokens, then only the end; ``breaks_at``: there it needs too much work.
    """

    length: int = 1000
    breaks_at: int = -1
    taken: list[int] = field(default_factory=list[int])

    def mask(self) -> NDArray[np.int32]:
        if len(self.taken) == self.breaks_at:
            raise GrammarError("The grammar is too hard.")
        return self._mask(self.taken)

    def accept(self, token: int) -> None:
        if self.count_allowed([token]) == 0:
            raise GrammarError(f"{token} is not allowed here.")
        self.taken.append(token)

    def count_allowed(self, tokens: list[int]) -> int:
        for count, token in enumerate(tokens):
            if token not in _ids(self._mask(self.taken + tokens[:count])):
                return count
        return len(tokens)

    def masks(self, tokens: list[int]) -> list[NDArray[np.int32]]:
        assert self.count_allowed(tokens) == len(tokens)
        return [self._mask(self.taken + tokens[:count]) for count in range(len(tokens) + 1)]

    def _mask(self, taken: list[int]) -> NDArray[np.int32]:
        if len(taken) >= self.length:
            return _bits(set(EOS_TOKEN_IDS))
        residue = (taken[-1] + 1) % 3 if taken else 1
        return _bits(set(range(residue, VOCABULARY, 3)) - set(EOS_TOKEN_IDS))


def _bits(ids: set[int]) -> NDArray[np.int32]:
    flags = np.zeros(-(-VOCABULARY // 32) * 32, dtype=np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def _ids(mask: NDArray[np.int32]) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
