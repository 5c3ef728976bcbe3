"""A port of its own for the figures of a process that has no other HTTP server.

It is served by a thread, so that a scrape waits neither for the event loop nor the other way round.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.instruments import CONTENT_TYPE
from common.logs import get_logger
from common.settings import MetricsPortSettings

log = get_logger()

_READ_LIMIT_S = 5.0
"""A client that sends nothing for so long loses its connection."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _READ_LIMIT_S

    def __init__(self, text: Callable[[], bytes], *args: object) -> None:
        self._text = text
        super().__init__(*args)  # pyright: ignore[reportArgumentType] - as the server gives them

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = self._text()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """A scrape every few seconds is no news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left in the middle."""


@contextmanager
def metrics_port(settings: MetricsPortSettings, text: Callable[[], bytes]) -> Generator[None]:
    """Answer ``GET /metrics`` with ``text()`` while this lasts, if the settings name a port.

    A port that cannot be had costs the figures, not the process.
    """
    if not settings.metrics_port:
        yield
        return
    try:
        server = _Server((settings.metrics_host, settings.metrics_port), partial(_Handler, text))
    except OSError as error:
        url = f"http://{settings.metrics_host}:{settings.metrics_port}/metrics"
        log.warning("metrics.unavailable", url=url, message=str(error))
        yield
        return
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
