"""A real Prometheus scrapes a running system under load, and every expression has an answer.

Asked are all expressions of TGI's and vLLM's public dashboards (``expressions/*.json``, with their
sources), of our own dashboards and of our rules. An answer has a finite figure; nothing is an empty
panel, and so is NaN.
"""

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from redis.asyncio import Redis

from common.models.simulated import SIMULATED_MODEL
from ops import runfile
from tests.support.instance import Instance
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

MONITORING = ROOT / "ops"
PUBLIC = sorted((Path(__file__).parent / "expressions").glob("*.json"))
_NUM_TARGETS = 6
"""Two gateways, two workers, a background worker, an exporter."""
_NUM_CALLERS = 12
_PATIENCE_S = 60.0
_NEEDS_A_GPU = re.compile(r"DCGM_FI_|kind=\"gpu_")
WITHOUT = {
    "vllm:external_prefix_cache_": "there is no cache of keys and values beside those of workers",
    "vllm:mm_cache_": "models here read text alone",
    "http_request": "requests are counted by API and code instead: headrace_requests_total",
}
"""Of vLLM's, what has nothing to be shown here, and why."""


class Prometheus:
    """One server that scrapes what ``headrace up`` on ``data_dir`` says is there."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        folder.mkdir()
        config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        [job] = config["scrape_configs"]
        job["file_sd_configs"][0]["files"] = [str(data_dir / "run" / "prometheus-targets.json")]
        config["rule_files"] = [self._hurried(folder, name) for name in config["rule_files"]]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _hurried(self, folder: Path, name: str) -> str:
        """The same rules, evaluated each second."""
        rules = yaml.safe_load((MONITORING / "prometheus" / name).read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
        (folder / name).write_text(yaml.safe_dump(rules))
        return str(folder / name)

    async def address(self) -> str:
        """Of its API, once it listens."""

        def found() -> str:
            found = re.search(r'msg="Listening on".* address=(\S+)', self._log.read_text())
            return found[1] if found else ""

        await wait_until(
            lambda: found() or self._popen.poll() is not None, timeout_s=30, what="Prometheus"
        )
        assert self._popen.poll() is None, self._log.read_text()
        return f"http://{found()}/api/v1"

    def stop(self) -> None:
        """At once: nobody will read its data."""
        self._popen.kill()
        self._popen.wait()


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncGenerator[Instance]:
    started = Instance(
        tmp_path / "data",
        *("--gateways", "2", "--workers", "2"),
        simulated_first_token_ms=5,
        simulated_inter_token_ms=2,
        max_batch_size=4,
    )
    try:
        await started.ready()
        state = runfile.read_state(started.data_dir)
        assert state is not None
        server: Any = Redis.from_url(state.redis_url)
        await server.config_set("maxmemory", 2**30)  # or there is no share of it to be shown
        await server.aclose()
        yield started
    finally:
        started.kill()


@pytest.fixture
def prometheus(instance: Instance, tmp_path: Path) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path / "prometheus", instance.data_dir)
    yield started
    started.stop()


@asynccontextmanager
async def load(*urls: str) -> AsyncGenerator[None]:
    """Streams, whole answers, mistakes and clients that leave, all the while."""

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body = {"inputs": "A river " * (number % 9 + 1), "parameters": {"max_new_tokens": 20}}
        if number % 10 == 7:
            body = {"inputs": "", "parameters": {"max_new_tokens": -1}}
        if number % 10 == 3:
            async with client.stream("POST", "/generate_stream", json=body) as stream:
                await anext(stream.aiter_lines())
            return
        await client.post("/generate_stream" if number % 2 else "/generate", json=body)

    async def caller(client: httpx.AsyncClient, place: int) -> None:
        number = place
        while True:
            await ask(client, number)
            number += 1

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60))
            for url in urls
        ]
        callers = [
            asyncio.create_task(caller(clients[n % len(urls)], n)) for n in range(_NUM_CALLERS)
        ]
        try:
            yield
        finally:
            for task in callers:
                task.cancel()
            ends = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


def filled(expression: str, variables: dict[str, str]) -> str:
    """The expression with Grafana's variables as Grafana would fill them in."""
    values = {"__rate_interval": "30s", "__range": "5m", "__interval": "5s", **variables}
    values = {name: value.replace("MODEL", SIMULATED_MODEL) for name, value in values.items()}
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expression)


