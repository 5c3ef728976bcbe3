"""Keeps other websites out of what needs no key.

On loopback nobody has to show a key, so any page that the operator has open in a browser could
otherwise have his browser drain his workers (a request across sites), or ask and read under a name
of its own that it lets point to 127.0.0.1 (DNS rebinding). Who shows a key that holds is past this:
no browser adds one by itself, and no other site knows one. A header alone proves nothing: where no
key is asked for, any will do.
"""

from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from common.failures import Failure
from common.settings import GatewaySettings, is_loopback
from gateway.callers import Callers, caller_of
from gateway.services import services_of

_OWN = ("same-origin", "none")
"""``Sec-Fetch-Site`` of a page of ours, and of an address that was typed in."""
MAX_SHOWN_HOST = 100


class HostCheck:
    """Refuses, on every path, who calls a gateway of this machine alone by a foreign name.

    That is one on loopback that asks for no key, unless it was told to take whoever comes. A
    request without a name is let pass: browsers always send one. ``refuse`` makes the answer of a
    failure.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: GatewaySettings,
        callers: Callers,
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._callers = callers
        self._refuse = refuse
        self._allowed = settings.allowed_hosts
        self._is_wanted = is_loopback(settings.host) and not settings.allow_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_wanted:
            host = Headers(scope=scope).get("host", "")
            if host and not is_own_host(host, self._allowed) and await self._is_open():
                response = await self._refuse(Request(scope), _not_allowed(host))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _is_open(self) -> bool:
        """Who cannot find out leaves it to whoever checks the key, who cannot either."""
        try:
            return await self._callers.is_open_here()
        except Failure:
            return False


def check_same_site(request: Request) -> None:
    """Let pass who shows a key, who is no browser, and pages of this gateway.

    Raises: Failure SCOPE_DENIED, HOST_NOT_ALLOWED.
    """
    headers = request.headers
    if caller_of(request).has_key:
        return
    host, settings = headers.get("host", ""), services_of(request).settings
    if is_loopback(settings.host) and not is_own_host(host, settings.allowed_hosts):
        raise _not_allowed(host)
    origin = headers.get("origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != host
    if is_foreign or headers.get("sec-fetch-site", "none") not in _OWN:
        raise Failure("SCOPE_DENIED", "This request comes from a page of another site")


def is_own_host(host: str, allowed: Collection[str]) -> bool:
    """Whether ``host``, as in the header, is a name of this machine to itself or an ``allowed``
    one, with any port.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) or name in map(str.lower, allowed)


def _not_allowed(host: str) -> Failure:
    return Failure(
        "HOST_NOT_ALLOWED",
        f"Without keys this gateway answers to localhost only, not to {host[:MAX_SHOWN_HOST]!r}: "
        "name it with --allowed-hosts (HEADRACE_ALLOWED_HOSTS), or make a key",
    )
