"""The tokenizer of a stored model, for gateways and workers alike: text to ids and back.

This is the Rust library below transformers' fast tokenizers, on the model's own ``tokenizer.json``.
transformers itself stays out: its ``AutoTokenizer`` takes seconds to import, pulls in torch where
torch is installed, and builds some tokenizers anew from parts of the file.
"""

import asyncio
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from common.failures import Failure
from common.models.byte_level import symbol_bytes
from common.models.files import NAMED_TOKENS, TOKENIZER_FILE, JsonObject, read_json, token_text

_REPLACEMENT = "\ufffd"
_WORD_START = "\u2581"
"""How SentencePiece writes a space."""
_INLINE_CHARACTERS = 10_000
"""Encoding runs at 2 MB/s or more, so a text up to here blocks the event loop for 5 ms at most."""


class Tokenizer:
    """Immutable after loading; every method may be called from any thread."""

    def __init__(self, backend: Backend, config: JsonObject) -> None:
        """``config`` is the content of ``tokenizer_config.json``: it names the special tokens."""
        # A file may carry the padding and truncation of whoever saved it last.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.bos_token = token_text(config, "bos_token")
        self.eos_token = token_text(config, "eos_token")
        self.named_tokens = {
            key: text for key in NAMED_TOKENS if (text := token_text(config, key)) is not None
        }
        self._add_missing_tokens()
        self._apply_added_ends(config)
        self.special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.byte_ids = self._byte_ids()
        """Tokens that stand for one raw byte (``<0xE2>``), decoded as a run or not at all; most
        tokenizers have none."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._bytes_by_id: dict[int, bytes] = {}
        self._text_by_id: dict[int, str] = {}

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of the model directory ``path``.

        Raises:
            Failure: MODEL_LOAD_FAILED, if its files cannot be used.
        """
        config = path / "tokenizer_config.json"
        legacy = path / "special_tokens_map.json"
        named = read_json(legacy) if legacy.exists() else {}
        named |= read_json(config) if config.exists() else {}
        try:
            backend = Backend.from_file(str(path / TOKENIZER_FILE))
        except Exception as error:
            raise Failure(
                "MODEL_LOAD_FAILED", f"{path / TOKENIZER_FILE} cannot be read: {error}"
            ) from error
        return cls(backend, named)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; special tokens written out in it become their single ids.

        ``add_special_tokens`` adds what the model wants at the ends (often a BOS, often nothing); a
        rendered chat template has them already.

        Raises:
            Failure: BAD_REQUEST, if the text holds lone surrogates.
        """
        return self._encode(text, add_special_tokens, offsets=False).ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As :meth:`encode`, for an event loop: a long text is encoded in a thread."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> list[tuple[int, str, int, int]]:
        """``(id, text, start, stop)`` of each token; the offsets count bytes of UTF-8.

        Tokens that share one character (an emoji of several tokens) each cover it whole; added
        special tokens cover nothing. Raises as :meth:`encode`.
        """
        encoding = self._encode(text, add_special_tokens, offsets=True)
        to_bytes = list(accumulate(map(_utf8_length, text), initial=0))
        # One by one: all at once (`offsets`) they hold the GIL for a tenth of a second.
        places = (encoding.token_to_chars(index) or (0, 0) for index in range(len(encoding)))
        return [
            (token, text[start:stop], to_bytes[start], to_bytes[stop])
            for token, (start, stop) in zip(encoding.ids, places, strict=True)
        ]

    async def encode_with_offsets_async(
        self, text: str, *, add_special_tokens: bool = True
    ) -> list[tuple[int, str, int, int]]:
        """As :meth:`encode_with_offsets`, for an event loop: a long text goes to a thread."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.encode_with_offsets(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.encode_with_offsets, text, add_special_tokens=add_special_tokens
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Bytes that make no character are U+FFFD, unknown ids nothing."""
        if len(ids) != 1 or not skip_special_tokens:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        # Remembered, since a detokenizer asks for the text of every token that it has seen.
        text = self._text_by_id.get(ids[0])
        if text is None:
            text = self._text_by_id[ids[0]] = self._backend.decode(ids)
        return text

    def token_text(self, id: int) -> str:
        """The text of one token alone, special or not: ``<|im_end|>``; of an unknown id ``""``."""
        return self._backend.decode([id], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token as it stands within a text, also where they are but a part of a
        character; of an unknown id none.
        """
        known = self._bytes_by_id.get(id)
        if known is None:
            known = self._bytes_by_id[id] = self._bytes_of(id)
        return known

    def _bytes_of(self, id: int) -> bytes:
        text, symbol = self.token_text(id), self._backend.id_to_token(id) or ""
        if id in self.byte_ids:
            return bytes([int(symbol[3:5], 16)])
        if _REPLACEMENT in text:
            return symbol_bytes(symbol) or text.encode()
        if symbol.startswith(_WORD_START) and not text.startswith(" "):
            text = " " + text  # decoders drop it at the start of a text, which this is not
        return text.encode()

    def to_json(self) -> str:
        """The tokenizer as it stands, in the form of a ``tokenizer.json``."""
        return self._backend.to_str()

    def _encode(self, text: str, add_special_tokens: bool, *, offsets: bool) -> Encoding:
        # The batch calls: unlike `encode` they release the GIL while they work, and the fast one
        # takes half the time because it keeps no offsets.
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        try:
            return encode([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:
            raise Failure("BAD_REQUEST", "The text holds a lone surrogate.") from error

    def _byte_ids(self) -> frozenset[int]:
        names = (f"<0x{byte:02X}>" for byte in range(256))
        ids = ((name, self._backend.token_to_id(name)) for name in names)
        # Where the decoder knows no bytes, a token of that name is plain text.
        return frozenset(
            token
            for name, token in ids
            if token is not None and self._backend.decode([token]) != name
        )

    def _add_missing_tokens(self) -> None:
        """Tokens that the configuration calls special stay whole, whatever the file says."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        missing = [text for text in self.named_tokens.values() if text not in known]
        present = [text for text in missing if self._backend.token_to_id(text) is not None]
        self._backend.add_special_tokens([AddedToken(text, special=True) for text in present])

    def _apply_added_ends(self, config: JsonObject) -> None:
        """Follow ``add_bos_token`` and ``add_eos_token`` where the configuration says them.

        They outrank the file's own post-processor, as in transformers; some models rely on it.
        """
        wishes = [config.get("add_bos_token"), config.get("add_eos_token")]
        if wishes == [None, None]:
            return
        bos, eos = (
            text if wish and text is not None else None
            for wish, text in zip(wishes, (self.bos_token, self.eos_token), strict=True)
        )
        ends = {text: self._backend.token_to_id(text) for text in (bos, eos) if text is not None}
        wanted = [ends[text] for text in (bos, eos) if text is not None]
        if None in wanted or self._backend.encode("", add_special_tokens=True).ids == wanted:
            return
        self._backend.post_processor = TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(text, token) for text, token in ends.items() if token is not None],
        )


def _utf8_length(character: str) -> int:
    code = ord(character)
    return 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4
