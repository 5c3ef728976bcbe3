"""What happens to every request and answer, as pure ASGI: ids, headers, limits, last resort."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.clock import monotonic_s
from common.failures import Failure
from common.ids import new_request_id
from common.logs import get_logger
from common.spans import Kind, Spans
from common.tracing import Trace, trace_of
from gateway.errors import failure_response, wire_of

log = get_logger()

MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 100

_SMALL_BYTES = 64 * 1024
"""Of a body; in numbers such bodies are bounded by the connections that a gateway takes."""

_UPLOADS = "/v1/files"
"""There a body is a file, which may be large, and may take its time."""

_SANE_ID = re.compile(r"[\x21-\x7e]{1,200}")
"""What a client may name its request: visible ASCII, so it fits a header and a log line."""

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class RequestContext:
    """Outermost: names the request, stamps the answer, turns what nobody caught into INTERNAL.

    The answer's ``x-request-id`` is the client's own (``x-request-id``, else ``X-Amzn-Trace-Id``,
    as huggingface_hub sends it), else ours. Its ``traceresponse`` names the trace, which is the
    caller's if there was a valid ``traceparent``.
    """

    def __init__(
        self, app: ASGIApp, *, model_version: str, spans: Callable[[], Spans | None] = lambda: None
    ) -> None:
        self._app = app
        self._model_version = model_version
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["headrace.arrived_at"] = monotonic_s()
        headers = Headers(scope=scope)
        scope["headrace.request_id"] = own_id = new_request_id()
        told_id = client_request_id(headers) or own_id
        trace, parent = trace_of(headers.getlist("traceparent"), headers.get("x-amzn-trace-id", ""))
        scope["headrace.trace"], scope["headrace.parent"] = trace, parent
        spans = self._spans()
        scope["headrace.span"] = span = {} if spans else None
        has_started = False

        async def stamped(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if span is not None:
                    span["http.response.status_code"] = message["status"]
                self._stamp(MutableHeaders(scope=message), told_id, trace)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=own_id, **trace.names()):
            try:
                await self._app(scope, receive, stamped)
            except Exception as error:
                log.exception("request.failed", path=scope["path"], code="INTERNAL")
                if has_started:
                    raise  # the server closes the connection: the client sees a cut, not an end
                failure = Failure("INTERNAL", f"{type(error).__name__} in the gateway")
                await failure_response(failure, wire_of(scope["path"]))(scope, receive, stamped)
            finally:
                if spans and span and "gen_ai.operation.name" in span:
                    _tell_span(spans, scope, span)

    def _stamp(self, headers: MutableHeaders, request_id: str, trace: Trace) -> None:
        headers["x-request-id"] = request_id
        headers["traceresponse"] = trace.parent
        headers.setdefault("x-model-version", self._model_version)
        headers.setdefault("cache-control", "no-cache")
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        if headers.get("content-type", "").startswith("text/html"):
            headers["content-security-policy"] = _PAGE_POLICY


def _tell_span(spans: Spans, scope: Scope, span: dict[str, Any]) -> None:
    """Of a request for a generation, whose answer has ended."""
    error = span.pop("error.type", "")
    spans.tell(
        f"{scope['method']} {scope['path']}",
        Kind.SERVER,
        scope["headrace.trace"],
        parent=scope["headrace.parent"],
        began_s=time.time() - (monotonic_s() - scope["headrace.arrived_at"]),
        attributes={"http.request.method": scope["method"], "url.path": scope["path"], **span},
        error=error,
    )


def span_of(request: Request) -> dict[str, Any] | None:
    """Where attributes of its span are put; None: there are no spans."""
    return request.scope["headrace.span"]


class PlatformRoutes:
    """Paths that a hosting platform chose, and the routes of ours that they mean: to all that comes
    behind, they are those.
    """

    def __init__(self, app: ASGIApp, *, predict: str, health: str) -> None:
        self._app = app
        self._meant = {("POST", predict): "/vertex", ("GET", health): "/ping"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = self._meant.get((scope["method"], scope["path"]))
            if path is not None:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)


class HeadLimit:
    """Refuses requests whose address and headers are too long or too many, before all else."""

    def __init__(
        self, app: ASGIApp, *, refuse: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_long(scope):
            failure = Failure(
                "HEADER_TOO_LARGE",
                f"Address and headers may have at most {MAX_HEAD_BYTES} bytes, and headers may be "
                f"at most {MAX_HEADERS}.",
            )
            response = await self._refuse(Request(scope), failure)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_long(scope: Scope) -> bool:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    num_bytes = len(scope["path"]) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in headers)
    return len(headers) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES


class PayloadLimit:
    """Refuses bodies above ``max_bytes``, by their announced length or as they come, and those that
    are not there ``limit_s`` after their head. For files, which nobody collects in memory and whose
    pace is watched where they are read, it is ``max_upload_bytes`` and no such time.

    Of all the bodies whose requests are not answered yet, ``max_held_bytes`` may lie in memory;
    the first ``_SMALL_BYTES`` of each do not count, so large ones never crowd out small ones.

    What a client still sends once its answer has begun cannot be refused: then it counts as gone.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_bytes: int,
        max_held_bytes: int,
        max_upload_bytes: int,
        limit_s: float,
    ) -> None:
        self._app = app
        self._held = HeldBytes(max_held_bytes)
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].startswith(_UPLOADS)
        max_bytes = self._max_upload_bytes if is_upload else self._max_bytes
        body = _Body(receive, Headers(scope=scope), max_bytes)
        if not is_upload:
            body.due_s = scope["headrace.arrived_at"] + self._limit_s
            body.held = self._held
        has_answered = False

        async def limited() -> Message:
            if body.is_whole:
                return await receive()
            try:
                return await body.next()
            except Failure:
                if has_answered:
                    return {"type": "http.disconnect"}
                raise

        async def noted(message: Message) -> None:
            nonlocal has_answered
            if not has_answered:
                has_answered = True
                body.let_go()
            await send(message)

        try:
            await self._app(scope, limited, noted)
        finally:
            body.let_go()


