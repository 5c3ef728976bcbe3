"""Batches from end to end: taken in by a gateway, steered here, run by a worker process."""

import json
from typing import Any

import msgspec
import pytest

from common.batches import BatchRecord
from common.clock import wall_ms
from common.ids import generation_id
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.batch_stage import BatchStage
from tests.support.batches import asking_for, line
from tests.support.gateway_app import Stand
from tests.support.processes import Processes
from tests.support.scripted_worker import saying

LINES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "plain": {},
        "several": {"n": 3},
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "stops": {"stop": ["e"]},
        "a tier": {"service_tier": "auto"},
        "seeded": {"temperature": 1, "seed": 7},
        "no messages": {"messages": []},
        "a stream": {"stream": True},
        "too hot": {"temperature": 9},
        "too long": {"max_tokens": 10**6},
        "unsupported": {"audio": {"voice": "a"}},
        "a wrong type": {"messages": "hi"},
        "too large": {"user": "x" * 2_000_100},
    },
    "/v1/completions": {
        "plain": {},
        "several prompts": {"prompt": ["a", "b", "c"], "n": 2, "logprobs": 1},
        "tokens": {"prompt": [65, 66, 67], "echo": True},
        "nothing": {"prompt": ""},
        "best of": {"best_of": 3, "temperature": 1, "seed": 3},
    },
    "/v1/responses": {
        "plain": {"store": False},
        "instructed": {"store": False, "instructions": "Be short.", "top_logprobs": 1},
        "follows on nothing": {"store": False, "previous_response_id": "resp_x"},
        "no input": {"input": None},
    },
    "/generate": {
        "plain": {},
        "details": {"parameters": {"max_new_tokens": 4, "details": True, "seed": 5}},
        "nothing": {"inputs": ""},
        "top_k": {"parameters": {"top_k": 0}},
    },
}
_OWN = {"id", "created", "created_at", "completed_at", "headrace", "service_tier", "call_id"}
"""What two answers to one request may differ in: names, times, and the lane that they had."""


@pytest.fixture
async def stage(stand: Stand) -> BatchStage:
    return BatchStage(stand, await stand.gateway())


async def worker(stage: BatchStage, started: Processes, **settings: Any) -> None:
    fast: dict[str, Any] = {"simulated_first_token_ms": 1, "simulated_inter_token_ms": 0.5}
    await started.worker(data_dir=stage.stand.data_dir, **fast | settings).ready()


def same(answer: Any) -> Any:
    """An answer without what is its own."""
    if isinstance(answer, dict):
        return {name: same(value) for name, value in answer.items() if name not in _OWN}
    return [same(item) for item in answer] if isinstance(answer, list) else answer


async def results_of(stage: BatchStage, record: BatchRecord) -> dict[str, dict[str, Any]]:
    """Each line of both files by its id, after a look at what holds of all of them."""
    output = await stage.content(record.output_file_id)
    errors = await stage.content(record.error_file_id)
    results = {result["custom_id"]: result for result in (*output, *errors)}
    assert len(results) == len(output) + len(errors), "a line has one result"
    assert all(result["id"].startswith("batch_req_") for result in results.values())
    assert all(result["response"]["status_code"] == 200 for result in output)
    assert (len(output), len(errors)) == (record.counts.completed, record.counts.failed)
    return results


async def test_a_line_is_answered_as_a_request_would_be(
    stage: BatchStage, started: Processes
) -> None:
    """With the same status and the same body, be it an answer or a refusal."""
    await worker(stage, started, prefix_cache="off")  # or the second would find what the first did
    lines = {
        endpoint: [line(name, endpoint, **body) for name, body in bodies.items()]
        for endpoint, bodies in LINES.items()
    }
    batch_ids = {endpoint: await stage.create(asked, endpoint) for endpoint, asked in lines.items()}
    async with stage.steerer():
        for endpoint, asked in lines.items():
            await check_answers(stage, batch_ids[endpoint], endpoint, asked)


