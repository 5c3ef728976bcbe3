"""Batch jobs: what is known of one, the states it goes through, and how it is shown.

A record holds no line and no answer: those lie in storage, under :func:`folder`. Steps from one
state to the next are methods that return the record changed, or None where the step does not apply
any more, so that each can be tried again by whoever steers::

    validating ──▶ in_progress ──▶ finalizing ──▶ completed
        │               └──────────────┴────────▶ expired      at the end of its window
        ├──▶ failed     validating, in_progress ──▶ cancelling ──▶ cancelled

Times are in seconds since 1970, as OpenAI shows them.
"""

import hashlib
import secrets
from typing import Any, Literal, get_args

import msgspec

from common.files import LIFE_S
from common.keys import PUBLIC_TENANT

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)
"""Where a line may be sent to: OpenAI's for text, and TGI's."""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
FINAL: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
"""No step leads on from these."""

MAX_LINES = 50_000
MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_ERRORS = 100
"""Of a file that is refused; whoever has more mends these first."""
WINDOW_S = 24 * 3600
"""``completion_window``: what is not finished by then expires."""

_PREFIX = "batch_"
_FIELDS_OF_TIME = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of the lines that were answered."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens - other.input_tokens,
            self.cached_tokens - other.cached_tokens,
            self.output_tokens - other.output_tokens,
        )

    def shown(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


NO_USAGE = Usage()


class BatchError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a file was refused. ``line`` counts from 1; None: the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    def shown(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("code", "message", "param", "line")}


class Counts(msgspec.Struct, frozen=True, omit_defaults=True):
    """``completed`` lines have an answer, ``failed`` ones stand in the error file."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def finished(self) -> int:
        return self.completed + self.failed


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A batch as it is stored."""

    id: str
    tenant: str = PUBLIC_TENANT
    pool: str
    """Name of the model whose workers run it."""
    endpoint: Endpoint
    input_file_id: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    created_at: int
    expires_at: int
    in_progress_at: int = 0
    finalizing_at: int = 0
    completed_at: int = 0
    failed_at: int = 0
    expired_at: int = 0
    cancelling_at: int = 0
    cancelled_at: int = 0
    is_late: bool = False
    """Its time was over before all lines were finished."""
    model: str | None = None
    """As the lines name it."""
    models: tuple[str, ...] = ()
    """Names of models and adapters that the key of its creator may ask for; none: all."""
    errors: tuple[BatchError, ...] = ()
    counts: Counts = Counts()
    usage: Usage = Usage()
    num_parts: int = 0
    """Parts of results whose lines are counted here."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_life_s: int = LIFE_S
    """How long the files of results live."""
    fingerprint: str = ""
    """Of what was asked for, where an idempotency key was sent."""

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    # Steps ---------------------------------------------------------------------------------------

    def refused(self, errors: list[BatchError], now_s: int) -> "BatchRecord | None":
        """Its file can not be run."""
        if self.status != "validating":
            return None
        kept = tuple(errors[:MAX_ERRORS])
        return _changed(self, status="failed", failed_at=now_s, errors=kept)

    def begun(self, total: int, model: str | None, now_s: int) -> "BatchRecord | None":
        """Its file is valid: lines are run."""
        if self.status != "validating":
            return None
        counts = Counts(total)
        return _changed(
            self, status="in_progress", in_progress_at=now_s, counts=counts, model=model
        )

    def counted(self, num_parts: int, counts: Counts, usage: Usage) -> "BatchRecord | None":
        """More lines are finished; who is late with it changes nothing."""
        if self.is_final or num_parts <= self.num_parts:
            return None
        return _changed(self, num_parts=num_parts, counts=counts, usage=usage)

    def cancelling(self, now_s: int) -> "BatchRecord | None":
        if self.status not in ("validating", "in_progress"):
            return None
        return _changed(self, status="cancelling", cancelling_at=now_s)

    def finalizing(self, now_s: int, *, is_late: bool = False) -> "BatchRecord | None":
        """Every line is finished; or its time is over, and then the others expire."""
        if self.status != "in_progress":
            return None
        return _changed(self, status="finalizing", finalizing_at=now_s, is_late=is_late)

    def ended(
        self,
        output_file_id: str | None,
        error_file_id: str | None,
        now_s: int,
        error: BatchError | None = None,
    ) -> "BatchRecord | None":
        """Its files are written; ``error`` kept lines out of them that have no answer."""
        if self.status not in ("cancelling", "finalizing"):
            return None
        files = {"output_file_id": output_file_id, "error_file_id": error_file_id}
        if error is not None:
            return _changed(self, status="failed", failed_at=now_s, errors=(error,), **files)
        if self.status == "cancelling":
            return _changed(self, status="cancelled", cancelled_at=now_s, **files)
        if self.is_late:
            return _changed(self, status="expired", expired_at=now_s, **files)
        return _changed(self, status="completed", completed_at=now_s, **files)

    # ---------------------------------------------------------------------------------------------

    def shown(self) -> dict[str, Any]:
        """As OpenAI's API shows a batch."""
        times = {name: getattr(self, name) or None for name in _FIELDS_OF_TIME}
        errors = [error.shown() for error in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            **times,
            "request_counts": {
                "total": self.counts.total,
                "completed": self.counts.completed,
                "failed": self.counts.failed,
            },
            "usage": self.usage.shown(),
            "metadata": self.metadata,
        }


def _changed(record: BatchRecord, **fields: Any) -> BatchRecord:
    return msgspec.structs.replace(record, **fields)


# Names -------------------------------------------------------------------------------------------


def new_batch_id() -> str:
    """128 random bits behind OpenAI's prefix."""
    return _PREFIX + secrets.token_hex(16)


def folder(batch_id: str) -> str:
    """Where in storage all lies that belongs to a batch, but for its files."""
    return f"batches/{batch_id}/"


def index_name(batch_id: str) -> str:
    """Of the list of its lines that validation leaves behind."""
    return f"{folder(batch_id)}index"


def parts_prefix(batch_id: str) -> str:
    return f"{folder(batch_id)}parts/"


def part_name(batch_id: str, number: int) -> str:
    """Of the ``number``-th part of its results, from 1; names sort as numbers do."""
    return f"{parts_prefix(batch_id)}{number:08d}"


def result_file_id(batch_id: str, kind: Literal["output", "error"]) -> str:
    """The same for whoever writes the file, however often."""
    return "file-" + hashlib.sha256(f"{batch_id} {kind}".encode()).hexdigest()[:32]


def request_id(batch_id: str, line: int, prompt: int = 0) -> str:
    """The request that runs a line, or one more of the prompts in it: the same for whoever
    steers, so that a line that waits or runs already is found instead of run twice.
    """
    first = f"{batch_id.removeprefix(_PREFIX)}-{line}"
    return f"{first}-{prompt}" if prompt else first
