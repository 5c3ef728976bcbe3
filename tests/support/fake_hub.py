"""A Hugging Face hub in miniature: one repository, served as huggingface_hub asks for it."""

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """``files`` by name; ``requests`` lists what was asked for, in order."""

    files: dict[str, bytes]
    licence: str = "mit"
    url: str = ""
    requests: list[str] = field(default_factory=list[str])

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        path = path.partition("?")[0]
        api = f"/api/models/{REPOSITORY}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return 200, {"content-type": "application/json"}, json.dumps(self._info()).encode()
        if path == f"{api}/tree/{COMMIT}":
            return 200, {"content-type": "application/json"}, json.dumps(self._tree()).encode()
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name in self.files:
            body = self.files[name]
            etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
            return 200, {"etag": f'"{etag}"', "x-repo-commit": COMMIT}, body
        return 404, {"x-error-code": "RepoNotFound"}, b""

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": len(body)} for name, body in self.files.items()]
        card = {"license": self.licence}
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "cardData": card}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": len(body),
                "oid": hashlib.sha1(body, usedforsecurity=False).hexdigest(),
            }
            for name, body in self.files.items()
        ]


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Generator[FakeHub]:
    """Serve ``files`` as ``acme/tiny`` on a free port of this machine."""
    hub = FakeHub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            """Silent: a test looks at ``requests``."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
