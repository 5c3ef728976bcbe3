"""The tail of a batch: counts and lines as they finish, the same ones on every gateway."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from common.batches import Counts, Usage
from common.broker import BatchStore
from common.parts import Parts, encode_part
from ops.bench.sse_client import Event, read_events
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.batches import batch_record
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand


@dataclass
class Steered:
    """A batch that the test itself works off, part by part."""

    id: str
    store: BatchStore
    parts: Parts
    num_parts: int = 0
    counts: Counts = field(default_factory=lambda: Counts(total=10))

    @property
    def path(self) -> str:
        return f"/v1/batches/{self.id}/events"

    async def finish(self, *lines: int, failed: tuple[int, ...] = (), padding: int = 0) -> None:
        """Write a part with these lines and let the record count it."""
        self.num_parts += 1
        first = self.counts.finished
        part = encode_part(
            first,
            [(line, line_of(line, padding)) for line in lines],
            [(line, line_of(line, padding)) for line in failed],
            Usage(),
        )
        assert await self.parts.add(self.num_parts, part)
        counts = self.counts
        self.counts = Counts(
            counts.total, counts.completed + len(lines), counts.failed + len(failed)
        )
        await self.store.change(
            self.id, lambda record: record.counted(self.num_parts, self.counts, Usage())
        )

    async def end(self) -> None:
        await self.store.change(self.id, lambda record: record.finalizing(2000))
        await self.store.change(self.id, lambda record: record.ended("file-o", None, 2001))


def line_of(number: int, padding: int = 0) -> bytes:
    return json.dumps({"custom_id": str(number), "padding": "x" * padding}).encode()


async def steered(stand: Stand, gateway: RunningGateway, *, tenant: str = "public") -> Steered:
    store = stand.broker.batch_store
    record = await store.create(batch_record(tenant=tenant))
    await store.change(record.id, lambda record: record.begun(10, "m", 1001))
    return Steered(record.id, store, Parts(gateway.services.storage, record.id))


@asynccontextmanager
async def tail(
    gateway: RunningGateway, path: str, **request: Any
) -> AsyncGenerator[AsyncIterator[Event]]:
    async with gateway.client.stream("GET", path, **request) as response:
        assert response.status_code == 200, await response.aread()
        yield read_events(response)


async def read_all(gateway: RunningGateway, path: str, **request: Any) -> list[Event]:
    async with asyncio.timeout(20), tail(gateway, path, **request) as events:
        return [event async for event in events]


def lines_in(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.id, event.json["custom_id"]) for event in events if event.kind == "line"]


async def until(events: AsyncIterator[Event], kind: str) -> Event:
    async with asyncio.timeout(20):
        async for event in events:
            if event.kind == kind:
                return event
    raise AssertionError(f"the events ended without {kind}")


async def test_counts_and_lines_come_as_they_finish_and_then_the_end(stand: Stand) -> None:
    """Each line once, in the order of the parts, with the very bytes of its file."""
    gateway = await stand.gateway()
    batch = await steered(stand, gateway)
    async with tail(gateway, batch.path) as events:
        first = await until(events, "batch")
        assert first.json["request_counts"] == {"total": 10, "completed": 0, "failed": 0}
        await batch.finish(3, 1, failed=(2,))
        assert (await until(events, "batch")).json["request_counts"]["failed"] == 1
        assert [(await until(events, "line")).id for _ in range(3)] == ["1", "2", "3"]
        await batch.finish(4)
        assert (await until(events, "line")).json == json.loads(line_of(4))
        await batch.end()
        done = await until(events, "done")
        assert [event async for event in events] == []
    shown = await stand.broker.batch_store.get(batch.id)
    assert shown is not None
    assert (done.id, done.json) == ("4-end", shown.shown())
    again = await read_all(gateway, batch.path)
    assert lines_in(again) == [("1", "3"), ("2", "1"), ("3", "2"), ("4", "4")]
    assert again[-1].kind == "done"


async def test_a_reader_goes_on_behind_any_line_on_any_gateway(stand: Stand) -> None:
    """By the header, and by the query for who can send none; also in the middle of a part."""
    one, other = [await stand.gateway() for _ in range(2)]
    batch = await steered(stand, one)
    for lines in ((1, 2, 3), (4,), (5, 6, 7, 8)):
        await batch.finish(*lines)
    await batch.end()
    whole = lines_in(await read_all(one, batch.path))
    assert [int(position) for position, _ in whole] == list(range(1, 9))
    for seen in range(9):
        header = await read_all(other, batch.path, headers={"last-event-id": str(seen)})
        query = await read_all(other, f"{batch.path}?starting_after={seen}")
        assert lines_in(header) == lines_in(query) == whole[seen:]
    ended = await other.client.get(batch.path, headers={"last-event-id": "8-end"})
    assert ended.status_code == 204, "so that an EventSource comes no more"


async def test_a_client_may_ask_for_counts_alone(stand: Stand) -> None:
    gateway = await stand.gateway()
    batch = await steered(stand, gateway)
    await batch.finish(1, 2)
    await batch.end()
    assert [event.kind for event in await read_all(gateway, f"{batch.path}?lines=0")] == ["done"]


async def test_silence_is_filled_with_comments_that_no_sdk_takes_for_events(stand: Stand) -> None:
    gateway = await stand.gateway(keep_alive_s=0.05)
    batch = await steered(stand, gateway)
    async with gateway.client.stream("GET", batch.path) as response:
        raw = ""
        async for piece in response.aiter_text():
            raw += piece
            if raw.count(": ping\n") >= 2:
                break
    assert raw.startswith("retry: 500\nevent: batch\ndata: {")
    assert ": ping\n\n" not in raw


async def test_another_tenant_sees_nothing(stand: Stand) -> None:
    """What belongs to one does not exist for another, nor do tokens for it."""
    gateway = await stand.gateway(key_pepper=PEPPER)
    batch = await steered(stand, gateway, tenant="a")
    stranger = bearer(await make_key(stand.broker, "b", scopes=("batch",)))
    foreign = await gateway.client.get(batch.path, headers=stranger)
    unknown = await gateway.client.get(f"/v1/batches/{batch.id[:-1]}x/events", headers=stranger)
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    token = batch.path.replace("events", "token")
    assert (await gateway.client.post(token, headers=stranger)).status_code == 404


async def test_a_token_opens_the_events_of_one_batch_alone(stand: Stand) -> None:
    """In the address, for a browser's EventSource; only while its key may read batches."""
    gateway = await stand.gateway(key_pepper=PEPPER)
    key = await make_key(stand.broker, "a", scopes=("batch",))
    batch, other = [await steered(stand, gateway, tenant="a") for _ in range(2)]
    await batch.end()
    made = await gateway.client.post(batch.path.replace("events", "token"), headers=bearer(key))
    told = made.json()
    assert told["url"].startswith(f"{batch.path}?token=")
    assert [event.kind for event in await read_all(gateway, told["url"])] == ["done"]
    refused = [
        await gateway.client.get(other.path, params={"token": told["token"]}),
        await gateway.client.get(f"/v1/batches/{batch.id}", params={"token": told["token"]}),
        await gateway.client.get(batch.path, params={"token": told["token"] + "x"}),
        await gateway.client.get(batch.path),
    ]
    assert [answer.status_code for answer in refused] == [401] * 4


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("starting_after=x", "starting_after"),
        ("starting_after=-1", "starting_after"),
        ("starting_after=7", "starting_after"),
        ("lines=2", "lines"),
    ],
)
async def test_what_is_no_place_in_the_batch_is_refused(
    stand: Stand, query: str, field: str
) -> None:
    gateway = await stand.gateway()
    batch = await steered(stand, gateway)
    await batch.finish(1)
    await batch.end()
    answer = await gateway.client.get(f"{batch.path}?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_lines_that_are_kept_in_files_alone_are_said_to_be(stand: Stand) -> None:
    """Counts and end are still told."""
    gateway = await stand.gateway()
    batch = await steered(stand, gateway)
    await batch.finish(1, 2)
    await batch.end()
    await gateway.services.storage.delete(f"batches/{batch.id}/parts/00000001")
    gone = await gateway.client.get(batch.path)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "stream_expired")
    assert [event.kind for event in await read_all(gateway, f"{batch.path}?lines=0")] == ["done"]
    seen = await read_all(gateway, f"{batch.path}?starting_after=2")
    assert [event.kind for event in seen] == ["done"]


