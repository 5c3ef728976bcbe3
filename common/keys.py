"""API keys: what one allows its bearer, and how its secret is drawn, hashed and recognised.

A key reads ``sk-headrace-<id>-<secret>``. The id is public: it stands in logs and lists. The secret
is 256 random bits in base 62 and is shown once; what is stored is its HMAC-SHA256 under the pepper,
which never lies in Redis: who reads Redis alone can neither use nor test a key.
"""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import Literal, get_args

import msgspec

from common.failures import Failure
from common.messages import LANES, Lane

Scope = Literal["generate", "batch", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may be used for: answers and streams; files and batches; ``/ops``; ``/metrics``."""

PUBLIC_TENANT = "public"
"""Everybody's tenant where no key is asked for."""

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_KEY = re.compile(r"sk-headrace-([0-9a-f]{12})-([0-9A-Za-z]{43})")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_BITS = 256
_SECRET_DIGITS = 43
"""62**43 is the first power above 2**256."""
_MIN_PEPPER_CHARACTERS = 32


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The most that a key may use of each model; 0: no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers together; an answer counts what it was allowed until it has ended."""
    streams: int = 0
    """Prompts at once, waiting or running, streamed or not."""


NO_LIMITS = Limits()


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A key as it is stored: everything but its secret. Times are in seconds since 1970."""

    id: str
    tenant: str
    hash: bytes
    created_s: int
    name: str = ""
    """For people: whose, or what for."""
    scopes: tuple[Scope, ...] = ("generate",)
    models: tuple[str, ...] = ()
    """Names of models and adapters that may be asked for; none: all."""
    best_lane: Lane = LANES[0]
    """No request waits in a lane before this one."""
    limits: Limits = NO_LIMITS
    expires_s: int = 0
    """0: never."""
    old_hash: bytes = b""
    """Of the secret before the last rotation."""
    old_until_s: int = 0

    def is_expired(self, now_s: float) -> bool:
        return 0 < self.expires_s <= now_s

    def opens_with(self, digest: bytes, now_s: float) -> bool:
        """Whether ``digest`` is of a secret of this key; takes the same time whatever it is."""
        is_new = hmac.compare_digest(self.hash, digest)
        is_old = hmac.compare_digest(self.old_hash, digest)
        return is_new or (is_old and now_s < self.old_until_s)


def new_key_id() -> str:
    return secrets.token_hex(6)


def new_key_text(key_id: str) -> str:
    """The whole key with a new secret: what its bearer keeps."""
    number = secrets.randbits(_SECRET_BITS)
    digits: list[str] = []
    for _ in range(_SECRET_DIGITS):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return f"sk-headrace-{key_id}-{''.join(digits)}"


def key_id_of(text: str) -> str | None:
    """The public part of a key; None for what is no key of ours."""
    found = _KEY.fullmatch(text)
    return found[1] if found else None


def is_tenant(name: str) -> bool:
    """Short, so that it stays small beside each generation; no colon, as it is part of names."""
    return _TENANT.fullmatch(name) is not None


def tenant_hash(pepper: bytes | None, tenant: str) -> str:
    """What stands for a tenant's name in logs: 12 hex digits, the same wherever the pepper is."""
    if pepper is None:
        return hashlib.sha256(tenant.encode()).hexdigest()[:12]
    return hmac.digest(pepper, b"tenant " + tenant.encode(), "sha256").hex()[:12]


# The pepper --------------------------------------------------------------------------------------


def pepper_path(data_dir: Path) -> Path:
    return data_dir / "keys.pepper"


def read_pepper(given: str, data_dir: Path) -> bytes | None:
    """``given`` (``HEADRACE_KEY_PEPPER``), else what lies in the data directory; None: neither.

    Raises: Failure ACCESS_MISCONFIGURED for one that is short, or that others may read.
    """
    if given:
        if len(given) < _MIN_PEPPER_CHARACTERS:
            raise _misconfigured(
                f"HEADRACE_KEY_PEPPER must have at least {_MIN_PEPPER_CHARACTERS} characters"
            )
        return given.encode()
    path = pepper_path(data_dir)
    try:
        if path.stat().st_mode & 0o077:
            raise _misconfigured(f"others may read {path}: chmod 600 {path}")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise _misconfigured(f"{path} can not be read by this user") from error


def make_pepper(data_dir: Path) -> bytes:
    """Draw a pepper and keep it in the data directory, for this user alone.

    Raises: FileExistsError when there is one; OSError.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    pepper = secrets.token_hex(32).encode()
    fresh = data_dir / f".keys.pepper.{os.getpid()}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pepper)
            file.flush()
            os.fsync(file.fileno())
        pepper_path(data_dir).hardlink_to(fresh)  # whole or not at all, and never over another
    finally:
        fresh.unlink()
    return pepper


def hashed(pepper: bytes, text: str) -> bytes:
    """What is stored of a key's text: HMAC-SHA256 (RFC 2104) under the pepper."""
    return hmac.digest(pepper, text.encode(), "sha256")


def fingerprint(pepper: bytes) -> bytes:
    """Tells one pepper from another without telling anything of either."""
    return hashed(pepper, "headrace")[:8]


def no_pepper(data_dir: Path) -> Failure:
    return _misconfigured(
        f"There are API keys, and no pepper to check them with: neither {pepper_path(data_dir)} "
        "nor HEADRACE_KEY_PEPPER"
    )


def _misconfigured(message: str) -> Failure:
    return Failure("ACCESS_MISCONFIGURED", message)
