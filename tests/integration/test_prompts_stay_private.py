"""A canary in prompts: no log line, figure or error tells it, and Redis only while it is needed."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from common.models.tokenizer import Tokenizer
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.gateway_app import Stand
from tests.support.models import simulated
from tests.support.processes import Process, Processes
from tests.support.redis_server import RawRedis
from tests.support.waiting import wait_until

CANARY = "the canary sings at 0417"
RETENTION_S = 1


@pytest.fixture
async def raw(redis_url: str) -> AsyncIterator[RawRedis]:
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


async def holders(raw: RawRedis, data_dir: Path) -> set[str]:
    """Kinds of the keys that hold the canary, as text or as tokens."""
    tokens = Tokenizer.load(simulated(data_dir).path).encode(CANARY, add_special_tokens=False)
    forms = (CANARY.encode(), struct.pack(f"<{len(tokens)}I", *tokens))
    found: set[str] = set()
    for key in await raw.keys("*"):
        dumped = repr(await _content(raw, key)) + repr(key)
        if any(repr(form)[2:-1] in dumped for form in forms):
            found.add(key.decode().rpartition("}:")[2].partition(":")[0])
    return found


async def _content(raw: RawRedis, key: bytes) -> Any:
    match (await raw.type(key)).decode():
        case "hash":
            return await raw.hgetall(key)
        case "stream":
            return await raw.xrange(key)
        case "zset":
            return await raw.zrange(key, 0, -1)
        case "set":
            return await raw.smembers(key)
        case "list":
            return await raw.lrange(key, 0, -1)
        case _:
            return await raw.get(key)


async def test_redis_holds_a_prompt_while_it_waits_and_runs(stand: Stand, raw: RawRedis) -> None:
    worker = await stand.worker()
    gateway = await stand.gateway(retention_s=RETENTION_S, response_retention_s=RETENTION_S)
    held: list[set[str]] = []
    for path, body in (
        ("/generate_stream", {"inputs": CANARY}),
        ("/v1/responses", {"input": CANARY, "stream": True}),
    ):
        async with gateway.client.stream(
            "POST", path, json=body, headers={"idempotency-key": path}
        ) as answer:
            held.append(await holders(raw, stand.data_dir))
            turn = await worker.take()
            await turn.say("an answer")
            held.append(await holders(raw, stand.data_dir))
            await turn.end()
            await answer.aread()
        held.append(await holders(raw, stand.data_dir))
        await wait_until(lambda: _is_gone(raw, stand), what="the end of the retention")
    own = {"spec"}
    assert held == [own, own, set(), own | {"doc"}, own | {"doc"}, {"doc"}]


async def _is_gone(raw: RawRedis, stand: Stand) -> bool:
    return not await holders(raw, stand.data_dir)


async def test_no_process_tells_a_prompt_or_a_key(
    stand: Stand, started: Processes, simulated_data_dir: Path
) -> None:
    """Whether it is answered, refused for each reason there is, cancelled or interrupted."""
    settings: dict[str, Any] = {"data_dir": simulated_data_dir, "key_pepper": PEPPER}
    gateway = started.gateway(model="simulated", **settings)
    worker = await started.worker(simulated_first_token_ms=1, simulated_inter_token_ms=1).ready()
    await gateway.ready()
    key = await make_key(stand.broker, "a", scopes=("generate", "batch", "metrics"))
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    refusals: list[str] = []
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        for path, body in GOOD:
            answer = await client.post(path, json=body, headers=bearer(key))
            assert answer.status_code == 200, answer.text
            refused = await client.post(path, json=body, headers=bearer(wrong))
            assert refused.status_code == 401
            refusals.append(refused.text)
        for path, body in BAD:
            answer = await client.post(path, json=body, headers=bearer(key))
            assert 400 <= answer.status_code < 500, (path, body, answer.text)
            refusals.append(answer.text)
        for form, status in ((FILE, 200), (FILE | {"other": ("b", b"c")}, 200), ({}, 400)):
            answer = await client.post(
                "/v1/files", files=form or {"x": FILE["file"]}, data=PURPOSE, headers=bearer(key)
            )
            assert answer.status_code == status
            refusals.append(answer.text.replace(f"{CANARY}.jsonl", ""))
        broken = f'{{"inputs": "{CANARY}", '.encode()
        headers = bearer(key) | {"content-type": "application/json"}
        refusals.append((await client.post("/generate", content=broken, headers=headers)).text)
        worker.kill()
        body = {"inputs": CANARY, "stream": True}
        async with client.stream("POST", "/", json=body, headers=bearer(key)):
            pass  # its client leaves
        figures = (await client.get("/metrics", headers=bearer(key))).text
    told = [*refusals, figures, *map(_logged, (gateway, worker))]
    assert "request.finished" in told[-2]
    assert "worker.finished" in told[-1]
    for text in told:
        assert CANARY not in text
        assert key[-43:] not in text
        assert wrong[-43:] not in text


def _logged(process: Process) -> str:
    return "".join(path.read_text() for path in process.folder.iterdir() if path.is_file())


FILE = {"file": (f"{CANARY}.jsonl", CANARY.encode())}
PURPOSE = {"purpose": "batch"}
_SAID = [{"role": "user", "content": CANARY}]
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": CANARY, "parameters": {"max_new_tokens": 4, "stop": [CANARY]}}),
    ("/tokenize", {"inputs": CANARY}),
    ("/v1/chat/completions", {"messages": _SAID, "max_tokens": 4, "user": CANARY}),
    ("/v1/completions", {"prompt": [CANARY, CANARY], "max_tokens": 4}),
    ("/v1/responses", {"input": CANARY, "max_output_tokens": 4, "metadata": {"a": CANARY}}),
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": CANARY, "parameters": {"temperature": -1}}),
    ("/generate", {"inputs": [CANARY]}),
    ("/generate", {"inputs": CANARY, "parameters": {"max_new_tokens": 10**6}}),
    ("/generate", {"inputs": CANARY * 400}),
    ("/generate", {"inputs": CANARY, "parameters": {"stop": [CANARY * 100]}}),
    ("/generate", {"inputs": CANARY, "parameters": {"grammar": {"type": "regex", "value": 1}}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"text": CANARY}}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}], "user": CANARY}),
    ("/v1/chat/completions", {"messages": _SAID, "tools": [{"type": "function"}]}),
    ("/v1/chat/completions", {"messages": _SAID, "max_tokens": 0}),
    ("/v1/completions", {"prompt": CANARY, "n": 99}),
    ("/v1/completions", {"prompt": {"text": CANARY}}),
    ("/v1/responses", {"input": CANARY, "previous_response_id": "resp_none"}),
    ("/v1/responses", {"input": [{"role": "user", "content": 7}], "instructions": CANARY}),
]
