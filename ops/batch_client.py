"""Files and batches by the API of any gateway: uploaded, created, followed, fetched.

All survives a gateway that goes away, and does nothing twice. Raises what
:mod:`ops.gateways` raises: Refused and Unreachable.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import click
import httpx2
import orjson

from ops.gateways import Gateways, NotNow, checked, events_of, opened

Batch = dict[str, Any]
"""As the API shows one."""

_UPLOAD_TIMEOUT_S = 120.0
"""For an answer behind the last byte: by then all of it must lie in storage."""
_CHUNK_BYTES = 256 * 1024
_PAGE = 100


class BatchClient:
    def __init__(self, gateways: Gateways) -> None:
        self._gateways = gateways

    def check(self) -> None:
        """Raises: Refused, for a key that may have no batches."""
        self._gateways.call("GET", "/v1/batches", params={"limit": 1})

    def upload(self, file: Path, shown: Callable[[BinaryIO], BinaryIO] = lambda file: file) -> str:
        """The id under which a gateway has the file. ``shown`` wraps it at each try, for a bar."""

        def send(client: httpx2.Client) -> str:
            with file.open("rb") as content:
                response = client.post(
                    "/v1/files",
                    data={"purpose": "batch"},
                    files={"file": (file.name, shown(content), "application/jsonl")},
                    timeout=_UPLOAD_TIMEOUT_S,
                )
            return checked(response).json()["id"]

        return self._gateways.persist(send)

    def create(self, file_id: str, endpoint: str, metadata: dict[str, str] | None = None) -> Batch:
        """One batch, however often it has to be asked for."""
        wanted: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": "24h",
        }
        if metadata:
            wanted["metadata"] = metadata
        headers = {"Idempotency-Key": f'"{uuid4()}"'}
        return self._gateways.call("POST", "/v1/batches", json=wanted, headers=headers)

    def get(self, batch_id: str) -> Batch:
        return self._gateways.call("GET", _path(batch_id))

    def cancel(self, batch_id: str) -> Batch:
        return self._gateways.call("POST", f"{_path(batch_id)}/cancel")

    def newest(self, limit: int) -> list[Batch]:
        """At most ``limit`` batches, the newest first."""
        batches: list[Batch] = []
        after: dict[str, str] = {}
        while len(batches) < limit:
            wanted = {"limit": str(min(_PAGE, limit - len(batches))), **after}
            page = self._gateways.call("GET", "/v1/batches", params=wanted)
            batches += page["data"]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        return batches

    def followed(self, batch_id: str) -> Iterator[Batch]:
        """The batch whenever it has changed, until it has ended, over any number of connections."""
        path = f"{_path(batch_id)}/events?lines=0"
        while True:
            try:
                with opened(self._gateways.current, path) as response:
                    for kind, data in events_of(response):
                        self._gateways.answered()
                        yield orjson.loads(data)
                        if kind == "done":
                            return
                error: Exception = httpx2.ReadError("the connection ended")
            except (httpx2.TransportError, NotNow) as failure:
                error = failure
            self._gateways.failed(error)

    def copy(self, file_id: str, to: BinaryIO) -> None:
        """Write a file's content. It never changes: after a break, what was written is skipped."""
        written = 0

        def read(client: httpx2.Client) -> None:
            nonlocal written
            skipped = written
            with opened(client, f"/v1/files/{file_id}/content") as response:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    fresh = chunk[skipped:]
                    skipped -= len(chunk) - len(fresh)
                    written += to.write(fresh)

        self._gateways.persist(read)
        to.flush()


def _path(batch_id: str) -> str:
    """Raises: click.BadParameter."""
    if not batch_id.replace("_", "").replace("-", "").isalnum():
        raise click.BadParameter(f"{batch_id!r} is no id of a batch")
    return f"/v1/batches/{batch_id}"
