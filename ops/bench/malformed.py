"""Malformed requests: real ones, broken in many ways by a seed, over every route.

Starts Headrace with the simulated engine and sends them over plain sockets, because an HTTP library
would mend some. A run passes when every request was answered (or its connection closed for what is
no HTTP at all), no answer was an undocumented 5xx, no process died, the gateway never held up its
own event loop for 100 ms, and a plain question is answered at the end. Same seed, same requests.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import httptools

from common.failures import KINDS
from ops import runfile
from ops.bench.instance import own_instance
from ops.bench.metrics import buckets_in, metrics_at
from ops.probe import http_status

_ANSWER_S = 30.0
_MAX_TOTAL_TOKENS = 64
_MAX_GROWN = 50_000
_MAX_NESTED = 100
"""The generator's own parser takes no more than 1000 levels."""
_STALL_S = 0.1
"""What no event loop may be held up for."""

_CHAT = {"role": "user", "content": "hi"}
BODIES: dict[str, Any] = {
    "/generate": {
        "inputs": "hi",
        "parameters": {
            "max_new_tokens": 4, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "stop": ["x"],
            "seed": 1, "details": True, "grammar": {"type": "regex", "value": "a+"},
            "logit_bias": {"65": 1.5}, "stop_token_ids": [66], "best_of": 1, "truncate": 5,
        },
    },
    "/generate_stream": {"inputs": "hi", "parameters": {"max_new_tokens": 4}},
    "/": {"inputs": "hi", "stream": False, "parameters": {"max_new_tokens": 4}},
    "/tokenize": {"inputs": "hé <|im_end|>"},
    "/chat_tokenize": {"messages": [_CHAT]},
    "/invocations": {"inputs": "hi", "parameters": {"max_new_tokens": 4}},
    "/vertex": {"instances": [{"inputs": "hi", "parameters": {"max_new_tokens": 4}}]},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "be brief"}, _CHAT],
        "max_tokens": 4, "temperature": 0.5, "stream": True, "n": 1, "logprobs": True,
        "top_logprobs": 2, "stop": ["x"], "logit_bias": {"65": 1}, "seed": 3,
        "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
        "service_tier": "auto",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none",
    },
    "/v1/completions": {
        "prompt": ["hi", "you"], "max_tokens": 4, "echo": True, "logprobs": 1, "n": 1,
        "stop": "x", "best_of": 1,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "max_output_tokens": 4, "instructions": "be brief", "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}}, "store": True, "background": False,
    },
    "/v1/responses/input_tokens": {"input": "hi", "instructions": "be brief"},
    "/v1/batches": {
        "input_file_id": "file-0123456789abcdef0123456789abcdef", "completion_window": "24h",
        "endpoint": "/v1/chat/completions", "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
    },
}  # fmt: skip
"""A valid body for each route that takes one."""
PATHS = (
    "/v1/streams/0123456789abcdef0123456789abcdef", "/v1/responses/resp_0", "/v1/models/x",
    "/v1/files/file-0123456789abcdef0123456789abcdef", "/v1/files", "/v1/batches",
    "/v1/batches/batch_0123456789abcdef0123456789abcdef", "/v1/models", "/info", "/health",
    "/ready", "/ping", "/openapi.json", "/nowhere", "/ui/",
)  # fmt: skip
FILES = "/v1/files"
FORM = (
    b'--edge\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--edge\r\ncontent-disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600\r\n'
    b'--edge\r\ncontent-disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at\r\n'
    b'--edge\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    b"content-type: application/jsonl\r\n\r\n{}\n\r\n--edge--\r\n"
)
"""A valid body for ``POST /v1/files``, the one route that takes a form."""
_HEADERS = (
    "x-headrace-disconnect", "last-event-id", "idempotency-key", "x-request-id", "authorization",
    "accept", "content-encoding", "x-stream-retention-seconds", "range", "cookie", "expect",
)  # fmt: skip
_TEXTS = (
    "", "\0", "\u2028\x85", "a" * 5000, "<|im_start|>system\n", "{{ 7*7 }}", "../../etc/passwd",
    "'; FLUSHALL", "\U0001f600" * 50, "\ufeff", "-1", "NaN", "[" * 200, "(a+)+$", "%s%n", "٣",
)  # fmt: skip
_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, -1e308, 5e-324, 0.5, 17, 257)


@dataclass(frozen=True, slots=True)
class Sent:
    """The bytes of one request; ``is_http``: an answer must come."""

    data: bytes
    is_http: bool = True


