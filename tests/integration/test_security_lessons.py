"""What incidents of other inference servers teach, one regression test for each that applies here.

Named by the lesson; the advisory stands in the docstring. API keys have tests of their own.
"""

import ast
import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import pytest

from common.broker import Broker
from common.failures import Failure
from common.models.chat_template import ChatTemplate
from common.models.files import check_directory
from common.models.store import ModelStore
from common.settings import GatewaySettings, Settings, WorkerSettings
from gateway.api.chat import ChatBody
from gateway.api.completions import CompletionBody
from gateway.api.responses import ResponseBody
from gateway.api.tgi import Parameters
from gateway.middleware import MAX_HEAD_BYTES, MAX_HEADERS
from ops.processes import UpSettings
from tests.support.gateway_app import RunningGateway, Stand
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
DOUBLING = (
    "{%% set ns = namespace(x='a') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
POSTS = {
    "/": {"inputs": "hi"},
    "/generate": {"inputs": "hi"},
    "/generate_stream": {"inputs": "hi"},
    "/tokenize": {"inputs": "hi"},
    "/chat_tokenize": CHAT,
    "/invocations": {"inputs": "hi"},
    "/vertex": {"instances": [{"inputs": "hi"}]},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
JSON = {"content-type": "application/json"}


@pytest.fixture
async def gateway(stand: Stand) -> RunningGateway:
    await stand.worker()
    return await stand.gateway()


async def queued(broker: Broker) -> int:
    return sum((await broker.state()).waiting.values())


# What crosses a wire -----------------------------------------------------------------------------


def test_no_code_of_ours_unpickles_or_evaluates() -> None:
    """CVE-2024-50050 and its copies (pickle over ZeroMQ), CVE-2025-32434, CVE-2025-62164
    (``torch.load``): nothing that arrives is ever turned into objects by name."""
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    banned_calls = {"eval", "exec", "load_pickle"}
    found: list[str] = []
    for folder in ("common", "gateway", "workers", "ops"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names = {(node.module or "").partition(".")[0]}
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    names = {node.func.id} & banned_calls
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    is_load = (node.value.id, node.attr) == ("torch", "load")
                    names = {"pickle"} if is_load else set[str]()
                else:
                    continue
                if names & (banned_modules | banned_calls):
                    found.append(f"{path}:{getattr(node, 'lineno', 0)}")
    assert not found


def test_nothing_listens_beyond_this_machine_unless_told_to() -> None:
    """CVE-2025-30202, CVE-2025-32444, CVE-2025-47277: sockets on all interfaces."""
    assert GatewaySettings().host == UpSettings().host == "127.0.0.1"
    assert Settings().redis_url.startswith("redis://127.0.0.1")
    with pytest.raises(ValueError, match="needs a password"):
        Settings(redis_url="redis://10.0.0.7")


async def test_no_tensor_is_taken_from_a_client(gateway: RunningGateway) -> None:
    """CVE-2025-62164: ``prompt_embeds`` went through ``torch.load``."""
    body = {"prompt_embeds": "gASVAAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU", "max_tokens": 1}
    refused = await gateway.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert "prompt" in refused.json()["error"]["message"]


# What a model brings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", json.dumps({"auto_map": {"AutoModel": "evil.Model"}})),
        ("modeling_evil.py", "import os"),
        ("pytorch_model.bin", "x"),
    ],
)
def test_a_model_that_brings_code_is_refused_before_anybody_reads_it(
    tmp_path: Path, name: str, content: str
) -> None:
    """CVE-2026-22807, CVE-2025-66448: code ran although remote code was not trusted."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / name).write_text(content)
    with pytest.raises(Failure) as caught:
        check_directory(tmp_path)
    assert caught.value.code == "UNSAFE_FORMAT"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages.append)({}) }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        DOUBLING % "ns.x ~ ns.x",
        DOUBLING % "ns.x + ns.x",
        DOUBLING % "[ns.x, ns.x] | join",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_chat_template_can_neither_reach_out_nor_hold_up(source: str) -> None:
    """CVE-2026-5760: a template of a model file ran code; here it is refused or runs out."""
    with pytest.raises(Failure) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
    assert caught.value.code in ("TEMPLATE_ERROR", "MODEL_LOAD_FAILED")


async def test_a_request_brings_no_template_and_no_arguments_to_one(
    gateway: RunningGateway,
) -> None:
    """CVE-2025-62426, CVE-2025-61620: ``chat_template_kwargs`` reached the template's call."""
    plain = (await gateway.client.post("/chat_tokenize", json=CHAT)).json()
    more: dict[str, Any] = {
        "chat_template": "{{ 7 * 7 }}",
        "chat_template_kwargs": {"tokenize": True, "messages": [], "add_generation_prompt": False},
        "add_generation_prompt": False,
    }
    assert (await gateway.client.post("/chat_tokenize", json=CHAT | more)).json() == plain


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "a/../b", "/etc/passwd", "a\\b", "a\0b"]
)
def test_a_models_name_is_no_path(tmp_path: Path, name: str) -> None:
    """CVE-2024-37032: path traversal in a model's digest."""
    with pytest.raises(Failure) as caught:
        ModelStore(tmp_path).get(name)
    assert caught.value.code == "MODEL_NOT_FOUND"


