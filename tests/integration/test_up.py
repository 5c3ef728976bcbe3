"""`headrace up` as its user meets it: a command on a terminal, with the simulated engine."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import httpx
import psutil
import pytest

from ops import runfile
from tests.support.instance import START_S, Instance
from tests.support.processes import ROOT, free_port
from tests.support.waiting import wait_until

Start = Callable[..., Instance]


@pytest.fixture
def start(tmp_path: Path) -> Generator[Start]:
    """Start an instance; its data directory is ``data`` unless the test names another."""
    started: list[Instance] = []

    def start(*options: str, data: str = "data", **settings: object) -> Instance:
        instance = Instance(tmp_path / data, *options, **settings)
        started.append(instance)
        return instance

    yield start
    for instance in started:
        instance.kill()


async def generate(url: str, **parameters: object) -> httpx.Response:
    body = {"inputs": "A river", "parameters": {"max_new_tokens": 4, **parameters}}
    async with httpx.AsyncClient(timeout=60.0) as client:
        return await client.post(f"{url}/generate", json=body)


async def scraped(instance: Instance) -> set[str]:
    """Which processes show figures where the file for Prometheus says so."""
    found: set[str] = set()
    async with httpx.AsyncClient(timeout=30.0) as client:
        for target in json.loads(runfile.targets_path(instance.data_dir).read_bytes()):
            [address] = target["targets"]
            answer = await client.get(f"http://{address}/metrics")
            if "headrace_build_info" in answer.text:
                found.add(target["labels"]["instance"])
    return found


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ops.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


async def none_is_left(pids: list[int]) -> None:
    await wait_until(lambda: not any(map(psutil.pid_exists, pids)), what="the end of all")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_and_stops_in_order(start: Start, signum: signal.Signals) -> None:
    """One command serves several gateways; a signal ends all of it, front first, with exit 0."""
    instance = await start("--gateways", "2", "--workers", "2").ready()
    running = instance.processes()
    assert set(running) == {
        "server", "gateway 1", "gateway 2", "worker 1", "worker 2", "background", "exporter"
    }  # fmt: skip
    assert {process.state for process in running.values()} == {"ready"}
    for name in ("gateway 1", "gateway 2"):
        assert (await generate(running[name].address)).status_code == 200
    assert await scraped(instance) == {
        "gateway-1", "gateway-2", "worker-1", "worker-2", "background", "exporter"
    }  # fmt: skip
    assert f"{instance.url}/ui/" in instance.output
    assert f"curl -N {instance.url}/generate_stream" in instance.output

    instance.send(signum)

    assert await instance.ended() == 0
    ends = [line["role"] for line in instance.log("process.exited")]
    assert ends == ["gateway", "gateway", "worker", "worker", "background", "exporter", "server"]
    assert {line["exit_code"] for line in instance.log("process.exited")} == {0}
    await none_is_left([process.pid for process in running.values()])
    assert runfile.read_state(instance.data_dir) is None


async def test_who_is_killed_by_hand_casts_no_blame(start: Start) -> None:
    """Four workers are shot before the first token: the fifth answers; no lease is waited for."""
    instance = await start(simulated_first_token_ms=4000, lease_ms=60_000).ready()
    answer = asyncio.create_task(generate(instance.url))
    worker_log = instance.data_dir / "log" / "worker.jsonl"
    for num_claims in range(1, 5):
        await wait_until(
            lambda n=num_claims: (
                instance.process("worker 1").state == "ready"
                and worker_log.read_text().count('"worker.claimed"') >= n
            ),
            timeout_s=START_S,
            what=f"claim {num_claims}",
        )
        os.kill(instance.process("worker 1").pid, signal.SIGKILL)
    response = await answer
    assert response.status_code == 200, response.text
    # The client may know of the end before the worker hears that it was published.
    await wait_until(lambda: '"worker.finished"' in worker_log.read_text())
    lines = map(json.loads, worker_log.read_text().splitlines())
    [end] = [line for line in lines if line["event"] == "worker.finished"]
    assert (end["attempt"], end["deaths"]) == (5, 0)


async def test_what_dies_is_started_again(start: Start) -> None:
    """SIGKILL of any process, the server included, is a pause: then requests are answered again."""
    instance = await start().ready()
    for name in ("worker 1", "gateway 1", "background", "exporter", "server"):
        victim = instance.process(name)
        os.kill(victim.pid, signal.SIGKILL)

        def is_replaced(name: str = name, victim: runfile.ProcessState = victim) -> bool:
            process = instance.process(name)
            return process.state == "ready" and process.pid != victim.pid

        await wait_until(is_replaced, timeout_s=START_S, what=f"a new {name}")
        assert instance.process(name).restarts == 1

    async def answers() -> bool:
        try:
            return (await generate(instance.url)).status_code == 200
        except httpx.TransportError:
            return False

    await wait_until(answers, timeout_s=START_S, what="an answer")
    assert {line["name"] for line in instance.log("process.restarted")} == {
        "worker 1", "gateway 1", "background", "exporter", "server"
    }  # fmt: skip


async def test_nothing_survives_its_supervisor(start: Start) -> None:
    """SIGKILL of the supervisor takes all along; the next start finds the data."""
    first = await start().ready()
    answer = await generate(first.url)
    pids = [process.pid for process in first.processes().values()]

    first.kill()

    await none_is_left(pids)
    second = await start().ready()
    async with httpx.AsyncClient(timeout=60.0) as client:
        stream = f"{second.url}/v1/streams/{answer.headers['x-headrace-stream-id']}"
        replayed = await client.get(stream)
    assert replayed.status_code == 200
    assert "generated_text" in replayed.text


async def test_a_second_start_on_the_same_data_is_refused(start: Start) -> None:
    """One line says which process has the data directory; the first instance is not disturbed."""
    first = await start().ready()

    second = headrace("up", "--data-dir", str(first.data_dir), "--port", "0")

    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"pid {first.pid}" in second.stderr
    assert (await generate(first.url)).status_code == 200


async def test_a_port_in_use_is_one_line(start: Start) -> None:
    """The port is tried before anything is started."""
    first = await start().ready()
    port = first.url.rpartition(":")[2]

    second = headrace("up", "--data-dir", str(first.data_dir.with_name("other")), "--port", port)

    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f":{port}" in second.stderr
    assert "in use" in second.stderr


async def test_status_says_who_holds_what(start: Start) -> None:
    """`headrace status --json`: role, pid and state of each process; a running generation's id
    stands with its worker, and its reader with its gateway."""
    instance = await start(simulated_inter_token_ms=200).ready()
    data_dir = str(instance.data_dir)
    body = {"inputs": "A river", "parameters": {"max_new_tokens": 200}}
    async with (
        httpx.AsyncClient(timeout=60.0) as client,
        client.stream("POST", f"{instance.url}/generate_stream", json=body) as answer,
    ):
        await anext(answer.aiter_lines())
        status = json.loads(headrace("status", "--json", "--data-dir", data_dir).stdout)
    stream_id = answer.headers["x-headrace-stream-id"]

    found = {process["name"]: process for process in status["processes"]}
    pids = {name: process.pid for name, process in instance.processes().items()}
    assert {name: process["pid"] for name, process in found.items()} == pids
    assert {process["state"] for process in found.values()} == {"ready"}
    assert found["worker 1"]["holds"] == [f"{stream_id}.0"]
    assert found["gateway 1"]["streams"] == 1
    assert status["supervisor_pid"] == instance.pid
    assert headrace("status", "--expect-worker", "--data-dir", data_dir).returncode == 0


async def test_it_uses_a_server_of_the_users_own(start: Start, redis_url: str) -> None:
    """With ``--redis-url`` no server is started, and that one is used."""
    instance = await start("--redis-url", redis_url).ready()

    assert "server" not in instance.processes()
    assert (await generate(instance.url)).status_code == 200

    instance.send(signal.SIGTERM)
    assert await instance.ended() == 0


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """The address is named, its password is not."""
    port = free_port()
    ended = headrace(
        "up", "--engine", "simulated", "--port", "0", "--data-dir", str(tmp_path),
        "--redis-url", f"redis://me:secret@127.0.0.1:{port}/0",
    )  # fmt: skip

    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"redis://me:***@127.0.0.1:{port}/0" in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