class Breaker:
    """Makes requests, each of them wrong in some way (or right, once in a while)."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def request(self) -> Sent:
        rng = self._rng
        if rng.random() < 0.03:
            return self._http("POST", FILES, self._form(), "multipart/form-data; boundary=edge")
        path = rng.choice(list(BODIES)) if rng.random() < 0.85 else rng.choice(PATHS)
        method = "POST" if path in BODIES else rng.choice(("GET", "DELETE"))
        if rng.random() < 0.03:
            method = rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
        if rng.random() < 0.05:
            path += rng.choice(("/", "?", "?after=1-0", "/x", "%00", "//", "?stream=true", "%ff"))
        body = self._body(path) if method in ("POST", "PUT", "PATCH") else b""
        return self._http(method, path, body)

    def _form(self) -> bytes:
        form = FORM
        for _ in range(self._rng.choice((0, 1, 1, 2, 5))):
            form = self._garbled(form)
        return form

    def _http(
        self, method: str, path: str, body: bytes, content_type: str = "application/json"
    ) -> Sent:
        rng = self._rng
        headers = {"host": "localhost", "content-type": content_type}
        if rng.random() < 0.05:
            kinds = ("text/plain", "", "multipart/form-data; boundary=x", "application/json;;")
            headers["content-type"] = rng.choice(kinds)
        if rng.random() < 0.1:
            text = rng.choice(_TEXTS).encode("ascii", "ignore").decode()
            headers[rng.choice(_HEADERS)] = "".join(filter(str.isprintable, text))
        if rng.random() < 0.01:
            headers |= {f"x-{index}": "a" * 200 for index in range(rng.choice((60, 120)))}
        length = len(body)
        headers["content-length"] = str(length)
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(
            f"{k}: {v}\r\n" for k, v in headers.items()
        )
        data = head.encode("latin-1") + b"\r\n" + body
        if rng.random() < 0.01:
            return Sent(self._garbled(data), is_http=False)
        return Sent(data)

    def _body(self, path: str) -> bytes:
        rng = self._rng
        value = json.loads(json.dumps(BODIES.get(path, {"inputs": "hi"})))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
            value = self._broken(value)
            text = json.dumps(value)
            if len(text) > _MAX_GROWN or text.count("[[") > _MAX_NESTED:
                break  # each change may make it a hundred times as long, or 400 levels deeper
        if rng.random() < 0.02:
            value = {"x": value, **(value if isinstance(value, dict) else {})}
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5, allow_nan=True)
        raw = data.encode("utf-8", "surrogatepass")
        return self._garbled(raw) if rng.random() < 0.12 else raw

    def _broken(self, value: Any) -> Any:
        """``value`` with something changed at a random place in it."""
        rng = self._rng
        if isinstance(value, dict | list) and value and rng.random() < 0.75:
            key: Any = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            choice = rng.random()
            if choice < 0.15:
                del value[key]
            elif choice < 0.25 and isinstance(value, dict):
                value[rng.choice(_TEXTS)] = value[key]
            elif choice < 0.35 and isinstance(value, list) and len(value) < 50:
                value *= rng.choice((0, 2, 40))
            else:
                value[key] = self._broken(value[key])
            return value
        return self._other(value)

    def _other(self, value: Any) -> Any:
        rng = self._rng
        makers: tuple[Callable[[], Any], ...] = (
            lambda: rng.choice(_NUMBERS),
            lambda: rng.choice(_TEXTS),
            lambda: rng.choice((None, True, False, [], {}, [[]], [{}], float("nan"))),
            lambda: [value] * rng.choice((1, 3, 100)),
            lambda: {"type": rng.choice((value, *_TEXTS, 7)), "value": value},
            lambda: self._deep(value, rng.choice((3, 31, 33, 2000))),
            lambda: "a" * rng.choice((1000, 70_000)),
            lambda: "\ud800",
        )
        return rng.choice(makers)()

    def _deep(self, value: Any, depth: int) -> Any:
        return json.loads("[" * min(depth, 400) + json.dumps(value) + "]" * min(depth, 400))

    def _garbled(self, data: bytes) -> bytes:
        """Bytes cut, flipped, doubled or put in."""
        rng = self._rng
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + rng.randbytes(rng.choice((1, 4, 30))) + data[at:]
            case 2:
                return data[:at] + data[at + rng.choice((1, 5)) :]
            case 3:
                return data + data[at:]
            case _:
                return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


@dataclass
class Outcome:
    """What came of all requests."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    codes: Counter[str] = field(default_factory=Counter[str])
    closed: int = 0
    """Connections closed without an answer to what was no HTTP."""
    problems: list[str] = field(default_factory=list[str])

    @property
    def has_passed(self) -> bool:
        return not self.problems


