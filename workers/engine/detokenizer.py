"""Token ids to text, one token at a time: together the pieces are what decoding all ids gives.

Held back is what a later token can still change: half a UTF-8 character, and a run of byte tokens
(``<0xE2>``…), which tokenizers with byte fallback decode as a whole or not at all. Special tokens
have no text.
"""

from collections.abc import Sequence
from typing import Protocol

HALF = "\ufffd"
"""How decoders write bytes that are not a character (yet)."""

_CONTEXT_TOKENS = 5
"""Prompt tokens that the first piece is decoded behind: whether it starts with a space depends on
its left neighbour, and the neighbour's own text must be more than half a character."""


class TextDecoder(Protocol):
    """What detokenizing needs of a tokenizer."""

    special_ids: frozenset[int]
    byte_ids: frozenset[int]
    """Tokens of one raw byte in a tokenizer that falls back to them; of others none."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, id: int) -> bytes:
        """Of one token within a text, also where they are but a part of a character."""
        ...


class Detokenizer:
    """The text of one generation.

    Decodes a short window of recent tokens, never the whole text. A window begins where all text
    before it was settled, and with a token that has text, because decoders treat the first token
    differently (they drop its leading space).
    """

    def __init__(self, tokenizer: TextDecoder, prompt: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._special_ids = tokenizer.special_ids
        self._byte_ids = tokenizer.byte_ids
        self._window = self._context(prompt)
        self._new_from = len(self._window)
        self._num_shown = len(self._decode(self._window))

    def push(self, token: int) -> str:
        """Take one token; returns the text that is settled by it, possibly ''."""
        if token in self._special_ids:
            return ""
        self._window.append(token)
        if token in self._byte_ids:
            return ""
        text = self._decode(self._window)
        held = text.endswith(HALF)
        fresh = text[self._num_shown : len(text) - held]
        self._num_shown += len(fresh)
        if fresh and not held:
            self._slide()
        return fresh

    def flush(self) -> str:
        """The text still held back, as it stands; for the end of a generation."""
        fresh = self._decode(self._window)[self._num_shown :]
        self._num_shown += len(fresh)
        return fresh

    def _slide(self) -> None:
        """Drop the tokens before the ones that were just shown."""
        del self._window[: self._new_from]
        self._new_from = len(self._window)
        self._num_shown = len(self._decode(self._window))

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last few prompt tokens with text; more where they would begin inside a byte run."""
        context: list[int] = []
        for token in reversed(prompt):
            if token in self._special_ids:
                continue
            if len(context) >= _CONTEXT_TOKENS and context[-1] not in self._byte_ids:
                break
            context.append(token)
        context.reverse()
        return context
