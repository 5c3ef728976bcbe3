"""Calls gateways over HTTP, of which any may go away: the next one is asked, or the same one again.

Who never answered is told at once; who has answered before is waited for.
"""

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import click
import httpx2

from common.clock import monotonic_s

T = TypeVar("T")
Note = Callable[[str], None]

DEFAULT_URL = "http://127.0.0.1:8080"
_FIRST_CONTACT_S = 5.0
_PATIENCE_S = 600.0
"""Without an answer; as long as whatever is restarted there may take."""
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_MAY_PASS = frozenset({408, 429, 502, 503, 504})
_SILENCE_S = 45.0
"""A connection that says nothing for so long is dead; gateways send a comment every 15 s."""


class Refused(click.ClickException):
    """A gateway will not do it, however often it is asked."""

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        super().__init__(_words_of(response))


class Unreachable(click.ClickException):
    """No gateway answered in time."""


class NotNow(Exception):
    """A gateway answered that it can not do it at the moment. ``wait_s``: when it may."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(_words_of(response))
        wait = response.headers.get("retry-after", "")
        self.wait_s = float(wait) if wait.isdigit() else 0.0


class Gateways:
    """Those at ``urls``, any of which does the same. ``note`` is told when one is waited for.

    Raises: click.BadParameter for what is no address.
    """

    def __init__(self, urls: Sequence[str], key: str | None, note: Note) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(_SILENCE_S, connect=_FIRST_CONTACT_S)
        self._clients = [
            httpx2.Client(base_url=_address(url), headers=headers, timeout=timeout) for url in urls
        ]
        self._note = note
        self._has_answered = False
        self._alive_s = monotonic_s()
        self._failures = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def call(self, method: str, path: str, **request: Any) -> Any:
        """The JSON that a gateway answers.

        Raises: Refused; Unreachable.
        """
        return self.persist(lambda client: checked(client.request(method, path, **request)).json())

    def persist(self, act: Callable[[httpx2.Client], T]) -> T:
        """Do it at one gateway after another until one lets it be done.

        ``act`` may raise httpx2.TransportError and NotNow, and is then called again.

        Raises: Refused; Unreachable.
        """
        self._alive_s = monotonic_s()
        while True:
            try:
                done = act(self._clients[0])
            except (httpx2.TransportError, NotNow) as error:
                self.failed(error)
            else:
                self.answered()
                return done

    @property
    def current(self) -> httpx2.Client:
        """Of the gateway whose turn it is."""
        return self._clients[0]

    def answered(self) -> None:
        """There is a sign of life."""
        if self._failures:
            self._note("the gateway answers again")
        self._has_answered, self._failures, self._alive_s = True, 0, monotonic_s()

    def failed(self, error: Exception) -> None:
        """Wait a little, then turn to the next gateway.

        Raises: Unreachable, when nothing has answered for too long.
        """
        patience_s = _PATIENCE_S if self._has_answered else _FIRST_CONTACT_S
        words = str(error) or type(error).__name__
        if monotonic_s() - self._alive_s > patience_s:
            raise Unreachable(f"{self._clients[0].base_url}: {words}") from error
        if self._has_answered and not self._failures:
            self._note(f"{words}; trying again")
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures)
        self._failures += 1
        self._clients.append(self._clients.pop(0))
        wait_s = error.wait_s if isinstance(error, NotNow) else 0.0
        time.sleep(max(wait_s, longest_s * random.uniform(0.5, 1.0)))


def checked(response: httpx2.Response) -> httpx2.Response:
    """The response, where it is no refusal. Raises: NotNow; Refused."""
    if response.is_success:
        return response
    raise NotNow(response) if response.status_code in _MAY_PASS else Refused(response)


@contextmanager
def opened(client: httpx2.Client, path: str) -> Generator[httpx2.Response]:
    """One answer as it comes.

    Raises: httpx2.TransportError, also while it is read; NotNow; Refused.
    """
    with client.stream("GET", path) as response:
        if not response.is_success:
            response.read()
        yield checked(response)


def _words_of(response: httpx2.Response) -> str:
    """What the gateway said; where that was no gateway, what it answered."""
    try:
        error: Any = response.json()["error"]
        return f"{error['message']} ({error['code']})"
    except (ValueError, LookupError, TypeError):
        where = f"{response.request.method} {response.request.url}"
        return f"{where} answers {response.status_code}: {response.text[:200]}"


def _address(url: str) -> str:
    """With or without ``/v1`` behind it. Raises: click.BadParameter."""
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise click.BadParameter(f"{url} is no http address", param_hint="--url")
    return url.rstrip("/").removesuffix("/v1")


def events_of(response: httpx2.Response) -> Iterator[tuple[str, str]]:
    """Type and data of each server-sent event of an open answer, until it ends.

    Raises: httpx2.TransportError when it breaks off.
    """
    kind, data = "message", ""
    for line in response.iter_lines():
        if not line:
            if data:
                yield kind, data
            kind, data = "message", ""
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif line.startswith("event: "):
            kind = line.removeprefix("event: ")
