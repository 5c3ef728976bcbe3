"""Of several hundred faults, injected where the outside comes in, none is answered with INTERNAL.

What Redis may say, what a disk may say, and what may go wrong in an engine: each has a code that
says who can act. INTERNAL would mean that nobody had thought of it.
"""

import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest

import gateway.admission
from common.failures import KINDS
from common.models.tokenizer import Tokenizer
from common.storage import local
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.engines import engine_around, request
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.gateway_app import RunningGateway, Stand, simulated_data_dir, stand
from tests.support.models import simulated
from tests.support.scripted_worker import saying
from workers.engine.grammar import GrammarError
from workers.engine.port import DeviceMemoryError
from workers.engine.sequence import Sequence

__all__ = ["simulated_data_dir", "stand"]

PROMPT = {"prompt": "hi", "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
NATIVE = {"inputs": "hi", "parameters": {"max_new_tokens": 4}}

OF_REDIS = (
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOREPLICAS Not enough good replicas to write.",
    "CLUSTERDOWN The cluster is down",
    "CLUSTERDOWN Hash slot not served",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "MOVED 866 10.0.0.7:6379",
    "ASK 866 10.0.0.7:6379",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "UNKILLABLE Sorry the script already executed write commands against the dataset.",
    "MISCONF Errors writing to the AOF file: No space left on device",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist.",
    "NOAUTH Authentication required.",
    "NOPERM User headrace has no permissions to run the 'fcall' command",
    "NOPERM No permissions to access a key",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "ERR max number of clients reached",
    "ERR unknown command 'FCALL', with args beginning with: ",
    "ERR DISABLED the command is disabled",
    "ERR Protocol error: too big bulk count string",
)
"""As Redis 7, 8 and Valkey 8, 9 word them (src/server.c, src/cluster.c, src/script.c)."""

OF_A_DISK = tuple(
    getattr(errno, name)
    for name in (
        "EACCES", "EBUSY", "EDQUOT", "EFBIG", "EINTR", "EIO", "ELOOP", "EMFILE", "ENAMETOOLONG",
        "ENFILE", "ENODEV", "ENOENT", "ENOMEM", "ENOSPC", "ENXIO", "EPERM", "EROFS", "ESTALE",
        "ETIMEDOUT", "EXDEV",
    )
)  # fmt: skip

OF_AN_ENGINE: tuple[Exception, ...] = (
    ArithmeticError("division by zero"),
    AssertionError(),
    AttributeError("no such thing"),
    BufferError(),
    EOFError(),
    IndexError("list index out of range"),
    KeyError("a"),
    LookupError(),
    MemoryError(),
    NotImplementedError(),
    OSError(errno.EIO, "EIO"),
    OverflowError(),
    RecursionError(),
    RuntimeError("a tensor of the wrong shape"),
    TypeError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ValueError(),
    ZeroDivisionError(),
    GrammarError("no token is allowed"),
)


@dataclass
class Served:
    """A gateway behind a proxy with something of everything in it."""

    gateway: RunningGateway
    proxy: FaultProxy
    headers: dict[str, str]
    stream_id: str
    file_id: str

    async def ask(self, method: str, path: str, **body: Any) -> str:
        """The code of the answer, or ``ok``."""
        path = path.format(stream=self.stream_id, file=self.file_id)
        answer = await self.gateway.client.request(method, path, headers=self.headers, **body)
        return code_of(answer.status_code, answer.text, answer.json)


def code_of(status: int, text: str, parsed: Callable[[], Any]) -> str:
    if status < 400:
        return "ok"
    told = parsed()
    code = told["error"]["code"] if isinstance(told["error"], dict) else told["code"]
    assert code.upper() in KINDS, text
    return code.upper()


@pytest.fixture
async def served(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(gateway.admission, "PATIENCE_S", 0.0)
    worker = await stand.worker()
    async with fault_proxy(stand.redis_url) as proxy, worker.acting(saying("a")):
        running = await stand.gateway(redis_url=proxy.url, key_pepper=PEPPER)
        headers = bearer(await make_key(stand.broker, "a", scopes=("generate", "batch", "metrics")))
        made = await running.client.post("/v1/completions", json=PROMPT, headers=headers)
        form = {"file": ("a", b"a"), "purpose": (None, "batch")}
        kept = await running.client.post("/v1/files", files=form, headers=headers)
        yield Served(
            running, proxy, headers, made.headers["x-headrace-stream-id"], kept.json()["id"]
        )


Call = tuple[str, str, dict[str, Any]]
FORM = {"file": ("a", b"a"), "purpose": (None, "batch")}
CALLS_OF_REDIS: dict[bytes, Call] = {
    b"_admit": ("POST", "/v1/completions", {"json": PROMPT}),
    b"_admit\r\n": ("POST", "/v1/chat/completions", {"json": CHAT}),
    b"admit\r\n": ("POST", "/generate", {"json": NATIVE}),
    b"admit": ("POST", "/generate_stream", {"json": NATIVE}),
    b"_attach": ("GET", "/v1/streams/{stream}", {}),
    b"_cancel": ("DELETE", "/v1/streams/{stream}", {}),
    b":files": ("GET", "/v1/files", {}),
    b":file": ("GET", "/v1/files/{file}", {}),
    b"file": ("POST", "/v1/files", {"files": FORM}),
    b"batch": ("GET", "/v1/batches", {}),
    b"batch:": ("GET", "/v1/batches/batch_0123456789abcdef0123456789abcdef", {}),
    b"_state": ("GET", "/metrics", {}),
}
"""What is asked, by a part of the commands that are then refused."""


async def test_whatever_redis_says_has_a_code(served: Served) -> None:
    codes: Counter[str] = Counter()
    for error in OF_REDIS:
        for needle, (method, path, body) in CALLS_OF_REDIS.items():
            rule = served.proxy.refuse(needle, error, times=10**6)
            code = await served.ask(method, path, **body)
            rule.release()
            assert code != "INTERNAL", f"{method} {path}: {error}"
            codes[code] += rule.hit.is_set()
    assert codes.total() >= 200, "most were never asked of Redis"
    assert await served.ask("POST", "/v1/completions", json=PROMPT) == "ok"


async def test_whatever_a_disk_says_has_a_code(served: Served) -> None:
    upload: Call = ("POST", "/v1/files", {"files": FORM})
    download: Call = ("GET", "/v1/files/{file}/content", {})
    places: list[tuple[object, str, Call]] = [
        (local._Draft, "open", upload),
        (local._Draft, "write", upload),
        (local._Draft, "sync", upload),
        (local.LocalStorage, "_publish", upload),
        (local.LocalStorage, "_open", download),
    ]
    codes: Counter[str] = Counter()
    for number in OF_A_DISK:
        for owner, name, (method, path, body) in places:
            error = OSError(number, os.strerror(number), "a file")
            with patch.object(owner, name, side_effect=error) as call:
                code = await served.ask(method, path, **body)
            assert code != "INTERNAL", f"{method} {path}: {error}"
            codes[code] += call.called
    assert codes.total() == len(OF_A_DISK) * len(places)
    assert codes["STORAGE_FULL"]
    assert await served.ask(*download[:2]) == "ok"


class _Runner:
    """Computes nothing: each step raises, or gives every sequence the same token."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def run(self, chunks: list[Any]) -> list[Any]:
        if self._error is not None:
            raise self._error
        return [[type("Choice", (), {"token": 65, "logprob": -0.1})()] for _ in chunks]


@pytest.mark.parametrize("place", ["__init__", "append"])
def test_whatever_goes_wrong_in_an_engine_has_a_code(simulated_data_dir: Any, place: str) -> None:
    """At its beginning and at a token; a device without memory is told apart."""
    tokenizer = Tokenizer.load(simulated(simulated_data_dir).path)
    for error in OF_AN_ENGINE:
        engine = engine_around(_Runner(), tokenizer)
        with patch.object(Sequence, place, side_effect=error):
            engine.submit(request("a", [1, 2, 3]))
            outputs = [output for _ in range(2) for output in engine.step()]
        [finish] = [output.finish for output in outputs if output.finish]
        assert finish.code in ("ENGINE_ERROR", "GRAMMAR_REJECTED"), error
        assert finish.code in KINDS
    engine = engine_around(_Runner(DeviceMemoryError()), tokenizer)
    engine.submit(request("a", [1, 2, 3]))
    assert [output.finish.code for output in engine.step() if output.finish] == ["CUDA_OOM"]
