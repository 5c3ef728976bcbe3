"""What one gateway can relay: streams times rate, processor time per token, memory per stream.

A real gateway, a real server, workers that take no time (:mod:`ops.bench.token_source`) and readers
that take little (:mod:`ops.bench.stream_readers`), each a process of its own on this machine. All
streams are opened once; then each gets tokens at one rate after the other. *Latency* is from the
moment at which a worker has a token to its arrival at the reader, with all that lies between. Where
fewer cores are free than processes work, the processor time per token says more about a gateway
than the highest rate: the others take their share of the same cores.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar, get_args
from urllib.parse import urlsplit

import click
import msgspec
from rich.console import Console
from rich.table import Table

from common.clock import monotonic_s
from common.models.simulated import SIMULATED_MODEL
from common.models.store import ModelStore
from ops.bench import machine
from ops.bench.processes import Use, running, use_of
from ops.bench.stream_readers import BEGIN, TELL, Api, Figures
from ops.bench.token_source import Order, Ready, Report
from ops.embedded import server_binary, server_spec

_START_TIMEOUT_S = 30.0
_DRAIN_LIMIT_S = 5.0
_LOOK_S = 0.05

Told = TypeVar("Told", bound=msgspec.Struct)


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One rate on one number of streams. Processor times are microseconds per token."""

    api: str
    streams: int
    rate: float
    """Asked for, per stream."""
    per_step: int
    tokens: int
    tokens_per_second: float
    """That reached their readers."""
    missing: int
    gateway_us: float
    server_us: float
    source_us: float
    reader_us: float
    gateway_cores: float
    """How much of one core it had."""
    latency_p50_ms: float
    latency_p99_ms: float
    latency_max_ms: float
    events_per_piece: float
    source_late_ms: float
    """How far the workers were behind: what was published late was not the gateway's to relay."""
    stream_kib: float
    """Resident memory that each stream added to the gateway, by the end of this level."""
    open_ms: float
    """Processor time of the gateway to open one stream."""


@click.command()
@click.option("--streams", default="2000", show_default=True, help="Comma-separated.")
@click.option("--rates", default="5,10,15,20", show_default=True, help="Tokens/s of each stream.")
@click.option("--seconds", default=5.0, show_default=True, help="Of each rate.")
@click.option("--api", default="chat", show_default=True, help="chat, tgi, or both by comma.")
@click.option("--per-step", default=1, show_default=True, help="Tokens of a stream in each step.")
@click.option("--rows", default=256, show_default=True, help="Streams of one worker.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
def main(
    streams: str,
    rates: str,
    seconds: float,
    api: str,
    per_step: int,
    rows: int,
    json_path: Path | None,
) -> None:
    """Measure how many tokens one gateway relays, and what one costs."""
    levels: list[Level] = []
    orders = [Order(float(rate), seconds, per_step) for rate in rates.split(",")]
    for name in api.split(","):
        if name not in get_args(Api):
            raise click.BadParameter(f"{name!r} is neither chat nor tgi", param_hint="--api")
        for count in map(int, streams.split(",")):
            levels += measure(name, count, orders, rows)
    _show(levels)
    if json_path is not None:
        told = {"machine": machine.describe(), "levels": levels}
        json_path.write_text(json.dumps(msgspec.to_builtins(told), indent=1) + "\n")


def measure(api: str, streams: int, orders: Sequence[Order], rows: int) -> list[Level]:
    """One start of everything. Raises: click.ClickException when a part does not do its work."""
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder,
        System(Path(folder)) as it,
    ):
        before = use_of(it.gateway.pid)
        it.open(api, streams, rows)
        opened = use_of(it.gateway.pid)
        open_ms = (_cpu_s(opened) - _cpu_s(before)) * 1000 / streams
        return [
            _level(it, order, api, streams, open_ms, before.total_rss_bytes) for order in orders
        ]


class System:
    """Server and gateway, and then sources and readers, as processes in a folder."""

    gateway: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]
    source: subprocess.Popen[bytes]
    readers: subprocess.Popen[bytes]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = contextlib.ExitStack()
        socket = folder / "server.sock"
        self._redis_url = f"unix://{socket}"
        self._server = server_spec(server_binary(), folder, socket).argv
        self._version = ModelStore(folder).add_simulated().version

    def __enter__(self) -> Self:
        folder = self._folder
        self.server = self._running.enter_context(running(self._server, {}, folder / "server.log"))
        _wait_for((folder / "server.sock").exists, "the server")
        limits = {
            "REDIS_URL": self._redis_url,
            "DATA_DIR": str(folder),
            "MODEL": SIMULATED_MODEL,
            "PORT": "0",
            "MAX_TOTAL_TOKENS": "32768",
            "LANE_CAP_TOKENS": str(1 << 40),
        }
        log = folder / "gateway.log"
        self.gateway = self._running.enter_context(
            running(
                [sys.executable, "-P", "-m", "gateway"],
                {f"HEADRACE_{name}": value for name, value in limits.items()},
                log,
            )
        )
        _wait_for(lambda: b'"gateway.ready"' in log.read_bytes(), "the gateway")
        ready = next(line for line in log.read_bytes().splitlines() if b'"gateway.ready"' in line)
        self._address = urlsplit(json.loads(ready)["url"])
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def open(self, api: str, streams: int, rows: int) -> None:
        """Open the streams, and have them claimed."""
        names = [self._redis_url, str(streams), str(rows), self._version]
        self.source = self._start("ops.bench.token_source", *names)
        _hear(self.source, Report)  # so that there are workers before anybody asks for one
        host, port = self._address.hostname or "", str(self._address.port)
        self.readers = self._start("ops.bench.stream_readers", host, port, api, str(streams))
        _hear(self.readers, Figures)
        _hear(self.source, Ready)

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._running.callback(_end, process)
        return process


