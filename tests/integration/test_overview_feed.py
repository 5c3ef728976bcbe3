"""The feed of the live page and ``/v1/stats``: one picture of the pool, on every gateway alike."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.broker import OverviewStore
from common.broker.overview_store import KEPT_S
from common.overview import SERIES
from gateway.app import drain
from ops.bench.sse_client import Event, read_events
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.overviews import overview, worker_view


@asynccontextmanager
async def feed(
    gateway: RunningGateway, path: str = "/ops/feed", **request: Any
) -> AsyncGenerator[AsyncIterator[Event]]:
    async with asyncio.timeout(20), gateway.client.stream("GET", path, **request) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield read_events(response)


async def append(store: OverviewStore, *numbers: int) -> None:
    """Seconds that can be told apart by their dead letters."""
    for number in numbers:
        await store.append(overview(at=time.time(), dead_letters=number))


async def test_a_follower_gets_the_history_and_then_each_second(stand: Stand) -> None:
    gateway, store = await stand.gateway(), stand.broker.overview_store
    await append(store, 1, 2)
    async with feed(gateway) as events:
        history = await anext(events)
        newest = await anext(events)
        await append(store, 3)
        third = await anext(events)
    assert history.kind == "history"
    assert history.id == "", "one does not resume from it"
    assert set(history.json) == {"at", *SERIES}
    assert history.json["dead_letters"] == [1, 2]
    assert history.json["lanes.default.depth"] == [3, 3]
    assert history.json["lanes.batch.est_wait_s"] == [None, None], "not known is not 0"
    assert history.json["workers.ready"] == [3, 3]
    assert [event.kind for event in (newest, third)] == ["overview", "overview"]
    assert [event.json["dead_letters"] for event in (newest, third)] == [2, 3]
    assert newest.json["workers"][0]["name"] == "w0"


@pytest.mark.parametrize("by", ["header", "query"])
async def test_a_feed_goes_on_at_any_second_on_another_gateway(stand: Stand, by: str) -> None:
    first, second = await stand.gateway(), await stand.gateway()
    store = stand.broker.overview_store
    await append(store, 1)
    async with feed(first) as events:
        await anext(events)
        seen = await anext(events)
    await append(store, 2, 3)
    asked: dict[str, Any] = {"params": {"from": seen.id}}
    if by == "header":
        asked = {"headers": {"last-event-id": seen.id}, "params": {"from": "1-1"}}
    async with feed(second, **asked) as events:
        missed = [await anext(events), await anext(events)]
    assert [event.kind for event in missed] == ["overview", "overview"]
    assert [event.json["dead_letters"] for event in missed] == [2, 3]


@pytest.mark.parametrize("seen", ["1-1", "99999999999999-0"])
async def test_who_missed_too_much_or_knows_a_time_that_is_not_yet_gets_the_history(
    stand: Stand, seen: str
) -> None:
    """The second is what a Redis that went back in time leaves its followers with."""
    gateway = await stand.gateway()
    await append(stand.broker.overview_store, *range(1, 70))
    async with feed(gateway, headers={"last-event-id": seen}) as events:
        history, newest = await anext(events), await anext(events)
    assert history.kind == "history"
    assert newest.json["dead_letters"] == 69


async def test_where_nobody_looks_the_feed_says_so(stand: Stand) -> None:
    gateway = await stand.gateway()
    async with feed(gateway) as events:
        told = await anext(events)
        assert told.json["diagnosis"][0]["code"] == "exporter_stale"
        assert told.id == ""
        await append(stand.broker.overview_store, 5)
        await until(events, lambda event: event.json["dead_letters"] == 5)


async def test_redis_away_is_told_and_its_return_too(stand: Stand) -> None:
    store = stand.broker.overview_store
    async with fault_proxy(stand.redis_url) as proxy:
        gateway = await stand.gateway(redis_url=proxy.url)
        await append(store, 1)
        async with feed(gateway) as events:
            await until(events, lambda event: event.kind == "overview")
            await proxy.cut()
            told = await until(events, lambda event: not event.json["redis"]["is_up"])
            assert told.json["diagnosis"][0]["code"] == "redis_away"
            assert told.json["workers"][0]["name"] == "w0", "the last picture stays"
            await proxy.heal()
            await append(store, 2)
            await until(events, lambda event: event.json["dead_letters"] == 2)


async def until(events: AsyncIterator[Event], is_it: Any) -> Event:
    async for event in events:
        if is_it(event):
            return event
    raise AssertionError("the feed ended")


async def test_a_drain_ends_the_feed(stand: Stand) -> None:
    gateway = await stand.gateway()
    await append(stand.broker.overview_store, 1)
    async with feed(gateway) as events:
        await anext(events)
        await drain(gateway.services, 0.0)
        rest = [event async for event in events]
    assert {event.kind for event in rest} <= {"overview"}, "no error: an EventSource comes back"
    refused = await gateway.client.get("/ops/feed")
    assert refused.json()["code"] == "DRAINING"


async def test_an_id_that_is_none_is_refused_by_name(stand: Stand) -> None:
    gateway = await stand.gateway()
    answer = await gateway.client.get("/ops/feed", params={"from": "57"})
    assert answer.status_code == 422
    assert "from" in answer.json()["error"]


async def test_the_seconds_are_bounded(stand: Stand) -> None:
    store = stand.broker.overview_store
    await append(store, *range(KEPT_S + 3))
    assert len(await store.rows()) == KEPT_S
    assert len(await store.after("0-0", 2 * KEPT_S)) == KEPT_S


async def test_one_writer_holds_the_lease(stand: Stand) -> None:
    store = stand.broker.overview_store
    assert await store.take_lease("a")
    assert not await store.take_lease("b")
    assert await store.take_lease("a")
    await store.drop_lease("b")
    assert not await store.take_lease("b")
    await store.drop_lease("a")
    assert await store.take_lease("b")


async def test_the_five_figures_are_there_by_name(stand: Stand) -> None:
    gateway = await stand.gateway()
    await stand.broker.overview_store.append(overview(at=time.time()))
    told = (await gateway.client.get("/v1/stats")).json()
    assert told["queue_time"] == 0.2
    assert told["generation_time"] == 3.0
    assert told["tokens_per_second"] == 120.0
    assert told["error_rate"] == 0.0
    assert told["model_version"] == "m@1"
    assert told["windows"]["1h"]["error_rate"] == 0.001
    assert set(told["windows"]) == {"1m", "5m", "1h"}


async def test_without_anybody_who_looks_the_figures_are_empty(stand: Stand) -> None:
    gateway = await stand.gateway()
    told = (await gateway.client.get("/v1/stats")).json()
    assert told["queue_time"] is None
    assert told["at"] is None
    assert told["model_version"] == stand.version


@pytest.mark.parametrize(("path", "scope"), [("/ops/feed", "admin"), ("/v1/stats", "metrics")])
async def test_where_keys_are_asked_for_they_need_their_scope(
    stand: Stand, path: str, scope: str
) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER)
    await append(stand.broker.overview_store, 1)
    plain = await make_key(stand.broker, "a")
    allowed = await make_key(stand.broker, "b", scopes=(scope,))
    answer = await gateway.client.get(path)
    assert answer.status_code == 401
    answer = await gateway.client.get(path, headers=bearer(plain))
    assert answer.status_code == 403
    answer = await gateway.client.head(path, headers=bearer(allowed))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://elsewhere.example"},
        {"origin": "null"},
        {"host": "rebound.example:8080"},
        {"host": "rebound.example", "origin": "http://rebound.example"},
        {"host": "rebound.example", "authorization": "Bearer none"},
    ],
)
async def test_another_website_is_refused(stand: Stand, headers: dict[str, str]) -> None:
    gateway = await stand.gateway()
    answer = await gateway.client.get("/ops/feed", headers=headers)
    assert answer.status_code == 403
    expected = "HOST_NOT_ALLOWED" if "host" in headers else "SCOPE_DENIED"
    assert answer.json()["code"] == expected


async def test_the_own_page_and_programs_are_let_in(stand: Stand) -> None:
    gateway = await stand.gateway()
    for headers in (
        {},
        {"sec-fetch-site": "same-origin", "origin": gateway.url},
        {"sec-fetch-site": "none"},
    ):
        assert (await gateway.client.head("/ops/feed", headers=headers)).status_code == 200


async def test_no_figure_is_lost_on_the_way(stand: Stand) -> None:
    gateway = await stand.gateway()
    sent = overview(at=time.time(), workers=[worker_view("w7", state="draining", kv_used=0.5)])
    await stand.broker.overview_store.append(sent)
    async with feed(gateway) as events:
        told = await until(events, lambda event: event.kind == "overview")
    worker = told.json["workers"][0]
    assert (worker["name"], worker["state"], worker["kv_used"]) == ("w7", "draining", 0.5)
    assert told.json["latency"]["ttft"] == {"p50": 0.3, "p99": 0.9}
