"""What OpenAI's two generating routes share: parameters, their checks, and the order they become.

Temperature 0 is greedy, everything else samples (default 1.0). Beside OpenAI's own, ``top_k``,
``repetition_penalty`` and ``ignore_eos`` are taken, as vLLM does.
"""

from typing import Any

import msgspec

from common.failures import Failure
from common.messages import Lane, Sampling
from gateway.bodies import (
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TOP_K,
    check_range,
    check_stops,
    draw_seed,
    refuse_unsupported,
    unsupported,
)
from gateway.order import INCLUDE_USAGE, SHOW_TIER, Api, Order
from gateway.services import ServedModel, Services

TIERS: dict[str, Lane] = {
    "auto": "default",
    "default": "default",
    "flex": "flex",
    "priority": "priority",
}
"""OpenAI's ``service_tier`` and the lane it means."""


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class OpenAiBody(msgspec.Struct, kw_only=True):
    """Every field may be null. ``model`` may be any name: there is one model here."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    # Known, and supported only with a value that changes nothing:
    best_of: Any = None
    frequency_penalty: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    min_p: Any = None
    n: Any = None
    presence_penalty: Any = None
    typical_p: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "guided_json": (),
    "guided_regex": (),
    "logit_bias": ({}, []),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "typical_p": (1,),
}
"""Values that change nothing, beside null, of the parameters that both routes know."""


def check_supported(body: OpenAiBody, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Refuse what both routes or this one, ``neutral``, do not support yet.

    Raises: Failure UNSUPPORTED_PARAMETER.
    """
    refuse_unsupported(body, NEUTRAL | neutral)
    lane_of(body.service_tier)


def order(
    services: Services,
    body: OpenAiBody,
    api: Api,
    prompt: list[int],
    *,
    max_tokens: int | None,
    num_prompt_characters: int = 0,
) -> Order:
    """Raises: Failure BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED_PARAMETER."""
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return Order(
        api=api,
        prompt=prompt,
        sampling=_sampling(services, body, len(prompt), max_tokens),
        stream=bool(body.stream),
        flags=INCLUDE_USAGE * include_usage | SHOW_TIER * (body.service_tier is not None),
        num_prompt_characters=num_prompt_characters,
        lane=lane_of(body.service_tier),
    )


def lane_of(service_tier: str | None) -> Lane:
    """Raises: Failure UNSUPPORTED_PARAMETER."""
    if service_tier is None:
        return "default"
    if service_tier not in TIERS:
        raise unsupported("service_tier", f"must be one of {', '.join(TIERS)}")
    return TIERS[service_tier]


def _sampling(
    services: Services, body: OpenAiBody, num_prompt_tokens: int, max_tokens: int | None
) -> Sampling:
    check_range("temperature", body.temperature, 0.0, 2.0)
    check_range("top_p", body.top_p, 0.0, 1.0)
    check_range("top_k", body.top_k, 0, MAX_TOP_K)
    check_range("max_tokens", max_tokens, 1, MAX_NEW_TOKENS)
    check_range("seed", body.seed, -(2**63), MAX_SEED)
    penalty = body.repetition_penalty
    if penalty is not None and not 0 < penalty <= MAX_REPETITION_PENALTY:
        raise Failure(
            "BAD_REQUEST",
            f"`repetition_penalty` must be above 0 and at most {MAX_REPETITION_PENALTY:g}",
            field="repetition_penalty",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_stops("stop", stops)
    max_stops = services.settings.max_stop_sequences
    if len(stops) > max_stops:
        raise Failure(
            "BAD_REQUEST",
            f"`stop` supports up to {max_stops} stop sequences. Given: {len(stops)}",
            field="stop",
        )
    is_greedy = body.temperature == 0 or body.top_p == 0
    return Sampling(
        max_new_tokens=_room(services.model, num_prompt_tokens, max_tokens),
        seed=draw_seed() if body.seed is None else body.seed & MAX_SEED,
        do_sample=not is_greedy,
        temperature=1.0 if is_greedy or body.temperature is None else body.temperature,
        top_p=1.0 if is_greedy or body.top_p is None else body.top_p,
        top_k=0 if is_greedy else body.top_k or 0,
        repetition_penalty=penalty or 1.0,
        stop=tuple(stops),
        keep_stop=False,
        ignore_eos=bool(body.ignore_eos),
    )


def _room(model: ServedModel, num_prompt_tokens: int, max_tokens: int | None) -> int:
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
