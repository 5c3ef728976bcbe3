"""How often each token stands in a generation: what penalties need, kept as tokens come."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.messages import Sampling


@dataclass(frozen=True, slots=True)
class Counts:
    """Distinct tokens, each with its occurrences; the arrays are as long as each other.

    They may be those that :class:`TokenCounts` goes on to grow: read them before the next token.
    """

    ids: "array[int]"
    in_all: "array[int]"
    """Occurrences in prompt and answer."""
    in_answer: "array[int]"
    num_tokens: int
    """Length of prompt and answer, the sum of ``in_all``."""


class TokenCounts:
    """The tokens of one sequence, counted; a new one costs the same however many there are."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places: dict[int, int] = {}
        self._ids = array("q")
        self._in_all = array("q")
        self._in_answer = array("q")
        self._num_tokens = 0
        for token in prompt:
            self._in_all[self._place(token)] += 1
            self._num_tokens += 1

    def append(self, token: int) -> None:
        """Take the next token of the answer."""
        place = self._place(token)
        self._in_all[place] += 1
        self._in_answer[place] += 1
        self._num_tokens += 1

    def with_draft(self, draft: Sequence[int] = ()) -> Counts:
        """The counts as they would be behind ``draft``, which is not taken."""
        if not draft:
            return Counts(self._ids, self._in_all, self._in_answer, self._num_tokens)
        ids, in_all, in_answer = self._ids[:], self._in_all[:], self._in_answer[:]
        places: dict[int, int] = {}
        for token in draft:
            place = self._places.get(token, places.get(token))
            if place is None:
                place = places[token] = len(ids)
                ids.append(token)
                in_all.append(0)
                in_answer.append(0)
            in_all[place] += 1
            in_answer[place] += 1
        return Counts(ids, in_all, in_answer, self._num_tokens + len(draft))

    def _place(self, token: int) -> int:
        """Where ``token`` stands in the arrays; makes room for it if it is new."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._ids)
            self._ids.append(token)
            self._in_all.append(0)
            self._in_answer.append(0)
        return place


def are_counts_needed(sampling: Sampling) -> bool:
    """Whether what is chosen depends on the tokens before."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or sampling.relative_frequency_penalty != 0.0
    )
