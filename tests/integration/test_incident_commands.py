"""`headrace incident` on the logs of a real pool, in which a worker is killed at its work."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import orjson
import pytest
from click.testing import CliRunner, Result

from ops.incident import replay, show, verify
from tests.support.api_keys import PEPPER
from tests.support.processes import Process, Processes
from tests.support.waiting import wait_until

PROMPT = "Tell me what a river is, and where it goes"
OTHER = "Tell me what a valley is and where it ends"
"""As long as the first one."""
NUM_REQUESTS = 6


@dataclass
class Scene:
    """A pool with logs of its own; ``common`` are the options that name it."""

    gateway: Process
    workers: list[Process]
    common: list[str]

    async def ask(self, **fields: Any) -> str:
        """Ask for an answer; the request's id."""
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.8} | fields
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=60) as client:
            answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-headrace-stream-id"]

    async def at_work(self) -> tuple[Process, Process]:
        """A worker that answers, and the other one, which may have nothing to do."""
        first, second = self.workers
        await wait_until(
            lambda: first.events("worker.first_token") or second.events("worker.first_token"),
            timeout_s=20,
            what="a token",
        )
        return (first, second) if first.events("worker.first_token") else (second, first)

    async def run(self, command: click.Command, *arguments: str, pepper: str = PEPPER) -> Result:
        """In a thread, since commands have event loops of their own."""

        def invoke() -> Result:
            environment = {"HEADRACE_KEY_PEPPER": pepper}
            given = [*arguments, *self.common]
            return CliRunner(env=environment).invoke(command, given, standalone_mode=False)

        return await asyncio.to_thread(invoke)


@pytest.fixture
async def scene(started: Processes, simulated_data_dir: Path) -> Scene:
    given: dict[str, Any] = {"data_dir": simulated_data_dir, "model": "simulated"}
    workers = [started.worker(simulated_inter_token_ms=25, **given) for _ in range(2)]
    gateway = started.gateway(key_pepper=PEPPER, **given)
    for process in (*workers, gateway):
        await process.ready()
    logs = [f"--logs={process.folder}/*.jsonl" for process in (*workers, gateway)]
    return Scene(gateway, workers, [*logs, f"--data-dir={simulated_data_dir}"])


def redis_options(redis_url: str) -> list[str]:
    return [f"--redis-url={redis_url}", "--model=simulated", "--timeout=30"]


async def test_a_kill_breaks_no_promise_and_is_told_with_the_request(scene: Scene) -> None:
    asking = [asyncio.create_task(scene.ask(n=1 + i % 2)) for i in range(NUM_REQUESTS)]
    victim, heir = await scene.at_work()
    victim.kill()
    ids = await asyncio.gather(*asking)
    await scene.gateway.saw("request.finished", request_id=ids[-1])

    checked = await scene.run(verify.main, "--json")
    assert checked.exception is None, checked.exception
    told = orjson.loads(checked.output)
    assert told["violations"] == []
    assert told["checked"]["requests"] == NUM_REQUESTS

    moved = scene.gateway.events("request.finished", attempts=2)
    assert moved
    shown = await scene.run(show.main, moved[0]["request_id"], "--json")
    assert shown.return_value == 1
    story = orjson.loads(shown.output)["story"]
    assert story["attempts"][0]["worker"] == victim.name
    assert story["attempts"][-1]["worker"] == heir.name
    phases = {phase["name"]: phase["seconds"] for phase in story["phases"]}
    assert abs(sum(phases.values()) - moved[0]["duration"]) < 0.25


async def test_a_generation_is_evaluated_again_and_compared(
    scene: Scene, redis_url: str, tmp_path: Path
) -> None:
    id = await scene.ask(top_p=0.9)
    await scene.gateway.saw("request.finished", request_id=id)
    given = tmp_path / "prompt"
    options = [id, *redis_options(redis_url)]

    without = await scene.run(replay.main, *options)
    assert isinstance(without.exception, click.ClickException)
    assert without.exception.exit_code == 2
    assert "--prompt-file" in without.exception.message

    given.write_text(PROMPT + "\n")
    same = await scene.run(replay.main, *options, f"--prompt-file={given}")
    assert same.exception is None, same.exception
    assert same.return_value == 0
    assert "the same by its hash" in same.output
    assert "then and now: the same 40, token by token" in same.output

    served = "--show-text", f"--against={scene.gateway.url},{scene.gateway.url}/v1"
    servers = await scene.run(replay.main, *options, f"--prompt-file={given}", *served)
    assert (servers.return_value, servers.exception) == (0, None), servers.output

    given.write_text(OTHER)
    refused = await scene.run(replay.main, *options, f"--prompt-file={given}")
    assert isinstance(refused.exception, click.BadParameter)
    assert "prompt_sha256" in refused.exception.message


async def test_a_difference_is_named_by_its_position_and_text_only_on_demand(
    scene: Scene, redis_url: str, tmp_path: Path
) -> None:
    """Here another prompt stands for another model: without a pepper nobody can tell it apart."""
    id = await scene.ask(seed=7)  # some seeds bring both prompts the same words
    await scene.gateway.saw("request.finished", request_id=id)
    given = tmp_path / "prompt.json"
    given.write_text(orjson.dumps({"prompt": OTHER, "max_tokens": 40}).decode())
    options = [id, *redis_options(redis_url), f"--prompt-file={given}", "--json"]
    differs = await scene.run(replay.main, *options, pepper="")
    assert differs.exception is None, differs.exception
    assert differs.return_value == 1
    told = orjson.loads(differs.output)
    first, second = told["replay"]["comparisons"]
    assert first["position"] == second["position"] is not None
    assert first["left_token"] != first["right_token"]
    assert first["left_text"] == ""
    assert "two replays agree" in told["findings"][0]["why"]
    with_text = await scene.run(replay.main, *options, "--show-text", pepper="")
    assert orjson.loads(with_text.output)["replay"]["comparisons"][0]["left_text"] != ""