def of_public_dashboards() -> list[str]:
    found: list[str] = []
    for path in PUBLIC:
        board = json.loads(path.read_text())
        found += [filled(expression, board["variables"]) for expression in board["expressions"]]
    return found


def is_without(expression: str) -> bool:
    return any(name in expression for name in WITHOUT)


def of_our_dashboards() -> list[str]:
    boards = [json.loads(path.read_text()) for path in (MONITORING / "grafana").glob("*.json")]
    return [
        filled(target["expr"], {"model": ".*"})
        for board in boards
        for panel in board["panels"]
        for target in panel.get("targets", [])
        if not _NEEDS_A_GPU.search(target["expr"])
    ]


def of_our_rules() -> list[str]:
    """What is recorded; and of what alerts compare, the figure without the comparison."""
    found: list[str] = []
    for name in ("recording.yml", "alerts.yml"):
        for group in yaml.safe_load((MONITORING / "prometheus" / name).read_text())["groups"]:
            found += [rule["expr"] for rule in group["rules"] if "record" in rule]
            for alert in (rule["expr"] for rule in group["rules"] if "alert" in rule):
                figures = re.sub(r" (>=|>|==) [0-9. *]+", "", alert).replace("absent(", "count(")
                found += re.split(r"\n(?:and|or)(?: on \(\))?\n", figures.strip())
    return found


async def without_an_answer(client: httpx.AsyncClient, expressions: list[str]) -> list[str]:
    """Those with no finite figure."""
    empty: list[str] = []
    for expression in dict.fromkeys(expressions):
        answer = (await client.post("/query", data={"query": expression})).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        if not any(map(math.isfinite, values)):
            empty.append(expression)
    return empty


async def targets_are_up(client: httpx.AsyncClient) -> bool:
    active = (await client.get("/targets")).json()["data"]["activeTargets"]
    return len(active) == _NUM_TARGETS and all(target["health"] == "up" for target in active)


def test_nearly_all_of_vllms_dashboards_is_asked_for() -> None:
    """What is left out is named, with its reason."""
    of_vllm = [expression for expression in of_public_dashboards() if "tgi_" not in expression]
    asked = [expression for expression in of_vllm if not is_without(expression)]
    assert len(asked) >= 0.95 * len(of_vllm)
    assert all(any(name in expression for expression in of_vllm) for name in WITHOUT)


@pytest.mark.timeout(300)  # what it waits for has limits of its own
async def test_every_expression_of_every_dashboard_and_rule_has_an_answer(
    instance: Instance, prometheus: Prometheus
) -> None:
    """TGI's and vLLM's dashboards work unchanged; no panel of ours is dead, no rule fails."""
    urls = [instance.process(f"gateway {n}").address for n in (1, 2)]
    public = [expression for expression in of_public_dashboards() if not is_without(expression)]
    empty = public + of_our_dashboards() + of_our_rules()
    async with httpx.AsyncClient(base_url=await prometheus.address(), timeout=30) as client:
        async with load(*urls):
            await wait_until(lambda: targets_are_up(client), timeout_s=30, what="targets")
            give_up_s = time.monotonic() + _PATIENCE_S
            while empty and time.monotonic() < give_up_s:
                empty = await without_an_answer(client, empty)
        assert not empty, f"{len(empty)} without an answer:\n" + "\n".join(map(repr, empty))
        rules = (await client.get("/rules")).json()["data"]["groups"]
    failing = [rule for group in rules for rule in group["rules"] if rule.get("lastError")]
    assert not failing
