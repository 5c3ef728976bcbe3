"""Request bodies: reading, decoding, and the checks that every API shares.

Unknown fields are ignored. A parameter that is known but not supported yet is refused by name
unless its value changes nothing: it is never ignored in silence.
"""

import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from common.failures import Failure
from common.messages import Lane, Sampling
from gateway.errors import MalformedJson

if TYPE_CHECKING:
    from gateway.services import ServedModel

Body = TypeVar("Body")

MAX_STOP_CHARACTERS = 1000
MAX_TEMPERATURE = 100.0
"""Beyond any use: at 100 every distribution is flat."""
MAX_REPETITION_PENALTY = 100.0
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_NEW_TOKENS = 2**32 - 1

_AT = re.compile(r" - at `\$\.?([^`]*)`$")

TIERS: dict[str, Lane] = {
    "auto": "default",
    "default": "default",
    "flex": "flex",
    "priority": "priority",
}
"""OpenAI's ``service_tier`` and the lane it means."""


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


def openai_sampling(
    model: "ServedModel",
    num_prompt_tokens: int,
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: str | list[str] | None,
    max_stop_sequences: int,
) -> Sampling:
    """Sampling as OpenAI's parameters mean it: temperature 0 is greedy, everything else samples.

    Raises: Failure BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED.
    """
    check_range("temperature", temperature, 0.0, 2.0)
    check_range("top_p", top_p, 0.0, 1.0)
    check_range("top_k", top_k, 0, MAX_TOP_K)
    check_range("max_tokens", max_tokens, 1, MAX_NEW_TOKENS)
    check_range("seed", seed, -(2**63), MAX_SEED)
    if repetition_penalty is not None and not 0 < repetition_penalty <= MAX_REPETITION_PENALTY:
        raise Failure(
            "BAD_REQUEST",
            f"`repetition_penalty` must be above 0 and at most {MAX_REPETITION_PENALTY:g}",
            field="repetition_penalty",
        )
    stops = [stop] if isinstance(stop, str) else stop or []
    check_stops("stop", stops)
    if len(stops) > max_stop_sequences:
        raise Failure(
            "BAD_REQUEST",
            f"`stop` supports up to {max_stop_sequences} stop sequences. Given: {len(stops)}",
            field="stop",
        )
    is_greedy = temperature == 0 or top_p == 0
    return Sampling(
        max_new_tokens=_room(model, num_prompt_tokens, max_tokens),
        seed=draw_seed() if seed is None else seed & MAX_SEED,
        do_sample=not is_greedy,
        temperature=1.0 if is_greedy or temperature is None else temperature,
        top_p=1.0 if is_greedy or top_p is None else top_p,
        top_k=0 if is_greedy else top_k or 0,
        repetition_penalty=repetition_penalty or 1.0,
        stop=tuple(stops),
        keep_stop=False,
    )


def _room(model: "ServedModel", num_prompt_tokens: int, max_tokens: int | None) -> int:
    limit = model.max_total_tokens
    if num_prompt_tokens + (max_tokens or 1) > limit:
        wish = f" and asks for up to {max_tokens} more" if max_tokens else ""
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"This model's maximum context length is {limit} tokens; "
            f"the prompt has {num_prompt_tokens}{wish}.",
            field="messages",
        )
    return limit - num_prompt_tokens if max_tokens is None else max_tokens


def lane_of(service_tier: str | None) -> Lane:
    """Raises: Failure UNSUPPORTED_PARAMETER."""
    if service_tier is None:
        return "default"
    if service_tier not in TIERS:
        raise unsupported("service_tier", f"must be one of {', '.join(TIERS)}")
    return TIERS[service_tier]
