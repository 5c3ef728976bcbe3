"""`headrace forget`: nothing of a tenant is left, and of others everything."""

import asyncio
import io
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from common.batches import folder
from common.broker import Broker, WorkerPresence, connect
from common.keys import Limits
from common.storage.local import LocalStorage
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.batches import batch_record
from tests.support.command import Headrace, headrace_of
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.generations import admit
from tests.support.scripted_worker import saying

LIMITS = Limits(requests_per_minute=100, tokens_per_minute=1_000_000, streams=10)
OTHER, GONE = "other", "gone"

Forget = Callable[..., Any]


headrace = headrace_of("forget")


@pytest.fixture
def forget(stand: Stand, headrace: Headrace) -> Forget:
    """Runs `headrace forget …` beside the test's own event loop; exit code and what it printed."""

    async def beside(*arguments: str) -> tuple[int, str]:
        said = await asyncio.to_thread(headrace, *arguments, data_dir=stand.data_dir)
        return said.code, said.out + said.err

    return beside


async def use_everything(stand: Stand, gateway: RunningGateway, tenant: str) -> dict[str, str]:
    """As a tenant of every kind of thing that is kept: the ids, by kind, and its key."""
    key = await make_key(stand.broker, tenant, limits=LIMITS, scopes=("generate", "batch"))
    headers = bearer(key)
    client = gateway.client
    body = {"prompt": f"secret of {tenant}", "max_tokens": 4, "n": 2}
    stream = await client.post(
        "/v1/completions", json=body, headers=headers | {"idempotency-key": "k"}
    )
    stored = await client.post("/v1/responses", json={"input": "hi"}, headers=headers)
    assert (stream.status_code, stored.status_code) == (200, 200)
    form = {"file": ("in.jsonl", b"secret"), "purpose": (None, "batch")}
    file = await client.post("/v1/files", files=form, headers=headers)
    assert file.status_code == 200, file.text
    return {
        "key": key,
        "file": file.json()["id"],
        "stream": stream.headers["x-headrace-stream-id"],
        "response": stored.json()["id"],
    }


async def used_by(
    stand: Stand, *tenants: str
) -> tuple[httpx.AsyncClient, dict[str, dict[str, str]]]:
    """A gateway, and what each tenant has used of it; nothing that comes later is worked on."""
    worker = await stand.worker()
    gateway = await stand.gateway(key_pepper=PEPPER)
    async with worker.acting(saying("a", "b")):
        used = {tenant: await use_everything(stand, gateway, tenant) for tenant in tenants}
    return gateway.client, used


async def names_left(redis_url: str) -> list[bytes]:
    redis: Any = Redis.from_url(redis_url)
    try:
        return [name async for name in redis.scan_iter()]
    finally:
        await redis.aclose()


async def seen(client: httpx.AsyncClient, ids: dict[str, str]) -> list[int]:
    headers = bearer(ids["key"])
    paths = (
        f"/v1/streams/{ids['stream']}",
        f"/v1/responses/{ids['response']}",
        f"/v1/files/{ids['file']}/content",
    )
    return [(await client.get(path, headers=headers)).status_code for path in paths]


async def test_nothing_of_a_tenant_is_left(stand: Stand, forget: Forget) -> None:
    """Also what waits at that moment; another tenant's things are as before."""
    client, used = await used_by(stand, OTHER, GONE)
    other, gone = used[OTHER], used[GONE]
    waiting = await client.post(
        "/v1/responses", json={"input": "later", "background": True}, headers=bearer(gone["key"])
    )
    assert waiting.json()["status"] == "queued"
    code, told = await forget(GONE, "--yes")
    assert code == 0, told
    assert "3 requests, with their answers" in told
    assert "Its API keys are still taken" in told
    assert sum((await stand.broker.state()).waiting.values()) == 0
    assert await seen(client, gone) == [404, 404, 404]
    assert await seen(client, other) == [200, 200, 200]
    left = await names_left(stand.redis_url)
    ids = [gone["stream"], gone["response"].removeprefix("resp_")]
    beside_records = [name for name in left if not name.endswith((b":ended", b":secret"))]
    for name in beside_records:
        assert not any(id.encode() in name for id in ids), name
        assert b":gone:" not in name
    code, told = await forget(GONE, "--dry-run")
    assert (code, "0 requests" in told, "0 idempotency keys" in told) == (0, True, True)


async def test_with_its_keys_nobody_comes_in_any_more(stand: Stand, forget: Forget) -> None:
    client, used = await used_by(stand, OTHER, GONE)
    other, gone = used[OTHER], used[GONE]
    code, told = await forget(GONE, "--keys", "--yes")
    assert (code, "1 API keys" in told) == (0, True)
    assert await seen(client, gone) == [401, 401, 401]
    assert await seen(client, other) == [200, 200, 200]
    assert [key.tenant for key, _ in await stand.broker.key_store.all()] == [OTHER]
    left = await names_left(stand.redis_url)
    assert not [name for name in left if gone["key"].split("-")[2].encode() in name]


async def test_a_look_changes_nothing(stand: Stand, forget: Forget) -> None:
    client, used = await used_by(stand, GONE)
    code, told = await forget(GONE, "--dry-run")
    assert (code, "2 requests" in told) == (0, True)
    assert await seen(client, used[GONE]) == [200, 200, 200]


async def test_it_asks_first(stand: Stand, forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    client, used = await used_by(stand, GONE)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, told = await forget(GONE)
    assert code != 0
    assert "Remove all of it" in told
    assert await seen(client, used[GONE]) == [200, 200, 200]


async def test_batches_are_stopped_and_go_with_their_folders(
    stand: Stand, forget: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody steers them here, so that none says that it has stopped."""
    monkeypatch.setattr("ops.forget.STOP_LIMIT_S", 0.3)
    storage, batches = LocalStorage(stand.data_dir / "files"), stand.broker.batch_store
    records = {tenant: batch_record(tenant=tenant) for tenant in (GONE, OTHER)}
    for record in records.values():
        await batches.create(record)
        await storage.put(f"{folder(record.id)}parts/00000001", b"secret")
    code, told = await forget(GONE, "--yes")
    assert (code, "1 batches" in told) == (0, True)
    assert await batches.get(records[GONE].id) is None
    assert await batches.active("simulated") == [records[OTHER].id]
    assert await storage.list(folder(records[GONE].id)) == []
    assert len(await storage.list(folder(records[OTHER].id))) == 1
    assert await batches.page(GONE, limit=10) == ([], False)


async def test_every_pool_is_looked_through(stand: Stand, forget: Forget) -> None:
    """A server may hold those of several models."""
    other_pool = Broker(connect(stand.redis_url), "another/model")
    await other_pool.load()
    presence = WorkerPresence(model_version="another/model@1", max_cost=100)
    await other_pool.beat_worker("w", presence, seen=0, holding=(), lease_ms=60_000)
    gone = await admit(other_pool, tenant=GONE)
    kept = await admit(other_pool, tenant=OTHER)
    code, told = await forget(GONE, "--yes")
    assert (code, "1 requests" in told) == (0, True)
    assert await other_pool.read(gone, 0) is None
    assert await other_pool.read(kept, 0) is not None
    await other_pool.close()


@pytest.mark.parametrize("name", ["", "A", "../x", "a*"])
async def test_what_is_no_name_is_refused(forget: Forget, name: str) -> None:
    code, told = await forget(name, "--yes")
    assert code == 2
    assert "is no name of a tenant" in told
