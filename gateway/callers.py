"""Who calls: the tenant that a request belongs to, and what it may do.

Without keys everybody is the tenant ``public`` and may do everything. What belongs to one tenant
does not exist for another.
"""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from common import keys
from common.keys import NO_LIMITS, PUBLIC_TENANT, SCOPES, Limits
from common.messages import LANES, Lane


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    tenant: str = PUBLIC_TENANT
    key_id: str = ""
    """Public part of the key; empty where none is asked for."""
    scopes: frozenset[keys.Scope] = frozenset(SCOPES)
    models: frozenset[str] | None = None
    """Names of models and adapters that may be asked for; None: all."""
    best_lane: Lane = LANES[0]
    """No request of this caller waits in a lane before this one."""
    limits: Limits = NO_LIMITS


PUBLIC = Caller()
"""Everybody, where no key is asked for."""


class Identification:
    """Puts the caller on each request, for :func:`caller_of`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headrace.caller"] = PUBLIC
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Whose request it is."""
    return request.scope["headrace.caller"]
