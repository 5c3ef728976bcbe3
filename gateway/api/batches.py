"""``/v1/batches``: OpenAI's Batch API. A gateway takes a batch in and tells of it; background
workers run it.

A batch is promised when its record lies on the disks of Redis; from then on nothing that ends here
ends it.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.batches import (
    ENDPOINTS,
    WINDOW_S,
    BatchRecord,
    Endpoint,
    new_batch_id,
)
from common.clock import wall_ms
from common.failures import Failure
from common.files import LIFE_S, MAX_LIFE_S, MIN_LIFE_S
from common.logs import get_logger
from gateway.api.lists import page_limit, shown_page
from gateway.api.responses import check_metadata
from gateway.bodies import check_range, decoded, read_json
from gateway.callers import Caller, caller_of
from gateway.idempotency import idempotency_of
from gateway.services import Services, services_of

log = get_logger()

MAX_PAGE = 100
DEFAULT_PAGE = 20


class ExpiresAfter(msgspec.Struct):
    anchor: str
    seconds: int


class BatchBody(msgspec.Struct):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Any = None
    output_expires_after: ExpiresAfter | None = None


decoder = msgspec.json.Decoder(BatchBody)


async def create_batch(request: Request) -> Response:
    """Raises: Failure BAD_REQUEST, MODEL_NOT_ALLOWED, IDEMPOTENCY_CONFLICT, DRAINING."""
    services, caller = services_of(request), caller_of(request)
    if services.is_draining:
        raise Failure("DRAINING")
    body = decoded(await read_json(request), decoder)
    wish = await _wish(services, caller, body)
    idempotency = await idempotency_of(request)
    id, fingerprint = new_batch_id(), ""
    if idempotency is not None:
        digest = hashlib.sha256(f"{caller.tenant}:{idempotency.key}".encode()).hexdigest()
        id, fingerprint = f"batch_{digest[:32]}", idempotency.fingerprint
    now_s = wall_ms() // 1000
    asked = BatchRecord(
        id=id,
        tenant=caller.tenant,
        pool=services.model.name,
        endpoint=wish.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        metadata=body.metadata,
        created_at=now_s,
        expires_at=now_s + WINDOW_S,
        models=tuple(sorted(caller.models)),
        output_life_s=wish.output_life_s,
        fingerprint=fingerprint,
    )
    record = await services.broker.batch_store.create(asked)
    if record.fingerprint != fingerprint:
        raise Failure("IDEMPOTENCY_CONFLICT")
    await services.broker.durable()
    is_replayed = record is not asked
    if not is_replayed:
        log.info(
            "batch.created", batch_id=id, endpoint=record.endpoint, file_id=record.input_file_id
        )
    headers = {"idempotent-replayed": "true"} if is_replayed else {}
    return JSONResponse(record.shown(), headers=headers)


@dataclass(frozen=True, slots=True)
class _Wish:
    endpoint: Endpoint
    output_life_s: int


async def _wish(services: Services, caller: Caller, body: BatchBody) -> _Wish:
    """Raises: Failure BAD_REQUEST, which names the field; MODEL_NOT_ALLOWED."""
    try:
        endpoint = msgspec.convert(body.endpoint, Endpoint)
    except msgspec.ValidationError as error:
        known = ", ".join(ENDPOINTS)
        raise _refused(f"`endpoint` must be one of {known}", "endpoint") from error
    if body.completion_window != "24h":
        raise _refused("`completion_window` must be 24h", "completion_window")
    check_metadata(body.metadata)
    file = await services.files.get(body.input_file_id, caller.tenant)
    if file is None:
        raise _refused(
            f"`input_file_id`: no such file: {body.input_file_id[:80]!r}", "input_file_id"
        )
    if file.purpose != "batch":
        raise _refused("`input_file_id` must be of a file with purpose batch", "input_file_id")
    names = {adapter.name for adapter in services.model.adapters.list()}
    if not any(caller.may_use(name) for name in (services.model.name, *names)):
        raise Failure(
            "MODEL_NOT_ALLOWED", f"This API key is not for {services.model.name}", field="model"
        )
    return _Wish(endpoint, _life(body.output_expires_after))


def _life(expires_after: ExpiresAfter | None) -> int:
    """Seconds that the files of results are to live."""
    if expires_after is None:
        return LIFE_S
    if expires_after.anchor != "created_at":
        raise _refused(
            "`output_expires_after.anchor` must be created_at", "output_expires_after.anchor"
        )
    field = "output_expires_after.seconds"
    check_range(field, expires_after.seconds, MIN_LIFE_S, MAX_LIFE_S)
    return expires_after.seconds


async def list_batches(request: Request) -> Response:
    """Batches of the caller, the newest first. Raises: Failure BAD_REQUEST."""
    query, store = request.query_params, services_of(request).broker.batch_store
    page = await store.page(
        caller_of(request).tenant,
        limit=page_limit(query, default=DEFAULT_PAGE, most=MAX_PAGE),
        after=query.get("after", ""),
    )
    if page is None:
        raise _refused("`after` must be the id of a batch", "after")
    records, has_more = page
    return shown_page([record.shown() for record in records], has_more=has_more)


async def show_batch(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    return JSONResponse((await find_batch(request)).shown())


async def cancel_batch(request: Request) -> Response:
    """End a batch early: what is finished is kept. One that is being cancelled stays so.

    Raises: Failure NOT_FOUND, BATCH_ENDED.
    """
    found = await find_batch(request)
    services, now_s = services_of(request), wall_ms() // 1000
    record = await services.broker.batch_store.change(found.id, lambda it: it.cancelling(now_s))
    if record is None:
        raise _not_found(found.id)
    if record.status not in ("cancelling", "cancelled"):
        raise Failure(
            "BATCH_ENDED", f"Cannot cancel a batch with status '{record.status}'.", field="id"
        )
    await services.broker.durable()
    log.info("batch.cancelled", batch_id=record.id, status=found.status)
    return JSONResponse(record.shown())


async def find_batch(request: Request) -> BatchRecord:
    """The batch that the path names.

    Raises: Failure NOT_FOUND, also for another tenant's.
    """
    batch_id = request.path_params["id"]
    store = services_of(request).broker.batch_store
    record = await store.get(batch_id, caller_of(request).tenant)
    if record is None:
        raise _not_found(batch_id)
    return record


def _not_found(batch_id: str) -> Failure:
    return Failure("NOT_FOUND", f"No batch found with id '{batch_id[:80]}'.", field="id")


def _refused(message: str, field: str) -> Failure:
    return Failure("BAD_REQUEST", message, field=field)


routes = [
    Route("/v1/batches", create_batch, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{id}", show_batch, methods=["GET"]),
    Route("/v1/batches/{id}/cancel", cancel_batch, methods=["POST"]),
]
