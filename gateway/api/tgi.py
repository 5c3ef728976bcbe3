"""TGI's own routes: to generate, to tokenize, and what this server is (``/info``).

Field names, null rules, the order of the validation rules and their messages are
those of TGI 3.3. Where we differ on purpose: refusals are real status codes before the stream
begins, ``max_new_tokens`` is exact, a stop sequence may end inside a token, and an unknown adapter
is refused. Beside TGI's own, the parameters are taken that its users asked for and did not get.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from common.messages import Grammar, Sampling, Watermark
from common.settings import OrderSettings
from gateway.answer import answer, turn_away_early
from gateway.api import chat
from gateway.api.grammars import tgi_grammar
from gateway.api.shapes import TextToken
from gateway.bodies import (
    MAX_NEW_TOKENS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    check_range,
    check_stop_tokens,
    check_stops,
    draw_seed,
    logit_bias,
    read_body,
)
from gateway.order import AS_LIST, DETAILS, FULL_TEXT, PREFILL, Order
from gateway.services import Offer, ServedModel, services_of


class Parameters(msgspec.Struct):
    """Null is allowed where TGI's field is optional, and nowhere else."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    adapter_id: str | None = None
    # What TGI lacks:
    min_p: float | None = None
    presence_penalty: float | None = None
    logit_bias: Any = None
    min_new_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None


class GenerateBody(msgspec.Struct):
    """Without ``parameters`` TGI samples; with an empty object it does not."""

    inputs: str
    parameters: Parameters = msgspec.field(default_factory=lambda: Parameters(do_sample=True))
    stream: bool = False


decoder = msgspec.json.Decoder(GenerateBody)


async def generate(request: Request) -> Response:
    body = await read_body(request, decoder)
    await turn_away_early(request)
    return await answer(request, await order_of(services_of(request), body, stream=False))


async def generate_stream(request: Request) -> Response:
    body = await read_body(request, decoder)
    await turn_away_early(request)
    return await answer(request, await order_of(services_of(request), body, stream=True))


async def generate_compatibly(request: Request) -> Response:
    """``POST /``: as the inference API of the Hugging Face hub; the answer is a list."""
    return await answer_compatibly(request, await read_body(request, decoder))


async def answer_compatibly(request: Request, body: GenerateBody) -> Response:
    await turn_away_early(request)
    if body.parameters.return_full_text is None:
        body.parameters.return_full_text = True
    order = await order_of(services_of(request), body, stream=body.stream, flags=AS_LIST)
    return await answer(request, order)


async def tokenize(request: Request) -> Response:
    """The tokens of ``inputs``; with ``truncate`` the last ones. Other parameters say nothing."""
    body = await read_body(request, decoder)
    tokens = await services_of(request).model.tokenizer.encode_with_offsets_async(body.inputs)
    truncate = body.parameters.truncate
    if truncate is not None:
        check_range("truncate", truncate, 1, MAX_NEW_TOKENS)
        tokens = tokens[-truncate:]
    return _json(await _listed(tokens))


async def chat_tokenize(request: Request) -> Response:
    """The prompt that a conversation becomes, as text and as tokens."""
    body = await read_body(request, chat.decoder)
    model = services_of(request).model
    text = await chat.templated(services_of(request), body)
    tokens = await model.tokenizer.encode_with_offsets_async(text, add_special_tokens=False)
    listed, templated = await _listed(tokens), msgspec.json.encode(text)
    return _json(b'{"tokenize_response":%b,"templated_text":%b}' % (listed, templated))


_TOKENS_AT_ONCE = 4096
"""So many are written in 2 ms, which may block the event loop."""


async def _listed(tokens: list[tuple[int, str, int, int]]) -> bytes:
    """Tokens as a JSON list; those of a long text are written in a thread, piece by piece."""

    def write(first: int) -> bytes:
        part = tokens[first : first + _TOKENS_AT_ONCE]
        return msgspec.json.encode([TextToken(*token) for token in part])[1:-1]

    if len(tokens) <= _TOKENS_AT_ONCE:
        return b"[%b]" % write(0)
    starts = range(0, len(tokens), _TOKENS_AT_ONCE)
    return b"[%b]" % await asyncio.to_thread(lambda: b",".join(map(write, starts)))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def info(request: Request) -> Response:
    services = services_of(request)
    model, settings = services.model, services.settings
    return JSONResponse(
        {
            "model_id": model.name,
            "model_sha": model.version.rpartition("@")[2] or None,
            "model_pipeline_tag": "text-generation",
            "model_version": model.version,
            "model_dtype": model.dtype,
            "max_concurrent_requests": settings.max_concurrent_requests
            or settings.lane_cap_tokens // model.max_total_tokens,
            "max_best_of": settings.max_best_of,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_tokens": services.max_input_tokens,
            "max_total_tokens": model.max_total_tokens,
            "validation_workers": 1,
            "max_top_n_tokens": settings.max_top_n_tokens,
            "max_client_batch_size": settings.max_client_batch_size,
            "router": "headrace",
            "version": services.version,
            "sha": None,
            "docker_label": None,
        }
    )


