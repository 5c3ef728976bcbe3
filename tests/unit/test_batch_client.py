"""The client of `headrace batch` against scripted gateways, which go away at the worst moment."""

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import click
import pytest

from ops import gateways as module
from ops.batch_client import BatchClient
from ops.gateways import Gateways, Refused, Unreachable

Reply = Callable[["Handler"], None]
Asked = tuple[str, str, dict[str, str], bytes]
"""Method, path, headers, body."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    replies: list[Reply]
    asked: list[Asked]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append((self.command, self.path, dict(self.headers), body))
        self.replies.pop(0)(self)

    do_POST = do_GET  # noqa: N815 - by which the standard library finds it

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Not on the test's output."""


@dataclass
class Scripted:
    url: str
    asked: list[Asked]


@contextmanager
def scripted(*replies: Reply) -> Generator[Scripted]:
    """A gateway that gives these replies, one after another."""
    asked: list[Asked] = []
    kind = type("Kind", (Handler,), {"replies": list(replies), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Scripted(f"http://127.0.0.1:{server.server_address[1]}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(body: object, status: int = 200, **headers: str) -> Reply:
    def reply(handler: Handler) -> None:
        payload = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    return reply


def sends(data: bytes, *, whole: bool = True) -> Reply:
    """``whole``: else the connection breaks before the end."""

    def reply(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(data) + (not whole)))
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    return reply


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True


def event(kind: str, status: str) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'status': status})}\n\n".encode()


@contextmanager
def client_of(*urls: str, notes: list[str] | None = None) -> Generator[BatchClient]:
    noted = [] if notes is None else notes
    with Gateways(urls, "secret", noted.append) as gateways:
        yield BatchClient(gateways)


def test_a_file_that_breaks_off_is_gone_on_with_elsewhere() -> None:
    """Every byte once, wherever the first gateway stopped."""
    content = b"".join(b"%d\n" % number for number in range(1000))
    copied = BytesIO()
    with (
        scripted(sends(content[:777], whole=False)) as one,
        scripted(sends(content)) as other,
        client_of(one.url, other.url) as client,
    ):
        client.copy("file-1", copied)
    assert copied.getvalue() == content
    assert [ask[1] for ask in one.asked + other.asked] == ["/v1/files/file-1/content"] * 2


def test_a_batch_is_followed_over_gateways_that_stop() -> None:
    """A clean end without the last event is as good as a break: another one goes on."""
    notes: list[str] = []
    with (
        scripted(sends(event("batch", "validating")), hangs_up) as one,
        scripted(sends(event("batch", "in_progress") + event("done", "completed"))) as other,
        client_of(one.url, other.url, notes=notes) as client,
    ):
        assert [batch["status"] for batch in client.followed("batch_1")] == [
            "validating",
            "in_progress",
            "completed",
        ]
    assert other.asked[0][1] == "/v1/batches/batch_1/events?lines=0"
    assert "trying again" in notes[0]


def test_a_batch_that_had_to_be_asked_for_twice_is_one_batch() -> None:
    """The same key with each try, so that the gateways know it again."""
    made = says({"id": "batch_1"})
    with (
        scripted(hangs_up, says({}, 503, retry_after="0")) as one,
        scripted(hangs_up, made) as two,
        client_of(one.url, two.url) as client,
    ):
        assert client.create("file-1", "/v1/completions")["id"] == "batch_1"
    keys = {headers["Idempotency-Key"] for _, _, headers, _ in one.asked + two.asked}
    assert (len(one.asked), len(two.asked), len(keys)) == (2, 2, 1)


def test_an_upload_that_breaks_off_is_sent_again_from_the_start(tmp_path: Path) -> None:
    file = tmp_path / "night.jsonl"
    file.write_bytes(b'{"custom_id": "1"}\n' * 1000)
    answers = (hangs_up, says({"id": "file-1"}))
    with scripted(*answers) as gateway, client_of(gateway.url) as client:
        assert client.upload(file) == "file-1"
    _, path, headers, body = gateway.asked[1]
    assert (path, headers["Authorization"]) == ("/v1/files", "Bearer secret")
    assert body.count(file.read_bytes()) == 1
    assert b'name="purpose"\r\n\r\nbatch\r\n' in body


def test_a_refusal_is_said_once_in_the_gateways_words() -> None:
    error = {"error": {"message": "No such batch.", "code": "not_found"}}
    with (
        scripted(says(error, 404), says("a page", 404)) as gateway,
        client_of(gateway.url) as client,
    ):
        with pytest.raises(Refused) as refusal:
            client.get("batch_1")
        assert refusal.value.message == "No such batch. (not_found)"
        with pytest.raises(Refused, match="answers 404"):
            client.get("batch_1")


def test_who_never_answered_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_CONTACT_S", 0.1)
    with scripted() as gone:
        url = gone.url
    with client_of(url) as client, pytest.raises(Unreachable, match=url):
        client.check()


@pytest.mark.parametrize("url", ["ftp://host", "http://", "://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(click.BadParameter, match="no http address"), client_of(url):
        pass


def test_what_is_no_id_is_never_sent() -> None:
    with (
        scripted() as gateway,
        client_of(gateway.url) as client,
        pytest.raises(click.BadParameter, match="no id"),
    ):
        client.get("../files")
    assert gateway.asked == []
