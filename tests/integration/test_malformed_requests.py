"""Malformed requests by the thousand, over every route: nothing falls over, nobody hangs.

`headrace bench malformed` sends more of them, and tells how late the event loop was.
"""

from pathlib import Path
from typing import Any

import httpx
import pytest

from ops.bench.malformed import BODIES, Breaker, send_all
from tests.support.gateway_app import Stand
from tests.support.processes import Processes

COUNT = 2000


def test_a_seed_makes_the_same_requests_again() -> None:
    def requests(seed: int) -> list[bytes]:
        breaker = Breaker(seed)
        return [breaker.request().data for _ in range(200)]

    assert requests(7) == requests(7)
    assert requests(7) != requests(8)
    sent = b"".join(requests(7))
    assert all(f" {path} ".encode() in sent for path in BODIES)


@pytest.mark.timeout(240)
async def test_malformed_requests_do_no_harm(started: Processes, simulated_data_dir: Path) -> None:
    """Every one is answered, none with an undocumented 5xx; gateway and worker live on."""
    shared: dict[str, Any] = {
        "data_dir": simulated_data_dir,
        "model": "simulated",
        "max_total_tokens": 64,
    }
    fast: dict[str, Any] = {"simulated_first_token_ms": 0, "simulated_inter_token_ms": 0}
    worker = await started.worker(**shared, **fast).ready()
    gateway = await started.gateway(**shared).ready()
    host, port = gateway.url.removeprefix("http://").split(":")
    outcome = await send_all(host, int(port), seed=1, count=COUNT)
    assert not outcome.problems, outcome.problems[:3]
    assert sum(outcome.statuses.values()) + outcome.closed == COUNT
    assert {200, 400, 404, 413, 415, 422} <= outcome.statuses.keys()
    assert gateway.exit_code is None
    assert worker.exit_code is None
    assert not gateway.events("request.failed")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        answer = await client.post("/generate", json={"inputs": "still there?"})
    assert answer.status_code == 200


async def test_what_once_broke_is_refused(stand: Stand) -> None:
    """Found by the generator: each of these was a 500."""
    await stand.worker()
    gateway = await stand.gateway()
    json = {"content-type": "application/json"}
    key = {"idempotency-key": "k1"}
    for path, body, headers in (
        ("/generate", b'{"inputs":"hi","parameters":{"grammar":{"type":[],"value":1}}}', {}),
        ("/v1/responses", b'{"input":[{"role":["user"],"content":"hi"}]}', {}),
        ("/v1/responses", b'{"input":[{"role":"user","content":[{"type":{}}]}]}', {}),
        ("/v1/completions", b'{"prompt":"","x\xf4":1}', key),
        ("/v1/completions", b'{"prompt":"","x":"\\ud800"}', key),
    ):
        answer = await gateway.client.post(path, content=body, headers=json | headers)
        assert answer.status_code in (400, 422), (path, body, answer.text)
