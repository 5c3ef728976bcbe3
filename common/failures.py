"""Every failure code in one table, and the one exception that carries a code.

A code is a promise: it is never renamed, and what a caller may do about it stands in its row. The
tree splits at the root by who can act: the caller, the capacity of the system, or the server.
"""

from dataclasses import dataclass
from enum import StrEnum


class Actor(StrEnum):
    """Who can act on a failure."""

    CALLER = "caller"
    TENANT = "tenant_admin"
    OPERATOR = "operator"
    DEVELOPER = "developer"
    AUTOMATIC = "automatic"


@dataclass(frozen=True, slots=True)
class FailureKind:
    """One row of the table.

    ``status`` is the HTTP status before the first byte; afterwards the failure is an event in the
    stream. ``openai_type`` and ``tgi_type`` are what the two wire formats call it.
    """

    code: str
    status: int
    openai_type: str
    tgi_type: str
    retryable: bool
    actor: Actor
    meaning: str


def _kind(
    code: str,
    status: int,
    openai_type: str,
    tgi_type: str,
    retryable: bool,
    actor: Actor,
    meaning: str,
) -> FailureKind:
    return FailureKind(code, status, openai_type, tgi_type, retryable, actor, meaning)


_INVALID = "invalid_request_error"
_SERVER = "server_error"
_RATE = "rate_limit_error"
_PERMISSION = "permission_error"

