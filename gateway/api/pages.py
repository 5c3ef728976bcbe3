"""``/ui/``: the pages. ``/ops/``: the one of operations. ``GET /``: the page for a browser, TGI's
health for everybody else.
"""

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).resolve().parents[1] / "static"


async def root(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("/ui/")
    return Response(headers={"vary": "accept"})


async def operations(request: Request) -> Response:
    """A file as those under ``/ui/``, which it links to; it shows nothing without ``/ops/feed``."""
    return await _PAGES.get_response("ops.html", request.scope)


class Page(StaticFiles):
    """Files that a browser asks for again each time: after an upgrade none may mix old with new.

    An unchanged one costs a 304 by its ETag. None comes in pieces: to put ranges together has cost
    servers their event loop, and no file here needs it.
    """

    async def get_response(self, path: str, scope: Scope) -> Response:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        return await super().get_response(path, {**scope, "headers": headers})

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


_PAGES = Page(directory=STATIC, html=True, check_dir=False)

routes = [
    Route("/", root, methods=["GET"]),
    Route("/ops/", operations, methods=["GET"]),
    Mount("/ui", _PAGES),
]
