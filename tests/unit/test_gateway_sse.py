"""An answer that nobody takes ends; one that comes slowly does not."""

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from common.broker import Presentation
from common.clock import monotonic_s
from common.messages import Finish, LogEntry, TokenRecord, chain_next, chain_start, chain_text
from common.metrics import GatewayMetrics
from gateway import sse
from gateway.account import Account
from gateway.frames import CompletionFrames, Subject
from gateway.stream import Stream

_LIMIT_S = 0.3


class Scene:
    """An event stream of one generation; ``taking_s`` is how long its client takes for a part."""

    def __init__(self, taking_s: float) -> None:
        self.taking_s = taking_s
        self.bodies: list[bytes] = []
        self.num_closed = 0
        self.stream = Stream("r.0", "public", self._read_log)
        self._chain = chain_start("r.0", "m@1")
        self._position = 0
        subject = Subject("r", "m", "m@1", Presentation("completion", 0, 0, 1))
        tokenizer: Any = None
        self._answer = sse.EventStream(
            self.stream,
            CompletionFrames(subject, tokenizer),
            Account(GatewayMetrics(), "completion", monotonic_s()),
            on_close=self._close,
            headers={},
        )

    def say(self, finish: str = "") -> None:
        self._chain = chain_next(self._chain, 7)
        record = TokenRecord(
            self._position,
            chain_text(self._chain),
            [7],
            [b"a"],
            finish=Finish(finish) if finish else None,
        )
        self._position += 1
        self.stream.offer(LogEntry(record))
        self.stream.deliver()

    async def run(self) -> None:
        await self._answer({"type": "http"}, self._receive, self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(self.taking_s)
            self.bodies.append(message["body"])

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def _read_log(self, id: str, cursor: int) -> None: ...

    def _close(self) -> None:
        self.num_closed += 1


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_LIMIT_S", _LIMIT_S)


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    scene = Scene(taking_s=3600)
    scene.say()
    async with asyncio.timeout(5):
        await scene.run()
    assert scene.bodies == []
    assert scene.num_closed == 1


async def test_waiting_for_tokens_is_not_the_fault_of_a_client() -> None:
    """However long the whole takes: the limit is for each part that is sent."""
    scene = Scene(taking_s=0)
    running = asyncio.create_task(scene.run())
    for finish in ("", "", "length"):
        await asyncio.wait([running], timeout=1.2 * _LIMIT_S)
        scene.say(finish)
    await running
    assert b"".join(scene.bodies).count(b'"text":"a"') == 3
    assert scene.bodies[-2].endswith(b"data: [DONE]\n\n")
