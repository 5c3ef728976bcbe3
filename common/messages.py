"""What crosses a process boundary: typed, versioned, msgpack.

Unknown fields are ignored by the decoder; an unknown :data:`PROTOCOL` is refused by the functions
in Redis. Structs that are stored per token are arrays, those stored per request are maps.
"""

import json
import zlib
from enum import StrEnum
from typing import Literal, get_args

import msgspec

PROTOCOL = 1
"""Version of the state in Redis, and the number in the function library's name."""

Lane = Literal["priority", "default", "flex", "batch"]
LANES: tuple[Lane, ...] = get_args(Lane)
"""Lanes by rank; the names are OpenAI's ``service_tier``."""


class FinishReason(StrEnum):
    """Why a generation ended. The first three are TGI's names on the wire."""

    EOS = "eos_token"
    STOP = "stop_sequence"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen. Neutral values switch a warper off.

    ``seed`` is always set (the gateway draws one if the request names none): with the position it
    keys all randomness, so any worker continues with the same tokens. ``keep_stop`` says whether
    the text that matched a stop string stays in the output (TGI keeps it, OpenAI does not);
    ``ignore_eos`` lets a generation run on behind an end-of-sequence token, to its length.
    """

    max_new_tokens: int
    seed: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    ignore_eos: bool = False


class GenerationSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker needs to run a request; stored once and dropped when its choices ended.

    ``prompt`` holds the token ids as little-endian u32, so that a long prompt costs no parsing.
    ``request_id`` and ``trace`` go into the worker's log lines.
    """

    prompt: bytes
    sampling: Sampling
    request_id: str
    trace: str = ""
    tenant: str = "public"
    """Whose prompt it is: only the same tenant's generations may use what it computes."""


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """The end of a generation: a reason; for ``failed`` also a code and a message."""

    reason: str
    code: str = ""
    message: str = ""


class TokenRecord(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a token log: the tokens of one step, or the end, or both.

    ``start`` is the position of the first token, so the entry ends at ``start + len(tokens)``;
    ``chain`` is the chain at that end. ``pieces`` holds one text per token, as the inside of an
    ASCII-escaped JSON string (see :func:`escape_piece`): frames are made by joining bytes. A piece
    is empty while its text is held back (half a character, a possible stop string); the text then
    stands in the piece of the token that released it. The pieces of special tokens are empty.
    ``logprobs`` are natural logarithms, one per token.
    """

    start: int
    chain: str
    tokens: list[int]
    pieces: list[bytes]
    logprobs: list[float] | None = None
    finish: Finish | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Timing(msgspec.Struct, frozen=True, array_like=True):
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


class LogEntry(msgspec.Struct, frozen=True):
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
    return json.dumps(text)[1:-1].encode()


def unescape_pieces(pieces: list[bytes]) -> str:
    """The text that ``pieces`` stand for together."""
    return json.loads(b'"' + b"".join(pieces) + b'"')
