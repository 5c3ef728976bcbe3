"""``/ui/``: the page. ``GET /``: the page for a browser, TGI's health for everybody else."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).resolve().parents[1] / "static"


async def root(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("/ui/")
    return Response(headers={"vary": "accept"})


routes = [
    Route("/", root, methods=["GET"]),
    Mount("/ui", StaticFiles(directory=STATIC, html=True, check_dir=False)),
]
