"""``GET /v1/models`` and ``/v1/models/{id}``: the one model of this gateway, and its adapters."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from common.models.adapters import AdapterManifest
from gateway.callers import caller_of
from gateway.services import ServedModel, services_of


async def list_models(request: Request) -> Response:
    """Those that the caller's key is for."""
    model, caller = services_of(request).model, caller_of(request)
    adapters = [_shown_adapter(model, adapter) for adapter in model.adapters.list()]
    shown = [each for each in (_shown(model), *adapters) if caller.may_use(each["id"])]
    return JSONResponse({"object": "list", "data": shown})


async def show_model(request: Request) -> Response:
    """Raises: Failure MODEL_NOT_FOUND."""
    model, caller = services_of(request).model, caller_of(request)
    name = request.path_params["id"]
    if name in (model.name, model.version) and caller.may_use(model.name):
        return JSONResponse(_shown(model))
    try:
        shown = _shown_adapter(model, model.adapters.resolve(name))
    except Failure:
        shown = None
    if shown is None or not caller.may_use(shown["id"]):
        raise Failure("MODEL_NOT_FOUND", f"The model {name[:100]!r} is not here")
    return JSONResponse(shown)


def _shown(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.name,
        "model_version": model.version,
        "max_model_len": model.max_total_tokens,
    }


def _shown_adapter(model: ServedModel, adapter: AdapterManifest) -> dict[str, Any]:
    """As a model of its own, because a request chooses it by the same field."""
    return _shown(model) | {
        "id": adapter.name,
        "created": adapter.created_s,
        "adapter_version": adapter.version,
        "parent": model.name,
    }


routes = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", show_model, methods=["GET"]),
]
