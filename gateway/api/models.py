"""``GET /v1/models`` and ``/v1/models/{id}``: the one model of this gateway."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from gateway.services import ServedModel, services_of


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_shown(services_of(request).model)]})


async def show_model(request: Request) -> Response:
    """Raises: Failure MODEL_NOT_FOUND."""
    model = services_of(request).model
    if request.path_params["id"] not in (model.name, model.version):
        raise Failure(
            "MODEL_NOT_FOUND", f"The model {request.path_params['id'][:100]!r} is not here"
        )
    return JSONResponse(_shown(model))


def _shown(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.name,
        "model_version": model.version,
        "max_model_len": model.max_total_tokens,
    }


routes = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", show_model, methods=["GET"]),
]
