"""A client of Headrace's streams that keeps all it saw, over any number of connections.

The tests and the chaos run judge by it what a user got: dense positions, nothing twice, one end.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Event:
    """One dispatched event; ``id`` is the last one sent, as the standard says."""

    id: str
    data: str
    kind: str = "message"

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def is_done(self) -> bool:
        return self.data == "[DONE]"

    @property
    def position(self) -> int:
        """Tokens up to and with this event: the first part of its cursor."""
        return int(self.id.partition("-")[0])


async def read_events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of an open response, until it ends."""
    last_id, kind, data = "", "message", ""
    async for line in response.aiter_lines():
        if not line:
            if data:
                yield Event(last_id, data, kind)
            kind, data = "message", ""
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif line.startswith("id: "):
            last_id = line.removeprefix("id: ")
        elif line.startswith("event: "):
            kind = line.removeprefix("event: ")


class StreamDefect(Exception):
    """A stream broke a promise: a gap, a repeat, no end or two, or an error."""


@dataclass
class Reader:
    """One client of a native stream: what it has seen, over any number of connections."""

    stream_id: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    events: list[Event] = field(default_factory=list[Event])

    @property
    def cursor(self) -> str:
        return self.events[-1].id if self.events else ""

    @property
    def positions(self) -> list[int]:
        return [event.json["index"] for event in self.events if "index" in event.json]

    @property
    def text(self) -> str:
        """What was streamed, without the texts of special tokens."""
        tokens = [event.json["token"] for event in self.events if "token" in event.json]
        return "".join(token["text"] for token in tokens if not token["special"])

    @property
    def token_ids(self) -> list[int]:
        return [event.json["token"]["id"] for event in self.events if "token" in event.json]

    @property
    def has_ended(self) -> bool:
        """Whether the final event came."""
        return any(_is_final(event) for event in self.events)

    @property
    def end(self) -> Any:
        """The final event.

        Raises:
            StreamDefect: there is none, or more than one.
        """
        finals = [event.json for event in self.events if _is_final(event)]
        if len(finals) != 1:
            raise StreamDefect(f"{len(finals)} final events after {len(self.events)}")
        return finals[0]

    def check_whole(self) -> None:
        """Check that positions are dense from 1, the end came once, and its text is what streamed.

        Raises:
            StreamDefect: it is not so.
        """
        if "error" in self.end:
            raise StreamDefect(str(self.end))
        if self.positions != list(range(1, len(self.positions) + 1)):
            raise StreamDefect(f"positions are not dense: {self.positions}")
        if self.end["generated_text"] != self.text:
            raise StreamDefect("the final text is not the text that was streamed")

    @asynccontextmanager
    async def generate(
        self,
        client: httpx.AsyncClient,
        inputs: str,
        headers: dict[str, str] | None = None,
        **parameters: Any,
    ) -> AsyncGenerator[AsyncIterator[Event]]:
        """POST /generate_stream; the events that are drawn are also kept."""
        body = {"inputs": inputs, "parameters": {"details": True, **parameters}}
        async with client.stream(
            "POST", "/generate_stream", json=body, headers=headers
        ) as response:
            if response.status_code != 200:
                await response.aread()
                raise StreamDefect(f"{response.status_code}: {response.text}")
            self.headers = dict(response.headers)
            self.stream_id = response.headers["x-headrace-stream-id"]
            yield self._kept(response)

    @asynccontextmanager
    async def resume(self, client: httpx.AsyncClient) -> AsyncGenerator[AsyncIterator[Event]]:
        """GET the same stream again behind the last event, on any gateway."""
        headers = {"Last-Event-ID": self.cursor} if self.cursor else {}
        path = f"/v1/streams/{self.stream_id}"
        async with client.stream("GET", path, headers=headers) as response:
            if response.status_code not in (200, 204):
                await response.aread()
                raise StreamDefect(f"{response.status_code}: {response.text}")
            yield self._kept(response)

    async def _kept(self, response: httpx.Response) -> AsyncIterator[Event]:
        async for event in read_events(response):
            self.events.append(event)
            yield event

    async def read_all(self, client: httpx.AsyncClient, inputs: str, **parameters: Any) -> "Reader":
        async with self.generate(client, inputs, **parameters) as events:
            async for _ in events:
                pass
        return self


def _is_final(event: Event) -> bool:
    return event.json.get("generated_text") is not None or "error" in event.json


async def take(events: AsyncIterator[Event], count: int) -> list[Event]:
    """Draw ``count`` events and leave the rest."""
    return [await anext(events) for _ in range(count)]
