"""The events of an answer, all of them, once it has ended."""

from typing import Any

import httpx

from ops.bench.sse_client import Event, read_events


async def read_all(response: httpx.Response) -> list[Event]:
    """What is left of an open response."""
    return [event async for event in read_events(response)]


async def events_of(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None
) -> list[Event]:
    """Ask, and read the stream that must come."""
    async with client.stream(method, path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        return await read_all(response)
