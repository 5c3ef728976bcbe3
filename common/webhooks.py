"""Webhooks: who wants to be told of which ends, with what secret, and what each is told.

An endpoint is a URL of one tenant. What it is told is an event of OpenAI's webhooks, signed as
Standard Webhooks 1.0 says (https://www.standardwebhooks.com). An event has one id however often it
is noted or sent, so that receivers can drop what they have had.

Endpoint secrets are stored nowhere: each is the HMAC-SHA256 of the endpoint's id and a salt, under
the pepper that API keys are hashed with. Who reads Redis alone cannot sign.
"""

import base64
import hashlib
import ipaddress
import re
import secrets
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

import msgspec

from common import keys

EventType = Literal[
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.failed",
    "response.cancelled",
    "response.incomplete",
]
EVENTS: tuple[EventType, ...] = get_args(EventType)

GIVE_UP_S = 72 * 3600
"""An event is sent again for so long, as OpenAI does."""

MAX_URL_CHARACTERS = 2048
_URL_CHARACTERS = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII without space and backslash: what every parser reads alike."""
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)*"
    r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?",
    re.IGNORECASE,
)
"""The last label begins with a letter: no way of writing an IPv4 address passes for a name."""
_FIRST_FREE_PORT = 1024
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Endpoint(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A URL that is told of events. Times are in seconds since 1970."""

    id: str
    tenant: str
    url: str
    created_s: int
    salt: str
    pepper: bytes
    """Fingerprint of the pepper that its secret hangs on."""
    events: tuple[EventType, ...] = EVENTS
    old_salt: str = ""
    """Of the secret before the last rotation."""
    old_until_s: int = 0
    disabled: str = ""
    """Why nothing is sent any more; empty: it is."""

    def wants(self, tenant: str, event_type: EventType) -> bool:
        return self.tenant == tenant and event_type in self.events and not self.disabled

    def secrets(self, pepper: bytes, now_s: float) -> list[str]:
        """What to sign with now, the newest first."""
        salts = [self.salt, self.old_salt] if now_s < self.old_until_s else [self.salt]
        return [_secret(pepper, self.id, salt) for salt in salts]


class Delivery(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event on its way to one endpoint. Times are in seconds since 1970."""

    event_id: str
    event_type: EventType
    object_id: str
    """Of the batch or the response."""
    tenant: str
    endpoint_id: str
    created_s: int
    give_up_s: int
    state: Literal["waiting", "delivered", "dead"] = "waiting"
    attempts: int = 0
    last: str = ""
    """What the last attempt came to, for people."""
    last_s: int = 0

    @property
    def id(self) -> str:
        return f"{self.event_id}.{self.endpoint_id}"

    def body(self) -> bytes:
        """The event as it is sent, the same each time."""
        return msgspec.json.encode(
            {
                "id": self.event_id,
                "object": "event",
                "created_at": self.created_s,
                "type": self.event_type,
                "data": {"id": self.object_id},
            }
        )


def new_endpoint_id() -> str:
    return f"we_{secrets.token_hex(8)}"


def new_salt() -> str:
    return secrets.token_hex(16)


def event_id(event_type: EventType, object_id: str) -> str:
    """The same for the same end, whoever notes it and however often."""
    return f"evt_{hashlib.sha256(f'{event_type} {object_id}'.encode()).hexdigest()[:32]}"


def _secret(pepper: bytes, endpoint_id: str, salt: str) -> str:
    digest = keys.hashed(pepper, f"webhook {endpoint_id} {salt}")
    return f"whsec_{base64.b64encode(digest).decode()}"


# Where events may be sent ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart once: nothing parses it again."""

    scheme: Literal["http", "https"]
    host: str
    """A name or an address, without brackets."""
    port: int
    path: str
    """With its query."""

    @property
    def authority(self) -> str:
        """As the header ``host`` says it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"


def target_of(url: str, *, allow_private: bool) -> Target:
    """The parts of a URL that events may be sent to.

    ``allow_private`` is for closed networks: plain HTTP and any port, too.

    Raises: ValueError, with the reason in its message.
    """
    if len(url) > MAX_URL_CHARACTERS or not _URL_CHARACTERS.fullmatch(url):
        raise ValueError("must be printable ASCII without spaces and backslashes")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError("is no URL") from error
    if parts.scheme == "https":
        scheme, default = "https", 443
    elif parts.scheme == "http" and allow_private:
        scheme, default = "http", 80
    else:
        raise ValueError("must begin with https://")
    host = parts.hostname or ""
    if "@" in parts.netloc:
        raise ValueError("must not name a user")
    if parts.fragment or "#" in url:
        raise ValueError("must not have a fragment")
    if not (_is_address(host) or _HOST_NAME.fullmatch(host)):
        raise ValueError("must name a host, or an address in its usual form")
    port = default if port is None else port
    if not allow_private and port != default and port < _FIRST_FREE_PORT:
        raise ValueError(f"must be on port {default}, or one from {_FIRST_FREE_PORT} on")
    query = f"?{parts.query}" if parts.query else ""
    target = Target(scheme, host, port, f"{parts.path or '/'}{query}")
    if not allow_private and _is_address(host) and not is_public(host):
        raise ValueError("must be on a public address")
    return target


def is_public(address: str) -> bool:
    """Whether everybody on the internet means the same machine by this address.

    Addresses that hold another one inside are judged by that one, or not taken at all.
    """
    found: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        elif found.sixtofour is not None or found.teredo is not None or found.is_site_local:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host
