"""`headrace batch` as people use it: against running gateways, with files, keys and exit codes."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.broker import Broker, connect
from tests.support.api_keys import PEPPER, make_key
from tests.support.batches import jsonl, line
from tests.support.command import Said
from tests.support.processes import ROOT, Process, Processes
from tests.support.waiting import wait_until

LIMIT_S = 60.0


@dataclass
class Place:
    """A system that works batches off, and the command beside it."""

    folder: Path
    started: Processes
    settings: dict[str, Any]
    gateway: Process
    environment: dict[str, str] = field(default_factory=dict[str, str])

    async def start(self, *arguments: object) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ops.cli", "batch"),
            *map(str, arguments),
            cwd=ROOT,
            env=os.environ | {"HEADRACE_URL": self.gateway.url} | self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def headrace(self, *arguments: object) -> Said:
        process = await self.start(*arguments)
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
        return Said(process.returncode or 0, out.decode(), err.decode())

    def file(self, name: str, *bodies: dict[str, Any], ids: list[str] | None = None) -> Path:
        path = self.folder / name
        made = (
            line(ids[number] if ids else str(number), "/v1/completions", model="simulated", **body)
            for number, body in enumerate(bodies)
        )
        path.write_bytes(jsonl(made))
        return path


@pytest.fixture
async def place(started: Processes, tmp_path: Path, simulated_data_dir: Path) -> Place:
    settings: dict[str, Any] = {
        "data_dir": simulated_data_dir,
        "model": "simulated",
        "storage_url": f"file://{tmp_path}/files",
    }
    worker = started.worker(**settings, simulated_first_token_ms=1, simulated_inter_token_ms=10)
    background = started.background(**settings)
    gateway = started.gateway(**settings, key_pepper=PEPPER)
    for process in (worker, background, gateway):
        await process.ready()
    return Place(tmp_path, started, settings, gateway)


def short(number: int) -> dict[str, Any]:
    return {"prompt": f"{number}. A river", "max_tokens": 3, "temperature": 0}


def ids_in(path: Path) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in path.read_text().splitlines())


async def test_a_file_is_handed_over_watched_and_fetched(place: Place) -> None:
    """The id alone is on standard output; answers and failed lines land beside the file."""
    bad = {"prompt": "x", "max_tokens": -1}
    file = place.file("night.jsonl", *map(short, range(30)), bad)
    said = await place.headrace("submit", file, "--watch", "--metadata", "night=1")
    assert said.code == 3, said.err
    batch_id = said.out.strip()
    assert batch_id.startswith("batch_")
    assert "30 of 31 lines answered, 1 failed" in said.err
    output, errors = place.folder / "night.output.jsonl", place.folder / "night.errors.jsonl"
    assert ids_in(output) == sorted(map(str, range(30)))
    assert ids_in(errors) == ["30"]

    again = await place.headrace("results", batch_id, "--errors", place.folder / "e")
    assert (again.code, again.out) == (3, output.read_text())
    assert (place.folder / "e").read_text() == errors.read_text()
    shown = json.loads((await place.headrace("status", batch_id, "--json")).out)
    assert (shown["status"], shown["metadata"]) == ("completed", {"night": "1"})
    listed = json.loads((await place.headrace("list", "--json")).out)
    assert [batch["id"] for batch in listed] == [batch_id]
    told = await place.headrace("status", batch_id)
    assert "31 of 31 finished, 1 failed" in told.out
    assert json.loads((await place.headrace("status", "--json")).out) == []


async def test_a_batch_that_is_cancelled_keeps_what_is_finished(place: Place) -> None:
    """Whoever waits is told, and by the exit code, too."""
    endless = {"prompt": "x", "max_tokens": 3000}
    file = place.file("long.jsonl", *map(short, range(5)), *[endless] * 20)
    batch_id = (await place.headrace("submit", file)).out.strip()

    async def has_answers() -> bool:
        shown = json.loads((await place.headrace("status", batch_id, "--json")).out)
        return shown["request_counts"]["completed"] >= 5

    await wait_until(has_answers, timeout_s=LIMIT_S)
    early = await place.headrace("results", batch_id)
    assert (early.code, early.out) == (1, "")
    assert "is in progress: there are files once it has ended" in early.err
    waiting = await place.start("status", batch_id, "--watch")
    assert (await place.headrace("cancel", batch_id)).code == 0
    out, _ = await waiting.communicate()
    assert (waiting.returncode, b"cancelled" in out) == (4, True)
    output, errors = place.folder / "o", place.folder / "e"
    said = await place.headrace("results", batch_id, "-o", output, "--errors", errors)
    assert said.code == 4
    assert sorted(ids_in(output) + ids_in(errors)) == sorted(map(str, range(25)))
    assert set(map(str, range(5))) <= set(ids_in(output))


async def test_what_is_wrong_is_said_in_plain_words(
    place: Place, redis_url: str, simulated_data_dir: Path
) -> None:
    """By line for a refused file; and who has no key for batches is told before he sends it."""
    file = place.file("twice.jsonl", short(1), short(2), ids=["a", "a"])
    said = await place.headrace("submit", file, "--watch")
    assert said.code == 4
    assert "line 2: " in said.err
    assert "duplicate_custom_id" in said.err
    assert not list(place.folder.glob("twice.*.jsonl"))
    (place.folder / "empty").write_text("")
    nothing = await place.headrace("submit", place.folder / "empty")
    assert (nothing.code, "no request with a `url`" in nothing.err) == (2, True)
    unknown = await place.headrace("status", "batch_" + "0" * 32)
    assert (unknown.code, unknown.out) == (1, "")
    assert "not_found" in unknown.err

    broker = Broker(connect(redis_url), "simulated")
    key = await make_key(broker, "a", scopes=("batch",))
    other = await make_key(broker, "a")
    await broker.close()
    await wait_until(lambda: refused(place.headrace), timeout_s=LIMIT_S)
    denied = await place.headrace("submit", file, "--key", other)
    assert (denied.code, "scope batch" in denied.err) == (1, True)
    place.environment["OPENAI_API_KEY"] = key
    assert (await place.headrace("list")).code == 0


async def refused(headrace: Callable[..., Any]) -> bool:
    """Gateways know of the first key within a second."""
    return "invalid_api_key" in (await headrace("list")).err


async def test_a_gateway_that_dies_is_not_missed(place: Place) -> None:
    """Another one goes on telling, and gives out the results."""
    doomed = place.gateway
    heir = await place.started.gateway(**place.settings, key_pepper=PEPPER).ready()
    place.environment["HEADRACE_URL"] = f"{doomed.url} {heir.url}"
    bodies = [short(number) | {"max_tokens": 150} for number in range(60)]
    file = place.file("night.jsonl", *bodies)
    watching = await place.start("submit", file, "--watch")
    assert watching.stderr is not None
    async with asyncio.timeout(LIMIT_S):
        while b"in progress" not in (line := await watching.stderr.readline()):
            assert line, "it ended before the batch ran"
    doomed.kill()
    out, err = await watching.communicate()
    assert watching.returncode == 0, err.decode()
    assert b"trying again" in err
    assert out.startswith(b"batch_")
    assert ids_in(place.folder / "night.output.jsonl") == sorted(map(str, range(60)))
