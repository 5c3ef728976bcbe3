"""A stop string ends the text exactly where it begins or ends, even inside a token."""

import httpx

from ops.bench.sse_client import Reader
from tests.story.conftest import Stage

_TORCH = {"model": "tiny", "engine": "torch", "dtype": "float32"}


async def completion(client: httpx.AsyncClient, **fields: object) -> dict[str, object]:
    body = {"model": "tiny", "prompt": "the and", "temperature": 0, "max_tokens": 60, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def test_a_stop_string(stage: Stage) -> None:
    """OpenAI's route leaves the stop string out, TGI's route keeps it; both say why they ended."""
    await stage.worker(**_TORCH)
    _, client = await stage.gateway(**_TORCH)
    whole = str((await completion(client))["text"])
    stop = whole[7:10]
    before = whole[: whole.index(stop)]

    stopped = await completion(client, stop=[stop])
    assert (stopped["text"], stopped["finish_reason"]) == (before, "stop")

    reader = await Reader().read_all(client, "the and", max_new_tokens=60, stop=[stop])
    reader.check_whole()
    assert reader.text == before + stop
    assert reader.end["details"]["finish_reason"] == "stop_sequence"
