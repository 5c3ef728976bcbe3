"""Unmodified JavaScript clients in Node, the examples as they stand, and our client's types."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from ops.bench.sse_client import read_events
from tests.clients.conftest import System, run
from tests.support.processes import ROOT, free_port

HERE = Path(__file__).parent / "node"
EXAMPLES = ROOT / "ops" / "examples"
CLIENT = ROOT / "gateway" / "static" / "headrace.js"
INSTALL_S = 100


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned packages: ``npm ci`` installs what the lock file says."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"],
        cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return folder


async def run_example(folder: Path, name: str, system: System) -> tuple[str, str]:
    """Run a copy where its packages are, as somebody would who copied it."""
    shutil.copy(EXAMPLES / name, folder)
    return await run(folder, "node", name, "hello", BASE_URL=system.url)


async def text_of(system: System, path: str) -> str:
    """What a chat stream says, read from its log."""
    async with (
        httpx.AsyncClient(base_url=system.url, timeout=30) as client,
        client.stream("GET", path) as response,
    ):
        events = [event async for event in read_events(response)]
    chunks = [json.loads(event.data) for event in events if not event.is_done]
    return "".join(
        choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]
    )


async def test_the_openai_client_for_node_streams(system: System, packages: Path) -> None:
    """Through the silence before the first token; what it printed is what the log holds."""
    out, told = await run_example(packages, "openai.mjs", system)
    path = told.partition(": ")[2].strip()
    assert path.startswith("/v1/streams/")
    assert out == await text_of(system, path) + "\n"
    assert len(out) > 20


async def test_the_ai_sdk_streams(system: System, packages: Path) -> None:
    out, told = await run_example(packages, "ai-sdk.mjs", system)
    assert len(out) > 20
    num_read, num_written = [int(word) for word in told.split() if word.isdigit()]
    assert num_read > 0
    assert 0 < num_written <= 200
    assert told.rstrip().endswith(("stop", "length"))


async def test_what_the_openai_client_for_node_raises_and_returns(
    system: System, packages: Path
) -> None:
    shutil.copy(HERE / "openai_surface.mjs", packages)
    out, _ = await run(packages, "node", "openai_surface.mjs", BASE_URL=system.url)
    seen = json.loads(out)
    assert seen["whole"]["finish_reason"] == "length"
    assert seen["whole"]["text"] == seen["streamed"]["text"] == seen["again"]["text"]
    assert seen["streamed"]["usage"]["completion_tokens"] == 12
    assert seen["again"]["replayed"] == "true"
    assert seen["refused"] == {"name": "BadRequestError", "code": "bad_request", "param": "n"}
    assert seen["conflict"] == {
        "name": "UnprocessableEntityError", "code": "idempotency_conflict", "param": None,
    }  # fmt: skip


async def test_our_client_sends_a_request_again_whose_answer_was_lost(system: System) -> None:
    """To the next gateway, under the same key: one generation is made, and it is read whole."""
    async with losing_answers(system.url) as (url, lost):
        out, _ = await run(
            ROOT, "node", str(HERE / "replicas.mjs"),
            CLIENT=CLIENT.as_uri(), URLS=f"http://127.0.0.1:{free_port()} {url} {system.url}",
        )  # fmt: skip
    answer = json.loads(out)
    assert [answer["id"]] == lost
    assert answer["finishReason"] == "length"
    assert answer["text"] == await text_of(system, f"/v1/streams/{answer['id']}")


@asynccontextmanager
async def losing_answers(target: str) -> AsyncGenerator[tuple[str, list[str]]]:
    """A gateway that is cut off when it has taken a request: its address, and what it took."""
    lost: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        sent = {name: headers[name] for name in ("content-type", "idempotency-key")}
        url = target + lines[0].split()[1]
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream("POST", url, content=body, headers=sent) as response,
        ):
            lost.append(response.headers["x-headrace-stream-id"])
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lost
    finally:
        server.close()


async def test_our_client_has_types(packages: Path) -> None:
    """It is strict by itself, and whoever calls it wrongly is told by the compiler."""
    shutil.copy(CLIENT, packages)
    uses = {
        "right.mjs": "const { text } = await streamChat({ body: {}, onPlace: (p) => p.position });"
        "text.length;",
        "wrong.mjs": "await streamChat({ body: {}, onText: 1 }); cancel({});",
    }
    for name, use in uses.items():
        (packages / name).write_text(f'import {{ cancel, streamChat }} from "./headrace.js"; {use}')
    compiler = (
        "node", "node_modules/typescript/bin/tsc", "--noEmit", "--allowJs", "--checkJs", "--strict",
        "--target", "es2022", "--module", "es2022", "--moduleResolution", "bundler",
        "--lib", "es2023,dom,dom.iterable,dom.asynciterable",
    )  # fmt: skip
    await run(packages, *compiler, "headrace.js", "right.mjs")
    complaints, _ = await run(packages, *compiler, "wrong.mjs", expected=2)
    assert "is not assignable to type '(piece: string" in complaints
    assert "Property 'id' is missing" in complaints


async def test_curl_streams_and_resumes(system: System) -> None:
    """As the README says it: what was missed is one request away."""
    body = json.dumps({"prompt": "hello", "max_tokens": 8, "stream": True, "temperature": 0})
    url = f"{system.url}/v1/completions"
    out, _ = await run(
        ROOT, "curl", "--no-buffer", "--silent", "--show-error", "--fail", "--include", url,
        "--header", "content-type: application/json", "--data", body,
    )  # fmt: skip
    head, _, events = out.partition("\r\n\r\n")
    [stream_id] = [
        line.partition(": ")[2]
        for line in head.split("\r\n")
        if line.startswith("x-headrace-stream-id")
    ]
    assert ": ping\n" in events
    assert events.endswith("data: [DONE]\n\n")
    shown = events[events.index("id: ") :]
    first, _, rest = shown.partition("\n\n")
    cursor = first.partition("\n")[0].removeprefix("id: ")
    again, _ = await run(
        ROOT, "curl", "--no-buffer", "--silent", "--show-error", "--fail",
        f"{system.url}/v1/streams/{stream_id}", "--header", f"last-event-id: {cursor}",
    )  # fmt: skip
    assert again == "retry: 500\n" + rest