async def order_of(offer: Offer, body: GenerateBody, *, stream: bool, flags: int = 0) -> Order:
    """Raises: Failure, for the first of TGI's rules that the body breaks."""
    p, model = body.parameters, offer.model
    _check_parameters(p, offer.settings, stream=stream)
    if not body.inputs:
        raise _invalid("inputs", "cannot be empty")
    max_input = offer.max_input_tokens
    if p.truncate is not None and not 0 < p.truncate <= max_input:
        raise _invalid(
            "truncate", f"must be strictly positive and less than {max_input}. Given: {p.truncate}"
        )
    with _as_validation():
        prompt = await model.tokenizer.encode_async(body.inputs)
    if p.truncate is not None:
        prompt = prompt[-p.truncate :]
    max_new_tokens = _new_tokens(len(prompt), p.max_new_tokens, max_input, model.max_total_tokens)
    num_choices = p.best_of or 1
    with _as_validation():
        sampling = _sampling(offer, p, max_new_tokens)
        adapter = _adapter(model, p.adapter_id)
    return Order(
        api="tgi",
        prompt=prompt,
        sampling=sampling,
        stream=stream,
        flags=flags
        | DETAILS * (p.details or p.decoder_input_details)
        | PREFILL * p.decoder_input_details
        | FULL_TEXT * bool(p.return_full_text),
        prompt_text=body.inputs if p.return_full_text else "",
        num_prompt_characters=len(body.inputs),
        adapter=adapter,
        num_choices=num_choices,
        num_best=num_choices if num_choices > 1 else 0,
    )


def _check_parameters(p: Parameters, settings: OrderSettings, *, stream: bool) -> None:
    """TGI's rules in its order and words, then the bounds that its number types set."""
    if stream and p.best_of not in (None, 1):
        raise _invalid("best_of", "!= 1 is not supported when streaming tokens")
    if stream and p.decoder_input_details:
        raise _invalid("decoder_input_details", "== true is not supported when streaming tokens")
    if (p.best_of or 1) > 1:
        _check_best_of(p, settings.max_best_of)
    _check_choosing(p)
    _check_limits(p, settings)
    with _as_validation():
        _check_bounds(p)


def _check_choosing(p: Parameters) -> None:
    for name in ("temperature", "repetition_penalty"):
        value = getattr(p, name)
        if value is not None and value <= 0:
            raise _invalid(name, "must be strictly positive")
    if p.frequency_penalty is not None and not -2 <= p.frequency_penalty <= 2:
        raise _invalid("frequency_penalty", "must be >= -2.0 and <= 2.0")
    for name in ("top_p", "typical_p"):
        value = getattr(p, name)
        if value is not None and not 0 < value < 1:
            raise _invalid(name, "must be > 0.0 and < 1.0")
    for name in ("top_k", "max_new_tokens"):
        value = getattr(p, name)
        if value is not None and value <= 0:
            raise _invalid(name, "must be strictly positive")


def _check_limits(p: Parameters, settings: OrderSettings) -> None:
    max_stops = settings.max_stop_sequences
    if len(p.stop) > max_stops:
        raise _invalid("stop", f"supports up to {max_stops} stop sequences. Given: {len(p.stop)}")
    if p.seed is not None and (p.best_of or 1) > 1:
        raise _invalid("seed", "must not be set when `best_of` > 1")
    max_tops = settings.max_top_n_tokens
    if p.top_n_tokens is not None and not 0 <= p.top_n_tokens <= max_tops:
        raise _invalid("top_n_tokens", f"must be >= 0 and <= {max_tops}. Given: {p.top_n_tokens}")


def _check_best_of(p: Parameters, limit: int) -> None:
    if limit == 1:
        raise _invalid("best_of", "!= 1 is not allowed for this endpoint")
    if p.best_of is not None and p.best_of > limit:
        raise _invalid("best_of", f"must be > 0 and <= {limit}. Given: {p.best_of}")
    if not p.do_sample and {p.temperature, p.top_k, p.top_p, p.typical_p} == {None}:
        raise Failure(
            "BAD_REQUEST",
            "Input validation error: you must use sampling when `best_of` is > 1",
            field="best_of",
        )


