"""Webhooks: ends reach their endpoints, signed, under one id, whatever breaks on the way."""

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai import OpenAI
from redis.asyncio import Redis
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from common import keys
from common.broker import Broker, WebhookStore, connect, webhook_store
from common.settings import BackgroundSettings
from common.webhooks import Delivery, Endpoint, EventType, new_endpoint_id, new_salt
from tests.support.batches import batch_record
from tests.support.event_schema import captured_logs
from tests.support.fault_proxy import fault_proxy
from tests.support.gateway_app import Stand
from tests.support.processes import Processes
from tests.support.receiver import Received, Receiver, receiving
from tests.support.scripted_worker import saying
from tests.support.waiting import wait_until
from workers.background import webhooks
from workers.background.post import Poster
from workers.background.webhooks import Deliverer, tell_batches, tell_responses

PEPPER = "p" * 64
SETTINGS = BackgroundSettings(key_pepper=PEPPER, allow_private_webhooks=True)  # pyright: ignore[reportArgumentType]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def store(broker: Broker) -> WebhookStore:
    return broker.webhook_store


def deliverer_of(store: WebhookStore, **options: Any) -> Deliverer:
    chosen: dict[str, Any] = {"allow_private": True} | options
    return Deliverer(store, Poster(**chosen), SETTINGS)


async def add(store: WebhookStore, url: str, **changes: Any) -> Endpoint:
    fields: dict[str, Any] = {
        "id": new_endpoint_id(),
        "tenant": "public",
        "url": url,
        "created_s": int(time.time()),
        "salt": new_salt(),
        "pepper": keys.fingerprint(PEPPER.encode()),
    }
    endpoint = Endpoint(**(fields | changes))
    await store.add_endpoint(endpoint)
    return endpoint


def secret_of(endpoint: Endpoint) -> str:
    return endpoint.secrets(PEPPER.encode(), time.time())[0]


async def send_due(store: WebhookStore, deliverer: Deliverer) -> list[Delivery]:
    """One attempt at each delivery whose time has come; how they stand afterwards, newest first."""
    for delivery in await store.claim_due(limit=100, lease_ms=10_000):
        await deliverer.deliver(delivery)
    return await store.deliveries()


def is_signed(request: Received, secret: str) -> bool:
    """As the reference library and OpenAI's client check it; both would raise."""
    Webhook(secret).verify(request.body, request.headers)
    event = OpenAI(api_key="none").webhooks.unwrap(request.body, request.headers, secret=secret)
    return event.id == request.headers["webhook-id"]


# Ends become events ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish", "event_type"),
    [
        ("eos_token", "response.completed"),
        ("length", "response.incomplete"),
        ("failed", "response.failed"),
        ("cancelled", "response.cancelled"),
    ],
)
async def test_the_end_of_a_background_response_is_told_and_signed(
    stand: Stand, receiver: Receiver, finish: str, event_type: EventType
) -> None:
    worker, gateway = await stand.worker(), await stand.gateway()
    store = stand.broker.webhook_store
    endpoint = await add(store, receiver.url)
    answer = await gateway.client.post("/v1/responses", json={"input": "a", "background": True})
    response_id = answer.json()["id"]
    turn = await worker.take()
    await turn.say("Hel")
    if finish == "cancelled":
        await gateway.client.post(f"/v1/responses/{response_id}/cancel")
    elif finish == "failed":
        await turn.say(finish="failed", code="ENGINE_ERROR")
    else:
        await turn.say(finish=finish)
    assert await tell_responses(stand.broker)
    await send_due(store, deliverer_of(store))
    [request] = receiver.received
    event = msgspec.json.decode(request.body)
    assert (event["type"], event["data"]) == (event_type, {"id": response_id})
    assert request.target == "/hooks?of=test"
    assert is_signed(request, secret_of(endpoint))


