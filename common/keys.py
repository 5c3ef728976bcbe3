"""What a key allows its bearer: scopes, models, a lane, limits.

Nothing here talks to Redis or reads a secret.
"""

from typing import Literal, get_args

import msgspec

Scope = Literal["generate", "batch", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may be used for: answers and streams; files and batches; ``/ops``; ``/metrics``."""

PUBLIC_TENANT = "public"
"""Everybody's tenant where no key is asked for."""


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The most a key may use; 0: no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers together; an answer counts what it was allowed until it has ended."""
    streams: int = 0
    """Requests at once, waiting or running, streamed or not."""


NO_LIMITS = Limits()
