"""What an operator may do over HTTP: drain and resume, dead letters, what runs, what failed."""

import asyncio
from typing import Any

import pytest

from common.broker import FailureNote
from common.ids import request_of
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.dead_letters import killed
from tests.support.event_schema import captured_logs
from tests.support.gateway_app import Stand
from tests.support.scripted_worker import Turn, saying
from tests.support.waiting import wait_until

ROUTES = [
    ("GET", "/ops/feed"),
    ("POST", "/ops/workers/w1/drain"),
    ("POST", "/ops/workers/w1/resume"),
    ("GET", "/ops/dead"),
    ("GET", "/ops/dead/x.0"),
    ("POST", "/ops/dead/x.0/requeue"),
    ("POST", "/ops/dead/x.0/discard"),
    ("GET", "/ops/streams"),
    ("GET", "/ops/errors/CUDA_OOM"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_key_without_the_scope_is_refused_everywhere(
    stand: Stand, method: str, path: str
) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER)
    key = await make_key(stand.broker, "a", scopes=("generate", "batch", "metrics"))
    answer = await gateway.client.request(method, path, headers=bearer(key))
    assert answer.status_code == 403
    assert answer.json()["code"] == "SCOPE_DENIED"
    assert (await gateway.client.request(method, path)).status_code == 401


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_another_website_is_refused_everywhere(stand: Stand, method: str, path: str) -> None:
    gateway = await stand.gateway()
    for headers in (
        {"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"},
        {"host": "rebound.example"},
        {"host": "rebound.example", "authorization": "Bearer none"},
    ):
        answer = await gateway.client.request(method, path, headers=headers)
        assert answer.status_code == 403
        expected = "HOST_NOT_ALLOWED" if "host" in headers else "SCOPE_DENIED"
        assert answer.json()["code"] == expected


async def test_who_shows_a_key_is_past_the_question_where_he_comes_from(stand: Stand) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER)
    key = await make_key(stand.broker, "a", scopes=("admin",))
    headers = bearer(key) | {"origin": "https://ops.example", "host": "ops.example"}
    assert (await gateway.client.get("/ops/dead", headers=headers)).json() == {"dead": []}


async def test_a_drain_outlives_the_gateway_that_took_it(stand: Stand) -> None:
    gateway, other = await stand.gateway(), await stand.gateway()
    worker = await stand.worker()
    answer = await gateway.client.post(f"/ops/workers/{worker.name}/drain")
    assert answer.json() == {"worker": worker.name, "state": "draining"}
    await stand.broker.leave_gateway(gateway.name)
    [seen] = (await stand.broker.census()).workers
    assert seen.drain_cause == "operator at the gateway"
    answer = await other.client.post(f"/ops/workers/{worker.name}/resume")
    assert answer.json()["state"] == "ready"
    [seen] = (await stand.broker.census()).workers
    assert seen.drain_cause == ""


async def test_the_worker_is_told_which_key_asked(stand: Stand) -> None:
    gateway = await stand.gateway(key_pepper=PEPPER)
    worker = await stand.worker()
    key = await make_key(stand.broker, "a", scopes=("admin",))
    await gateway.client.post(f"/ops/workers/{worker.name}/drain", headers=bearer(key))
    [seen] = (await stand.broker.census()).workers
    assert seen.drain_cause.startswith("operator with key ")
    assert key not in seen.drain_cause, "never the secret"


async def test_who_had_a_dead_letter_asked_anew_or_removed_is_logged(stand: Stand) -> None:
    """In a line of the request that it was, with the key that asked."""
    gateway = await stand.gateway(key_pepper=PEPPER)
    key = await make_key(stand.broker, "a", scopes=("admin",))
    revived, discarded = await killed(stand.broker), await killed(stand.broker)
    with captured_logs() as lines:
        path = f"/ops/dead/{revived.id}/requeue"
        answer = await gateway.client.post(path, headers=bearer(key))
        await gateway.client.post(f"/ops/dead/{discarded.id}/discard", headers=bearer(key))
    [first, second] = [line for line in lines if line["event"].startswith("job.")]
    assert (first["event"], first["job_id"]) == ("job.revived", revived.id)
    assert first["revived_as"] == answer.json()["request_id"]
    assert (second["event"], second["job_id"]) == ("job.discarded", discarded.id)
    for line in (first, second):
        assert line["request_id"] == request_of(line["job_id"])
        assert line["cause"].removeprefix("operator with key ") in key