class HeldBytes:
    """What the bodies of requests that are not answered yet take together, beyond small ones."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class _Body:
    """The body of one request, as it comes."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int) -> None:
        self.is_whole = False
        self.due_s: float | None = None
        self.held: HeldBytes | None = None
        """Where it counts, for as long as it is collected in memory."""
        self._num_held = 0
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        length = headers.get("content-length", "")
        self._is_announced_too_long = length.isdigit() and int(length) > max_bytes

    async def next(self) -> Message:
        """Raises: Failure BODY_TOO_LARGE, BODY_TIMEOUT, QUEUE_FULL."""
        if self._is_announced_too_long:
            raise too_large(self._max_bytes)
        left_s = None if self.due_s is None else max(0.0, self.due_s - monotonic_s())
        try:
            async with asyncio.timeout(left_s):
                message = await self._receive()
        except TimeoutError as error:
            raise Failure("BODY_TIMEOUT") from error
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise too_large(self._max_bytes)
        if self.held is not None:
            self._hold(self.held)
        self.is_whole = not message.get("more_body", False)
        return message

    def _hold(self, held: HeldBytes) -> None:
        more = max(0, self._num_bytes - _SMALL_BYTES) - self._num_held
        if more and held.num_bytes + more > held.max_bytes:
            raise Failure("QUEUE_FULL", "This gateway holds all the large requests that it may.")
        self._num_held += more
        held.num_bytes += more

    def let_go(self) -> None:
        """It counts no more: its request is answered, or over."""
        if self.held is not None:
            self.held.num_bytes -= self._num_held
            self.held, self._num_held = None, 0


def too_large(limit_bytes: int) -> Failure:
    return Failure(
        "BODY_TOO_LARGE",
        "Failed to buffer the request body: length limit exceeded: it may have at most "
        f"{limit_bytes} bytes",
    )


def arrival_of(request: Request) -> float:
    """When the request came, on the monotonic clock."""
    return request.scope["headrace.arrived_at"]


def request_id_of(request: Request) -> str:
    """What we call it: no two have the same, whatever their clients call them."""
    return request.scope["headrace.request_id"]


def own_trace(request: Request) -> Trace:
    """Where in which trace its answer stands."""
    return request.scope["headrace.trace"]


def client_request_id(headers: Headers) -> str:
    """What the client calls the request; empty: nothing that could be told back."""
    for name in ("x-request-id", "x-amzn-trace-id"):
        value = headers.get(name, "")
        if _SANE_ID.fullmatch(value):
            return value
    return ""
