"""Spans of what is done for requests, for a collector of OpenTelemetry: the extra ``otel``.

Their ids are those of the log (:mod:`common.tracing`), so that one leads to the other. Nothing here
is loaded unless an endpoint is set. Attributes never hold what a user wrote: no prompt, no answer.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from common import build
from common.redis_clock import RedisClock
from common.settings import Settings
from common.tracing import Trace

if TYPE_CHECKING:
    from opentelemetry.context import Context

Value = str | int | float | bool | Sequence[str]

_PATH = "/v1/traces"
_SEND_LIMIT_S = 5.0
_CLOSE_LIMIT_S = 2.0


class Kind(Enum):
    """What a span stands for, in OpenTelemetry's words."""

    INTERNAL = "internal"
    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Spans:
    """Sends spans in the background: a collector that is away or slow costs spans, never time.

    Times are put on Redis' clock as far as ``clock`` knows it, so that those of several hosts fit.
    """

    def __init__(self, settings: Settings, service: str, instance: str, clock: RedisClock) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        endpoint = settings.otlp_endpoint.rstrip("/")
        endpoint = endpoint if endpoint.endswith(_PATH) else endpoint + _PATH
        self._clock = clock
        self._ids = _given_ids()
        self._provider = TracerProvider(
            resource=Resource.create(
                {
                    "service.name": settings.otlp_service_name,
                    "service.namespace": service,
                    "service.instance.id": instance,
                    "service.version": build.version(),
                }
            ),
            id_generator=self._ids,
            span_limits=SpanLimits(max_attribute_length=256),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_LIMIT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headrace", build.version())

    def tell(
        self,
        name: str,
        kind: Kind,
        trace: Trace,
        *,
        parent: Trace | None,
        began_s: float,
        ended_s: float | None = None,
        attributes: Mapping[str, Value | None],
        link: Trace | None = None,
        error: str = "",
    ) -> None:
        """One span that has ended: ``trace`` is its own place. Times are in seconds since 1970 on
        this host's clock; it ended now unless ``ended_s`` says when.
        """
        if not trace.is_sampled:
            return
        from opentelemetry.trace import Link, SpanKind, Status, StatusCode

        self._ids.trace_id, self._ids.span_id = int(trace.trace_id, 16), int(trace.span_id, 16)
        told = {key: value for key, value in attributes.items() if value is not None}
        if error:
            told["error.type"] = error
        span = self._tracer.start_span(
            name,
            context=_within(parent),
            kind=SpanKind[kind.name],
            attributes=told,
            links=[Link(_context_of(link))] if link else [],
            start_time=self._nanoseconds(began_s),
        )
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(self._nanoseconds(time.time() if ended_s is None else ended_s))

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_LIMIT_S)

    def _nanoseconds(self, wall_s: float) -> int:
        return int((wall_s + (self._clock.offset_s or 0.0)) * 1e9)


def open_spans(settings: Settings, service: str, instance: str, clock: RedisClock) -> Spans | None:
    """None where no collector is named: then spans cost nothing."""
    return Spans(settings, service, instance, clock) if settings.otlp_endpoint else None


def _given_ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class GivenIds(IdGenerator):
        """Those that the log has already: set before each span."""

        trace_id = span_id = 0

        def generate_trace_id(self) -> int:
            return self.trace_id

        def generate_span_id(self) -> int:
            return self.span_id

    return GivenIds()


def _context_of(trace: Trace) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(
        int(trace.trace_id, 16),
        int(trace.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )


def _within(parent: Trace | None) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    if parent is None:
        return Context()
    return set_span_in_context(NonRecordingSpan(_context_of(parent)), Context())
