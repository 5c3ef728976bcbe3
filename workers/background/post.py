"""One POST to a URL that a tenant chose, and no way from there into our own network.

The URL is parsed once (``common.webhooks.target_of``) and its name resolved once; the connection
goes to one of the addresses that were looked at, whatever the name says a moment later. Redirects
are not followed, proxies of the environment not used, and no byte of the answer's body is read.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping

import httpx2

from common.webhooks import Target, is_public, target_of

LIMIT_S = 15.0
"""For all of it, name and answer included: who sends one byte a second holds nothing up."""

Resolve = Callable[[str, int], Awaitable[list[str]]]


class Refused(Exception):
    """It is not sent there; the message says why."""


async def resolve(host: str, port: int) -> list[str]:
    """Addresses of a name, the preferred first. Raises: OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    return [str(address[0]) for *_, address in found]


class Poster:
    """``tls`` says whose certificates are believed; by default those of the machine's list."""

    def __init__(
        self,
        *,
        allow_private: bool,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve = resolve,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._allow_private = allow_private
        self._tls = tls or httpx2.create_ssl_context(trust_env=False)
        self._resolve = resolve
        self._limit_s = limit_s

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """Returns the status.

        Raises:
            Refused: the URL, or an address behind it, is not one that we send to.
            OSError, httpx2.HTTPError, TimeoutError: nobody answered.
        """
        try:
            target = target_of(url, allow_private=self._allow_private)
        except ValueError as error:
            raise Refused(f"the URL {error}") from error
        async with asyncio.timeout(self._limit_s):
            addresses = await self._resolve(target.host, target.port)
            if not self._allow_private and not all(map(is_public, addresses)):
                raise Refused(f"{target.host} is not on a public address")
            for address in addresses[:-1]:
                try:
                    return await self._send(target, address, headers, body)
                except httpx2.ConnectError:
                    continue
            return await self._send(target, addresses[-1], headers, body)

    async def _send(
        self, target: Target, address: str, headers: Mapping[str, str], body: bytes
    ) -> int:
        """Connect to ``address``; TLS and the header ``host`` speak of the name."""
        async with httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            request = httpx2.Request(
                "POST",
                httpx2.URL(
                    scheme=target.scheme,
                    host=address,
                    port=target.port,
                    raw_path=target.path.encode(),
                ),
                headers={"host": target.authority, "connection": "close", **headers},
                content=body,
                extensions={"sni_hostname": target.host},
            )
            response = await transport.handle_async_request(request)
            await response.aclose()
            return response.status_code
