"""A line of a batch, answered as a request would be: the same orders, statuses and bodies.

This is all that the background process knows of the gateway. A line's requests have ids that follow
from the batch, and what is drawn for an interactive request follows from them here: the same line
makes the same requests, whoever makes them.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.responses import JSONResponse

from common.batches import NO_USAGE, BatchRecord, Endpoint, Usage, request_id
from common.broker import Admission, Broker
from common.failures import Failure
from common.ids import generation_id
from common.keys import read_pepper, tenant_hash
from common.messages import LANES, Finish, FinishReason
from common.settings import KeySettings, OrderSettings
from common.tracing import new_trace
from gateway.admission import admission_of, presentation_of
from gateway.answer import subject_of, whole_body
from gateway.api import chat, completions, responses, tgi
from gateway.bodies import decoded, max_prompt_items, unsupported
from gateway.callers import Caller, permitted
from gateway.collect import Completion, Reply, failure_of, reply_of
from gateway.errors import failure_response, wire_of
from gateway.json_limits import MAX_ITEMS, check_json
from gateway.middleware import too_large
from gateway.order import Order
from gateway.responses import read_log
from gateway.services import ServedModel, load_model, longest_prompt

_INLINE_BYTES = 64 * 1024
"""A body up to here is checked in half a millisecond, which may block the event loop."""


@dataclass(frozen=True, slots=True)
class LineOffer:
    """What the lines of batches may ask for."""

    model: ServedModel
    settings: OrderSettings
    pepper: bytes | None = None
    """What names of tenants are hashed with for the log."""

    @property
    def max_input_tokens(self) -> int:
        return longest_prompt(self.model, self.settings)


def load_offer(settings: OrderSettings) -> LineOffer:
    """Raises: Failure MODEL_NOT_FOUND, MODEL_LOAD_FAILED."""
    pepper = None
    if isinstance(settings, KeySettings):
        with suppress(Failure):  # whoever checks keys with it says so
            pepper = read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)
    return LineOffer(load_model(settings), settings, pepper)


Wholes = list[list[Completion]]
"""What was generated for each request of a line, choice by choice."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a line; only a line with several prompts has several."""

    request_id: str
    order: Order
    caller: Caller

    def generations(self) -> list[str]:
        """Ids of its choices."""
        return [generation_id(self.request_id, i) for i in range(self.order.num_choices)]

    def admission(self, offer: LineOffer, *, queue_limit_ms: int, retention_ms: int) -> Admission:
        """As it is queued: for nobody in particular, and no matter who reads."""
        return replace(
            admission_of(
                offer.settings,
                self.caller,
                self.request_id,
                self.order,
                trace=new_trace().parent,
            ),
            attached=False,
            grace_ms=0,
            queue_limit_ms=queue_limit_ms,
            retention_ms=retention_ms,
        )


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What an interactive request would have been answered with."""

    status: int
    body: bytes
    usage: Usage = NO_USAGE


async def requests_of(
    offer: LineOffer, broker: Broker, batch: BatchRecord, line: int, body: bytes
) -> list[Asked]:
    """The requests that the line numbered ``line``, with this ``body``, stands for.

    Raises: Failure, what an interactive request with this body would be refused with.
    """
    caller = Caller(
        tenant=batch.tenant,
        models=frozenset(batch.models),
        best_lane=LANES[-1],
        tenant_hash=tenant_hash(offer.pepper, batch.tenant),
    )
    seed, orders = await _orders_of(offer, broker, batch, body)
    asked: list[Asked] = []
    for prompt, order in enumerate(orders):
        id = request_id(batch.id, line, prompt)
        if seed is None:
            order = _seeded(order, id)  # noqa: PLW2901 - the same order, with what was left open
        asked.append(Asked(id, permitted(caller, order, offer.model.name), caller))
    return asked


def _seeded(order: Order, id: str) -> Order:
    seed = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")
    return replace(order, sampling=msgspec.structs.replace(order.sampling, seed=seed))


async def _orders_of(
    offer: LineOffer, broker: Broker, batch: BatchRecord, body: bytes
) -> tuple[int | None, list[Order]]:
    """The seed that the body names, and its orders."""
    await _check(offer, batch.endpoint, body)
    match batch.endpoint:
        case "/v1/chat/completions":
            asked = decoded(body, chat.decoder)
            _refuse_stream(asked.stream)
            return asked.seed, [await chat.order_of(offer, asked)]
        case "/v1/completions":
            asked = decoded(body, completions.decoder)
            _refuse_stream(asked.stream)
            return asked.seed, await completions.orders_of(offer, asked)
        case "/v1/responses":
            asked = decoded(body, responses.decoder)
            _refuse_stream(asked.stream)
            if asked.background:
                raise unsupported("background", "must not be true in a batch, which waits for it")
            asked.store = False  # it is kept in the output file, and nowhere else
            return asked.seed, [await responses.order_of(offer, broker, batch.tenant, asked)]
        case "/generate":
            asked = decoded(body, tgi.decoder)
            _refuse_stream(asked.stream)
            return asked.parameters.seed, [await tgi.order_of(offer, asked, stream=False)]


async def _check(offer: LineOffer, endpoint: Endpoint, body: bytes) -> None:
    if len(body) > offer.settings.payload_limit:
        raise too_large(offer.settings.payload_limit)
    may_hold_tokens = endpoint == "/v1/completions"
    limit = max_prompt_items(offer.model.max_total_tokens) if may_hold_tokens else MAX_ITEMS
    if len(body) <= _INLINE_BYTES:
        check_json(body, limit)
    else:
        await asyncio.to_thread(check_json, body, limit)


def _refuse_stream(stream: bool | None) -> None:
    if stream:
        raise unsupported("stream", "must not be true in a batch: a line is answered in one piece")


async def read_ended(broker: Broker, asked: Sequence[Asked]) -> Wholes | None:
    """All that was generated for the requests of a line; None: something of it is not there, or
    has not ended.

    Raises: Failure BROKER_UNAVAILABLE.
    """
    wholes: Wholes = []
    num_choices = 0
    for one in asked:
        choices: list[Completion] = []
        for id in one.generations():
            found = await read_log(broker, id)
            if found is None or not found[0].finish.reason:
                return None
            found[0].choice = num_choices
            num_choices += 1
            choices.append(found[0])
        wholes.append(choices)
    return wholes


def answer_of(offer: LineOffer, asked: Sequence[Asked], wholes: Wholes) -> LineAnswer:
    """The answer to the requests of one line, from all that was generated for each.

    Raises: Failure, what one of the generations failed with.
    """
    replies = [
        _reply(offer, one, list(choices)) for one, choices in zip(asked, wholes, strict=True)
    ]
    body = JSONResponse(whole_body(replies, offer.model.tokenizer)).body
    return LineAnswer(200, bytes(body), _usage(replies))


def failed(wholes: Wholes) -> Finish | None:
    """The end of the first generation that failed, if one did."""
    finishes = (choice.finish for choices in wholes for choice in choices)
    return next((it for it in finishes if it.reason == FinishReason.FAILED), None)


def refusal_of(endpoint: Endpoint, failure: Failure) -> LineAnswer:
    """As the endpoint answers a request that fails."""
    response = failure_response(failure, wire_of(endpoint))
    return LineAnswer(response.status_code, bytes(response.body))


def _reply(offer: LineOffer, asked: Asked, choices: list[Completion]) -> Reply:
    for choice in choices:
        if choice.finish.reason == FinishReason.FAILED:
            raise failure_of(choice.finish)
    timing = choices[0].timing
    presentation = presentation_of(asked.order)
    if timing is not None:  # Redis knows when it was queued, whoever did it
        presentation = msgspec.structs.replace(presentation, created=timing.admitted // 1000)
    version = timing.model_version if timing else offer.model.version
    subject = subject_of(offer, asked.order, asked.request_id, presentation, version)
    return reply_of(subject, choices, asked.order.num_best)


def _usage(replies: Sequence[Reply]) -> Usage:
    """Every prompt once, and the tokens of all that was generated for it."""
    usage = Usage()
    for reply in replies:
        prompt = reply.subject.presentation.prompt_tokens
        cached = min(choice.finish.cached_tokens for choice in reply.choices)
        usage += Usage(prompt, min(prompt, cached), reply.num_tokens)
    return usage


# The lines of the files of results ---------------------------------------------------------------


def result_line(batch_id: str, line: int, custom_id: str, answer: LineAnswer) -> bytes:
    """One line of the output file, or, for a status other than 200, of the error file."""
    id = request_id(batch_id, line)
    return b'{"id":"batch_req_%b","custom_id":%b,"response":{"status_code":%d,"request_id":"%b","body":%b},"error":null}' % (  # noqa: E501
        id.encode(), msgspec.json.encode(custom_id), answer.status, id.encode(), answer.body,
    )  # fmt: skip


def unfinished_line(batch_id: str, line: int, custom_id: str, code: str, message: str) -> bytes:
    """A line of the error file for one that was not run to its end."""
    shown: dict[str, Any] = {
        "id": f"batch_req_{request_id(batch_id, line)}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return msgspec.json.encode(shown)
