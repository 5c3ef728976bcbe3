"""Prompts of an exact length in tokens that no cache has seen: common words in random order.

Each word, with the space before it, is one token in practically every vocabulary, so a text of n
words has n tokens plus a constant (a begin token, a chat template), which one request that tells
its length reveals.
"""

import random

# fmt: off
_WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they",
    "which", "one", "you", "were", "all", "her", "she", "there", "would", "their", "we", "him",
    "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said", "what", "up",
    "its", "about", "into", "than", "them", "can", "only", "other", "new", "some", "could", "time",
    "these", "two", "may", "then", "do", "first", "any", "my", "now", "such", "like", "our", "over",
    "man", "me", "even", "most", "made", "after", "also",
]
# fmt: on


class Prompts:
    """Texts of ``num_words`` words of which the first ``num_shared`` are the same in all.

    Behind those no two begin alike: the first words count the prompts, in an order that ``seed``
    shuffles.
    """

    def __init__(self, num_words: int, *, num_shared: int = 0, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._digits = self._rng.sample(_WORDS, len(_WORDS))
        self._shared = self._rng.choices(_WORDS, k=num_shared)
        self._num_own = max(1, num_words - num_shared)
        self._number = 0

    def next(self) -> str:
        own = self._rng.choices(_WORDS, k=self._num_own)
        number, place = self._number, 0
        while place < len(own) and (number or place < 2):
            number, digit = divmod(number, len(self._digits))
            own[place] = self._digits[digit]
            place += 1
        self._number += 1
        return " ".join([*self._shared, *own])