async def test_an_end_is_told_once_however_often_it_is_read(
    stand: Stand, receiver: Receiver
) -> None:
    """A process that was killed between event and cursor leaves the end to be read again."""
    worker, gateway = await stand.worker(), await stand.gateway()
    store = stand.broker.webhook_store
    await add(store, receiver.url)
    await gateway.client.post("/v1/responses", json={"input": "a", "background": True})
    async with worker.acting(saying("Hello")):
        await wait_until(lambda: stand.broker.read_ended(""), what="its end")
    for _ in range(2):
        await tell_responses(stand.broker)
        await stand.broker.keep_told_cursor("")
        await send_due(store, deliverer_of(store))
    assert len(receiver.received) == 1
    assert len(await store.deliveries()) == 1


async def test_what_somebody_waited_for_is_not_told(stand: Stand, receiver: Receiver) -> None:
    worker, gateway = await stand.worker(), await stand.gateway()
    await add(stand.broker.webhook_store, receiver.url)
    async with worker.acting(saying("Hello")):
        await gateway.client.post("/v1/responses", json={"input": "a"})
    assert await tell_responses(stand.broker)
    assert not await stand.broker.webhook_store.deliveries()


async def test_the_end_of_a_batch_is_told_to_its_tenant(broker: Broker, receiver: Receiver) -> None:
    """The record leaves word of it in the step that ends it, for whoever looks next."""
    store = broker.webhook_store
    await add(store, receiver.url, tenant="other")
    await add(store, receiver.url, tenant="acme", events=("batch.completed",))
    mine = await add(store, receiver.url, tenant="acme")
    record = await broker.batch_store.create(batch_record(tenant="acme", pool=broker.pool))
    await tell_batches(broker)
    assert not await store.deliveries()
    await broker.batch_store.change(
        record.id, lambda known: msgspec.structs.replace(known, status="failed")
    )
    for _ in range(2):
        await tell_batches(broker)
    [delivery] = await store.deliveries()
    assert delivery.endpoint_id == mine.id
    assert (delivery.event_type, delivery.object_id) == ("batch.failed", record.id)


# Sending -----------------------------------------------------------------------------------------


async def test_what_is_not_taken_is_sent_again_under_its_id(
    store: WebhookStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "FIRST_RETRY_S", 0.0)
    await add(store, receiver.url)
    receiver.statuses = [500, 302, 204]
    await store.enqueue("batch.completed", "public", "batch_1")
    deliverer = deliverer_of(store)
    states = [(await send_due(store, deliverer))[0] for _ in range(3)]
    assert [(it.state, it.attempts, it.last) for it in states] == [
        ("waiting", 1, "status 500"),
        ("waiting", 2, "status 302"),
        ("delivered", 3, "status 204"),
    ]
    await send_due(store, deliverer)
    assert len(receiver.ids) == 3
    assert len(set(receiver.ids)) == 1
    assert len({request.body for request in receiver.received}) == 1


async def test_it_waits_between_attempts(store: WebhookStore, receiver: Receiver) -> None:
    await add(store, receiver.url)
    receiver.statuses = [503]
    await store.enqueue("batch.completed", "public", "batch_1")
    for _ in range(2):
        await send_due(store, deliverer_of(store))
    assert len(receiver.received) == 1


async def test_an_endpoint_that_says_it_is_gone_is_left_alone(
    store: WebhookStore, receiver: Receiver
) -> None:
    endpoint = await add(store, receiver.url)
    receiver.statuses = [410]
    await store.enqueue("batch.completed", "public", "batch_1")
    await store.enqueue("batch.failed", "public", "batch_2")
    deliveries = await send_due(store, deliverer_of(store))
    assert {delivery.state for delivery in deliveries} == {"dead"}
    assert len(receiver.received) == 1
    known = await store.endpoint(endpoint.id)
    assert known is not None
    assert "410" in known.disabled
    await store.enqueue("batch.completed", "public", "batch_3")
    assert len(await store.deliveries()) == 2


async def test_what_nobody_took_is_listed_and_can_be_sent_again(
    store: WebhookStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_store, "GIVE_UP_S", 0)
    await add(store, receiver.url)
    receiver.statuses = [500, 200]
    await store.enqueue("batch.completed", "public", "batch_1")
    with capture_logs() as lines:
        await send_due(store, deliverer_of(store))
    assert [line["event"] for line in lines] == ["webhook.dead"]
    [dead] = await store.deliveries(only_dead=True)
    assert await store.send_again(dead.id)
    [delivery] = await send_due(store, deliverer_of(store))
    assert (delivery.state, len(set(receiver.ids))) == ("delivered", 1)
    assert not await store.deliveries(only_dead=True)
    assert await store.send_again("evt_0.we_0") is None


