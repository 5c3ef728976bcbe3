"""TGI's own routes: ``/generate``, ``/generate_stream``, ``POST /``, ``/tokenize`` and ``/info``.

Field names, null rules, the order of the validation rules and their messages are
those of TGI 3.3. Where we differ on purpose: refusals are real status codes before the stream
begins, ``max_new_tokens`` is exact, and a stop sequence may end inside a token.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from common.messages import Sampling
from gateway.answer import answer
from gateway.bodies import (
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    check_range,
    check_stops,
    draw_seed,
    read_body,
    refuse_unsupported,
)
from gateway.order import AS_LIST, DETAILS, FULL_TEXT, Order
from gateway.services import Services, services_of


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


class GenerateBody(msgspec.Struct):
    """Without ``parameters`` TGI samples; with an empty object it does not."""

    inputs: str
    parameters: Parameters = msgspec.field(default_factory=lambda: Parameters(do_sample=True))
    stream: bool = False


_decoder = msgspec.json.Decoder(GenerateBody)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (0, 1),
    "frequency_penalty": (0,),
    "typical_p": (),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
    "grammar": (),
    "adapter_id": (),
}


async def generate(request: Request) -> Response:
    body = await read_body(request, _decoder)
    return await answer(request, await _order(services_of(request), body, stream=False))


async def generate_stream(request: Request) -> Response:
    body = await read_body(request, _decoder)
    return await answer(request, await _order(services_of(request), body, stream=True))


async def generate_compatibly(request: Request) -> Response:
    """``POST /``: as the inference API of the Hugging Face hub; the answer is a list."""
    body = await read_body(request, _decoder)
    if body.parameters.return_full_text is None:
        body.parameters.return_full_text = True
    order = await _order(services_of(request), body, stream=body.stream, flags=AS_LIST)
    return await answer(request, order)


async def tokenize(request: Request) -> Response:
    body = await read_body(request, _decoder)
    tokens = await services_of(request).model.tokenizer.encode_with_offsets_async(body.inputs)
    return JSONResponse(
        [dict(zip(("id", "text", "start", "stop"), token, strict=True)) for token in tokens]
    )


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
            "max_concurrent_requests": settings.lane_cap_tokens // model.max_total_tokens,
            "max_best_of": 1,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_tokens": model.max_total_tokens - 1,
            "max_total_tokens": model.max_total_tokens,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "headrace",
            "version": services.version,
            "sha": None,
            "docker_label": None,
        }
    )


async def _order(services: Services, body: GenerateBody, *, stream: bool, flags: int = 0) -> Order:
    """Raises: Failure, for the first of TGI's rules that the body breaks."""
    p, model = body.parameters, services.model
    _check_parameters(p, stream=stream, max_stops=services.settings.max_stop_sequences)
    if not body.inputs:
        raise _invalid("inputs", "cannot be empty")
    max_input = model.max_total_tokens - 1
    if p.truncate is not None and not 0 < p.truncate <= max_input:
        raise _invalid(
            "truncate", f"must be strictly positive and less than {max_input}. Given: {p.truncate}"
        )
    refuse_unsupported(p, _NEUTRAL)
    prompt = await model.tokenizer.encode_async(body.inputs)
    if p.truncate is not None:
        prompt = prompt[-p.truncate :]
    return Order(
        api="tgi",
        prompt=prompt,
        sampling=_sampling(p, _new_tokens(len(prompt), p.max_new_tokens, model.max_total_tokens)),
        stream=stream,
        flags=flags | DETAILS * p.details | FULL_TEXT * bool(p.return_full_text),
        prompt_text=body.inputs if p.return_full_text else "",
        num_prompt_characters=len(body.inputs),
    )


def _check_parameters(p: Parameters, *, stream: bool, max_stops: int) -> None:
    """TGI's rules in its order and words, then the bounds that its number types set."""
    if stream and p.best_of not in (None, 1):
        raise _invalid("best_of", "!= 1 is not supported when streaming tokens")
    if not stream and p.best_of is not None and p.best_of > 1:
        raise _invalid("best_of", "!= 1 is not allowed for this endpoint")
    if stream and p.decoder_input_details:
        raise _invalid("decoder_input_details", "== true is not supported when streaming tokens")
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
    if len(p.stop) > max_stops:
        raise _invalid("stop", f"supports up to {max_stops} stop sequences. Given: {len(p.stop)}")
    _check_bounds(p)


def _check_bounds(p: Parameters) -> None:
    check_range("best_of", p.best_of, 0, MAX_NEW_TOKENS)
    check_range("temperature", p.temperature, 0, MAX_TEMPERATURE)
    check_range("repetition_penalty", p.repetition_penalty, 0, MAX_REPETITION_PENALTY)
    check_range("top_k", p.top_k, 1, MAX_TOP_K)
    check_range("max_new_tokens", p.max_new_tokens, 1, MAX_NEW_TOKENS)
    check_range("seed", p.seed, 0, MAX_SEED)
    check_stops("stop", p.stop)


def _new_tokens(num_prompt: int, wished: int | None, max_total: int) -> int:
    """Allowed new tokens: what was asked for, exactly, or all the room that is left."""
    if wished is not None and num_prompt + wished > max_total:
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {max_total}. "
            f"Given: {num_prompt} `inputs` tokens and {wished} `max_new_tokens`",
            field="parameters.max_new_tokens",
        )
    if num_prompt >= max_total:
        raise Failure(
            "CONTEXT_LENGTH_EXCEEDED",
            f"Input validation error: `inputs` must have less than {max_total - 1} tokens. "
            f"Given: {num_prompt}",
            field="inputs",
        )
    return max_total - num_prompt if wished is None else wished


def _sampling(p: Parameters, max_new_tokens: int) -> Sampling:
    """TGI samples when told to, and whenever a warper is set."""
    is_sampling = (
        p.do_sample
        or p.temperature not in (None, 1.0)
        or p.top_k is not None
        or p.top_p is not None
    )
    return Sampling(
        max_new_tokens=max_new_tokens,
        seed=draw_seed() if p.seed is None else p.seed,
        do_sample=is_sampling,
        temperature=p.temperature or 1.0,
        top_k=p.top_k or 0,
        top_p=p.top_p or 1.0,
        repetition_penalty=p.repetition_penalty or 1.0,
        stop=tuple(p.stop),
        keep_stop=True,
    )


def _invalid(name: str, what: str) -> Failure:
    return Failure("BAD_REQUEST", f"Input validation error: `{name}` {what}", field=name)


routes = [
    Route("/", generate_compatibly, methods=["POST"]),
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/info", info, methods=["GET"]),
]
