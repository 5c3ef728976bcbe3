"""Whether an answer and the log say of a failure what its row in ``common.failures`` promises."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from common.failures import KINDS, Failure
from gateway.errors import status_of
from tests.support.processes import ROOT

FINAL_EVENTS = ("gateway.rejected", "request.finished", "request.failed")
"""One of them tells how a request ended."""
_OPENAI_WORDS = {
    "AUTH_MISSING": "invalid_api_key",
    "AUTH_INVALID": "invalid_api_key",
    "AUTH_EXPIRED": "invalid_api_key",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUOTA_EXHAUSTED": "insufficient_quota",
}

Lines = Iterable[Mapping[str, Any]]


def check_row(code: str, answer: httpx.Response, lines: Lines) -> None:
    """Status, body, headers for retries, and the gateway's one final line."""
    told = answer.json()
    openai = isinstance(told["error"], dict)
    kind = KINDS[code]
    if openai:
        assert told["error"]["code"] == _OPENAI_WORDS.get(code, code.lower()), answer.text
        assert told["error"]["type"] == kind.openai_type
    else:
        assert told["code"] == code, answer.text
    assert told["error_type"] == kind.tgi_type
    assert answer.status_code == status_of(Failure(code), "openai" if openai else "tgi")
    assert answer.headers["x-should-retry"] == ("true" if kind.retryable else "false")
    wait_ms = answer.headers.get("retry-after-ms")
    assert (wait_ms is not None) == kind.retryable
    if wait_ms is not None:
        assert int(answer.headers["retry-after"]) == math.ceil(int(wait_ms) / 1000) > 0
    assert answer.headers["x-request-id"]
    ends = [line for line in lines if line["event"] in FINAL_EVENTS and line["code"] == code]
    assert {line.get("status", 500) for line in ends} == {answer.status_code}


def check_worker_line(code: str, lines: Lines) -> None:
    """The worker's one line of its attempt, with who can act."""
    [line] = [line for line in lines if line["event"] == "worker.failed"]
    kind = KINDS[code]
    assert (line["code"], line["retryable"], line["actor"]) == (code, kind.retryable, kind.actor)


def check_witnesses(witnesses: Mapping[str, str]) -> None:
    """Each names a test, as ``path::name`` below ``tests``, that there is."""
    for witness in witnesses.values():
        path, _, name = witness.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(), witness