def _check_bounds(p: Parameters) -> None:
    check_range("best_of", p.best_of, 0, MAX_NEW_TOKENS)
    check_range("temperature", p.temperature, 0, MAX_TEMPERATURE)
    check_range("repetition_penalty", p.repetition_penalty, 0, MAX_REPETITION_PENALTY)
    check_range("top_k", p.top_k, 1, MAX_TOP_K)
    check_range("max_new_tokens", p.max_new_tokens, 1, MAX_NEW_TOKENS)
    check_range("seed", p.seed, 0, MAX_SEED)
    check_range("min_p", p.min_p, 0, 1)
    check_range("presence_penalty", p.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_range("min_new_tokens", p.min_new_tokens, 0, p.max_new_tokens or MAX_NEW_TOKENS)
    check_stops("stop", p.stop)


def _new_tokens(num_prompt: int, wished: int | None, max_input: int, max_total: int) -> int:
    """Allowed new tokens: what was asked for, exactly, or all the room that is left."""
    room = max(0, max_total - num_prompt)
    num_new = room if wished is None else wished
    if num_prompt + num_new > max_total:
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {max_total}. "
            f"Given: {num_prompt} `inputs` tokens and {num_new} `max_new_tokens`",
            field="parameters.max_new_tokens",
        )
    if num_prompt > max_input:
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"Input validation error: `inputs` must have less than {max_input} tokens. "
            f"Given: {num_prompt}",
            field="inputs",
        )
    return num_new


def _sampling(offer: Offer, p: Parameters, max_new_tokens: int) -> Sampling:
    settings, vocab_size = offer.settings, offer.model.tokenizer.vocab_size
    watermark = Watermark(settings.watermark_gamma, settings.watermark_delta)
    return Sampling(
        max_new_tokens=max_new_tokens,
        seed=draw_seed() if p.seed is None else p.seed,
        do_sample=_is_sampling(p),
        temperature=p.temperature or 1.0,
        top_k=p.top_k or 0,
        top_p=p.top_p or 1.0,
        min_p=p.min_p or 0.0,
        typical_p=p.typical_p or 1.0,
        repetition_penalty=p.repetition_penalty or 1.0,
        relative_frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        logit_bias=logit_bias("logit_bias", p.logit_bias, vocab_size),
        watermark=watermark if p.watermark else None,
        grammar=_grammar(p.grammar, settings),
        stop=tuple(p.stop),
        stop_token_ids=check_stop_tokens("stop_token_ids", p.stop_token_ids or [], vocab_size),
        keep_stop=True,
        ignore_eos=bool(p.ignore_eos),
        min_new_tokens=min(p.min_new_tokens or 0, max_new_tokens),
        top_logprobs=p.top_n_tokens or 0,
        prompt_logprobs=p.decoder_input_details,
    )


def _is_sampling(p: Parameters) -> bool:
    """TGI samples when told to, and whenever a warper is set; several answers have to differ."""
    return (
        p.do_sample
        or p.temperature not in (None, 1.0)
        or {p.top_k, p.top_p, p.typical_p, p.min_p} != {None}
        or (p.best_of or 1) > 1
    )


def _grammar(asked: Any, settings: OrderSettings) -> Grammar | None:
    if asked is not None and settings.disable_grammar_support:
        raise Failure("BAD_REQUEST", "grammar is not supported", field="grammar")
    return tgi_grammar("grammar", asked)


def _adapter(model: ServedModel, adapter_id: str | None) -> str:
    """Unlike TGI, which answers with the base model to the name of an adapter that it lacks."""
    if not adapter_id:
        return ""
    try:
        return model.adapters.resolve(adapter_id).version
    except Failure as failure:
        message = f"`adapter_id`: {failure.message}"
        raise Failure(failure.code, message, field="adapter_id") from failure


@contextmanager
def _as_validation() -> Generator[None]:
    """Refusals that all APIs share, in TGI's words."""
    try:
        yield
    except Failure as failure:
        message = failure.message.removeprefix("`grammar.value`: ")
        raise Failure(
            failure.code, f"Input validation error: {message}", field=failure.field
        ) from failure


def _invalid(name: str, what: str) -> Failure:
    return Failure("BAD_REQUEST", f"Input validation error: `{name}` {what}", field=name)


routes = [
    Route("/", generate_compatibly, methods=["POST"]),
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/chat_tokenize", chat_tokenize, methods=["POST"]),
    Route("/info", info, methods=["GET"]),
]