def _level(
    it: System, order: Order, api: str, streams: int, open_ms: float, idle_bytes: int
) -> Level:
    _ask(it.readers, BEGIN, Figures)
    before = use_of(it.gateway.pid), use_of(it.server.pid)
    began_s = monotonic_s()
    report = _ask(it.source, msgspec.json.encode(order) + b"\n", Report)
    figures = _until_all_read(it.readers, report.tokens)
    seconds = monotonic_s() - began_s
    gateway, server = use_of(it.gateway.pid), use_of(it.server.pid)
    p50, p99, most = figures.age_ms

    def us(cpu_s: float) -> float:
        return round(cpu_s * 1e6 / max(1, figures.events), 2)

    gateway_s = _cpu_s(gateway) - _cpu_s(before[0])
    return Level(
        api=api,
        streams=streams,
        rate=order.rate,
        per_step=order.per_step,
        tokens=report.tokens,
        tokens_per_second=round(figures.events / seconds, 1),
        missing=report.tokens - figures.events,
        gateway_us=us(gateway_s),
        server_us=us(_cpu_s(server) - _cpu_s(before[1])),
        source_us=us(report.cpu_s),
        reader_us=us(figures.cpu_s),
        gateway_cores=round(gateway_s / seconds, 2),
        latency_p50_ms=p50,
        latency_p99_ms=p99,
        latency_max_ms=most,
        events_per_piece=round(figures.events / max(1, figures.pieces), 2),
        source_late_ms=round(report.late_s * 1000, 1),
        stream_kib=round((gateway.total_rss_bytes - idle_bytes) / 1024 / streams, 1),
        open_ms=round(open_ms, 2),
    )


def _until_all_read(readers: subprocess.Popen[bytes], tokens: int) -> Figures:
    """The figures once all is read; what is on its way for too long counts as missing."""
    deadline_s = monotonic_s() + _DRAIN_LIMIT_S
    found = _ask(readers, TELL, Figures)
    while found.events < tokens and monotonic_s() < deadline_s:
        time.sleep(_LOOK_S)
        found = _ask(readers, TELL, Figures)
    return found


def _ask(process: subprocess.Popen[bytes], line: bytes, kind: type[Told]) -> Told:
    if process.stdin is not None:
        process.stdin.write(line)
        process.stdin.flush()
    return _hear(process, kind)


def _hear(process: subprocess.Popen[bytes], kind: type[Told]) -> Told:
    """The next line that it tells. Raises: click.ClickException when it has ended."""
    line = process.stdout.readline() if process.stdout else b""
    if not line:
        raise click.ClickException(f"{process.args!r} ended: its words stand above")
    return msgspec.json.decode(line, type=kind)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # closes its pipes and waits for it
        pass


def _wait_for(is_there: Callable[[], bool], what: str) -> None:
    deadline_s = monotonic_s() + _START_TIMEOUT_S
    while not is_there():
        if monotonic_s() > deadline_s:
            raise click.ClickException(f"{what} did not start")
        time.sleep(_LOOK_S)


def _cpu_s(use: Use) -> float:
    return sum(use.cpu_s.values())


_COLUMNS = {
    "api": "api",
    "streams": "streams",
    "rate": "tokens/s each",
    "tokens_per_second": "tokens/s",
    "gateway_us": "gateway µs",
    "gateway_cores": "cores",
    "server_us": "server µs",
    "source_us": "workers µs",
    "reader_us": "readers µs",
    "latency_p50_ms": "p50 ms",
    "latency_p99_ms": "p99 ms",
    "events_per_piece": "events/piece",
    "missing": "missing",
    "stream_kib": "KiB/stream",
    "open_ms": "open ms",
}


def _show(levels: Sequence[Level]) -> None:
    table = Table(title="Processor time per token, latency from worker to reader")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    for level in levels:
        table.add_row(*(str(getattr(level, name)) for name in _COLUMNS))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
