"""Tokens that stand in the address of a stream instead of a key: for one stream, for a while."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.processes import Processes
from tests.support.scripted_worker import saying
from tests.support.waiting import wait_until

BODY = {"inputs": "hi"}


@dataclass
class Asked:
    """A stream of the tenant ``a`` that has ended, and a token for it."""

    gateway: RunningGateway
    other: RunningGateway
    key: str
    stream_id: str
    body: str
    told: dict[str, Any]

    @property
    def path(self) -> str:
        return f"/v1/streams/{self.stream_id}"

    async def read(self, token: str, **options: Any) -> httpx.Response:
        return await self.other.client.get(self.path, params={"token": token}, **options)


@pytest.fixture
async def asked(stand: Stand) -> Asked:
    worker = await stand.worker()
    gateway, other = [await stand.gateway(key_pepper=PEPPER) for _ in range(2)]
    key = await make_key(stand.broker, "a")
    async with worker.acting(saying("x", "y")):
        answer = await gateway.client.post("/generate_stream", json=BODY, headers=bearer(key))
    stream_id = answer.headers["x-headrace-stream-id"]
    made = await gateway.client.post(f"/v1/streams/{stream_id}/token", headers=bearer(key))
    assert (made.status_code, made.headers["cache-control"]) == (200, "no-store")
    return Asked(gateway, other, key, stream_id, answer.text, made.json())


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_token_reads_its_stream_on_any_gateway_without_a_key(asked: Asked) -> None:
    told = asked.told
    assert told["id"] == asked.stream_id
    assert told["url"] == f"{asked.path}?token={told['token']}"
    assert 0 < told["expires_at"] - time.time() <= 900
    read = await asked.other.client.get(told["url"])
    assert read.text == "retry: 500\n" + asked.body
    cursor = asked.body.splitlines()[0].removeprefix("id: ")
    rest = await asked.read(told["token"], headers={"last-event-id": cursor})
    assert rest.text == "retry: 500\n" + asked.body.partition("\n\n")[2]


async def test_a_token_is_for_reading_one_stream_only(asked: Asked) -> None:
    token = {"token": asked.told["token"]}
    client = asked.other.client
    for method, path in (
        ("DELETE", asked.path),
        ("POST", f"{asked.path}/token"),
        ("GET", "/v1/models"),
        ("POST", "/generate"),
    ):
        refused = await client.request(method, path, params=token, json=BODY)
        assert refused.status_code == 401, (method, path)
    other = await client.get(f"/v1/streams/{'a' * 32}", params=token)
    assert code_of(other) == (401, "invalid_api_key")


async def test_a_token_that_was_changed_opens_nothing(asked: Asked) -> None:
    expires_at, key_id, signature = asked.told["token"].split(".")
    swapped = ("B" if signature[0] == "A" else "A") + signature[1:]
    for text in (
        "",
        "x",
        f"{expires_at}.{key_id}.{swapped}",
        f"{int(expires_at) + 1}.{key_id}.{signature}",
        f"{expires_at}.0123456789ab.{signature}",
        f"{expires_at}..{signature}",
        f"{expires_at}.{key_id}.",
        f"{expires_at}.{key_id}.{signature}é",
    ):
        refused = await asked.read(text)
        assert code_of(refused) == (401, "invalid_api_key"), text
        assert signature not in refused.text


async def test_a_token_ends(asked: Asked) -> None:
    key_id = asked.told["token"].split(".")[1]
    tokens = asked.gateway.services.stream_tokens
    now_s = int(time.time())
    old = await tokens.issue(asked.stream_id, "a", key_id, now_s - 901)
    assert old.expires_at == now_s - 1
    refused = await asked.read(old.text)
    assert refused.status_code == 401
    assert "expired" in refused.json()["error"]["message"]


async def test_a_token_ends_with_the_key_that_asked_for_it(stand: Stand, asked: Asked) -> None:
    await make_key(stand.broker, "b")
    assert await stand.broker.key_store.remove(asked.key.split("-")[2])

    async def is_refused() -> bool:
        return (await asked.read(asked.told["token"])).status_code == 401

    await wait_until(is_refused, timeout_s=2)


async def test_there_is_no_token_for_what_one_does_not_have(stand: Stand, asked: Asked) -> None:
    """Another tenant's stream is answered as one that never was."""
    stranger = bearer(await make_key(stand.broker, "b"))
    foreign = await asked.other.client.post(f"{asked.path}/token", headers=stranger)
    unknown = await asked.other.client.post(f"/v1/streams/{'a' * 32}/token", headers=stranger)
    assert (foreign.status_code, foreign.json()) == (404, unknown.json())
    bad = await asked.other.client.post("/v1/streams/x/token", headers=stranger)
    assert bad.status_code == 404


async def test_without_keys_tokens_work_as_well(stand: Stand) -> None:
    """So that a page need not know whether its gateway asks for keys."""
    worker = await stand.worker()
    gateway = await stand.gateway()
    async with worker.acting(saying("x")):
        answer = await gateway.client.post("/generate_stream", json=BODY)
    path = f"/v1/streams/{answer.headers['x-headrace-stream-id']}"
    made = (await gateway.client.post(f"{path}/token")).json()
    assert (await gateway.client.get(made["url"])).text == "retry: 500\n" + answer.text
    assert (await gateway.client.get(f"{path}?token=x")).status_code == 401


async def test_a_token_is_never_logged(started: Processes, simulated_data_dir: Path) -> None:
    settings: dict[str, Any] = {"data_dir": simulated_data_dir, "model": "simulated"}
    worker = started.worker(**settings)
    gateway = await started.gateway(**settings).ready()
    await worker.ready()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        answer = await client.post(
            "/generate_stream", json=BODY | {"parameters": {"max_new_tokens": 3}}
        )
        path = f"/v1/streams/{answer.headers['x-headrace-stream-id']}"
        token = (await client.post(f"{path}/token")).json()["token"]
        assert (await client.get(path, params={"token": token})).status_code == 200
        refused = [
            await client.get(path, params={"token": token + "x"}),
            await client.get(f"/v1/streams/{'a' * 32}", params={"token": token}),
            await client.get(path, params={"token": token, "after": "x"}),
        ]
    assert [answer.status_code for answer in refused] == [401, 401, 400]
    gateway.terminate()
    await gateway.ended()
    written = [
        (gateway.folder / name).read_text() for name in ("gateway.jsonl", "stdout", "stderr")
    ]
    assert "request.finished" in written[0]
    assert not any(token.split(".")[2] in text for text in written)