async def check_answers(
    stage: BatchStage, batch_id: str, endpoint: str, lines: list[dict[str, Any]]
) -> None:
    record = await stage.ended(batch_id)
    assert record.status == "completed"
    results = await results_of(stage, record)
    num_tokens = num_prompt_tokens = 0
    for made in lines:
        response = results[made["custom_id"]]["response"]
        if made["body"].get("stream"):
            assert response["body"]["error"]["param"] == "stream"
            continue
        direct = await stage.gateway.client.post(endpoint, json=made["body"])
        assert response["status_code"] == direct.status_code, made["custom_id"]
        assert same(response["body"]) == same(direct.json()), made["custom_id"]
        usage = response["body"].get("usage") or {} if direct.status_code == 200 else {}
        num_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        num_prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
    shown = (await stage.shown(batch_id))["usage"]
    if endpoint != "/generate":  # which tells no usage itself
        assert (shown["input_tokens"], shown["output_tokens"]) == (num_prompt_tokens, num_tokens)


async def test_several_processes_share_several_batches(stage: BatchStage) -> None:
    """Of many lines only a window is ever in Redis."""
    scripted = await stage.stand.worker()
    batch_ids = [await stage.create([line(f"r{i}") for i in range(150)]) for _ in range(3)]
    most = 0
    async with scripted.acting(saying("hi")), stage.steerer(), stage.steerer():
        for batch_id in batch_ids:
            while not (record := await stage.record(batch_id)).is_final:
                state = await stage.stand.broker.state()
                held = sum(len(worker.held) for worker in state.workers)
                most = max(most, state.waiting["batch"] + held)
            assert record.status == "completed"
            assert set(await results_of(stage, record)) == {f"r{i}" for i in range(150)}
    assert 0 < most < 3 * 150
    left = await stage.stand.broker.look(
        "", [f"{id[6:]}-{n}.0" for id in batch_ids for n in (1, 150)]
    )
    assert [look.state for look in left] == [""] * 6, "what a part holds is forgotten"


async def test_a_file_that_can_not_be_run_fails_with_reasons_by_line(stage: BatchStage) -> None:
    """No line of it is run."""
    lines = [line("a"), line("a"), line("b", "/v1/completions")]
    batch_id = await stage.create(lines)
    async with stage.steerer():
        record = await stage.ended(batch_id)
    assert record.status == "failed"
    errors = (await stage.shown(batch_id))["errors"]
    assert errors["object"] == "list"
    assert [(error["code"], error["line"]) for error in errors["data"]] == [
        ("duplicate_custom_id", 2),
        ("url_mismatch", 3),
    ]
    assert record.output_file_id is None
    assert record.error_file_id is None


