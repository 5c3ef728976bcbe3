"""Stream tokens: whoever has one may read one stream, or the events of one batch, for a while, and
do nothing else.

For a browser's EventSource, which can send no header: a page asks for a token with its key, or has
its own server ask, and puts it into the address. A token is signed for the stream, for the key that
asked, and for its end; the secret lies in Redis, so that any gateway can check it. It holds no
longer than the key does, and it is never logged.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

from common.broker import Broker
from common.clock import wall_ms
from common.failures import Failure

LIFETIME_S = 900
"""Longer than a generation runs by default. A connection that is open when it ends goes on."""

_PATH = re.compile(r"/v1/streams/([^/]+)|/v1/batches/([^/]+)/events")
_TOKEN = re.compile(r"([0-9]{1,12})\.([A-Za-z0-9]{0,64})\.([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class StreamToken:
    text: str
    expires_at: int
    """In seconds since 1970."""

    def shown(self, id: str, path: str) -> dict[str, Any]:
        """As it is answered; ``path`` is what it opens."""
        return {
            "id": id,
            "object": "stream.token",
            "token": self.text,
            "expires_at": self.expires_at,
            "url": f"{path}?token={self.text}",
        }


class StreamTokens:
    """Those of one pool."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def issue(
        self, request_id: str, tenant: str, key_id: str, now_s: int | None = None
    ) -> StreamToken:
        """A token for a stream of ``tenant``; ``key_id`` is empty where no key is asked for.

        Raises: Failure NOT_FOUND, also for what is another's; BROKER_UNAVAILABLE.
        """
        secret = await self._broker.stream_secret(secrets.token_hex(32), request_id, tenant)
        if secret is None:
            raise Failure("NOT_FOUND", "No such stream")
        return _signed(secret, request_id, key_id, now_s)

    async def issue_for_batch(self, batch_id: str, key_id: str) -> StreamToken:
        """A token for the events of a batch, for whoever was found to have it.

        Raises: Failure BROKER_UNAVAILABLE.
        """
        secret = await self._broker.stream_secret(secrets.token_hex(32))
        if secret is None:
            raise Failure("BROKER_UNAVAILABLE")
        return _signed(secret, batch_id, key_id)

    async def key_of(self, request_id: str, text: str) -> str:
        """The id of the key that a token for this stream was asked for with; may be empty.

        Raises: Failure AUTH_INVALID, AUTH_EXPIRED, BROKER_UNAVAILABLE.
        """
        found = _TOKEN.fullmatch(text)
        if found is None:
            raise _invalid()
        expires_at, key_id, signature = int(found[1]), found[2], found[3]
        secret = await self._broker.stream_secret(secrets.token_hex(32))
        expected = _sign(secret or b"", request_id, expires_at, key_id)
        if secret is None or not hmac.compare_digest(expected, signature):
            raise _invalid()
        if expires_at <= wall_ms() // 1000:
            raise Failure("AUTH_EXPIRED", "The stream token has expired; ask for another one")
        return key_id


def token_in(scope: Scope) -> tuple[str, str] | None:
    """The stream that a request wants to read, and the token that it brings instead of a key."""
    found = _PATH.fullmatch(scope["path"])
    if found is None or scope["method"] not in ("GET", "HEAD"):
        return None
    token = Request(scope).query_params.get("token")
    return None if token is None else (found[1] or found[2], token)


def _signed(secret: bytes, id: str, key_id: str, now_s: int | None = None) -> StreamToken:
    expires_at = (wall_ms() // 1000 if now_s is None else now_s) + LIFETIME_S
    signature = _sign(secret, id, expires_at, key_id)
    return StreamToken(f"{expires_at}.{key_id}.{signature}", expires_at)


def _sign(secret: bytes, request_id: str, expires_at: int, key_id: str) -> str:
    signed = f"{request_id}\n{expires_at}\n{key_id}".encode()
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _invalid() -> Failure:
    return Failure("AUTH_INVALID", "The stream token is not valid for this stream")
