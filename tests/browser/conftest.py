"""A real site for the browser tests: server, gateway, worker, Chromium, and a network to break.

The site lives as long as the test session, because a browser needs no empty Redis; each test has a
browser context, and with it a memory, of its own. Whatever a page does wrong in silence (an error
in the console, a violated policy, a call to another host) fails its test at the end.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    async_playwright,
)

from common.models.store import ModelStore
from tests.browser.link import Link, link_to
from tests.support.processes import Process, Processes, processes
from tests.support.redis_server import RedisServer

INTER_TOKEN_MS = 10
"""A token is a byte here: an answer takes seconds, so there is a middle to interrupt it in."""
CHROMIUM_FLAGS = [
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 20_000


@dataclass
class Site:
    """What the tests share. ``worker`` is the one that is alive."""

    started: Processes
    settings: dict[str, Any]
    gateway: Process
    worker: Process
    _answers: dict[object, str] = field(default_factory=dict[object, str])

    async def new_gateway(self, **settings: Any) -> Process:
        return await self.started.gateway(**(self.settings | settings)).ready()

    async def replace_worker(self) -> None:
        """SIGKILL, and an heir."""
        self.worker.kill()
        self.worker = await self.started.worker(**self.settings).ready()

    async def answer_to(self, *said: str, max_tokens: int) -> str:
        """What the model says to a conversation at temperature 0, in one piece.

        Asked once: it is the same every time, and takes as long as a streamed one.
        """
        if (known := self._answers.get((said, max_tokens))) is not None:
            return known
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(said)]
        body = {"messages": messages, "temperature": 0, "max_tokens": max_tokens}
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=60) as client:
            answer = await client.post("/v1/chat/completions", json=body)
        text: str = answer.raise_for_status().json()["choices"][0]["message"]["content"]
        return self._answers.setdefault((said, max_tokens), text)

    async def stream(self, id: str) -> str:
        """All frames of a stream that has ended, as any other reader gets them."""
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=60) as client:
            return (await client.get(f"/v1/streams/{id}")).raise_for_status().text


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ModelStore(folder / "data").add("simulated")
    settings: dict[str, Any] = {
        "data_dir": folder / "data",
        "model": "simulated",
        "simulated_first_token_ms": 5,
        "simulated_inter_token_ms": INTER_TOKEN_MS,
        "lease_ms": 3000,  # a paused worker counts as alive until its visitor has asked
    }
    with RedisServer("valkey", folder / "valkey") as server:
        with processes(server.url, folder) as started:
            gateway, worker = started.gateway(**settings), started.worker(**settings)
            await started.background(**settings).ready()
            yield Site(started, settings, await gateway.ready(), await worker.ready())
        leaked = server.keys_without_ttl()
        assert not leaked, f"keys without a time to live: {leaked}"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium, or the one that Playwright brought where there is none."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def link(site: Site) -> AsyncIterator[Link]:
    """What stands between this test's browser and the gateway."""
    async with link_to(site.gateway.url) as link:
        yield link


@dataclass
class Visitor:
    """A browser of somebody's own, with one page open at the site."""

    context: BrowserContext
    url: str
    page: Page = field(init=False)
    calls: list[Request] = field(default_factory=list[Request])
    """Requests to the API, in order."""
    complaints: list[str] = field(default_factory=list[str])
    expected: list[str] = field(default_factory=list[str])
    """Parts of the complaints that this test causes on purpose."""

    async def open(self) -> None:
        """A tab of its own, in place of the one before."""
        self.page = await self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note_request)
        await self.page.goto(f"{self.url}/ui/")
        await self.page.wait_for_selector("#model:not(:empty)")

    async def close(self) -> None:
        """Close the tab, and wait until the browser has let go of what it held."""
        other = await self.context.new_page()
        await other.goto(f"{self.url}/health")
        await self.page.close()
        await other.wait_for_function(
            "async () => !(await navigator.locks.query()).held.length", timeout=PATIENCE_MS
        )
        await other.close()

    async def choose(self, *, max_tokens: int, temperature: float = 0) -> None:
        """Set the settings; at temperature 0 an answer can be foretold."""
        await self.page.click("#settings summary")
        await self.page.fill("#temperature", str(temperature))
        await self.page.fill("#max-tokens", str(max_tokens))
        await self.page.click("#settings summary")

    async def ask(self, text: str) -> None:
        await self.page.fill("#prompt", text)
        await self.page.press("#prompt", "Enter")

    async def text(self) -> str:
        """The last answer as it stands on the page."""
        return await self.page.inner_text(".answer:last-child > .text")

    async def sees(self, text: str) -> None:
        """Wait for a text in the last answer or under it."""
        await self.page.wait_for_selector(f".answer:last-child :text({text!r})")

    async def sees_text(self, min_length: int) -> None:
        await self.page.wait_for_function(
            "length => document.querySelector('.answer:last-child > .text')"
            "?.innerText.length >= length",
            arg=min_length,
        )

    async def sees_end(self) -> dict[str, str]:
        """Wait until the last answer has ended; returns the figures under it."""
        await self.page.wait_for_selector(".answer:last-child > .stats:not([hidden])")
        groups = await self.page.query_selector_all(".answer:last-child > .stats > div")
        return dict([(await group.inner_text()).split("\n") for group in groups])

    async def stored_turns(self) -> list[dict[str, Any]]:
        return await self.page.evaluate("JSON.parse(localStorage.getItem('headrace.chat'))")

    def check_quiet(self) -> None:
        unexpected = [
            complaint
            for complaint in self.complaints
            if not any(part in complaint for part in self.expected)
        ]
        assert not unexpected, unexpected

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith(f"{self.url}/"):
            self.complaints.append(f"call to another host: {request.url}")
        if "/v1/" in request.url:
            self.calls.append(request)


@dataclass
class Door:
    """Lets visitors in, each with the options of a browser context."""

    chromium: Browser
    url: str
    contexts: AsyncExitStack
    visitors: list[Visitor] = field(default_factory=list[Visitor])

    async def enter(self, **options: Any) -> Visitor:
        context = await self.chromium.new_context(**options)
        self.contexts.push_async_callback(context.close)
        visitor = Visitor(context, self.url)
        self.visitors.append(visitor)
        await visitor.open()
        return visitor


@pytest_asyncio.fixture(loop_scope="session")
async def door(chromium: Browser, link: Link) -> AsyncIterator[Door]:
    async with AsyncExitStack() as contexts:
        door = Door(chromium, link.url, contexts)
        yield door
    for visitor in door.visitors:
        visitor.check_quiet()


@pytest_asyncio.fixture(loop_scope="session")
async def visitor(door: Door) -> Visitor:
    """Somebody with a desktop browser."""
    return await door.enter()