async def test_what_is_finished_when_a_batch_is_cancelled_is_kept(stage: BatchStage) -> None:
    """A line that ended before, even unseen, has its answer; all others say that they have none."""
    scripted = await stage.stand.worker()
    batch_id = await stage.create([line(f"r{i}") for i in range(40)])
    async with stage.steerer():
        for _ in range(3):
            await saying("hello")(await scripted.take())
        running = await scripted.take()
        await stage.gateway.client.post(f"/v1/batches/{batch_id}/cancel")
        record = await stage.ended(batch_id)
        answer = await running.say("more")
    assert [refusal.kind for refusal in answer.refusals] == ["unknown"], "nobody works for it"
    assert (record.status, record.counts.completed, record.counts.failed) == ("cancelled", 3, 37)
    results = await results_of(stage, record)
    assert len(results) == 40
    errors = [result["error"]["code"] for result in results.values() if result["error"]]
    assert errors == ["batch_cancelled"] * 37
    state = await stage.stand.broker.state()
    assert state.waiting["batch"] == 0
    again = await stage.gateway.client.post(f"/v1/batches/{batch_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


async def test_a_batch_is_cancelled_before_anybody_steers_it(stage: BatchStage) -> None:
    """Then it has no lines, and no files."""
    batch_id = await stage.create([line("a")])
    cancelled = await stage.gateway.client.post(f"/v1/batches/{batch_id}/cancel")
    assert cancelled.json()["status"] == "cancelling"
    async with stage.steerer():
        record = await stage.ended(batch_id)
    assert (record.status, record.counts.total, record.error_file_id) == ("cancelled", 0, None)


async def test_what_is_finished_when_the_time_is_over_is_kept(stage: BatchStage) -> None:
    """The rest stands in the error file as expired."""
    scripted = await stage.stand.worker()
    batch_id = await stage.create([line(f"r{i}") for i in range(20)])
    async with stage.steerer():
        await saying("hello")(await scripted.take())
        await stage.reached(batch_id, "in_progress")
    soon_s = wall_ms() // 1000
    await stage.store.change(batch_id, lambda it: _due(it, soon_s))
    async with stage.steerer():
        record = await stage.ended(batch_id)
    assert (record.status, record.counts.completed, record.counts.failed) == ("expired", 1, 19)
    results = await results_of(stage, record)
    errors = {result["error"]["code"] for result in results.values() if result["error"]}
    assert errors == {"batch_expired"}


def _due(record: BatchRecord, at_s: int) -> BatchRecord:
    return msgspec.structs.replace(record, expires_at=at_s)


async def test_a_batch_waits_for_workers(stage: BatchStage) -> None:
    """That none is there says nothing of its lines."""
    batch_id = await stage.create([line("a"), line("b")])
    async with stage.steerer():
        await stage.reached(batch_id, "in_progress")
        scripted = await stage.stand.worker()
        async with scripted.acting(saying("hi")):
            record = await stage.ended(batch_id)
    assert (record.status, record.counts.completed) == ("completed", 2)


async def test_what_fails_for_reasons_of_the_server_is_tried_again(
    stage: BatchStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as clients do; what has other reasons is not."""
    monkeypatch.setattr("workers.background.running.RETRY_S", 0.05)
    scripted = await stage.stand.worker()
    batch_id = await stage.create([line("a")])
    async with stage.steerer():
        for code in ("ENGINE_ERROR", "QUEUE_TIMEOUT", "MODEL_VERSION_GONE"):
            await (await scripted.take()).fail(code)
        await saying("at last")(await scripted.take())
        record = await stage.ended(batch_id)
    [result] = (await results_of(stage, record)).values()
    assert result["response"]["body"]["choices"][0]["message"]["content"] == "at last"
    batch_id = await stage.create([line("a"), line("b")])
    async with stage.steerer():
        for _ in range(4):
            turn = await scripted.take()
            is_first = turn.id == generation_id(f"{batch_id[6:]}-1")
            await turn.fail("ENGINE_ERROR" if is_first else "NAN_LOGITS")
        record = await stage.ended(batch_id)
    results = await results_of(stage, record)
    codes = {id: it["response"]["body"]["error"]["code"] for id, it in results.items()}
    assert codes == {"a": "engine_error", "b": "nan_logits"}


async def test_a_batch_whose_input_is_deleted_keeps_what_is_finished(stage: BatchStage) -> None:
    """It fails, as nobody knows any more what its lines were."""
    scripted = await stage.stand.worker()
    batch_id = await stage.create([line(f"r{i}") for i in range(50)])
    async with stage.steerer():
        await saying("hello")(await scripted.take())
        await stage.has_finished(batch_id, 1)
    input_file_id = (await stage.shown(batch_id))["input_file_id"]
    await stage.gateway.client.delete(f"/v1/files/{input_file_id}")
    async with stage.steerer():
        record = await stage.ended(batch_id)
    assert record.status == "failed"
    assert [error.code for error in record.errors] == ["input_file_not_found"]
    assert record.counts.completed == 1
    assert len(await results_of(stage, record)) == 1


# The API -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        (
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "output_expires_after.anchor",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
            "output_expires_after.seconds",
        ),
    ],
)
async def test_a_batch_that_makes_no_sense_is_refused(
    stage: BatchStage, change: dict[str, Any], field: str
) -> None:
    """By the name of the field that is wrong."""
    file_id = await stage.upload(b"{}\n")
    body = asking_for(file_id) | change
    answer = await stage.gateway.client.post("/v1/batches", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


async def test_an_idempotency_key_makes_one_batch(stage: BatchStage) -> None:
    """However often it is sent; with another body it is refused."""
    file_id = await stage.upload(b"{}\n")
    body = asking_for(file_id)
    post, headers = stage.gateway.client.post, {"idempotency-key": "night-1"}
    first = await post("/v1/batches", json=body, headers=headers)
    second = await post("/v1/batches", json=body, headers=headers)
    assert first.json()["id"] == second.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = await post("/v1/batches", json=body | {"metadata": {"a": "b"}}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_conflict")
    assert len((await stage.gateway.client.get("/v1/batches")).json()["data"]) == 1


async def test_batches_are_their_tenants_own(stand: Stand) -> None:
    """For another one they do not exist; and a key needs the scope."""
    stage = BatchStage(stand, await stand.gateway(key_pepper=PEPPER))
    keys = {
        name: bearer(await make_key(stand.broker, name, scopes=("batch",))) for name in ("a", "b")
    }
    scopeless = bearer(await make_key(stand.broker, "a"))
    client = stage.gateway.client
    file_id = await stage.upload(b"{}\n", tenant="a")
    body = asking_for(file_id)
    foreign = await client.post("/v1/batches", json=body, headers=keys["b"])
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (400, "input_file_id")
    ids = [
        (await client.post("/v1/batches", json=body, headers=keys["a"])).json()["id"]
        for _ in range(3)
    ]
    assert (await client.get("/v1/batches", headers=scopeless)).status_code == 403
    assert (await client.get("/v1/batches", headers=keys["b"])).json()["data"] == []
    for method, path in (("GET", ids[0]), ("POST", f"{ids[0]}/cancel")):
        answer = await client.request(method, f"/v1/batches/{path}", headers=keys["b"])
        missing = await client.request(
            method, f"/v1/batches/{path.replace('batch_', 'batch_0')}", headers=keys["b"]
        )
        assert (answer.status_code, missing.status_code) == (404, 404)
    page = (await client.get("/v1/batches?limit=2", headers=keys["a"])).json()
    rest = await client.get(f"/v1/batches?after={page['last_id']}", headers=keys["a"])
    assert page["has_more"]
    assert [it["id"] for it in (*page["data"], *rest.json()["data"])] == ids[::-1]
    for query, field in (("limit=0", "limit"), ("limit=x", "limit"), ("after=x", "after")):
        refused = await client.get(f"/v1/batches?{query}", headers=keys["a"])
        assert refused.json()["error"]["param"] == field


async def test_lines_may_ask_for_what_the_key_of_their_batch_may(stand: Stand) -> None:
    """A key that is for other models makes no batches, one that is for some adapter runs no line
    on the model itself.
    """
    stage = BatchStage(stand, await stand.gateway(key_pepper=PEPPER))
    key = bearer(await make_key(stand.broker, "a", scopes=("batch",), models=("other",)))
    file_id = await stage.upload(json.dumps(line("a")).encode(), tenant="a")
    body = asking_for(file_id)
    answer = await stage.gateway.client.post("/v1/batches", json=body, headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")


async def test_a_batch_that_has_ended_is_not_cancelled(stage: BatchStage) -> None:
    batch_id = await stage.create(b"\n")
    async with stage.steerer():
        await stage.ended(batch_id)
    answer = await stage.gateway.client.post(f"/v1/batches/{batch_id}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "batch_ended")
    assert answer.headers["x-should-retry"] == "false"


async def test_parts_go_a_day_after_the_end_and_files_stay(
    stage: BatchStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = await stage.stand.worker()
    batch_id = await stage.create([line("a")])
    async with scripted.acting(saying("hi")), stage.steerer() as steers:
        record = await stage.ended(batch_id)
        await steers.clear_folders()
        assert await stage.storage.list(f"batches/{batch_id}")
        monkeypatch.setattr("workers.background.batches.FOLDER_LIFE_S", -1)
        await steers.clear_folders()
        assert await stage.storage.list(f"batches/{batch_id}") == []
    assert len(await stage.content(record.output_file_id)) == 1


async def test_a_background_process_steers_and_steps_down_in_order(
    stage: BatchStage, started: Processes
) -> None:
    """On SIGTERM what is finished is in storage, and the next process goes on at once."""
    await worker(stage, started, simulated_inter_token_ms=5)
    batch_id = await stage.create([line(f"r{i}", max_tokens=20) for i in range(400)])
    first = await started.background(data_dir=stage.stand.data_dir).ready()
    await stage.has_finished(batch_id, 1)
    first.terminate()
    assert await first.ended() == 0
    assert await stage.store.unsteered("simulated") == [batch_id]
    second = await started.background(data_dir=stage.stand.data_dir).ready()
    record = await stage.ended(batch_id)
    assert record.counts.completed == 400
    assert len(await results_of(stage, record)) == 400
    assert second.events("batch.steered", status="in_progress")
    assert first.errors() + second.errors() == ""
