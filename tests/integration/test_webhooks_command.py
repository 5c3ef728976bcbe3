"""`headrace webhooks`: a secret is shown once, and what was sent can be seen and sent again."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from common import keys
from common.broker import Broker, WebhookStore, connect
from common.models.simulated import SIMULATED_MODEL
from common.webhooks import Endpoint
from ops import webhooks
from tests.support.command import Headrace, headrace_of
from tests.support.redis_server import RedisServer

T = TypeVar("T")


headrace = headrace_of("webhooks")


def on_store(server: RedisServer, act: Callable[[WebhookStore], Awaitable[T]]) -> T:
    async def run() -> T:
        broker = Broker(connect(server.url), SIMULATED_MODEL)
        try:
            return await act(broker.webhook_store)
        finally:
            await broker.close()

    return asyncio.run(run())


def only(server: RedisServer) -> Endpoint:
    [endpoint] = on_store(server, lambda store: store.endpoints())
    return endpoint


def test_an_endpoint_from_its_first_day_to_its_last(
    headrace: Headrace, redis_server: RedisServer, tmp_path: Path
) -> None:
    said = headrace("add", "acme", "https://hooks.example/a", "--event", "batch.completed")
    secret = said.out.strip()
    assert (said.code, secret[:6]) == (0, "whsec_")
    endpoint, pepper = only(redis_server), keys.pepper_path(tmp_path).read_bytes()
    assert endpoint.secrets(pepper, 0) == [secret]
    [row] = json.loads(headrace("list", "--json").out)
    assert (row["url"], row["events"], row["state"]) == (endpoint.url, "batch.completed", "on")
    rotated = headrace("rotate-secret", endpoint.id, "--overlap", "1h").out.strip()
    assert only(redis_server).secrets(pepper, endpoint.created_s + 60) == [rotated, secret]
    assert only(redis_server).secrets(pepper, endpoint.created_s + 4000) == [rotated]
    shown = headrace("list").out + headrace("list", "--json").out
    assert secret not in shown
    assert rotated not in shown
    assert headrace("enable", endpoint.id).code == 0
    assert headrace("remove", endpoint.id).code == 0
    assert not on_store(redis_server, lambda store: store.endpoints())
    for action in ("remove", "enable", "rotate-secret", "test"):
        said = headrace(action, endpoint.id)
        assert (said.code, said.err) == (1, f"headrace: there is no endpoint {endpoint.id}\n")


def test_what_was_sent_is_listed_and_sent_again(
    headrace: Headrace, redis_server: RedisServer
) -> None:
    headrace("add", "acme", "https://hooks.example/a")
    on_store(redis_server, lambda store: store.enqueue("batch.failed", "acme", "batch_1"))
    [row] = json.loads(headrace("deliveries", "--json").out)
    assert (row["event"], row["of"], row["state"]) == ("batch.failed", "batch_1", "waiting")
    assert "batch_1" in headrace("deliveries").out
    assert json.loads(headrace("dead", "--json").out) == []
    assert headrace("resend", row["id"]).code == 0
    assert headrace("resend", "evt_0.we_0").err == "headrace: there is no delivery evt_0.we_0\n"


def test_a_test_that_nobody_sends_says_so(
    headrace: Headrace, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_TEST_WAIT_S", 0.1)
    headrace("add", "acme", "https://hooks.example/a")
    said = headrace("test", only(redis_server).id)
    assert said.code == 1
    assert "does a background worker run?" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "acme", "http://hooks.example/"), "must begin with https://"),
        (("add", "acme", "https://10.0.0.1/"), "must be on a public address"),
        (("add", "Acme:x", "https://hooks.example/"), "must be up to 40 of a-z"),
        (("add", "acme", "https://hooks.example/", "--event", "done"), "'done' is not one of"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    headrace: Headrace, redis_server: RedisServer, arguments: tuple[str, ...], words: str
) -> None:
    said = headrace(*arguments)
    assert said.code == 2
    assert words in said.err
    assert not on_store(redis_server, lambda store: store.endpoints())


def test_a_closed_network_may_be_told_over_http(
    headrace: Headrace, redis_server: RedisServer
) -> None:
    assert headrace("add", "acme", "http://10.0.0.1/", "--allow-private-webhooks").code == 0
    assert only(redis_server).url == "http://10.0.0.1/"


def test_secrets_hang_on_one_pepper(
    headrace: Headrace, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Signatures of another one would open at no receiver."""
    headrace("add", "acme", "https://hooks.example/a")
    elsewhere = tmp_path / "elsewhere"
    said = headrace("add", "acme", "https://hooks.example/b", data_dir=elsewhere)
    assert said.code == 1
    assert "it is not here" in said.err
    keys.make_pepper(elsewhere)
    said = headrace("rotate-secret", only(redis_server).id, data_dir=elsewhere)
    assert "another pepper" in said.err
