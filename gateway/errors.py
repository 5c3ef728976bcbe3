"""Failures on the wire: the two envelopes, the status codes, and the headers that SDKs obey.

Before the first byte a failure is a real status code; afterwards it is an event in the stream. On
``/v1`` codes are written in lower case, as OpenAI writes its own (``context_length_exceeded``).
"""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from starlette.responses import Response

from common.broker import LimitReached, QuotaState
from common.failures import Failure

Wire = Literal["tgi", "openai"]

_DEFAULT_RETRY_MS = 1000
_OPENAI_CODES = {
    "AUTH_MISSING": "invalid_api_key",
    "AUTH_INVALID": "invalid_api_key",
    "AUTH_EXPIRED": "invalid_api_key",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUOTA_EXHAUSTED": "insufficient_quota",
}
"""Where OpenAI has a code of its own; else ours in lower case."""


class MalformedJson(Failure):
    """What is no JSON at all: 400 on every route, where TGI says 422 to JSON of a wrong shape."""


def wire_of(path: str) -> Wire:
    return "openai" if path.startswith("/v1/") else "tgi"


def status_of(failure: Failure, wire: Wire) -> int:
    """TGI says 422 to what is invalid and 424 to what broke in the engine."""
    kind = failure.kind
    if wire == "tgi" and kind.status == 400 and not isinstance(failure, MalformedJson):
        return 422
    if wire == "tgi" and kind.tgi_type == "generation" and failure.code != "INTERNAL":
        return 424
    return kind.status


def envelope(failure: Failure, wire: Wire) -> dict[str, Any]:
    """The JSON of an error, as body and as event.

    On ``/v1`` it carries TGI's ``error_type`` too: huggingface_hub chooses its exception by it.
    """
    kind = failure.kind
    if wire == "tgi":
        return {"error": failure.message, "error_type": kind.tgi_type, "code": failure.code}
    return {
        "error": {
            "message": failure.message,
            "type": kind.openai_type,
            "param": failure.field,
            "code": _OPENAI_CODES.get(failure.code, failure.code.lower()),
            "http_status_code": kind.status,
        },
        "error_type": kind.tgi_type,
    }


def retry_headers(failure: Failure) -> dict[str, str]:
    """``x-should-retry`` outranks the status in SDKs; the wait is measured where one is known."""
    headers = {"x-should-retry": "true" if failure.kind.retryable else "false"}
    if failure.kind.retryable:
        wait_ms = failure.retry_after_ms or _DEFAULT_RETRY_MS
        headers["retry-after-ms"] = str(wait_ms)
        headers["retry-after"] = str(math.ceil(wait_ms / 1000))
    return headers


def rate_limit_headers(quota: QuotaState | None) -> dict[str, str]:
    """OpenAI's ``x-ratelimit-*``, for the limits per minute that there are."""
    if quota is None:
        return {}
    headers: dict[str, str] = {}
    for name, limit, left, full_in_ms in (
        ("requests", quota.limits.requests_per_minute, quota.requests, quota.requests_full_in_ms),
        ("tokens", quota.limits.tokens_per_minute, quota.tokens, quota.tokens_full_in_ms),
    ):
        if limit:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(left)
            headers[f"x-ratelimit-reset-{name}"] = go_duration(full_in_ms)
    return headers


def go_duration(ms: int) -> str:
    """As Go writes it, and so OpenAI: ``120ms``, ``1.5s``, ``6m0s``."""
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest_ms / 1000:g}s"


def failure_response(
    failure: Failure,
    wire: Wire,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    headers = {**retry_headers(failure), **(headers or {})}
    if isinstance(failure, LimitReached):
        headers |= rate_limit_headers(failure.quota)
    if failure.kind.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if failure.code in ("DRAINING", "BODY_TIMEOUT"):
        headers["connection"] = "close"  # to find another gateway; and not to wait for the rest
    return Response(
        json.dumps(envelope(failure, wire)),
        status_code=status or status_of(failure, wire),
        headers=headers,
        media_type="application/json",
    )
