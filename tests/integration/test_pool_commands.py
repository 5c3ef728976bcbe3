"""`headrace top`, `workers` and `dead`: what the live page shows and does, at a terminal."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from rich.console import Console

from common.broker import Broker, Census, WorkerPresence, connect
from common.diagnosis import well
from common.ids import generation_id
from common.models.simulated import SIMULATED_MODEL
from common.overview import ErrorCount, LaneView, Overview
from common.settings import Settings
from ops.top import fitting, picture
from tests.support.command import Headrace, headrace_of
from tests.support.gateway_app import Stand
from tests.support.generations import ScriptedClaims, admission
from tests.support.overviews import overview, worker_view
from tests.support.processes import ROOT
from tests.support.redis_server import RedisServer

T = TypeVar("T")

workers = headrace_of("workers")
dead = headrace_of("dead")
top = headrace_of("top")


def on_pool(server: RedisServer, act: Callable[[Broker], Awaitable[T]]) -> T:
    """On the pool that commands look at unless they are told otherwise."""

    async def run() -> T:
        broker = Broker(connect(server.url), Settings.model_fields["model"].default)
        try:
            await broker.load()
            return await act(broker)
        finally:
            await broker.close()

    return asyncio.run(run())


async def beat(broker: Broker) -> None:
    for name in ("w11aa", "w11bb", "w22cc"):
        presence = WorkerPresence("m@1", 1000, host="host-a", rss_bytes=3 << 30)
        await broker.beat_worker(name, presence, seen=0, holding=(), lease_ms=60_000)


def causes(census: Census) -> dict[str, str]:
    return {worker.name: worker.drain_cause for worker in census.workers}


def test_a_worker_is_drained_and_resumed_by_its_name_or_the_beginning_of_it(
    workers: Headrace, redis_server: RedisServer
) -> None:
    on_pool(redis_server, beat)
    assert workers("drain", "w22").code == 0
    assert workers("drain", "w11aa").code == 0
    told = causes(on_pool(redis_server, lambda broker: broker.census()))
    assert told["w22cc"] == told["w11aa"] == "operator at the command line"
    assert told["w11bb"] == ""
    listed = workers("list")
    assert "w22cc" in listed.out
    assert "operator at the command line" in listed.out
    assert "3.0 G" in listed.out
    assert {it["name"] for it in json.loads(workers("list", "--json").out)} == set(told)
    assert workers("resume", "w22cc").code == 0
    assert causes(on_pool(redis_server, lambda broker: broker.census()))["w22cc"] == ""


@pytest.mark.parametrize(
    ("name", "words"), [("w9", "no worker's name begins"), ("w11", "several workers begin")]
)
def test_who_is_meant_must_be_clear(
    workers: Headrace, redis_server: RedisServer, name: str, words: str
) -> None:
    on_pool(redis_server, beat)
    said = workers("drain", name)
    assert said.code == 1
    assert words in said.err
    assert "w11aa" in said.err, "the names there are"


async def test_who_is_on_probation_is_named(broker: Broker) -> None:
    await kill(broker, num_deaths=2)
    for name, expected in (("w8", True), ("w9", False)):
        worker = ScriptedClaims(broker, name)
        await worker.beat()
        found = {attempt.id for attempt in await worker.claim()}
        census = {it.name: it.suspect for it in (await broker.census()).workers}
        assert census[name] == (found.pop() if expected else "")


async def kill(broker: Broker, num_deaths: int = 4) -> str:
    await broker.beat_gateway("g1")
    await ScriptedClaims(broker, "w0").beat()
    id = generation_id((await broker.admit(admission(prompt_tokens=6))).request_id)
    for number in range(num_deaths):
        worker = ScriptedClaims(broker, f"w{number}")
        await worker.beat()
        await worker.claim_one()
        await broker.bury_worker(worker.name)
        await broker.reap()
    return id


def test_a_dead_letter_is_listed_shown_and_asked_anew(
    dead: Headrace, redis_server: RedisServer
) -> None:
    id = on_pool(redis_server, kill)
    assert id in dead("list").out
    assert [it["id"] for it in json.loads(dead("list", "--json").out)] == [id]
    shown = dead("show", id).out
    for words in ("4: w0, w1, w2, w3", "prompt tokens  6", "max_new_tokens=8"):
        assert words in shown
    first, again = dead("requeue", id), dead("requeue", id)
    assert first.code == again.code == 0
    assert first.out == again.out, "once"
    assert "nothing was done now" in again.err
    assert "Nothing was set aside" in dead("list").out


def test_where_the_pool_has_its_log_the_command_writes_what_it_did(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    id = on_pool(redis_server, kill)
    (tmp_path / "log").mkdir()
    said = [
        subprocess.run(
            [sys.executable, "-m", "ops.cli", "dead", action, id,
             "--redis-url", redis_server.url, "--data-dir", str(tmp_path)],
            check=False, capture_output=True, text=True, timeout=60, cwd=ROOT,
        )
        for action in ("requeue", "discard")
    ]  # fmt: skip
    assert [it.returncode for it in said] == [0, 0]
    lines = (tmp_path / "log" / "command.jsonl").read_text().splitlines()
    revived, discarded = map(json.loads, lines)
    assert revived["revived_as"] == said[0].stdout.strip()
    for line, event in ((revived, "job.revived"), (discarded, "job.discarded")):
        assert (line["event"], line["service"], line["job_id"]) == (event, "command", id)
        assert line["cause"] == "operator at the command line"


def test_a_dead_letter_is_discarded(dead: Headrace, redis_server: RedisServer) -> None:
    id = on_pool(redis_server, kill)
    assert dead("discard", id).code == 0
    refused = dead("discard", id)
    assert refused.code == 1
    assert "NOT_FOUND" in refused.err


# top ---------------------------------------------------------------------------------------------


def drawn(shown: Overview, height: int = 0) -> list[str]:
    """At 80 columns; with a height as on a screen of so many lines."""
    console = Console(width=80, height=height or None, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(fitting(shown, console) if height else picture(shown))
    return captured.get().splitlines()


def busy() -> Overview:
    now = overview(at=time.time())
    changes: dict[str, Any] = {
        "workers": [
            worker_view("w00000000000", gpu_mem_bytes=61 << 30, gpu_mem_total_bytes=79 << 30),
            *(worker_view(f"w{number:011d}") for number in range(1, 20)),
        ],
        "lanes": [LaneView(lane="default", depth=500, oldest_age_s=12.3, backlog_tokens=10**6,
                           est_wait_s=33.0)],
        "errors": [ErrorCount(code="MODEL_VERSION_GONE", count_1m=12345, total=99999)],
        "diagnosis": [well(now)],
    }  # fmt: skip
    return overview(at=now.at, **changes)


def test_it_fits_eighty_columns_and_says_all_there_is() -> None:
    lines = drawn(busy())
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in (
        "Everything is well.",
        "headrace top",
        "w00000000019",
        "8/32",
        "25 %",
        "0.9 G",
        "GPU 61/79 G",
        "500",
        "33.0 s",
        "MODEL_VERSION_GONE",
        "12345",
        "first token",
        "Redis 95 of 954 MiB",
    ):
        assert words in text
    assert "…" not in text, "nothing is cut off"


def test_on_a_small_screen_who_is_not_well_is_seen() -> None:
    workers = [*busy().workers, worker_view("w-gone", state="dead")]
    lines = drawn(msgspec.structs.replace(busy(), workers=workers), height=24)
    assert len(lines) == 24
    assert any(line.startswith("w-gone  ") for line in lines)
    assert any(line.startswith("and ") and "more" in line for line in lines)
    assert "Redis 95 of 954 MiB" in lines[-1]
    assert len(drawn(overview(at=time.time()), height=24)) < 24


async def test_a_pipe_gets_one_after_the_other_and_is_told_of_a_loss(tmp_path: Path) -> None:
    """No codes for a terminal; it goes on while Redis is away."""
    with RedisServer("valkey", tmp_path) as server:
        broker = Broker(connect(server.url), SIMULATED_MODEL)
        await broker.overview_store.append(busy())
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ops.cli", "top", "--redis-url", server.url),
            *("--data-dir", str(tmp_path), "--model", SIMULATED_MODEL),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert command.stdout is not None
        said = [await asyncio.wait_for(command.stdout.readuntil(b"MiB\n"), 30)]
        await broker.overview_store.append(busy())
        said.append(await asyncio.wait_for(command.stdout.readuntil(b"MiB\n"), 30))
        await broker.close()
    await asyncio.wait_for(command.stdout.readuntil(b"The queue (Redis) cannot be reached"), 30)
    command.terminate()
    await command.wait()
    assert all(b"Everything is well." in one and b"\x1b" not in one for one in said)


def test_once_prints_the_newest_second(top: Headrace, redis_server: RedisServer) -> None:
    on_pool(redis_server, lambda broker: broker.overview_store.append(busy()))
    said = top("--once")
    assert said.code == 0
    assert "Everything is well." in said.out
    told = json.loads(top("--once", "--json").out)
    assert len(told["workers"]) == 20


def test_without_an_exporter_it_says_so(top: Headrace, redis_server: RedisServer) -> None:
    on_pool(redis_server, beat)
    said = top("--once")
    assert "nobody collects its figures" in said.out


async def test_it_asks_a_gateway_as_well(stand: Stand) -> None:
    gateway = await stand.gateway()
    await stand.broker.overview_store.append(busy())
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops.cli", "top", "--once", "--json", "--url", gateway.url),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, _ = await asyncio.wait_for(command.communicate(), 30)
    assert command.returncode == 0
    assert len(json.loads(out)["workers"]) == 20
