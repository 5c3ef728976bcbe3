"""Lists of OpenAI's API: which page of one is asked for, and how it is shown."""

from typing import Any

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response

from common.failures import Failure
from gateway.bodies import number_in


def page_limit(query: QueryParams, *, default: int, most: int) -> int:
    """How many are shown at once. Raises: Failure BAD_REQUEST."""
    return number_in("limit", query.get("limit", str(default)), 1, most)


def is_newest_first(query: QueryParams) -> bool:
    """Which OpenAI's lists are unless ``order`` is ``asc``. Raises: Failure BAD_REQUEST."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise Failure("BAD_REQUEST", "`order` must be one of asc, desc", field="order")
    return order == "desc"


def shown_page(data: list[dict[str, Any]], *, has_more: bool) -> Response:
    """``data`` as they are shown, each with its id."""
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }
    )
