"""Workers whose engine takes no time: they claim every stream and publish tokens at a set rate.

``python -m ops.bench.token_source REDIS_URL NUM_STREAMS ROWS`` stands for as many workers as it
takes to run the streams in batches of ``ROWS``, whose steps do not fall together. Fences, chains
and token logs are real; each step is one publish call, as from a worker. Orders come as lines of
JSON on standard input, what became of them goes out in the same way. The text of a token is the
moment at which its step was over (:func:`stamp`), so that a reader knows its age.
"""

import asyncio
import sys
import time

import msgspec
import uvloop

from common.broker import Broker, Claimed, Publication, WorkerPresence, connect
from common.clock import monotonic_s
from common.ids import new_nonce, new_process_name
from common.messages import TokenRecord, chain_next, chain_start, chain_text
from common.models.simulated import SIMULATED_MODEL

STAMP_BYTES = 8
STAMPS_PER_S = 10_000
_LEASE_MS = 30_000
_BEAT_S = 5.0
_TOKEN = 65
_LOGPROB = -0.6931471805599453
_LARGE_BUDGET = 1 << 40
_LOOK_S = 0.02


class Order(msgspec.Struct, frozen=True):
    """Publish on every stream ``rate`` tokens per second, ``per_step`` in each step."""

    rate: float
    seconds: float
    per_step: int = 1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an order. ``late_s``: how far steps were behind their time at the worst."""

    tokens: int
    cpu_s: float
    late_s: float


class Ready(msgspec.Struct, frozen=True):
    """All streams are claimed."""

    streams: int


def stamp(now_s: float) -> bytes:
    """A moment of the monotonic clock, the same for all processes of a machine, as token text."""
    return b"%08x" % (int(now_s * STAMPS_PER_S) & 0xFFFFFFFF)


def age(text: bytes, now_s: float) -> int:
    """Stamps, of which there are ``STAMPS_PER_S``, since the moment that ``text`` stands for."""
    return (int(now_s * STAMPS_PER_S) - int(text, 16)) & 0xFFFFFFFF


class _Row:
    """A claimed stream: how far its log is."""

    def __init__(self, claimed: Claimed, model_version: str) -> None:
        self.id = claimed.id
        self._fence = claimed.fence
        self._position = 0
        self._chain = chain_start(claimed.id, model_version)
        self._chain_text = ""

    def step(self, text: bytes, num_tokens: int) -> Publication:
        start, before = self._position, self._chain_text
        for _ in range(num_tokens):
            self._chain = chain_next(self._chain, _TOKEN)
        self._position += num_tokens
        self._chain_text = chain_text(self._chain)
        record = TokenRecord(
            start,
            self._chain_text,
            [_TOKEN] * num_tokens,
            [text] * num_tokens,
            [_LOGPROB] * num_tokens,
        )
        return Publication(self.id, self._fence, before, record)


class _Worker:
    """As Redis knows it: a lease, a batch of rows."""

    def __init__(self, broker: Broker, model_version: str) -> None:
        self.rows: list[_Row] = []
        self._broker = broker
        self._name = new_process_name("worker")
        self._version = model_version
        self._turn = 0
        self._beat_at_s = 0.0

    async def beat(self) -> None:
        presence = WorkerPresence(self._version, _LARGE_BUDGET, tokens_per_second=1e9)
        held = [row.id for row in self.rows]
        self._beat_at_s = monotonic_s()
        await self._broker.beat_worker(
            self._name, presence, seen=self._turn, holding=held, lease_ms=_LEASE_MS
        )

    async def claim(self, max_rows: int) -> int:
        self._turn += 1
        answer = await self._broker.claim(
            self._name,
            new_nonce(),
            self._turn,
            budget=_LARGE_BUDGET,
            max_generations=max_rows - len(self.rows),
            model_version=self._version,
        )
        self.rows += [_Row(claimed, self._version) for claimed in answer.generations]
        return len(answer.generations)

    async def step(self, per_step: int) -> None:
        """Raises: RuntimeError when a row was taken away: no figure would mean anything."""
        text = stamp(monotonic_s())
        publications = [row.step(text, per_step) for row in self.rows]
        answer = await self._broker.publish(self._name, publications, lease_ms=_LEASE_MS)
        if answer.refusals:
            raise RuntimeError(f"a publication was refused: {answer.refusals[0]}")
        if monotonic_s() - self._beat_at_s > _BEAT_S:
            await self.beat()


async def serve(redis_url: str, num_streams: int, rows: int, model_version: str) -> None:
    """Claim ``num_streams`` and follow orders until standard input ends."""
    broker = Broker(connect(redis_url, single=True), SIMULATED_MODEL)
    await broker.load()
    workers = [_Worker(broker, model_version) for _ in range(-(-num_streams // rows))]
    for worker in workers:
        await worker.beat()
    _tell(Report(tokens=0, cpu_s=0, late_s=0))
    await _claim_all(workers, num_streams, rows)
    _tell(Ready(num_streams))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _tell(await _follow(msgspec.json.decode(line, type=Order), workers))
    await broker.close()


async def _claim_all(workers: list[_Worker], num_streams: int, rows: int) -> None:
    num_missing = num_streams
    beat_at_s = monotonic_s()
    while num_missing:
        found = 0
        for worker in workers:
            if len(worker.rows) < rows:
                found = await worker.claim(rows)
                break
        num_missing -= found
        if not found:
            await asyncio.sleep(_LOOK_S)
        if monotonic_s() - beat_at_s > 1:
            beat_at_s = monotonic_s()
            for worker in workers:
                await worker.beat()


async def _follow(order: Order, workers: list[_Worker]) -> Report:
    """Steps of all workers, evenly spread over the time between two tokens."""
    between_s = order.per_step / order.rate / len(workers)
    num_tokens, late_s, number = 0, 0.0, 0
    cpu_s, began_s = time.process_time(), monotonic_s()
    while number * between_s < order.seconds:
        due_s = began_s + number * between_s
        now_s = monotonic_s()
        if now_s < due_s:
            await asyncio.sleep(due_s - now_s)
        late_s = max(late_s, now_s - due_s)
        worker = workers[number % len(workers)]
        await worker.step(order.per_step)
        num_tokens += order.per_step * len(worker.rows)
        number += 1
    return Report(tokens=num_tokens, cpu_s=time.process_time() - cpu_s, late_s=late_s)


def _tell(told: msgspec.Struct) -> None:
    sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    url, streams, rows_each, version = sys.argv[1:]
    uvloop.run(serve(url, int(streams), int(rows_each), version))
