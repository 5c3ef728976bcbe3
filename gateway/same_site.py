"""Keeps other websites out of what needs no key.

On loopback nobody has to show a key, so any page that the operator has open in a browser could
otherwise have his browser drain his workers (a request across sites), or read his pool under a name
of its own that it lets point to 127.0.0.1 (DNS rebinding). Who shows a key that holds is past this:
no browser adds one by itself, and no other site knows one. A header alone proves nothing: where no
key is asked for, any will do.
"""

from urllib.parse import urlsplit

from starlette.requests import Request

from common.failures import Failure
from common.settings import is_loopback
from gateway.callers import caller_of
from gateway.services import services_of

_OWN = ("same-origin", "none")
"""``Sec-Fetch-Site`` of a page of ours, and of an address that was typed in."""


def check_same_site(request: Request) -> None:
    """Let pass who shows a key, who is no browser, and pages of this gateway.

    Raises: Failure SCOPE_DENIED.
    """
    headers = request.headers
    if caller_of(request).has_key:
        return
    host = headers.get("host", "")
    if is_loopback(services_of(request).settings.host) and not _is_loopback_host(host):
        raise Failure("SCOPE_DENIED", "Without a key this is for localhost only, by that name")
    origin = headers.get("origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != host
    if is_foreign or headers.get("sec-fetch-site", "none") not in _OWN:
        raise Failure("SCOPE_DENIED", "This request comes from a page of another site")


def _is_loopback_host(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