async def test_while_a_secret_is_replaced_both_open_it(
    store: WebhookStore, receiver: Receiver
) -> None:
    endpoint = await add(store, receiver.url, old_salt="before", old_until_s=2**40)
    await store.enqueue("response.completed", "public", "resp_1")
    await send_due(store, deliverer_of(store))
    [request] = receiver.received
    new, old = endpoint.secrets(PEPPER.encode(), time.time())
    assert is_signed(request, new)
    assert is_signed(request, old)


async def test_of_many_senders_one_sends(store: WebhookStore, receiver: Receiver) -> None:
    await add(store, receiver.url)
    for n in range(20):
        await store.enqueue("batch.completed", "public", f"batch_{n}")
    await asyncio.gather(*(send_due(store, deliverer_of(store)) for _ in range(4)))
    assert len(receiver.ids) == len(set(receiver.ids)) == 20


async def test_a_receiver_that_never_answers_holds_nobody_up(
    store: WebhookStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LOOK_S", 0.02)
    monkeypatch.setattr(webhooks, "MAX_AT_ONCE", 6)
    async with receiving() as slow:
        slow.statuses = [0]
        await add(store, slow.url, events=("batch.failed",))
        await add(store, receiver.url, events=("batch.completed",))
        for n in range(10):
            await store.enqueue("batch.failed", "public", f"batch_{n}")
        await store.enqueue("batch.completed", "public", "batch_a")
        sending = asyncio.create_task(deliverer_of(store, limit_s=30).run())
        await asyncio.wait_for(receiver.arrived.wait(), 10)
        sending.cancel()


async def test_who_answers_too_late_has_not_taken_it(
    store: WebhookStore, receiver: Receiver
) -> None:
    receiver.statuses = [0]
    await add(store, receiver.url)
    await store.enqueue("batch.completed", "public", "batch_1")
    [delivery] = await send_due(store, deliverer_of(store, limit_s=0.1))
    assert delivery.last.startswith("no answer: TimeoutError")


async def test_without_the_pepper_nothing_is_sent_and_nothing_lost(
    store: WebhookStore, receiver: Receiver
) -> None:
    await add(store, receiver.url, pepper=b"other")
    await store.enqueue("batch.completed", "public", "batch_1")
    with captured_logs() as lines:
        [delivery] = await send_due(store, deliverer_of(store))
    assert [line["event"] for line in lines] == ["webhook.unsigned"]
    assert (delivery.state, delivery.attempts, receiver.received) == ("waiting", 0, [])


async def test_a_killed_process_loses_no_event(
    redis_url: str, store: WebhookStore, receiver: Receiver, started: Processes
) -> None:
    """It is killed while it sends; when its lease ends another one sends, under the same id."""
    settings: dict[str, Any] = {"key_pepper": PEPPER, "allow_private_webhooks": True}
    receiver.statuses = [0, 200]
    endpoint = await add(store, receiver.url)
    first = await started.background(**settings).ready()
    await store.enqueue("batch.completed", "public", "batch_1")
    await asyncio.wait_for(receiver.arrived.wait(), 20)
    first.kill()
    [delivery] = await store.deliveries()
    redis = Redis.from_url(redis_url)
    assert await redis.delete(f"hr:{{webhooks}}:lease:{delivery.id}"), "its lease"
    await redis.aclose()
    second = await started.background(**settings).ready()
    await second.saw("webhook.delivered", endpoint=endpoint.id)
    assert receiver.ids == [delivery.event_id] * 2


async def test_without_redis_it_waits(redis_url: str, receiver: Receiver) -> None:
    """What it sent while Redis was away is sent again, rather than not at all."""
    async with fault_proxy(redis_url) as proxy:
        pool = Broker(connect(proxy.url), "test")
        store = pool.webhook_store
        await add(store, receiver.url)
        await store.enqueue("batch.completed", "public", "batch_1")
        sending = asyncio.create_task(deliverer_of(store).run())
        lost = proxy.hold(b"delivered")
        await asyncio.wait_for(lost.hit.wait(), 10)
        await proxy.cut()
        await proxy.heal()
        await wait_until(store.deliveries, what="Redis")
        assert (await store.deliveries())[0].state == "waiting"
        sending.cancel()
        await pool.close()


# Where to ----------------------------------------------------------------------------------------


def resolving(*answers: str) -> tuple[Callable[[str, int], Any], list[str]]:
    """A resolver that gives one answer after another, and what it was asked."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return [answers[min(len(asked), len(answers)) - 1]]

    return resolve, asked


async def test_a_name_is_resolved_once_and_connected_to_as_it_was(
    store: WebhookStore, receiver: Receiver
) -> None:
    """There is no host of that name, and a second answer would lead elsewhere."""
    resolve, asked = resolving("127.0.0.1", "192.0.2.1")
    await add(store, f"http://hooks.invalid:{receiver.port}/")
    await store.enqueue("batch.completed", "public", "batch_1")
    [delivery] = await send_due(store, deliverer_of(store, resolve=resolve))
    assert delivery.state == "delivered"
    assert asked == ["hooks.invalid"]
    assert receiver.received[0].headers["host"] == f"hooks.invalid:{receiver.port}"


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254"])
async def test_a_name_that_has_come_to_lead_inside_is_not_followed(
    store: WebhookStore, receiver: Receiver, address: str
) -> None:
    resolve, _ = resolving(address)
    await add(store, f"https://hooks.example:{receiver.port}/")
    await store.enqueue("batch.completed", "public", "batch_1")
    [delivery] = await send_due(store, deliverer_of(store, resolve=resolve, allow_private=False))
    assert delivery.last == "not sent: hooks.example is not on a public address"
    assert (delivery.state, receiver.received) == ("waiting", [])


async def test_one_private_address_among_public_ones_is_enough_to_refuse(
    store: WebhookStore,
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    await add(store, "https://hooks.example/")
    await store.enqueue("batch.completed", "public", "batch_1")
    [delivery] = await send_due(store, deliverer_of(store, resolve=resolve, allow_private=False))
    assert "not on a public address" in delivery.last


async def test_a_redirect_is_not_followed(store: WebhookStore, receiver: Receiver) -> None:
    async with receiving() as elsewhere:
        receiver.statuses, receiver.location = [307], elsewhere.url
        await add(store, receiver.url)
        await store.enqueue("batch.completed", "public", "batch_1")
        [delivery] = await send_due(store, deliverer_of(store))
        assert (delivery.state, delivery.last) == ("waiting", "status 307")
        assert not elsewhere.received


async def test_the_next_address_is_tried_where_one_does_not_answer(
    store: WebhookStore, receiver: Receiver
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    await add(store, f"http://hooks.invalid:{receiver.port}/")
    await store.enqueue("batch.completed", "public", "batch_1")
    [delivery] = await send_due(store, deliverer_of(store, resolve=resolve))
    assert delivery.state == "delivered"


@pytest.mark.parametrize(
    ("named", "state"), [("hooks.example", "delivered"), ("other.example", "waiting")]
)
async def test_the_certificate_must_be_of_the_name(
    store: WebhookStore, tmp_path: Path, named: str, state: str
) -> None:
    certificate = certificate_of("hooks.example", tmp_path)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, tmp_path / "key.pem")
    believing = ssl.create_default_context(cafile=str(certificate))
    resolve, _ = resolving("127.0.0.1")
    async with receiving(serving) as receiver:
        await add(store, f"https://{named}:{receiver.port}/")
        await store.enqueue("batch.completed", "public", "batch_1")
        deliverer = deliverer_of(store, resolve=resolve, tls=believing)
        [delivery] = await send_due(store, deliverer)
        assert (delivery.state, len(receiver.received)) == (state, int(state == "delivered"))


def certificate_of(name: str, folder: Path) -> Path:
    certificate = folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate
