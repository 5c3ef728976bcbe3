"""The example of a page of somebody else's, on a web server and an origin of its own."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser

from tests.browser.conftest import PATIENCE_MS, Site
from tests.browser.link import link_to
from tests.support.processes import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = ROOT / "ops" / "examples" / "page.html"
GATEWAY = "http://127.0.0.1:8080"


@asynccontextmanager
async def served(text: str) -> AsyncGenerator[list[str]]:
    """A web server with one page. Yields a list: its origin, and what ``text`` shall be."""
    page = [text]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = page[0].encode()
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    page.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield page
    finally:
        server.close()


async def test_the_example_page_asks_resumes_and_stops(site: Site, chromium: Browser) -> None:
    """Across origins, which the gateway was told to allow; with nothing but its own few lines."""
    source = PAGE.read_text()
    assert GATEWAY in source
    async with served("") as page:
        gateway = await site.new_gateway(cors_allow_origin=f'["{page[1]}"]')
        async with link_to(gateway.url) as link:
            page[0] = source.replace(GATEWAY, link.url)
            context = await chromium.new_context()
            visit = await context.new_page()
            visit.set_default_timeout(PATIENCE_MS)
            errors: list[str] = []
            visit.on("pageerror", lambda error: errors.append(str(error)))
            try:
                await visit.goto(page[1])
                await visit.fill("input", "hello")
                await visit.click("text=Ask")
                await visit.wait_for_function(SHOWS, arg=20)
                link.lead_to(gateway.url)  # breaks what is open
                before = await visit.inner_text("#answer")
                await visit.wait_for_function(SHOWS, arg=len(before) + 10)
                await visit.reload()
                await visit.wait_for_function(SHOWS, arg=len(before) + 20)
                assert (await visit.inner_text("#answer")).startswith(before)
                await visit.click("#stop")
                await visit.wait_for_selector("#state:text('cancelled')")
                assert errors == []
            finally:
                await context.close()


SHOWS = "length => document.getElementById('answer').textContent.length >= length"
