"""W3C trace context: which trace a request belongs to, and the names of what is done for it.

Every line of the log carries these ids, whether or not spans are exported, so that logs can be
joined with the caller's traces. https://www.w3.org/TR/trace-context-2/
"""

import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_AMAZON_ROOT = re.compile(r"(?:^|;)\s*Root=1-([0-9a-f]{8})-([0-9a-f]{24})(?:;|$)")
"""The trace id of AWS X-Ray, whose two parts are one of W3C's: "Tracing header" of its guide."""
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_SAMPLED = 1


class Trace(NamedTuple):
    """A place in a trace: ``span_id`` names what is being done, as 16 hex digits."""

    trace_id: str
    """32 hex digits."""
    span_id: str
    is_sampled: bool = True

    @property
    def parent(self) -> str:
        """As the header ``traceparent`` of what this one causes."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"

    def child(self) -> "Trace":
        """What is done within this."""
        return Trace(self.trace_id, secrets.token_hex(8), self.is_sampled)

    def names(self) -> dict[str, str]:
        """As they stand in a log line."""
        return {"trace_id": self.trace_id, "span_id": self.span_id}


def new_trace() -> Trace:
    return Trace(secrets.token_hex(16), secrets.token_hex(8))


def parse_parent(text: str) -> Trace | None:
    """A ``traceparent``; None for one that must be ignored, by section 3.2.2 of the document."""
    found = _PARENT.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    is_known = version == "00" and more is None
    is_newer = version not in ("00", "ff")
    if not (is_known or is_newer) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Trace(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def trace_of(parents: Sequence[str], amazon: str = "") -> tuple[Trace, Trace | None]:
    """What a server does for a request, and what it is part of, if the caller said so.

    ``parents`` are the values of all its headers ``traceparent``: of several none holds. ``amazon``
    is ``X-Amzn-Trace-Id``, which names a trace where there is no ``traceparent``.
    """
    parent = parse_parent(parents[0].strip()) if len(parents) == 1 else None
    if parent is not None:
        return parent.child(), parent
    root = _AMAZON_ROOT.search(amazon)
    if root is not None and root[1] + root[2] != _NO_TRACE:
        return Trace(root[1] + root[2], secrets.token_hex(8)), None
    return new_trace(), None
