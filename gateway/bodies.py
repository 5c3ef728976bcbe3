"""Request bodies: reading, decoding, and the checks that every API shares.

Unknown fields are ignored. A parameter that is known but not supported yet is refused by name
unless its value changes nothing: it is never ignored in silence.
"""

import asyncio
import re
import secrets
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from common.failures import Failure
from gateway.errors import MalformedJson
from gateway.json_limits import MAX_ITEMS, check_json

Body = TypeVar("Body")

MAX_STOP_CHARACTERS = 1000
MAX_TEMPERATURE = 100.0
"""Beyond any use: at 100 every distribution is flat."""
MAX_REPETITION_PENALTY = 100.0
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_NEW_TOKENS = 2**32 - 1
MAX_PENALTY = 2.0
"""OpenAI's bound for frequency and presence penalties, and TGI's for its own, on both sides."""
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 64

_MAX_DIGITS = 15
"""Of a number written as text: more than any limit has, and exact as a float."""

_INLINE_BYTES = 256 * 1024
"""A body up to here is checked in 2 ms, which may block the event loop."""
_ID_DIGITS = 9
"""No vocabulary has ids of more digits."""
_AT = re.compile(r" - at `\$\.?([^`]*)`$")


async def read_body(
    request: Request, decoder: "msgspec.json.Decoder[Body]", max_items: int = MAX_ITEMS
) -> Body:
    """The decoded body.

    Raises: as :func:`read_json` and :func:`decoded`.
    """
    return decoded(await read_json(request, max_items), decoder)


async def read_json(request: Request, max_items: int = MAX_ITEMS) -> bytes:
    """The body as it came, said to be JSON and within the limits of :mod:`gateway.json_limits`.

    Raises: Failure UNSUPPORTED_MEDIA_TYPE, BODY_TOO_LARGE, BAD_REQUEST.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Failure(
            "UNSUPPORTED_MEDIA_TYPE", "Expected request with `Content-Type: application/json`"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Failure("UNSUPPORTED_MEDIA_TYPE", "A body must come without `Content-Encoding`")
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise Failure("BAD_REQUEST", "The body was not sent completely.") from error
    if len(body) <= _INLINE_BYTES:
        check_json(body, max_items)
    else:
        await asyncio.to_thread(check_json, body, max_items)
    return body


def max_prompt_items(max_total_tokens: int) -> int:
    """Limit of a list where it may be a prompt, token by token."""
    return max(MAX_ITEMS, max_total_tokens)


def decoded(body: bytes, decoder: "msgspec.json.Decoder[Body]") -> Body:
    """Raises: Failure BAD_REQUEST with the field's path; MalformedJson for what is no JSON."""
    try:
        return decoder.decode(body)
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
        message = f"`{name}` must be between {low:.15g} and {high:.15g}"
        raise Failure("BAD_REQUEST", message, field=name)


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


def number_in(name: str, text: str, low: int, high: int) -> int:
    """A number in a query or a form. Raises: Failure BAD_REQUEST, outside ``[low, high]`` too."""
    if not is_number(text):
        raise Failure("BAD_REQUEST", f"`{name}` must be a number", field=name)
    check_range(name, int(text), low, high)
    return int(text)


def check_above_0(name: str, value: float | None, high: float) -> None:
    """Raises: Failure BAD_REQUEST when ``value`` is given and outside ``]0, high]``."""
    if value is not None and not 0 < value <= high:
        message = f"`{name}` must be above 0 and at most {high:.15g}"
        raise Failure("BAD_REQUEST", message, field=name)


def check_stops(name: str, stops: Iterable[str]) -> None:
    """Raises: Failure BAD_REQUEST for an empty or an over-long stop sequence."""
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise Failure(
            "BAD_REQUEST",
            f"a sequence in `{name}` must have 1 to {MAX_STOP_CHARACTERS} characters",
            field=name,
        )


def check_stop_tokens(name: str, tokens: list[int], vocab_size: int) -> tuple[int, ...]:
    """Raises: Failure BAD_REQUEST for too many of them, or for one outside the vocabulary."""
    if len(tokens) > MAX_STOP_TOKENS:
        raise Failure("BAD_REQUEST", f"`{name}` takes up to {MAX_STOP_TOKENS} tokens", field=name)
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise _unknown_token(name, token, vocab_size)
    return tuple(tokens)


def logit_bias(name: str, biases: Any, vocab_size: int) -> dict[int, float]:
    """The biases by token; a client writes the ids as texts, and no biases as ``[]`` or null.

    Raises: Failure BAD_REQUEST, which names the token that is wrong.
    """
    if not biases and not isinstance(biases, (str, int, float)):
        return {}
    if not isinstance(biases, dict) or len(biases) > MAX_BIASED_TOKENS:
        raise Failure(
            "BAD_REQUEST",
            f"`{name}` must map up to {MAX_BIASED_TOKENS} token ids to biases",
            field=name,
        )
    return {
        _token_id(name, token, vocab_size): _bias(f"{name}.{token}", bias)
        for token, bias in biases.items()
    }


def _token_id(name: str, token: str, vocab_size: int) -> int:
    is_number = len(token) <= _ID_DIGITS and token.isascii() and token.isdigit()
    if not is_number or int(token) >= vocab_size:
        raise _unknown_token(name, token[:20], vocab_size)
    return int(token)


def _bias(field: str, bias: Any) -> float:
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not is_number or not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
        raise Failure(
            "BAD_REQUEST",
            f"`{field}` must be a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
            field=field,
        )
    return float(bias)


def _unknown_token(name: str, token: object, vocab_size: int) -> Failure:
    return Failure(
        "BAD_REQUEST",
        f"`{name}` names {token!r}, which is no token: ids go from 0 to {vocab_size - 1}",
        field=name,
    )


def draw_seed() -> int:
    return secrets.randbits(64)
