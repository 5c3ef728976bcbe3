"""A worker that says what the test tells it to, word by word, through the real broker.

It has no engine: :meth:`ScriptedWorker.take` claims the next generation, and its :class:`Turn` then
publishes whatever the test wants at the moment the test wants it. For tests of everything in front
of Redis.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from common.broker import Broker, Claimed, Publication, PublishAnswer, WorkerPresence
from common.ids import new_nonce, new_process_name
from common.messages import (
    Finish,
    GenerationSpec,
    PromptLogprobs,
    TokenRecord,
    TopTokens,
    chain_next,
    chain_start,
    chain_text,
    escape_piece,
)
from tests.support.waiting import wait_until

LEASE_MS = 60_000
EOS = 258
"""The end-of-message token of the simulated model."""


class Turn:
    """One claimed generation: what it has said so far, and the right to say more."""

    def __init__(self, worker: "ScriptedWorker", claimed: Claimed, spec: GenerationSpec) -> None:
        self.id = claimed.id
        self.spec = spec
        self.position = claimed.next
        self._worker = worker
        self._fence = claimed.fence
        self._chain = (
            int(claimed.chain, 16) if claimed.next else chain_start(claimed.id, worker.version)
        )

    @property
    def chain(self) -> str:
        """As Redis stores it: empty at position 0."""
        return chain_text(self._chain) if self.position else ""

    async def say(
        self,
        *texts: str,
        tokens: Sequence[int] | None = None,
        logprobs: Sequence[float] | None = None,
        tops: Sequence[TopTokens] | None = None,
        prompt: PromptLogprobs | None = None,
        finish: str = "",
        code: str = "",
        message: str = "",
    ) -> PublishAnswer:
        """Publish one record: a token for each text (ids from ``tokens``, else by position)."""
        ids = list(tokens) if tokens is not None else self._ids(texts)
        start, before = self.position, self.chain
        for token in ids:
            self._chain = chain_next(self._chain, token)
        self.position += len(ids)
        record = TokenRecord(
            start=start,
            chain=self.chain,
            tokens=ids,
            pieces=[escape_piece(text) for text in texts],
            logprobs=list(logprobs) if logprobs is not None else [-0.5] * len(ids),
            finish=Finish(finish, code, message) if finish else None,
            tops=list(tops) if tops is not None else None,
            prompt=prompt,
        )
        return await self._worker.publish(Publication(self.id, self._fence, before, record))

    async def end(self) -> PublishAnswer:
        """End as a model does: with its end-of-message token."""
        return await self.say("", tokens=[EOS], finish="eos_token")

    async def fail(self, code: str, message: str = "") -> PublishAnswer:
        return await self.say(finish="failed", code=code, message=message)

    async def release(self) -> None:
        """Hand it back, for another worker to continue."""
        await self._worker.release(self.id, self._fence)

    def _ids(self, texts: Sequence[str]) -> list[int]:
        return [65 + (self.position + index) % 26 for index in range(len(texts))]


Script = Callable[[Turn], Awaitable[object]]


class ScriptedWorker:
    """A live worker of ``version`` as far as Redis can tell."""

    def __init__(self, broker: Broker, version: str, *, max_cost: int = 1_000_000) -> None:
        self.name = new_process_name("worker")
        self.version = version
        self._broker = broker
        self._max_cost = max_cost
        self._num_claims = 0

    async def beat(self, state: str = "ready") -> None:
        """Take or renew the lease; it outlives any test."""
        presence = WorkerPresence(self.version, self._max_cost, 1000.0, state=state)
        await self._broker.beat_worker(self.name, presence, seen=0, holding=[], lease_ms=LEASE_MS)

    async def take(self) -> Turn:
        """Claim the next generation, waiting until there is one."""
        found: list[Claimed] = []

        async def claim() -> bool:
            self._num_claims += 1
            answer = await self._broker.claim(
                self.name,
                new_nonce(),
                self._num_claims,
                budget=self._max_cost,
                max_generations=1,
                model_version=self.version,
            )
            found.extend(answer.generations)
            return bool(found)

        await wait_until(claim, what="a generation to claim")
        spec = found[0].spec or await self._broker.read_spec(found[0].id.rpartition(".")[0])
        assert spec is not None
        return Turn(self, found[0], spec)

    async def publish(self, publication: Publication) -> PublishAnswer:
        return await self._broker.publish(self.name, [publication], lease_ms=LEASE_MS)

    async def release(self, generation_id: str, fence: str) -> None:
        await self._broker.release(self.name, [(generation_id, fence)])

    async def leave(self) -> None:
        await self._broker.leave_worker(self.name)

    @asynccontextmanager
    async def acting(self, script: Script) -> AsyncGenerator[None]:
        """Run ``script`` for each generation that comes, until the block ends."""

        async def serve() -> None:
            async with asyncio.TaskGroup() as turns:
                while True:
                    turns.create_task(_run(script, await self._take_patiently()))

        serving = asyncio.create_task(serve())
        try:
            yield
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _take_patiently(self) -> Turn:
        while True:
            try:
                return await self.take()
            except AssertionError:
                continue


async def _run(script: Script, turn: Turn) -> None:
    await script(turn)


def saying(*texts: str, finish: str = "eos_token", every_s: float = 0.0) -> Script:
    """A script: one record per text, then the end."""

    async def script(turn: Turn) -> None:
        for text in texts:
            await turn.say(text)
            await asyncio.sleep(every_s)
        if finish == "eos_token":
            await turn.end()
        else:
            await turn.say(finish=finish)

    return script
