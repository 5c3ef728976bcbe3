"""The gateway as a process: it starts or says in one line why not, drains, and logs no prompt."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.broker import Broker, connect
from ops.bench.sse_client import read_events
from tests.support.models import simulated
from tests.support.processes import ROOT, Process, Processes, free_port
from tests.support.scripted_worker import ScriptedWorker, Turn

BODY = {"inputs": "a secret canary", "parameters": {"details": True}}


@pytest.fixture
async def worker(redis_url: str, simulated_data_dir: Path) -> AsyncIterator[ScriptedWorker]:
    manifest = simulated(simulated_data_dir).manifest
    broker = Broker(connect(redis_url), manifest.name)
    worker = ScriptedWorker(broker, manifest.version)
    await worker.beat()
    yield worker
    await broker.close()


def start(started: Processes, data_dir: Path, **settings: Any) -> Process:
    defaults: dict[str, Any] = {"data_dir": data_dir, "model": "simulated"}
    return started.gateway(**defaults | settings)


async def open_stream(
    client: httpx.AsyncClient, worker: ScriptedWorker
) -> tuple[httpx.Response, Turn]:
    request = client.build_request("POST", "/generate_stream", json=BODY)
    response = await client.send(request, stream=True)
    assert response.status_code == 200
    turn = await worker.take()
    await turn.say("a")
    return response, turn


async def test_sigterm_lets_open_streams_finish(
    started: Processes, simulated_data_dir: Path, worker: ScriptedWorker
) -> None:
    """Readiness fails, new work is refused, what is open goes on, others resume; then exit 0."""
    gateway = await start(started, simulated_data_dir).ready()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        response, turn = await open_stream(client, worker)
        gateway.terminate()
        await gateway.saw("gateway.draining")
        refused = await client.post("/generate", json=BODY)
        assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
        assert (await client.get("/ready")).status_code == 503
        stream_id = response.headers["x-headrace-stream-id"]
        async with client.stream("GET", f"/v1/streams/{stream_id}") as resumed:
            assert resumed.status_code == 200
            await turn.say("b", finish="length")
            for reader in (response, resumed):
                events = [event async for event in read_events(reader)]
                assert events[-1].json["generated_text"] == "ab"
        await response.aclose()
        assert await gateway.ended() == 0
    assert gateway.events("gateway.stopped")
    assert gateway.errors() == ""


async def test_a_drain_ends_and_what_is_left_is_told_where_it_stands(
    started: Processes, simulated_data_dir: Path, worker: ScriptedWorker
) -> None:
    """An SDK gets an error that it can retry; an EventSource loses its connection, and returns."""
    gateway = await start(started, simulated_data_dir, drain_s=0.3).ready()
    other = await start(started, simulated_data_dir).ready()
    async with (
        httpx.AsyncClient(base_url=gateway.url, timeout=20) as client,
        httpx.AsyncClient(base_url=other.url, timeout=20) as elsewhere,
    ):
        response, turn = await open_stream(client, worker)
        stream_id = response.headers["x-headrace-stream-id"]
        async with client.stream("GET", f"/v1/streams/{stream_id}") as watching:
            gateway.terminate()
            told = [event async for event in read_events(response)]
            watched = [event async for event in read_events(watching)]
        await response.aclose()
        assert told[-1].json["code"] == "DRAINING"
        assert [event.json.get("index") for event in watched] == [1]
        assert await gateway.ended() == 0
        async with elsewhere.stream(
            "GET", f"/v1/streams/{stream_id}", headers={"last-event-id": told[-1].id}
        ) as resumed:
            await turn.say("b", finish="length")
            rest = [event async for event in read_events(resumed)]
        assert rest[-1].json["generated_text"] == "ab"


async def test_a_second_signal_ends_it_at_once(
    started: Processes, simulated_data_dir: Path, worker: ScriptedWorker
) -> None:
    gateway = await start(started, simulated_data_dir, drain_s=60).ready()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        response, _ = await open_stream(client, worker)
        gateway.terminate()
        await gateway.saw("gateway.draining")
        gateway.terminate()
        assert await gateway.ended() == 0
        await response.aclose()


async def test_the_log_has_one_line_per_request_and_no_prompt(
    started: Processes, simulated_data_dir: Path, worker: ScriptedWorker
) -> None:
    gateway = await start(started, simulated_data_dir).ready()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        headers = {"x-request-id": "mine-7"}
        asking = asyncio.create_task(client.post("/generate", json=BODY, headers=headers))
        turn = await worker.take()
        await turn.say("a secret answer")
        await turn.end()
        answer = await asking
        await client.post("/generate", json={"inputs": ""})
    line = await gateway.saw("request.finished")
    assert line["client_request_id"] == "mine-7"
    assert line["request_id"] == line["stream_id"] == answer.headers["x-headrace-stream-id"]
    assert (line["api"], line["code"], line["status"]) == ("tgi", "ok", 200)
    assert (line["tokens"], line["finish_reason"], line["attempts"]) == (2, "eos_token", 1)
    assert line["model_version"] == answer.headers["x-model-version"]
    assert line["lane"] == "default"
    for name in ("queue_time", "generation_time", "tokens_per_second", "ttft", "duration"):
        assert line[name] >= 0
    rejected = await gateway.saw("gateway.rejected")
    assert (rejected["code"], rejected["status"], rejected["field"]) == (
        "BAD_REQUEST",
        422,
        "inputs",
    )
    assert len(gateway.events("request.finished")) == 1
    assert "secret" not in json.dumps(gateway.events())


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"redis_url": "redis://127.0.0.1:1/0"}, 1, "Redis cannot be reached"),
        ({"model": "missing"}, 1, "There is no model 'missing' here"),
        ({"payload_limit": "many"}, 2, "payload_limit (HEADRACE_PAYLOAD_LIMIT)"),
    ],
)
async def test_what_keeps_it_from_starting_is_one_clear_line(
    started: Processes,
    simulated_data_dir: Path,
    settings: dict[str, Any],
    code: int,
    said: str,
) -> None:
    gateway = start(started, simulated_data_dir, **settings)
    assert await gateway.ended(60) == code
    [line] = gateway.errors().splitlines()
    assert line.startswith("headrace gateway: ")
    assert said in line


async def test_a_port_in_use_is_one_clear_line(
    started: Processes, simulated_data_dir: Path
) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        gateway = start(started, simulated_data_dir, port=port)
        assert await gateway.ended(60) == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in gateway.errors()


def test_a_gateway_needs_no_tensors() -> None:
    """It starts in a second and in 100 MB because of what it does not import."""
    script = (
        "import sys, gateway.__main__; "
        "print([name for name in ('torch', 'arq', 'safetensors', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    assert run.stdout.decode().strip() == "[]"
