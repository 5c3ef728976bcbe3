"""What crosses a process boundary: typed, versioned, msgpack.

Unknown fields are ignored by the decoder; an unknown :data:`PROTOCOL` is refused by the functions
in Redis. Structs that are stored per token are arrays, those stored per request are maps.
"""

import json
import zlib
from collections.abc import Mapping
from enum import StrEnum
from json.encoder import encode_basestring_ascii
from typing import Literal, get_args

import msgspec

PROTOCOL = 1
"""Version of the state in Redis, and the number in the function library's name."""

Lane = Literal["priority", "default", "flex", "batch"]
LANES: tuple[Lane, ...] = get_args(Lane)
"""Lanes in the order in which they are claimed; the names are OpenAI's ``service_tier``."""
RANKS: Mapping[Lane, int] = {"priority": 0, "default": 0, "flex": 1, "batch": 2}
"""Whom a lane gives way to: those of a lower rank. 0 is interactive."""


class FinishReason(StrEnum):
    """Why a generation ended. The first three are TGI's names on the wire."""

    EOS = "eos_token"
    STOP = "stop_sequence"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must match: a JSON schema, a regular expression, or an EBNF grammar."""

    kind: Literal["json_schema", "regex", "ebnf"]
    value: str


class Watermark(msgspec.Struct, frozen=True):
    """Kirchenbauer et al. (arXiv 2301.10226): ``gamma`` is the share of the vocabulary that is
    green behind each token, ``delta`` what is added to the scores of green tokens.
    """

    gamma: float
    delta: float


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen. Neutral values switch a warper off.

    ``seed`` is always set (the gateway draws one if the request names none): with the position it
    keys all randomness, so any worker continues with the same tokens. ``keep_stop`` says whether
    the text that matched a stop string stays in the output (TGI keeps it, OpenAI does not);
    ``ignore_eos`` lets a generation run on behind an end-of-sequence token, to its length.

    ``frequency_penalty`` and ``presence_penalty`` are OpenAI's: so much less for each occurrence,
    or for any, in the answer. ``relative_frequency_penalty`` is TGI's ``frequency_penalty``: times
    the share of the tokens so far, prompt included, that are this one. Below ``min_new_tokens``
    neither end-of-sequence nor stop tokens are chosen.

    ``top_logprobs`` is how many of the likeliest tokens are told with each token, and
    ``prompt_logprobs`` whether the tokens of the prompt are told as well.
    """

    max_new_tokens: int
    seed: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    relative_frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    watermark: Watermark | None = None
    grammar: Grammar | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    keep_stop: bool = False
    ignore_eos: bool = False
    min_new_tokens: int = 0
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def of_choice(self, choice: int) -> "Sampling":
        """The same for the ``choice``-th of several answers, whose seeds all differ."""
        if choice == 0:
            return self
        return msgspec.structs.replace(self, seed=seed_of_choice(self.seed, choice))


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of the ``choice``-th of several answers to a request with ``seed``; the first one's
    is ``seed`` itself.
    """
    return (seed + choice * _SEED_STRIDE) % 2**64


_SEED_STRIDE = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): far from any seed
that somebody counts up by hand."""


class GenerationSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker needs to run a request; stored once and dropped when its choices ended.

    ``prompt`` holds the token ids as little-endian u32, so that a long prompt costs no parsing.
    ``request_id``, ``trace``, ``tenant_hash`` and ``key_id`` go into the worker's log lines.
    """

    prompt: bytes
    sampling: Sampling
    request_id: str
    trace: str = ""
    """W3C ``traceparent`` of whoever queued it; empty, or anything else: none."""
    tenant_hash: str = ""
    key_id: str = ""
    tenant: str = "public"
    """Whose prompt it is: only the same tenant's generations may use what it computes."""
    adapter: str = ""
    """Name of the LoRA adapter that computes with the model; empty: none."""


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The end of a generation: a reason; for ``failed`` also a code and a message.

    ``cached_tokens`` of its prompt did not have to be computed, by the worker that ended it.
    ``flagged`` is what its worker saw to be wrong with the answer, which stands all the same.
    """

    reason: str
    code: str = ""
    message: str = ""
    cached_tokens: int = 0
    flagged: str = ""


TopTokens = list[tuple[int, float]]
"""The likeliest tokens of one position, best first, with their log-probabilities."""


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry per token of the prompt; the first one has nothing before it, so it has None."""

    logprobs: list[float | None]
    tops: list[TopTokens | None] | None = None


class TokenRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of a token log: the tokens of one step, or the end, or both.

    ``start`` is the position of the first token, so the entry ends at ``start + len(tokens)``;
    ``chain`` is the chain at that end. ``pieces`` holds one text per token, as the inside of an
    ASCII-escaped JSON string (see :func:`escape_piece`): frames are made by joining bytes. A piece
    is empty while its text is held back (half a character, a possible stop string); the text then
    stands in the piece of the token that released it. The pieces of special tokens are empty.
    ``logprobs`` are natural logarithms, one per token; ``tops`` also has one entry per token where
    the request asks for any. ``prompt`` stands in the first record of a log, likewise.
    """

    start: int
    chain: str
    tokens: list[int]
    pieces: list[bytes]
    logprobs: list[float] | None = None
    finish: Finish | None = None
    tops: list[TopTokens] | None = None
    prompt: PromptLogprobs | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Timing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Written by Redis with the end of each generation: one clock for all times (ms since 1970).

    ``claimed`` is the first claim and ``first_token`` the first publish; 0 if it never happened.
    ``attempts`` counts claims, ``deaths`` the workers that died of or with this generation.
    """

    admitted: int
    claimed: int
    first_token: int
    ended: int
    attempts: int
    deaths: int
    model_version: str
    worker: str
    lane: str

    @property
    def queue_time_s(self) -> float:
        return max(0, (self.claimed or self.ended) - self.admitted) / 1000

    @property
    def generation_time_s(self) -> float:
        return max(0, self.ended - self.claimed) / 1000 if self.claimed else 0.0

    @property
    def time_to_first_token_s(self) -> float | None:
        return (self.first_token - self.admitted) / 1000 if self.first_token else None

    def tokens_per_second(self, num_tokens: int) -> float:
        """Tokens per second of generation time; 0.0 when nothing was generated."""
        return num_tokens / self.generation_time_s if self.generation_time_s > 0 else 0.0


class LogEntry(msgspec.Struct, frozen=True, gc=False):
    """A record as it is read back; ``timing`` stands with the terminal entry only."""

    record: TokenRecord
    timing: Timing | None = None


def chain_start(generation_id: str, model_version: str) -> int:
    """The chain at position 0."""
    return zlib.crc32(f"{generation_id}\n{model_version}".encode())


def chain_next(chain: int, token: int) -> int:
    """The chain one position further: crc32 over the token id as little-endian u32."""
    return zlib.crc32(token.to_bytes(4, "little"), chain)


def chain_text(chain: int) -> str:
    """Eight hex digits, as stored in Redis and shown in a cursor."""
    return f"{chain:08x}"


def escape_piece(text: str) -> bytes:
    """The inside of an ASCII-escaped JSON string: no quotes, no raw control or line separators."""
    return encode_basestring_ascii(text)[1:-1].encode()


def unescape_pieces(pieces: list[bytes]) -> str:
    """The text that ``pieces`` stand for together."""
    return json.loads(b'"' + b"".join(pieces) + b'"')
