"""How long and how slow a body may be, whatever the routes behind make of it."""

import asyncio
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.clock import monotonic_s
from common.failures import Failure
from gateway.middleware import PayloadLimit

LIMIT_S = 60.0


async def reading(
    path: str,
    *pieces: bytes,
    age_s: float = 0.0,
    answers_first: bool = False,
    max_bytes: int = 10,
) -> list[Message]:
    """What an application is told that reads ``pieces``, behind which nothing comes, of a request
    that arrived ``age_s`` ago.
    """
    told: list[Message] = []
    waiting = iter(pieces)

    async def receive() -> Message:
        piece = next(waiting, None)
        if piece is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        if answers_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            told.append(await receive())
            if told[-1]["type"] == "http.disconnect" or not told[-1]["more_body"]:
                return

    async def send(_: Message) -> None:
        """To nobody."""

    scope: dict[str, Any] = {
        "type": "http",
        "path": path,
        "headers": [],
        "headrace.arrived_at": monotonic_s() - age_s,
    }
    limit = limited(app, max_bytes=max_bytes)
    await limit(scope, receive, send)
    return told


def limited(app: ASGIApp, *, max_bytes: int = 10, max_held_bytes: int = 0) -> PayloadLimit:
    return PayloadLimit(
        app,
        max_bytes=max_bytes,
        max_held_bytes=max_held_bytes,
        max_upload_bytes=5 * max_bytes,
        limit_s=LIMIT_S,
    )


async def test_a_body_in_time_is_passed_on() -> None:
    told = await reading("/generate", b"abc", b"de", b"")
    assert b"".join(message["body"] for message in told) == b"abcde"


async def test_a_body_that_does_not_come_is_refused() -> None:
    with pytest.raises(Failure) as caught:
        await reading("/generate", b"abc", age_s=LIMIT_S)
    assert caught.value.code == "BODY_TIMEOUT"


async def test_a_body_that_is_too_long_is_refused() -> None:
    with pytest.raises(Failure) as caught:
        await reading("/generate", b"a" * 6, b"a" * 6)
    assert caught.value.code == "BODY_TOO_LARGE"


@pytest.mark.parametrize("pieces", [(b"abc",), (b"a" * 11,)], ids=["slow", "long"])
async def test_who_is_answered_already_counts_as_gone(pieces: tuple[bytes, ...]) -> None:
    told = await reading("/v1/streams/x", *pieces, age_s=LIMIT_S, answers_first=True)
    assert told[-1] == {"type": "http.disconnect"}


async def test_an_upload_has_a_size_of_its_own() -> None:
    told = await reading("/v1/files", *[b"a" * 10] * 5, b"")
    assert len(told) == 6
    with pytest.raises(Failure) as caught:
        await reading("/v1/files", *[b"a" * 10] * 6)
    assert caught.value.code == "BODY_TOO_LARGE"


async def test_an_upload_may_take_its_time() -> None:
    asking = asyncio.create_task(reading("/v1/files", b"abc", age_s=LIMIT_S))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not asking.done()
    asking.cancel()


async def test_large_bodies_are_held_up_to_a_limit_and_small_ones_always() -> None:
    """What a request took is free again when its answer begins, or when it is over."""
    go_on = asyncio.Event()

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limit = limited(app, max_bytes=1_000_000, max_held_bytes=500_000)

    async def ask(num_bytes: int) -> None:
        sent = iter((b"a" * num_bytes, b""))

        async def receive() -> Message:
            piece = next(sent)
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def send(_: Message) -> None:
            """To nobody."""

        scope: dict[str, Any] = {
            "type": "http",
            "path": "/generate",
            "headers": [],
            "headrace.arrived_at": monotonic_s(),
        }
        await limit(scope, receive, send)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(ask(500_000))
        small = [group.create_task(ask(60_000)) for _ in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(Failure) as caught:
            await ask(200_000)
        assert caught.value.code == "QUEUE_FULL"
        go_on.set()
        await asyncio.gather(first, *small)
        await ask(500_000)
