"""Request bodies: reading, decoding, and the checks that every API shares.

Unknown fields are ignored. A parameter that is known but not supported yet is refused by name
unless its value changes nothing: it is never ignored in silence.
"""

import re
import secrets
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from common.failures import Failure
from gateway.errors import MalformedJson

Body = TypeVar("Body")

MAX_STOP_CHARACTERS = 1000
MAX_TEMPERATURE = 100.0
"""Beyond any use: at 100 every distribution is flat."""
MAX_REPETITION_PENALTY = 100.0
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_NEW_TOKENS = 2**32 - 1

_AT = re.compile(r" - at `\$\.?([^`]*)`$")


async def read_body(request: Request, decoder: "msgspec.json.Decoder[Body]") -> Body:
    """The decoded body.

    Raises: Failure UNSUPPORTED_MEDIA_TYPE, BODY_TOO_LARGE, BAD_REQUEST with the field's path.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Failure(
            "UNSUPPORTED_MEDIA_TYPE", "Expected request with `Content-Type: application/json`"
        )
    try:
        return decoder.decode(await request.body())
    except msgspec.ValidationError as error:
        at = _AT.search(str(error))
        raise Failure(
            "BAD_REQUEST",
            f"Failed to deserialize the JSON body into the target type: {error}",
            field=at.group(1) if at else None,
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedJson(
            "BAD_REQUEST", f"Failed to parse the request body as JSON: {error}"
        ) from error
    except ClientDisconnect as error:
        raise Failure("BAD_REQUEST", "The body was not sent completely.") from error


def refuse_unsupported(body: object, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Refuse parameters that would change the answer and are not supported.

    ``neutral`` maps each to the values that change nothing, beside null.

    Raises: Failure UNSUPPORTED_PARAMETER.
    """
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and not any(_is_same(value, other) for other in values):
            raise unsupported(name)


def _is_same(value: object, other: object) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def unsupported(name: str, why: str = "is not supported by this server yet") -> Failure:
    return Failure("UNSUPPORTED_PARAMETER", f"`{name}` {why}", field=name)


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raises: Failure BAD_REQUEST when ``value`` is given and outside ``[low, high]``."""
    if value is not None and not low <= value <= high:
        raise Failure("BAD_REQUEST", f"`{name}` must be between {low:g} and {high:g}", field=name)


def check_stops(name: str, stops: Iterable[str]) -> None:
    """Raises: Failure BAD_REQUEST for an empty or an over-long stop sequence."""
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise Failure(
            "BAD_REQUEST",
            f"a sequence in `{name}` must have 1 to {MAX_STOP_CHARACTERS} characters",
            field=name,
        )


def draw_seed() -> int:
    return secrets.randbits(64)
