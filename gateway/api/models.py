"""``GET /v1/models`` and ``/v1/models/{id}``: the one model of this gateway, and its adapters."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from common.models.adapters import AdapterManifest
from gateway.services import ServedModel, services_of


async def list_models(request: Request) -> Response:
    model = services_of(request).model
    adapters = [_shown_adapter(model, adapter) for adapter in model.adapters.list()]
    return JSONResponse({"object": "list", "data": [_shown(model), *adapters]})


async def show_model(request: Request) -> Response:
    """Raises: Failure MODEL_NOT_FOUND."""
    model = services_of(request).model
    name = request.path_params["id"]
    if name in (model.name, model.version):
        return JSONResponse(_shown(model))
    try:
        return JSONResponse(_shown_adapter(model, model.adapters.resolve(name)))
    except Failure as failure:
        raise Failure("MODEL_NOT_FOUND", f"The model {name[:100]!r} is not here") from failure


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