@pytest.mark.parametrize(
    "path",
    ["/ops/workers/nobody/drain", "/ops/workers/nobody/resume", "/ops/dead/x.0/requeue",
     "/ops/dead/x.0/discard"],
)  # fmt: skip
async def test_what_is_not_there_is_not_found(stand: Stand, path: str) -> None:
    gateway = await stand.gateway()
    answer = await gateway.client.post(path)
    assert answer.status_code == 404
    assert answer.json()["code"] == "NOT_FOUND"


async def test_what_runs_is_listed_without_a_text(stand: Stand) -> None:
    gateway, worker = await stand.gateway(), await stand.worker()
    may_end = asyncio.Event()

    async def script(turn: Turn) -> None:
        await turn.say("secret", "words")
        await may_end.wait()
        await turn.end()

    body = {"inputs": "a secret question", "parameters": {"max_new_tokens": 8}}
    async with worker.acting(script):
        asked = asyncio.create_task(gateway.client.post("/generate", json=body))
        found: list[dict[str, Any]] = []

        async def runs() -> bool:
            answer = await gateway.client.get("/ops/streams")
            assert "secret" not in answer.text
            found[:] = answer.json()["streams"]
            return bool(found) and found[0]["tokens"] == 2

        await wait_until(runs, what="the running one")
        may_end.set()
        await asked
    [shown] = found
    assert shown["worker"] == worker.name
    assert shown["lane"] == "default"
    assert shown["age_ms"] >= shown["running_ms"] >= 0
    assert shown["prompt_tokens"] > 0


async def test_the_list_of_what_runs_is_bounded_and_of_all_workers(stand: Stand) -> None:
    gateway = await stand.gateway()
    workers = [await stand.worker(), await stand.worker()]
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
    asked = [asyncio.create_task(gateway.client.post("/generate", json=body)) for _ in range(6)]
    turns = [await workers[number % 2].take() for number in range(5)]
    found = await stand.broker.live(4)
    assert {it.worker for it in found} == {worker.name for worker in workers}
    assert len(found) == 4
    everything = await stand.broker.live(200)
    assert sorted(it.worker == "" for it in everything) == [False] * 5 + [True]
    for turn in [*turns, await workers[0].take()]:
        await turn.end()
    await asyncio.gather(*asked)


async def test_failures_are_remembered_with_the_command_that_shows_them(stand: Stand) -> None:
    gateway, worker = await stand.gateway(), await stand.worker()

    async def script(turn: Turn) -> None:
        await turn.fail("CUDA_OOM")

    async with worker.acting(script):
        answer = await gateway.client.post("/generate", json={"inputs": "hi"})
    assert answer.json()["code"] == "CUDA_OOM"
    told: dict[str, Any] = {}

    async def is_told() -> bool:
        told.update((await gateway.client.get("/ops/errors/CUDA_OOM")).json())
        return bool(told["failures"])

    await wait_until(is_told, what="the failure")
    [failure] = told["failures"]
    assert failure["worker"] == worker.name
    assert failure["model_version"] == stand.version
    assert told["commands"] == [f"headrace incident show {failure['request_id']}"]
    assert told["explain"] == "headrace explain CUDA_OOM"
    assert told["meaning"]
    assert (await gateway.client.get("/ops/errors/NONSENSE")).status_code == 404


async def test_of_each_code_fifty_are_kept_the_newest_first(stand: Stand) -> None:
    notes = [
        FailureNote(code="CUDA_OOM", request_id=f"r{number}", at=number) for number in range(70)
    ]
    await stand.broker.keep_failures(notes[:60])
    await stand.broker.keep_failures(notes[60:])
    kept = await stand.broker.failures("CUDA_OOM")
    assert [note.request_id for note in kept] == [f"r{number}" for number in range(69, 19, -1)]


async def test_a_request_that_succeeds_leaves_no_note(stand: Stand) -> None:
    gateway, worker = await stand.gateway(), await stand.worker()
    async with worker.acting(saying("a")):
        await gateway.client.post("/generate", json={"inputs": "hi"})
    assert gateway.services.metrics.tally.untold == []
    assert gateway.services.metrics.tally.figures.outcomes == {"ok": 1}
