"""Idempotency keys: one request, however often it is sent, is answered once.

A client that cannot know whether its POST arrived sends it again to any gateway, under the same
``Idempotency-Key``. It then reads, from the beginning, what the first one made or is still making:
the key stands for as long as its answer is kept. Keys belong to their tenant, and Redis knows their
digests only. See draft-ietf-httpapi-idempotency-key-header; where it asks for 409 while the first
request runs, a second reader is welcome here.
"""

import hashlib
import re
from dataclasses import dataclass

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request

from common.failures import Failure

HEADER = "Idempotency-Key"
MAX_CHARACTERS = 255

_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
"""A string of RFC 9651, as the draft has it."""
_BARE = re.compile(r"[!#-~]+")
"""As most clients send it: visible characters without quotes."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    key: str
    fingerprint: str
    """Of what was asked for: another one under the same key is refused."""


def digest_of(key: str, choice: int) -> str:
    """What Redis knows the prompt by whose first choice is ``choice``.

    Several prompts in one body are as many requests.
    """
    return hashlib.sha256(f"{choice}:{key}".encode()).hexdigest()[:32]


async def idempotency_of(request: Request) -> Idempotency | None:
    """What the header says, with the fingerprint of path and body; None without the header.

    The body must have been decoded before.

    Raises: Failure BAD_REQUEST.
    """
    key = key_in(request.headers)
    if not key:
        return None
    return Idempotency(key, _fingerprint(request.url.path, await request.body()))


def key_in(headers: Headers) -> str:
    """What the header says; "" without the header. Raises: Failure BAD_REQUEST."""
    texts = headers.getlist(HEADER)
    if not texts:
        return ""
    key = _key(texts[0]) if len(texts) == 1 else ""
    if not 0 < len(key) <= MAX_CHARACTERS:
        raise Failure(
            "BAD_REQUEST",
            f"{HEADER} must be one string of 1 to {MAX_CHARACTERS} visible characters",
            field=HEADER,
        )
    return key


def _key(text: str) -> str:
    """The key, or "" where there is none."""
    quoted = _QUOTED.fullmatch(text.strip())
    if quoted is not None:
        return re.sub(r"\\(.)", r"\1", quoted[1])
    bare = _BARE.fullmatch(text.strip())
    return "" if bare is None else bare[0]


def _fingerprint(path: str, body: bytes) -> str:
    """The same for the same JSON, whatever its spaces and the order of its fields."""
    try:
        same = msgspec.json.encode(msgspec.json.decode(body), order="deterministic")
    except (msgspec.DecodeError, UnicodeDecodeError):  # in a field that nobody reads
        same = body
    return hashlib.sha256(path.encode() + b"\0" + same).hexdigest()[:32]
