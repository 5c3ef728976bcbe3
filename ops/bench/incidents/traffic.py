"""Clients of a run, in a process of their own: tenants that ask at random times, each in its way.

The plan comes as one JSON line on standard input; the wall time at which it began is told on
standard output. A client whose gateway is away tries another one once, as behind a load balancer.
Everything random comes from the plan's seed, but not how long answers take.
"""

import asyncio
import contextlib
import random
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click
import msgspec
import orjson

from ops.bench.incidents.places import find_addresses
from ops.bench.prompts import Prompts

Api = Literal["completions", "chat", "tgi"]
PATHS: dict[Api, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "tgi": "/generate_stream",
}
SCHEMA = {
    "type": "object",
    "properties": {"mill": {"type": "string", "maxLength": 12}, "wheels": {"type": "integer"}},
    "required": ["mill", "wheels"],
}
_PATIENCE_S = 30.0
_READ_BYTES = 65_536
_SLOW_BYTES, _SLOW_PAUSE_S, _SLOW_WINDOW_BYTES = 512, 0.1, 2048
"""How a client reads that is slow: some 5 kB/s, with the least window that there is."""


class Source(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Who asks for what, and how often. Ranges are inclusive; shares are of its requests."""

    key: str = ""
    """API key; empty: none."""
    rate: float
    """Requests per second."""
    start_s: float = 0.0
    end_s: float = 1e9
    apis: tuple[Api, ...] = ("completions", "chat", "tgi")
    prompt_words: tuple[int, int] = (8, 100)
    new_tokens: tuple[int, int] = (12, 56)
    streams: float = 0.7
    guided: float = 0.1
    sampled: float = 0.3
    tier: str = ""
    user_agent: str = "mill-client/1.0"
    words: str = ""
    """At the start of each prompt."""
    schema: dict[str, Any] = msgspec.field(default_factory=lambda: SCHEMA)
    leaves: bool = False
    """After the first bytes of the answer."""
    is_slow: bool = False
    """It reads more slowly than tokens come."""


class Plan(msgspec.Struct, frozen=True):
    data_dir: str
    seed: int
    seconds: float
    sources: list[Source]


class Exchange(msgspec.Struct):
    """One request as its client saw it. ``status`` 0: there was no answer."""

    source: int
    request_id: str
    asked: float
    ended: float = 0.0
    status: int = 0
    num_bytes: int = 0


class Asked(msgspec.Struct, frozen=True):
    """One request before it is sent."""

    request_id: str
    path: str
    body: dict[str, Any]


class Asker:
    """Draws the requests of one source."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source = source
        self._chance = random.Random(seed)
        self._prompts: dict[int, Prompts] = {}

    def next_pause_s(self) -> float:
        return self._chance.expovariate(self._source.rate)

    def next(self) -> Asked:
        source, chance = self._source, self._chance
        api = chance.choice(source.apis)
        words = chance.randint(*source.prompt_words)
        prompts = self._prompts.setdefault(words, Prompts(words, seed=chance.getrandbits(32)))
        prompt = f"{source.words} {prompts.next()}".strip()
        new_tokens = chance.randint(*source.new_tokens)
        is_guided = chance.random() < source.guided
        is_sampled = chance.random() < source.sampled
        is_streamed = chance.random() < source.streams
        path = PATHS[api] if is_streamed or api != "tgi" else "/generate"
        if api == "tgi":
            parameters: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": is_sampled}
            if is_guided:
                parameters["grammar"] = {"type": "json", "value": source.schema}
            body: dict[str, Any] = {"inputs": prompt, "parameters": parameters}
        else:
            body = {
                "model": "simulated",
                "max_tokens": new_tokens,
                "temperature": 0.8 if is_sampled else 0,
                "stream": is_streamed,
            }
            message = {"role": "user", "content": prompt}
            body |= {"messages": [message]} if api == "chat" else {"prompt": prompt}
            if source.tier:
                body["service_tier"] = source.tier
            if is_guided:
                shape = {"name": "answer", "schema": source.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": shape}
        return Asked(f"{chance.getrandbits(64):016x}", path, body)


class Traffic:
    """All sources of a plan at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._urls: Sequence[str] = []
        self._chance = random.Random(plan.seed)
        self._exchanges: list[Exchange] = []

    async def run(self) -> list[Exchange]:
        self._urls = find_addresses(Path(self._plan.data_dir))
        async with asyncio.TaskGroup() as tasks:
            for number, source in enumerate(self._plan.sources):
                tasks.create_task(self._keep_asking(number, source, tasks))
        return self._exchanges

    async def _keep_asking(self, number: int, source: Source, tasks: asyncio.TaskGroup) -> None:
        asker = Asker(source, self._plan.seed * 1000 + number)
        began = time.monotonic()
        at_s, end_s = source.start_s, min(source.end_s, self._plan.seconds)
        while (at_s := at_s + asker.next_pause_s()) < end_s:
            await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
            tasks.create_task(self._exchange(number, source, asker.next()))

    async def _exchange(self, number: int, source: Source, asked: Asked) -> None:
        seen = Exchange(number, asked.request_id, time.time())
        self._exchanges.append(seen)
        request = _request(source, asked)
        for _ in range(2):
            if not self._urls:
                self._urls = find_addresses(Path(self._plan.data_dir))
                continue
            url = urlsplit(self._chance.choice(self._urls))
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await _talk(url.hostname or "", url.port or 80, request, source, seen)
                break
            except ConnectionRefusedError:
                self._urls = find_addresses(Path(self._plan.data_dir))
            except (OSError, TimeoutError):
                break
        seen.ended = time.time()


def _request(source: Source, asked: Asked) -> bytes:
    payload = orjson.dumps(asked.body)
    lines = [
        f"POST {asked.path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        f"User-Agent: {source.user_agent}",
        f"X-Request-Id: {asked.request_id}",
        *([f"Authorization: Bearer {source.key}"] if source.key else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + payload


async def _talk(host: str, port: int, request: bytes, source: Source, seen: Exchange) -> None:
    """Send the request and read as much of the answer as this client does."""
    link = socket.socket()
    link.setblocking(False)
    if source.is_slow:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_WINDOW_BYTES)
    with contextlib.closing(link):
        loop = asyncio.get_running_loop()
        await loop.sock_connect(link, (host, port))
        await loop.sock_sendall(link, request)
        at_once = _SLOW_BYTES if source.is_slow else _READ_BYTES
        while piece := await loop.sock_recv(link, at_once):
            if not seen.status:
                seen.status = _status(piece)
            seen.num_bytes += len(piece)
            if source.leaves:
                return
            if source.is_slow:
                await asyncio.sleep(_SLOW_PAUSE_S)


def _status(head: bytes) -> int:
    words = head[:20].split(b" ")
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


@click.command()
@click.argument("seen_path", type=click.Path(path_type=Path))
def main(seen_path: Path) -> None:
    """Carry out the plan on standard input; what the clients saw goes to SEEN_PATH."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    click.echo(f"{time.time():.6f}")
    sys.stdout.flush()
    exchanges = asyncio.run(Traffic(plan).run())
    seen_path.write_bytes(msgspec.json.encode(exchanges))


if __name__ == "__main__":
    main()
