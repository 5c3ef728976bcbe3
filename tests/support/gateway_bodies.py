"""Request bodies through each API's own parsing, to the orders that they become."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request

from common.models.adapters import AdapterStore
from common.models.chat_template import ChatTemplate
from common.models.tokenizer import Tokenizer
from common.settings import GatewaySettings
from gateway.api import chat, completions, tgi
from gateway.bodies import read_body
from gateway.order import Order
from gateway.services import ServedModel, Services
from tests.support.models import simulated

MAX_TOTAL = 100


@dataclass
class Parts:
    """What parsing needs of the services."""

    settings: GatewaySettings
    model: ServedModel
    max_input_tokens: int = MAX_TOTAL - 1


def parsing_services(
    data_dir: Path, adapters: AdapterStore | None = None, **settings: Any
) -> Services:
    """The simulated model, with a context of ``MAX_TOTAL`` tokens."""
    directory = simulated(data_dir).path
    model = ServedModel(
        name="m",
        version="m@abc",
        max_total_tokens=MAX_TOTAL,
        tokenizer=Tokenizer.load(directory),
        chat_template=ChatTemplate.load(directory),
        adapters=adapters or AdapterStore(),
    )
    return cast("Services", Parts(GatewaySettings(**settings), model))


def request(body: bytes, content_type: str = "application/json") -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def generate(services: Services, body: Any, *, stream: bool = False) -> Order:
    parsed = await read_body(request(json.dumps(body).encode()), tgi.decoder)
    return await tgi.order_of(services, parsed, stream=stream)


async def converse(services: Services, **fields: Any) -> Order:
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    parsed = await read_body(request(json.dumps(body).encode()), chat.decoder)
    return await chat.order_of(services, parsed)


async def complete_all(services: Services, **fields: Any) -> list[Order]:
    body = {"prompt": "hi"} | fields
    parsed = await read_body(request(json.dumps(body).encode()), completions.decoder)
    return await completions.orders_of(services, parsed)


async def complete(services: Services, **fields: Any) -> Order:
    [order] = await complete_all(services, **fields)
    return order