KINDS: dict[str, FailureKind] = {
    kind.code: kind
    for kind in (
        _kind(
            "BAD_REQUEST",
            400,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "A field of the request is invalid.",
        ),
        _kind(
            "UNSUPPORTED_PARAMETER",
            400,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "A parameter that Headrace does not support yet.",
        ),
        _kind(
            "GRAMMAR_REJECTED",
            400,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The grammar is invalid, unsupported, or takes too much work.",
        ),
        _kind(
            "BODY_TOO_LARGE",
            413,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The body is larger than the limit.",
        ),
        _kind(
            "BODY_TIMEOUT",
            408,
            _INVALID,
            "validation",
            True,
            Actor.CALLER,
            "The body of the request did not come in time.",
        ),
        _kind(
            "HEADER_TOO_LARGE",
            431,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "Address and headers of the request are longer, or more, than the limit.",
        ),
        _kind(
            "UNSUPPORTED_MEDIA_TYPE",
            415,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The body is not application/json.",
        ),
        _kind(
            "CONTEXT_LENGTH_EXCEEDED",
            400,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "Prompt and new tokens together are longer than the model or any worker allows.",
        ),
        _kind(
            "TEMPLATE_ERROR",
            400,
            _INVALID,
            "template_error",
            False,
            Actor.CALLER,
            "The chat template rejected the messages.",
        ),
        _kind(
            "NOT_FOUND",
            404,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "No such path, stream or object.",
        ),
        _kind(
            "METHOD_NOT_ALLOWED",
            405,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The path exists, but not with this method.",
        ),
        _kind(
            "MODEL_NOT_FOUND",
            404,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "No such model here.",
        ),
        _kind(
            "ADAPTER_NOT_FOUND",
            404,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "No such adapter of this model here.",
        ),
        _kind(
            "ADAPTER_LOAD_FAILED",
            503,
            _SERVER,
            "generation",
            False,
            Actor.OPERATOR,
            "The adapter is damaged, of an unsupported kind, or not for this model.",
        ),
        _kind(
            "AUTH_MISSING",
            401,
            _INVALID,
            "authentication",
            False,
            Actor.CALLER,
            "No API key was sent: Authorization: Bearer sk-headrace-...",
        ),
        _kind(
            "AUTH_INVALID",
            401,
            _INVALID,
            "authentication",
            False,
            Actor.CALLER,
            "The API key is not known, or was revoked.",
        ),
        _kind(
            "AUTH_EXPIRED",
            401,
            _INVALID,
            "authentication",
            False,
            Actor.CALLER,
            "The API key has expired.",
        ),
        _kind(
            "SCOPE_DENIED",
            403,
            _PERMISSION,
            "permission",
            False,
            Actor.TENANT,
            "The API key has no scope for this.",
        ),
        _kind(
            "HOST_NOT_ALLOWED",
            403,
            _PERMISSION,
            "permission",
            False,
            Actor.CALLER,
            "Without keys a gateway on loopback answers to names of this machine only.",
        ),
        _kind(
            "MODEL_NOT_ALLOWED",
            403,
            _PERMISSION,
            "permission",
            False,
            Actor.TENANT,
            "The API key is not for this model.",
        ),
        _kind(
            "RATE_LIMITED",
            429,
            _RATE,
            "overloaded",
            True,
            Actor.CALLER,
            "A limit of the API key is reached for now.",
        ),
        _kind(
            "QUOTA_EXHAUSTED",
            429,
            "insufficient_quota",
            "overloaded",
            False,
            Actor.TENANT,
            "The request needs more than the API key may ever use at once.",
        ),
        _kind(
            "ACCESS_MISCONFIGURED",
            503,
            _SERVER,
            "overloaded",
            False,
            Actor.OPERATOR,
            "API keys can not be checked, or are missing where they must be.",
        ),
        _kind(
            "IDEMPOTENCY_CONFLICT",
            422,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The same idempotency key came with another body.",
        ),
        _kind(
            "STREAM_EXPIRED",
            410,
            _INVALID,
            "incomplete_generation",
            False,
            Actor.CALLER,
            "The stream is no longer kept; send the request again.",
        ),
        _kind(
            "STREAM_DIVERGED",
            409,
            _SERVER,
            "incomplete_generation",
            False,
            Actor.AUTOMATIC,
            "The log was lost with its worker and the new attempt differs from what was shown.",
        ),
        _kind(
            "BATCH_ENDED",
            409,
            _INVALID,
            "validation",
            False,
            Actor.CALLER,
            "The batch has ended, or is about to.",
        ),
        _kind(
            "QUEUE_FULL",
            429,
            _RATE,
            "overloaded",
            True,
            Actor.AUTOMATIC,
            "More work waits than can be done in time.",
        ),
        _kind(
            "NO_WORKERS",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "No worker for this model is alive.",
        ),
        _kind(
            "QUEUE_TIMEOUT",
            504,
            _SERVER,
            "overloaded",
            True,
            Actor.AUTOMATIC,
            "The request waited longer than its limit and never started.",
        ),
        _kind(
            "GENERATION_TIMEOUT",
            504,
            _SERVER,
            "incomplete_generation",
            False,
            Actor.OPERATOR,
            "The generation ran longer than its limit; what it made is kept.",
        ),
        _kind(
            "POISON_REQUEST",
            500,
            _SERVER,
            "generation",
            False,
            Actor.DEVELOPER,
            "Workers died while they ran this request; it is quarantined.",
        ),
        _kind(
            "MODEL_VERSION_GONE",
            503,
            _SERVER,
            "incomplete_generation",
            False,
            Actor.OPERATOR,
            "Tokens were shown and no worker of that model version is left.",
        ),
        _kind(
            "PROTOCOL_TOO_NEW",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "State in Redis was written by a newer protocol than this process knows.",
        ),
        _kind(
            "NAN_LOGITS",
            500,
            _SERVER,
            "generation",
            False,
            Actor.DEVELOPER,
            "The model produced numbers that are not finite.",
        ),
        _kind(
            "CUDA_OOM",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "The device has no memory for this generation, even without others beside it.",
        ),
        _kind(
            "ENGINE_ERROR",
            500,
            _SERVER,
            "generation",
            True,
            Actor.DEVELOPER,
            "The engine failed on this generation.",
        ),
        _kind(
            "MODEL_LOAD_FAILED",
            503,
            _SERVER,
            "overloaded",
            False,
            Actor.OPERATOR,
            "The model could not be loaded.",
        ),
        _kind(
            "WEIGHTS_MISMATCH",
            503,
            _SERVER,
            "overloaded",
            False,
            Actor.OPERATOR,
            "A file of the model differs from its manifest.",
        ),
        _kind(
            "UNSAFE_FORMAT",
            503,
            _SERVER,
            "overloaded",
            False,
            Actor.OPERATOR,
            "The model holds pickle weights or remote code and is refused.",
        ),
        _kind(
            "TOKENIZER_MISMATCH",
            500,
            _SERVER,
            "generation",
            False,
            Actor.OPERATOR,
            "Gateway and worker use different tokenizers.",
        ),
        _kind(
            "BROKER_UNAVAILABLE",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "Redis cannot be reached.",
        ),
        _kind(
            "BROKER_FULL",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "Redis is over its memory limit.",
        ),
        _kind(
            "STORAGE_UNAVAILABLE",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.OPERATOR,
            "The storage of files cannot be reached.",
        ),
        _kind(
            "STORAGE_FULL",
            507,
            _SERVER,
            "overloaded",
            False,
            Actor.OPERATOR,
            "The storage of files has no room left.",
        ),
        _kind(
            "DRAINING",
            503,
            _SERVER,
            "overloaded",
            True,
            Actor.AUTOMATIC,
            "This process is stopping; another one will answer.",
        ),
        _kind(
            "INTERNAL",
            500,
            _SERVER,
            "generation",
            True,
            Actor.DEVELOPER,
            "An error that no other code describes.",
        ),
    )
}


def is_callers_fault(code: str) -> bool:
    """Whether only who asked, or the one who gave him his key, can act on it."""
    kind = KINDS.get(code)
    return kind is not None and kind.actor in (Actor.CALLER, Actor.TENANT)


class Failure(Exception):
    """A failure with a code from :data:`KINDS`; the borders turn it into an answer or a final event.

    ``field`` names the offending field of the request, ``retry_after_ms`` is a measured wait.
    """

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        field: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        self.kind = KINDS[code]
        self.code = code
        self.message = message or self.kind.meaning
        self.field = field
        self.retry_after_ms = retry_after_ms
        super().__init__(f"{code}: {self.message}")