class _Answer:
    """Callbacks of httptools."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_whole = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_whole = True


async def send_all(host: str, port: int, seed: int, count: int, clients: int = 8) -> Outcome:
    """Send ``count`` requests over ``clients`` connections at a time."""
    outcome = Outcome()
    shares = [count // clients + (index < count % clients) for index in range(clients)]
    await asyncio.gather(
        *(
            _client(host, port, Breaker(seed * 1000 + index), share, outcome)
            for index, share in enumerate(shares)
        )
    )
    return outcome


async def _client(host: str, port: int, breaker: Breaker, count: int, outcome: Outcome) -> None:
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    for _ in range(count):
        sent = breaker.request()
        if connection is None or connection[1].is_closing():
            connection = await asyncio.open_connection(host, port)
        is_open = await _ask(connection, sent, outcome)
        if not is_open:
            connection[1].close()
            connection = None
    if connection is not None:
        connection[1].close()


async def _ask(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], sent: Sent, outcome: Outcome
) -> bool:
    """Whether the connection can be used again."""
    reader, writer = connection
    answer = _Answer()
    parser = httptools.HttpResponseParser(answer)
    try:
        writer.write(sent.data)
        if not sent.is_http:
            writer.write_eof()  # it may look like the beginning of something longer
        async with asyncio.timeout(_ANSWER_S):
            while not answer.is_whole and (data := await reader.read(65_536)):
                parser.feed_data(data)
                if sent.data.startswith(b"HEAD ") and parser.get_status_code():
                    break
    except TimeoutError:
        return _note_closed(sent, outcome, "no answer")
    except (OSError, httptools.HttpParserError) as error:
        return _note_closed(sent, outcome, repr(error))
    if not parser.get_status_code():
        return _note_closed(sent, outcome, "closed without an answer")
    _note(sent, parser.get_status_code(), bytes(answer.body), outcome)
    return sent.is_http and answer.is_whole and parser.should_keep_alive()


def _note_closed(sent: Sent, outcome: Outcome, why: str) -> bool:
    if sent.is_http:
        outcome.problems.append(f"{why}: {sent.data[:2000]!r}")
    else:
        outcome.closed += 1
    return False


def _note(sent: Sent, status: int, body: bytes, outcome: Outcome) -> None:
    outcome.statuses[status] += 1
    if status < 500:
        return
    code = _code_of(body)
    outcome.codes[code] += 1
    if code not in KINDS or code == "INTERNAL":
        outcome.problems.append(f"{status} {body[:300]!r} to {sent.data[:2000]!r}")


def _code_of(body: bytes) -> str:
    try:
        told = json.loads(body)
        return str(told.get("code") or told["error"]["code"]).upper()
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


# The command -------------------------------------------------------------------------------------


@click.command()
@click.option("--requests", "count", default=100_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--clients", default=8, show_default=True)
def main(count: int, seed: int, clients: int) -> None:
    """Send malformed requests to a Headrace of their own; exits with 1 when one did harm."""
    sys.exit(_run(count, seed, clients))


def _run(count: int, seed: int, clients: int) -> int:
    options = ("--engine", "simulated", "--payload-limit", "2000000")
    env = {
        "HEADRACE_MAX_TOTAL_TOKENS": str(_MAX_TOTAL_TOKENS),
        "HEADRACE_SIMULATED_FIRST_TOKEN_MS": "0",
        "HEADRACE_SIMULATED_INTER_TOKEN_MS": "0",
    }
    with own_instance(*options, env=env) as (folder, addresses):
        port = urlsplit(addresses[0]).port or 0
        before = _pids(folder)
        began = time.monotonic()
        outcome = asyncio.run(send_all("127.0.0.1", port, seed, count, clients))
        took_s = time.monotonic() - began
        if _pids(folder) != before:
            outcome.problems.append(f"processes were {before}, are {_pids(folder)}")
        if asyncio.run(http_status("127.0.0.1", port, "/ready")) != 200:
            outcome.problems.append("not ready afterwards")
        text = metrics_at(port)
    lag = looks_in(text, "headrace_event_loop_lag_seconds")
    held = looks_in(text, "headrace_event_loop_held_seconds")
    if held.num_stalls:
        outcome.problems.append(f"the gateway held up its own event loop: {held}")
    statuses = ", ".join(f"{status}: {n}" for status, n in sorted(outcome.statuses.items()))
    codes = ", ".join(f"{code}: {n}" for code, n in sorted(outcome.codes.items())) or "none"
    click.echo(f"requests   {count} in {took_s:.1f} s, seed {seed}")
    click.echo(f"answers    {statuses}; {outcome.closed} closed for what was no HTTP")
    click.echo(f"5xx        {codes}")
    click.echo(f"lag        {lag}")
    click.echo(f"held up    {held}: without what the machine gave to others")
    for problem in outcome.problems[:20]:
        click.echo(f"problem    {problem}")
    return 0 if outcome.has_passed else 1


def _pids(folder: Path) -> dict[str, tuple[int, int]]:
    state = runfile.read_state(folder)
    return {one.name: (one.pid, one.restarts) for one in state.processes} if state else {}


@dataclass(frozen=True, slots=True)
class Looks:
    """How late the event loop was in all of a gateway's looks, by one of its histograms."""

    count: int
    num_stalls: int
    """Those above ``_STALL_S``."""
    longest_s: float
    """An upper bound: the edge of a bucket."""

    def __str__(self) -> str:
        return (
            f"{self.count} looks, {self.num_stalls} above {_STALL_S:g} s, "
            f"none above {self.longest_s:g} s"
        )


def looks_in(text: str, name: str) -> Looks:
    """What the histogram ``name`` says in Prometheus' text format."""
    buckets = buckets_in(text, name)
    total = buckets[float("inf")]
    return Looks(
        count=int(total),
        num_stalls=int(total - buckets[_STALL_S]),
        longest_s=min(bound for bound, seen in buckets.items() if seen == total),
    )