async def test_no_path_of_the_web_leaves_its_folder(gateway: RunningGateway) -> None:
    """CVE-2024-37032, over HTTP."""
    host, port = gateway.url.removeprefix("http://").split(":")
    for path in (
        "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/..%2f..%2fpyproject.toml", "/ui//etc/passwd",
        "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    ):  # fmt: skip
        answer = await raw(
            host, int(port), f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        )
        assert answer.split()[1] in (b"404", b"400"), path


# What a request brings ---------------------------------------------------------------------------


async def test_a_grammar_that_is_nonsense_reaches_no_worker(
    gateway: RunningGateway, stand: Stand
) -> None:
    """CVE-2025-48942, CVE-2025-48943, CVE-2025-48944: a malformed schema or regular expression
    killed the server. Those that have the right shape are compiled where they can be killed."""
    for nonsense in (7, [], "x", {"type": []}, {"type": "json"}, {"type": "json", "value": [1]}):
        native = {"inputs": "hi", "parameters": {"grammar": nonsense}}
        for path, body in (
            ("/", native),
            ("/generate", native),
            ("/generate_stream", native),
            ("/invocations", native),
            ("/vertex", {"instances": [native]}),
            ("/v1/chat/completions", CHAT | {"response_format": nonsense}),
            ("/v1/completions", {"prompt": "hi", "response_format": nonsense}),
            ("/v1/responses", {"input": "hi", "text": {"format": nonsense}}),
        ):
            refused = await gateway.client.post(path, json=body)
            assert refused.status_code in (400, 422), (path, nonsense, refused.text)
    assert await queued(stand.broker) == 0


async def raw(host: str, port: int, *pieces: bytes) -> bytes:
    """What a server says to these bytes, until it closes or has said a whole head."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(4096), 10)
    except ConnectionError:
        return b"HTTP/1.1 000 closed"
    finally:
        writer.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"x-big": "a" * MAX_HEAD_BYTES},
        {f"x-{index}": "a" for index in range(MAX_HEADERS + 1)},
    ],
)
async def test_large_headers_are_refused_before_anybody_is_asked_for_a_key(
    stand: Stand, headers: dict[str, str]
) -> None:
    """CVE-2025-48956: one GET with a giant header took all memory, without authentication."""
    gateway = await stand.gateway(api_key="secret")
    answer = await gateway.client.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "header_too_large")
    native = await gateway.client.get("/info", headers=headers)
    assert (native.status_code, native.json()["code"]) == (431, "HEADER_TOO_LARGE")
    assert (await gateway.client.get("/v1/models")).status_code == 401


async def test_a_head_without_an_end_is_cut_off(gateway: RunningGateway) -> None:
    """CVE-2025-48956: the parser itself must not collect for ever."""
    host, port = gateway.url.removeprefix("http://").split(":")
    pieces = [b"GET / HTTP/1.1\r\nx: ", *[b"a" * 16_384] * 40]
    answer = await raw(host, int(port), *pieces)
    assert answer.split()[1] in (b"431", b"000")
    urls = [b"GET /", *[b"a" * 16_384] * 40]
    assert (await raw(host, int(port), *urls)).split()[1] in (b"431", b"000", b"400")
    assert (await gateway.client.get("/health")).status_code == 200


def test_what_a_tenant_computed_is_found_by_that_tenant_alone() -> None:
    """CVE-2025-46570: the time to the first token told what others had sent."""
    assert WorkerSettings().prefix_cache == "tenant"


@pytest.fixture
async def bait() -> AsyncIterator[tuple[str, list[str]]]:
    """A server of ours, and who has called it."""
    calls: list[str] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append((await reader.readline()).decode())
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"http://127.0.0.1:{port}/image.png", calls


async def test_nothing_that_a_prompt_names_is_fetched(
    gateway: RunningGateway, stand: Stand, bait: tuple[str, list[str]]
) -> None:
    """GHSA-3f6c-7fw2-ppm4, CVE-2026-24779 (media URLs), CVE-2026-0599 (links in Markdown)."""
    url, calls = bait
    image = {"type": "image_url", "image_url": {"url": url}}
    refused = await gateway.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": [image]}]}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    for path, body in (
        ("/tokenize", {"inputs": f"![]({url})"}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": f"![x]({url})"}]}),
        ("/tokenize", {"inputs": f"<img src='{url}'>"}),
    ):
        assert (await gateway.client.post(path, json=body)).status_code == 200
    async with gateway.client.stream("POST", "/generate_stream", json={"inputs": f"![]({url})"}):

        async def waits() -> bool:
            return await queued(stand.broker) == 1

        await wait_until(waits)
    assert calls == []


def numbers(body: type[msgspec.Struct]) -> list[str]:
    """Fields of a number, each."""
    return [
        field.name
        for field in msgspec.structs.fields(body)
        if {int, float} & {field.type, *get_args(field.type)}
    ]


NUMBERS = (
    [("/generate", {"inputs": "hi"}, name) for name in numbers(Parameters)]
    + [("/v1/chat/completions", CHAT, name) for name in numbers(ChatBody)]
    + [("/v1/completions", {"prompt": "hi"}, name) for name in numbers(CompletionBody)]
    + [("/v1/responses", {"input": "hi"}, name) for name in numbers(ResponseBody)]
)


async def test_every_number_has_a_bound_at_both_ends(gateway: RunningGateway) -> None:
    """CVE-2026-21869: a negative number from a request wrote out of bounds. Every field of every
    body, those of tomorrow too."""
    assert len(NUMBERS) > 50
    for path, body, name in NUMBERS:
        for value in (-(2**70), -1e30, 1e30, 2**70):
            sent = {"parameters": {name: value}} if path == "/generate" else {name: value}
            answer = await gateway.client.post(path, json=body | sent)
            assert answer.status_code in (400, 422), (path, name, value, answer.text)
            assert name.removeprefix("max_completion_") in answer.text or "max_tokens" in name


async def test_no_file_of_the_page_comes_in_ranges(gateway: RunningGateway) -> None:
    """CVE-2025-62727: a Range header of many parts took a time that grew with its square."""
    header = "bytes=" + ",".join(f"{index}-{index + 1}" for index in range(0, 2000, 2))
    answer = await gateway.client.get("/ui/app.js", headers={"range": header})
    assert answer.status_code == 200
    whole = await gateway.client.get("/ui/app.js")
    assert answer.content == whole.content


async def test_nothing_but_plain_json_is_read(gateway: RunningGateway) -> None:
    """CVE-2024-47874, CVE-2025-54121 (forms), and bombs in compressed bodies."""
    for path, body in POSTS.items():
        for headers in (
            {"content-type": "multipart/form-data; boundary=x"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "text/plain"},
            {},
            JSON | {"content-encoding": "gzip"},
            JSON | {"content-encoding": "identity, br"},
        ):
            content = json.dumps(body).encode()
            refused = await gateway.client.post(path, content=content, headers=headers)
            assert refused.status_code == 415, (path, headers)


async def test_a_body_is_weighed_before_it_is_parsed(gateway: RunningGateway) -> None:
    """Depth, length and digits: each took a server down somewhere."""
    for path in POSTS:
        for body in (
            b"[" * 50_000 + b"]" * 50_000,
            b'{"x":' + b"1" * 5000 + b"}",
            b'{"x":[' + b"0," * 200_000 + b"0]}",
            b'{"x":"' + b"a" * 600_000 + b'"}',
        ):
            refused = await gateway.client.post(path, content=body, headers=JSON)
            assert refused.status_code == 413, (path, body[:20])


async def test_names_from_outside_make_no_keys(gateway: RunningGateway, stand: Stand) -> None:
    """Faktory 1.10: the name of a queue collided with other keys of Redis."""
    for name in ("headrace:{simulated}", "a b", "*", "\r\nFLUSHALL\r\n", "{x}"):
        body = {"prompt": "hi", "model": name, "service_tier": name, "user": name}
        assert (await gateway.client.post("/v1/completions", json=body)).status_code == 400
        quoted = httpx.URL(f"{gateway.url}/v1/streams/").join(
            f"/v1/streams/{''.join(f'%{byte:02x}' for byte in name.encode())}"
        )
        assert (await gateway.client.get(quoted)).status_code in (400, 404)
    assert await queued(stand.broker) == 0
