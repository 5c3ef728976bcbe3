"""What hosting platforms call: SageMaker ``/invocations`` and ``/ping``, Vertex AI ``/vertex``, and
KServe ``/v2/health``.

Bodies and answers are those of TGI. Where we differ on purpose: all parameters of an instance
count, not two of them, and what goes wrong has its own status and words.
"""

from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.failures import Failure
from gateway.answer import answer, turn_away_early
from gateway.api import chat, completions, health, tgi
from gateway.bodies import decoded, max_prompt_items, read_body, read_json
from gateway.order import AS_PREDICTIONS, Order
from gateway.services import Services, services_of


class VertexBody(msgspec.Struct):
    """Each instance is a body of ``/generate`` or of ``/v1/chat/completions``."""

    instances: list[msgspec.Raw]


_decoder = msgspec.json.Decoder(VertexBody)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def invocations(request: Request) -> Response:
    """A body of ``POST /``, of chat completions or of completions: its members tell which."""
    services = services_of(request)
    body = await read_json(request, max_prompt_items(services.model.max_total_tokens))
    match _variant(body, {"inputs", "messages", "prompt"}, "SagemakerRequest"):
        case "inputs":
            return await tgi.answer_compatibly(request, decoded(body, tgi.decoder))
        case "messages":
            return await chat.answer_chat(request, decoded(body, chat.decoder))
        case _:
            return await completions.answer_completion(request, decoded(body, completions.decoder))


async def vertex(request: Request) -> Response:
    """Several prompts, answered together with a list of texts."""
    services = services_of(request)
    instances = (await read_body(request, _decoder)).instances
    limit = services.settings.max_client_batch_size
    if not 1 <= len(instances) <= limit:
        raise Failure(
            "BAD_REQUEST",
            f"Input validation error: `instances` must have 1 to {limit} members. "
            f"Given: {len(instances)}",
            field="instances",
        )
    await turn_away_early(request)
    orders = [await _order(services, bytes(instance)) for instance in instances]
    return await answer(request, *orders)


async def live(_: Request) -> Response:
    """KServe's V2 protocol: this process lives."""
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """KServe's V2 protocol: as ``/ready``."""
    answer = await health.ping(request)
    return answer if answer.status_code != 200 else JSONResponse({"ready": True})


async def _order(services: Services, instance: bytes) -> Order:
    if _variant(instance, {"inputs", "messages"}, "VertexInstance") == "inputs":
        body = decoded(instance, tgi.decoder)
        return await tgi.order_of(services, body, stream=False, flags=AS_PREDICTIONS)
    body = decoded(instance, chat.decoder)
    body.stream, body.stream_options = False, None
    order = await chat.order_of(services, body)
    return replace(order, flags=order.flags | AS_PREDICTIONS)


def _variant(body: bytes, names: set[str], kind: str) -> str:
    """The member by which a body shows its kind; the first one, if there are several.

    Raises: Failure BAD_REQUEST, as :func:`gateway.bodies.decoded`.
    """
    members: dict[str, Any] = decoded(body, _members)
    for name in ("inputs", "messages", "prompt"):
        if name in names and name in members:
            return name
    listed = ", ".join(f"`{name}`" for name in sorted(names))
    raise Failure(
        "BAD_REQUEST",
        "Failed to deserialize the JSON body into the target type: data did not match any variant "
        f"of untagged enum {kind}: it needs one of {listed}",
    )


routes = [
    Route("/invocations", invocations, methods=["POST"]),
    Route("/vertex", vertex, methods=["POST"]),
    Route("/ping", health.ping, methods=["GET"]),
    Route("/v2/health/live", live, methods=["GET"]),
    Route("/v2/health/ready", ready, methods=["GET"]),
]
