"""The load client tells what a server did, not what it hoped for: against scripted servers."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from ops.bench.dialects import DIALECTS
from ops.bench.load import Load, LoadError, Session, Target, find_target, split_route, summarise
from ops.bench.prompts import Prompts
from ops.bench.stream import Answer
from tests.support.processes import free_port

Reply = Callable[[str, dict[str, Any]], bytes]
"""What a scripted server answers to a path and a body."""

_SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
_LOAD = Load(prompt_tokens=20, new_tokens=4, requests=2, timeout_s=5, seed=1)


@dataclass
class Scripted:
    url: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(
        default_factory=list[tuple[str, dict[str, Any]]]
    )

    @property
    def prompts(self) -> list[str]:
        return [body["prompt"] for path, body in self.asked if path == "/v1/completions"]


@asynccontextmanager
async def scripted(reply: Reply | None) -> AsyncGenerator[Scripted]:
    """A server that lists the model `scripted` and answers with ``reply``, or not at all."""
    server = Scripted()
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            await answer(reader, writer)
            writer.close()
            await writer.wait_closed()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            writer.write(plain(200, {"data": [{"id": "scripted"}]}))
        elif reply is None:
            await reader.read()  # until the client goes
        else:
            length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            server.asked.append((path, body))
            for part in reply(path, body).split(b"|"):  # what arrives apart
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        server.url = "http://{}:{}".format(*listening.sockets[0].getsockname()[:2])
        yield server
        await asyncio.gather(*filter(None, serving))


def plain(status: int, body: object) -> bytes:
    payload = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(payload), payload)


def sse(*events: dict[str, Any] | str) -> bytes:
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return _SSE + b"".join(f"data: {text}\n\n|".encode() for text in texts)


def text(*pieces: str) -> list[dict[str, Any]]:
    return [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]


def end(completion_tokens: int | None, prompt_tokens: int = 20) -> list[dict[str, Any] | str]:
    finish: dict[str, Any] = {"choices": [{"text": "", "finish_reason": "length"}]}
    usage = {
        "choices": [],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }
    return [finish, "[DONE]"] if completion_tokens is None else [finish, usage, "[DONE]"]


def words_and(extra: int) -> Reply:
    """Counts words as tokens, and ``extra`` for a template."""
    return lambda _, body: sse(
        *text("a", "b", "c", "d"), *end(4, len(body["prompt"].split()) + extra)
    )


async def ask(reply: Reply | None, timeout_s: float = 5.0) -> Answer:
    async with scripted(reply) as server:
        target = Target(
            server.url + "/v1/completions", DIALECTS["completions"], "scripted", {}, {}, 20
        )
        return await target.ask("hello", 4, timeout_s=timeout_s)


# --- counting


async def test_tokens_are_counted_by_the_server_not_by_events() -> None:
    answer = await ask(lambda *_: sse(*text("two tokens", " and two"), *end(4)))
    assert (answer.num_tokens, len(answer.chunk_at_s), answer.num_prompt_tokens) == (4, 2, 20)
    level = summarise([answer], 0.0, concurrency=1)
    assert (level.output_tokens, level.tokens_per_event) == (4, 2.0)


async def test_events_are_counted_where_the_server_counts_nothing() -> None:
    answer = await ask(lambda *_: sse(*text("a", "", "b"), *end(None)))
    assert (answer.num_tokens, answer.failure) == (2, "")
    assert answer.num_prompt_tokens is None


async def test_chunked_answers_and_torn_events_are_read() -> None:
    events = [json.dumps(event) for event in (*text("a", "b"), end(2)[1])]
    payload = "".join(f"id: 1\r\ndata: {event}\r\n\r\n" for event in [*events, "[DONE]"]).encode()
    chunks = [payload[at : at + 7] for at in range(0, len(payload), 7)]
    body = b"|".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await ask(lambda *_: head + body)
    assert (answer.num_tokens, len(answer.chunk_at_s), answer.failure) == (2, 2, "")


async def test_the_role_of_a_chat_is_not_its_first_token() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    events = [DIALECTS["chat"].read_event({"choices": [{"delta": delta}]}) for delta in deltas]
    assert [event.has_text for event in events] == [False, True, True]


def test_rates_and_times_are_those_of_the_answers() -> None:
    """Two clients, 0 to 2 s and 0.5 to 2.5 s, 5 tokens each, the first after half a second."""
    answers = [
        Answer(
            began_s=began_s,
            ended_s=began_s + 2.0,
            chunk_at_s=[began_s + after_s for after_s in (0.5, 0.75, 1.0, 1.25, 2.0)],
            num_tokens=5,
        )
        for began_s in (0.0, 0.5)
    ]
    level = summarise([*answers, Answer(0.1, 0.2, failure="HTTP 503")], 0.25, concurrency=2)
    assert level.tokens_per_second == 10 / 2.5
    assert level.first_token_ms is not None
    assert level.first_token_ms.p50 == 500
    assert level.gap_ms is not None
    assert (level.gap_ms.p50, level.gap_ms.max) == (250, 750)
    assert level.per_token_ms is not None
    assert level.per_token_ms.p50 == 375
    assert level.whole_ms is not None
    assert level.whole_ms.p99 == 2000
    assert (level.requests, level.failures, level.client_cpu) == (3, {"HTTP 503": 1}, 0.1)


# --- failures


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (lambda *_: plain(503, {"error": "full"}), "HTTP 503"),
        (lambda *_: sse(*text("a"), {"error": {"code": "overloaded"}}), "event: overloaded"),
        (lambda *_: sse(*text("a")), "cut off"),
        (lambda *_: b"", "cut off"),
        (lambda *_: sse("no json"), "not understood"),
        (lambda *_: b"SMTP ready\r\n\r\n", "not HTTP"),
    ],
)
async def test_each_failure_has_its_kind(reply: Reply, kind: str) -> None:
    answer = await ask(reply)
    assert answer.failure == kind
    assert summarise([answer], 0.0).failures == {kind: 1}


async def test_silence_is_a_timeout_and_a_closed_port_no_connection() -> None:
    assert (await ask(None, timeout_s=0.05)).failure == "timeout"
    target = Target(f"http://127.0.0.1:{free_port()}/x", DIALECTS["tgi"], "", {}, {}, 1)
    assert (await target.ask("a", 1, timeout_s=5)).failure == "no connection"


# --- finding out whom we talk to


async def test_prompts_are_fitted_to_the_servers_own_count() -> None:
    """A template of 7 tokens leaves 13 words of 20."""
    async with scripted(words_and(7)) as server:
        target = await find_target(server.url + "/v1", _LOAD)
        level = await Session(target, _LOAD).closed_loop(3)
    assert (target.model, target.dialect.name, target.num_words) == ("scripted", "completions", 13)
    assert (level.prompt_tokens, level.output_tokens, level.failures) == (20, 24, {})
    assert len(set(server.prompts[-6:])) == 6


async def test_a_frame_longer_than_the_prompt_is_said() -> None:
    async with scripted(words_and(30)) as server:
        with pytest.raises(LoadError, match="31 tokens of the shortest prompt"):
            await find_target(server.url, _LOAD)


async def test_the_first_api_that_answers_is_taken() -> None:
    """Here neither `/v1/completions` nor a field that OpenAI does not know."""

    def strict(path: str, body: dict[str, Any]) -> bytes:
        if path != "/v1/chat/completions":
            return plain(404, {})
        if "ignore_eos" in body or "generation_config" in body:
            return plain(422, {"detail": "extra fields"})
        return sse({"choices": [{"delta": {"content": "a"}}]}, *end(2))

    async with scripted(strict) as server:
        target = await find_target(server.url, _LOAD)
    assert (target.dialect.name, target.run_on) == ("chat", {})


async def test_who_streams_nothing_is_refused_with_its_own_words() -> None:
    async with scripted(lambda *_: plain(401, {"error": "no key"})) as server:
        with pytest.raises(LoadError, match=r"HTTP 401.*no key"):
            await find_target(server.url, _LOAD)
    with pytest.raises(LoadError, match="does not answer"):
        await find_target(f"http://127.0.0.1:{free_port()}", _LOAD)


def test_a_url_may_name_the_server_the_version_or_the_route() -> None:
    assert split_route("localhost:8080") == ("http://localhost:8080", None)
    assert split_route("https://a.test/v1/") == ("https://a.test", None)
    assert split_route("http://a.test/v1/chat/completions") == ("http://a.test", "chat")
    with pytest.raises(LoadError):
        split_route("ftp://a.test")


# --- load


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    load = Load(prompt_tokens=20, new_tokens=4, limit_s=0.2, seed=1)
    async with scripted(words_and(0)) as server:
        level = await Session(await find_target(server.url, load), load).open_loop(50)
    assert level.rate == 50
    assert level.output_tokens == 4 * level.requests > 0


def test_no_two_prompts_begin_alike_unless_they_shall() -> None:
    prompts = Prompts(12, seed=5)
    made = [prompts.next().split() for _ in range(500)]
    assert {len(words) for words in made} == {12}
    assert len({tuple(words[:2]) for words in made}) == 500
    sharing = Prompts(12, num_shared=8, seed=5)
    shared = [sharing.next().split() for _ in range(100)]
    assert len({tuple(words[:8]) for words in shared}) == 1
    assert len({tuple(words[8:10]) for words in shared}) == 100
