"""What an upload costs a gateway: its memory, its event loop, and how long a file takes.

Starts Headrace with the simulated engine, uploads files of random lines over plain sockets, reads
each back and compares. *Memory* is the highest resident size of the gateway above what it had
before (Linux: ``VmHWM``, set back before each run). *Lag* is how late its event loop came to a task
that sleeps 50 ms, *held* the part of that which it did itself instead of the machine's being busy.
A run passes when memory stays within 32 MB and no look found the loop held for more than 50 ms.
"""

import asyncio
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click
import httptools

from ops import runfile
from ops.bench.instance import own_instance
from ops.bench.metrics import buckets_in, metrics_at

MEMORY_LIMIT_BYTES = 32 * 1000**2
LAG_LIMIT_S = 0.05
_ANSWER_S = 300.0
_BLOCK_BYTES = 1024 * 1024
_BOUNDARY = b"headrace-bench"
_HEAD = (
    b'--%b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nevals\r\n'
    b'--%b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
) % (_BOUNDARY, _BOUNDARY)
_TAIL = b"\r\n--%b--\r\n" % _BOUNDARY


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run, in its parts: all files went up at once, then came down at once."""

    what: str
    num_bytes: int
    took_s: float
    memory_bytes: int
    """Above what the gateway had before."""
    lag_s: float
    held_s: float
    """Upper bounds of the longest: edges of histogram buckets."""

    @property
    def has_passed(self) -> bool:
        return self.memory_bytes <= MEMORY_LIMIT_BYTES and self.held_s <= LAG_LIMIT_S

    def __str__(self) -> str:
        rate = self.num_bytes / self.took_s / 1e6
        return (
            f"{self.what:12} {self.took_s:7.2f} s {rate:7.0f} MB/s   memory "
            f"{self.memory_bytes / 1e6:+6.1f} MB   lag ≤ {self.lag_s * 1000:g} ms   "
            f"held ≤ {self.held_s * 1000:g} ms   {'ok' if self.has_passed else 'TOO MUCH'}"
        )


@click.command()
@click.option("--megabytes", default=200, show_default=True, help="Size of each file.")
@click.option("--at-once", default="1,8", show_default=True, help="Files, comma-separated.")
@click.option("--storage-url", default="", help="Where they go; else a directory.")
def main(megabytes: int, at_once: str, storage_url: str) -> None:
    """Upload large files to a Headrace of their own; exits with 1 when they cost it too much."""
    figures = _run(megabytes, list(map(int, at_once.split(","))), storage_url)
    sys.exit(0 if all(each.has_passed for each in figures) else 1)


def _run(megabytes: int, counts: list[int], storage_url: str) -> list[Figures]:
    options = ["--engine", "simulated"] + ["--storage-url", storage_url] * bool(storage_url)
    rows = _rows(megabytes * 1000**2)
    figures: list[Figures] = []
    with own_instance(*options) as (folder, addresses):
        port = urlsplit(addresses[0]).port or 0
        gateway = _gateway_pid(folder)
        asyncio.run(_up_and_down(port, rows[:_BLOCK_BYTES], 1, gateway))  # so that all is loaded
        for count in counts:
            for each in asyncio.run(_up_and_down(port, rows, count, gateway)):
                click.echo(str(each))
                figures.append(each)
    return figures


def _rows(num_bytes: int) -> bytes:
    """Lines that no compression or deduplication could help with."""
    row = json.dumps({"custom_id": os.urandom(8).hex(), "body": os.urandom(1000).hex()}) + "\n"
    return (row.encode() * (num_bytes // len(row) + 1))[:num_bytes]


async def _up_and_down(port: int, rows: bytes, count: int, gateway: int) -> list[Figures]:
    digest = hashlib.sha256(rows).hexdigest()
    watch = _Watch(port, gateway)
    ids = await asyncio.gather(*(_upload(port, rows) for _ in range(count)))
    figures = [watch.figures(f"{count} up", len(rows) * count)]
    watch = _Watch(port, gateway)
    digests = await asyncio.gather(*(_download(port, id) for id in ids))
    figures.append(watch.figures(f"{count} down", len(rows) * count))
    if set(digests) != {digest}:
        raise click.ClickException("a file came back as another one")
    for id in ids:
        await _ask(port, b"DELETE /v1/files/%b" % id.encode(), _Answer())
    return figures


class _Answer:
    """Callbacks of httptools: the body's hash, and its beginning."""

    def __init__(self) -> None:
        self.begun = b""
        self.sha256 = hashlib.sha256()
        self.is_whole = False

    def on_body(self, data: bytes) -> None:
        self.sha256.update(data)
        if len(self.begun) < _BLOCK_BYTES:
            self.begun += data

    def on_message_complete(self) -> None:
        self.is_whole = True


async def _upload(port: int, rows: bytes) -> str:
    answer = _Answer()
    await _ask(port, b"POST /v1/files", answer, rows)
    return str(json.loads(answer.begun)["id"])


async def _download(port: int, file_id: str) -> str:
    answer = _Answer()
    await _ask(port, b"GET /v1/files/%b/content" % file_id.encode(), answer)
    return answer.sha256.hexdigest()


async def _ask(port: int, line: bytes, answer: _Answer, rows: bytes = b"") -> None:
    """Send one request; with ``rows`` as the file of a form. Raises: click.ClickException."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    parser = httptools.HttpResponseParser(answer)
    head = b"%b HTTP/1.1\r\nHost: localhost\r\n" % line
    if rows:
        head += b"Content-Type: multipart/form-data; boundary=%b\r\n" % _BOUNDARY
        head += b"Content-Length: %d\r\n" % (len(_HEAD) + len(rows) + len(_TAIL))
    writer.write(head + b"\r\n")
    async with asyncio.timeout(_ANSWER_S):
        if rows:
            writer.write(_HEAD)
            for start in range(0, len(rows), _BLOCK_BYTES):
                writer.write(rows[start : start + _BLOCK_BYTES])
                await writer.drain()
            writer.write(_TAIL)
        while not answer.is_whole and (data := await reader.read(_BLOCK_BYTES)):
            parser.feed_data(data)
    writer.close()
    if parser.get_status_code() != 200:
        raise click.ClickException(f"{line.decode()}: {answer.begun[:300]!r}")


class _Watch:
    """What a gateway needs from now on."""

    def __init__(self, port: int, pid: int) -> None:
        self._port = port
        self._pid = pid
        self._looks = metrics_at(port)
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak is: now
        self._before = _memory(pid, "VmRSS")
        self._began_s = time.monotonic()

    def figures(self, what: str, num_bytes: int) -> Figures:
        took_s = time.monotonic() - self._began_s
        memory = _memory(self._pid, "VmHWM") - self._before
        time.sleep(0.2)  # the loop's last look
        looks = metrics_at(self._port)
        lag_s, held_s = (
            _longest(self._looks, looks, f"headrace_event_loop_{name}_seconds")
            for name in ("lag", "held")
        )
        return Figures(what, num_bytes, took_s, memory, lag_s, held_s)


def _memory(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _longest(before: str, after: str, name: str) -> float:
    """The edge of the highest bucket that has more in it than before."""
    old, new = buckets_in(before, name), buckets_in(after, name)
    in_it = {edge: new[edge] - old[edge] for edge in new}
    total = in_it[float("inf")]
    return min(edge for edge, count in in_it.items() if count == total)


def _gateway_pid(folder: Path) -> int:
    state = runfile.read_state(folder)
    pids = [each.pid for each in state.processes if each.role == "gateway"] if state else []
    if not pids:
        raise click.ClickException("headrace up has no gateway")
    return pids[0]