async def test_a_slow_reader_is_read_for_at_its_own_pace(stand: Stand) -> None:
    """Lines of many megabytes stay in storage until the client takes them."""
    gateway = await stand.gateway()
    batch = await steered(stand, gateway)
    for first in range(1, 10, 3):
        await batch.finish(*range(first, first + 3), padding=4_000_000)
    await batch.end()
    sent = 0
    read = gateway.services.storage.read

    async def counted(*arguments: Any, **options: Any) -> AsyncGenerator[bytes]:
        nonlocal sent
        async for block in read(*arguments, **options):
            sent += len(block)
            yield block

    gateway.services.storage.read = counted  # pyright: ignore[reportAttributeAccessIssue]
    async with tail(gateway, batch.path) as events:
        assert (await until(events, "line")).id == "1"
        for _ in range(100):
            await asyncio.sleep(0)
        assert sent < 20_000_000, "of 36"
        assert [(await until(events, "line")).id for _ in range(8)] == [
            str(position) for position in range(2, 10)
        ]


async def test_a_gateway_that_stops_lets_its_readers_go_on_elsewhere(stand: Stand) -> None:
    """The body just ends: no error, and no last event."""
    gateway, other = [await stand.gateway() for _ in range(2)]
    batch = await steered(stand, gateway)
    await batch.finish(1)
    async with tail(gateway, batch.path) as events:
        assert (await until(events, "line")).id == "1"
        gateway.services.is_draining = True
        assert [event async for event in events if event.kind != "batch"] == []
    await batch.finish(2)
    await batch.end()
    rest = await read_all(other, batch.path, headers={"last-event-id": "1"})
    assert lines_in(rest) == [("2", "2")]


async def test_the_tail_waits_while_redis_is_away(stand: Stand, redis_url: str) -> None:
    """What happened meanwhile is shown when it is back."""
    async with fault_proxy(redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        batch = await steered(stand, gateway)
        async with tail(gateway, batch.path) as events:
            await until(events, "batch")
            await proxy.cut()
            await batch.finish(1)
            await proxy.heal()
            assert (await until(events, "line")).id == "1"
            await batch.end()
            await until(events, "done")
