"""What OpenAI's two generating routes share: parameters, their checks, and the order they become.

Temperature 0 is greedy, everything else samples (default 1.0). Beside OpenAI's own, the parameters
that vLLM added are taken under its names: ``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``stop_token_ids``, ``ignore_eos``, and its ways to constrain an answer.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from common.broker import MAX_CHOICES
from common.failures import Failure
from common.messages import Grammar, Lane, Sampling
from common.settings import OrderSettings
from gateway.api.grammars import grammar_of
from gateway.api.tools import ToolUse
from gateway.bodies import (
    MAX_NEW_TOKENS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TOP_K,
    check_above_0,
    check_range,
    check_stop_tokens,
    check_stops,
    draw_seed,
    logit_bias,
    unsupported,
)
from gateway.order import INCLUDE_USAGE, SHOW_TIER, TOOLS, Api, Order
from gateway.services import Offer, ServedModel

TIERS: dict[str, Lane] = {
    "auto": "default",
    "default": "default",
    "flex": "flex",
    "priority": "priority",
}
"""OpenAI's ``service_tier`` and the lane it means."""


class StreamOptions(msgspec.Struct):
    """``include_obfuscation`` may be false: sizes of events are not hidden here, so nobody who
    relies on it is told that they are.
    """

    include_usage: bool = False
    include_obfuscation: bool | None = None


class OpenAiBody(msgspec.Struct, kw_only=True):
    """Every field may be null. ``model`` may be any name: there is one model here, beside adapters
    by their names.
    """

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Any = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    response_format: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    guided_choice: Any = None
    structured_outputs: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the two routes name in ways of their own."""

    max_tokens: int | None
    num_choices: int
    num_best: int = 0
    flags: int = 0
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    tools: ToolUse | None = None


def order(
    offer: Offer,
    body: OpenAiBody,
    api: Api,
    prompt: list[int],
    wanted: Wanted,
    *,
    prompt_text: str = "",
    num_prompt_characters: int = 0,
) -> Order:
    """Raises: Failure BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED_PARAMETER."""
    options = body.stream_options or StreamOptions()
    if options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation")
    return Order(
        api=api,
        prompt=prompt,
        sampling=_sampling(offer, body, len(prompt), wanted),
        stream=bool(body.stream),
        flags=wanted.flags
        | INCLUDE_USAGE * options.include_usage
        | SHOW_TIER * (body.service_tier is not None)
        | TOOLS * (wanted.tools is not None),
        prompt_text=prompt_text,
        num_prompt_characters=num_prompt_characters,
        lane=lane_of(body.service_tier),
        adapter=_adapter(offer.model, body.model),
        num_choices=wanted.num_choices,
        num_best=wanted.num_best,
    )


def num_choices(name: str, value: int | None) -> int:
    """``n`` or ``best_of``. Raises: Failure BAD_REQUEST."""
    check_range(name, value, 1, MAX_CHOICES)
    return 1 if value is None else value


def _adapter(model: ServedModel, name: str | None) -> str:
    """The adapter that the request calls its model; any other name means the model alone."""
    if not name:
        return ""
    try:
        return model.adapters.resolve(name).version
    except Failure:
        return ""


def lane_of(service_tier: str | None) -> Lane:
    """Raises: Failure UNSUPPORTED_PARAMETER."""
    if service_tier is None:
        return "default"
    if service_tier not in TIERS:
        raise unsupported("service_tier", f"must be one of {', '.join(TIERS)}")
    return TIERS[service_tier]


def _sampling(offer: Offer, body: OpenAiBody, num_prompt_tokens: int, wanted: Wanted) -> Sampling:
    _check_ranges(body)
    vocab_size = offer.model.tokenizer.vocab_size
    max_new_tokens = _room(offer, num_prompt_tokens, wanted.max_tokens)
    if body.min_tokens is not None and body.min_tokens > max_new_tokens:
        raise Failure(
            "BAD_REQUEST",
            f"`min_tokens` must be at most the {max_new_tokens} tokens that may be made",
            field="min_tokens",
        )
    is_greedy = body.temperature == 0 or body.top_p == 0
    warpers: dict[str, Any] = {} if is_greedy else _warpers(body)
    return Sampling(
        max_new_tokens=max_new_tokens,
        seed=draw_seed() if body.seed is None else body.seed & MAX_SEED,
        do_sample=not is_greedy,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=logit_bias("logit_bias", body.logit_bias, vocab_size),
        grammar=_grammar(body, offer.settings, wanted.tools),
        stop=_stops(body.stop, offer.settings.max_stop_sequences),
        stop_token_ids=check_stop_tokens("stop_token_ids", body.stop_token_ids or [], vocab_size),
        keep_stop=False,
        ignore_eos=bool(body.ignore_eos),
        min_new_tokens=body.min_tokens or 0,
        top_logprobs=wanted.top_logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        **warpers,
    )


def _warpers(body: OpenAiBody) -> dict[str, Any]:
    """What shapes the distribution that is sampled from; -1 is vLLM's word for no top_k."""
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),
        "min_p": body.min_p or 0.0,
        "typical_p": body.typical_p or 1.0,
    }


def _check_ranges(body: OpenAiBody) -> None:
    check_range("temperature", body.temperature, 0.0, 2.0)
    check_range("top_p", body.top_p, 0.0, 1.0)
    check_range("top_k", body.top_k, -1, MAX_TOP_K)
    check_range("min_p", body.min_p, 0.0, 1.0)
    check_above_0("typical_p", body.typical_p, 1.0)
    check_range("frequency_penalty", body.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_range("presence_penalty", body.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_above_0("repetition_penalty", body.repetition_penalty, MAX_REPETITION_PENALTY)
    check_range("min_tokens", body.min_tokens, 0, MAX_NEW_TOKENS)
    check_range("seed", body.seed, -(2**63), MAX_SEED)


def _stops(stop: str | list[str] | None, limit: int) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    check_stops("stop", stops)
    if len(stops) > limit:
        raise Failure(
            "BAD_REQUEST",
            f"`stop` supports up to {limit} stop sequences. Given: {len(stops)}",
            field="stop",
        )
    return tuple(stops)


def _grammar(body: OpenAiBody, settings: OrderSettings, tools: ToolUse | None) -> Grammar | None:
    guided = {
        name: getattr(body, name)
        for name in (
            "guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs",
        )
    }  # fmt: skip
    grammar = grammar_of(body.response_format, guided)
    if grammar is not None and settings.disable_grammar_support:
        raise unsupported("response_format", "and other grammars are switched off on this server")
    if tools is None:
        return grammar
    if settings.disable_grammar_support:
        raise unsupported("tools", "and other grammars are switched off on this server")
    return tools.grammar(grammar)


def _room(offer: Offer, num_prompt_tokens: int, max_tokens: int | None) -> int:
    limit = offer.model.max_total_tokens
    if num_prompt_tokens > offer.max_input_tokens:
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"A prompt may have at most {offer.max_input_tokens} of the {limit} tokens of this "
            f"model's maximum context length; this one has {num_prompt_tokens}.",
            field="messages",
        )
    if num_prompt_tokens + (1 if max_tokens is None else max_tokens) > limit:
        wish = f" and asks for up to {max_tokens} more" if max_tokens else ""
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"This model's maximum context length is {limit} tokens; "
            f"the prompt has {num_prompt_tokens}{wish}.",
            field="messages",
        )
    return limit - num_prompt_tokens if max_tokens is None else max_tokens
