"""The EventSource of a real browser, which can neither POST nor send a header."""

import shutil
from typing import Any

import httpx
from playwright.async_api import async_playwright

from ops.bench.sse_client import read_events
from tests.browser.conftest import CHROMIUM_FLAGS
from tests.clients.conftest import SILENCE_S, System

READ = """(url) => {
    const told = { opened: 0, places: [], events: [] };
    const source = new EventSource(url);
    source.onopen = () => told.opened++;
    source.onmessage = ({ data, lastEventId: id }) => told.events.push({ id, data });
    window.waits = new Promise((resolve) =>
        source.addEventListener("queue", ({ data }) => resolve(told.places.push(JSON.parse(data)))),
    );
    window.over = new Promise((resolve) => {
        source.onerror = () => source.readyState === EventSource.CLOSED && resolve(told);
    });
}"""


async def test_it_reads_a_stream_through_the_silence_before_the_first_token(
    system: System,
) -> None:
    """On one connection, with a token instead of a key; a second one is told that this was all."""
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 20}}
    headers = {"x-headrace-disconnect": "continue"}
    async with (
        async_playwright() as playwright,
        httpx.AsyncClient(base_url=system.url, timeout=30 + SILENCE_S) as client,
    ):
        chromium = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS
        )
        page = await chromium.new_page()
        await page.goto(f"{system.url}/ui/")
        system.worker.pause()  # until the page has seen that the request waits
        async with client.stream("POST", "/generate_stream", json=body, headers=headers) as asked:
            path = f"/v1/streams/{asked.headers['x-headrace-stream-id']}"
        url = (await client.post(f"{path}/token")).json()["url"]
        await page.evaluate(READ, f"{url}&events=1")
        await page.evaluate("waits")
        system.worker.resume()
        told: dict[str, Any] = await page.evaluate("over")
        async with client.stream("GET", path) as response:
            events = [event async for event in read_events(response)]
        await chromium.close()
    assert told["events"] == [{"id": event.id, "data": event.data} for event in events]
    assert told["opened"] == 1
    assert [told["places"][i]["state"] for i in (0, -1)] == ["waiting", "running"]
    assert len(events) == 20
