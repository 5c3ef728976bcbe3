"""`headrace top`: the overview of a pool in a terminal, as the live page shows it.

From a gateway's feed with --url, from anywhere; else straight from the Redis of the pool.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import click
import httpx2
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.broker import Broker, connect
from common.clock import monotonic_s, wall_ms
from common.diagnosis import counted, without_gateway, without_news, without_redis
from common.failures import Failure
from common.overview import Diagnosis, Overview, Stats, decode
from common.settings import Settings
from ops import runfile
from ops.tables import shown_memory

_LOOK_S = 0.5
_OLD_S = 5.0
_RETRY_S = 1.0
_FIRST_WAIT_S = 5.0
_WIDE_COLUMNS = 100
_MAX_WORKERS = 24
"""Where no screen says how many lines there are."""
_STYLES = {"ok": "green", "warning": "yellow", "critical": "bold red"}
_STATES = {"ready": "green", "loading": "cyan", "draining": "yellow", "drained": "yellow"}


class NothingToShow(click.ClickException):
    """No overview came."""


def top(
    settings: Settings, *, url: str | None, api_key: str | None, once: bool, as_json: bool
) -> None:
    """Print one overview after the other, or the next one.

    Raises: NothingToShow, Failure.
    """
    source = _from_gateway(url, api_key) if url else _from_redis(settings)
    asyncio.run(_print(source, as_json=as_json) if once else _follow(source, as_json=as_json))


async def _print(source: AsyncGenerator[Overview], *, as_json: bool) -> None:
    """Raises: NothingToShow, Failure."""
    async with aclosing(source):
        try:
            overview = await asyncio.wait_for(anext(source), _FIRST_WAIT_S)
        except TimeoutError as error:
            raise NothingToShow("no overview came: does `headrace exporter` run?") from error
    if as_json:
        click.echo(msgspec.json.encode(overview))
    else:
        _console().print(picture(overview))


async def _follow(source: AsyncGenerator[Overview], *, as_json: bool) -> None:
    async with aclosing(source):
        if as_json:
            async for overview in source:
                click.echo(msgspec.json.encode(overview))
            return
        console = _console()
        if not console.is_terminal:  # a file or a pipe gets one after the other
            async for overview in source:
                console.print(picture(overview), Text())
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            async for overview in source:
                live.update(fitting(overview, console), refresh=True)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDE_COLUMNS)


# Where it comes from -----------------------------------------------------------------------------


async def _from_redis(settings: Settings) -> AsyncGenerator[Overview]:
    """The newest overview whenever there is another one, or it has become old.

    Raises: Failure where Redis does not answer at first; later the overviews say so.
    """
    settings = runfile.joined(settings)
    broker = Broker(connect(settings.redis_url), settings.model)
    seen, last, heard_s = "", Overview(at=0.0, model=settings.model), 0.0
    try:
        while True:
            try:
                newest = await broker.overview_store.newest()
            except Failure:
                if not heard_s:
                    raise
                yield without_redis(last, monotonic_s() - heard_s)
            else:
                heard_s = monotonic_s()
                last = decode(newest[1]) if newest else last
                age_s = wall_ms() / 1000 - last.at
                if newest is None or age_s > _OLD_S:
                    yield without_news(last, age_s if newest else _OLD_S)
                elif newest[0] != seen:
                    seen = newest[0]
                    yield last
            await asyncio.sleep(_LOOK_S)
    finally:
        await broker.close()


async def _from_gateway(url: str, api_key: str | None) -> AsyncGenerator[Overview]:
    """Its feed, taken up again where it broke off.

    Raises: NothingToShow for a gateway that refuses, or that does not answer at first.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    last, last_id, heard_s = None, "", 0.0
    async with httpx2.AsyncClient(base_url=url, timeout=20) as client:
        while True:
            try:
                resumed = {"last-event-id": last_id} if last_id else {}
                feed = client.stream("GET", "/ops/feed", headers=headers | resumed)
                async with feed as answer:
                    if answer.status_code != HTTPStatus.OK:
                        raise NothingToShow(_refusal(await answer.aread(), answer.status_code))
                    async for id, overview in _overviews(answer):
                        last, last_id, heard_s = overview, id or last_id, monotonic_s()
                        yield overview
            except httpx2.HTTPError as error:
                if last is None:
                    raise NothingToShow(f"{url} does not answer: {error}") from error
                yield without_gateway(last, monotonic_s() - heard_s)
            await asyncio.sleep(_RETRY_S)


async def _overviews(answer: httpx2.Response) -> AsyncGenerator[tuple[str, Overview]]:
    kind, id = "", ""
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "id":
            id = value
        elif name == "data" and kind == "overview":
            yield id, decode(value)
        elif not line:
            kind, id = "", ""


def _refusal(body: bytes, status: int) -> str:
    try:
        return str(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the gateway answers {status}"


# How it looks ------------------------------------------------------------------------------------


def fitting(overview: Overview, console: Console) -> Group:
    """As many workers as the screen has room for between the rest."""
    num_other_lines = len(console.render_lines(picture(overview, max_workers=1))) - 1
    return picture(overview, max_workers=max(1, console.height - num_other_lines))


def picture(overview: Overview, max_workers: int = _MAX_WORKERS) -> Group:
    """All of it, readable at 80 columns, with at most so many lines of workers."""
    parts: list[Any] = [_banner(overview.diagnosis), Text(), _figures(overview), Text()]
    parts.append(_workers(overview, max_workers))
    if waiting := [lane for lane in overview.lanes if lane.depth]:
        table = _table("waiting in", "how many", "oldest", "a new one waits", "tokens")
        for lane in waiting:
            wait = "?" if lane.est_wait_s is None else f"{lane.est_wait_s:.1f} s"
            table.add_row(
                lane.lane,
                str(lane.depth),
                f"{lane.oldest_age_s:.0f} s",
                wait,
                str(lane.backlog_tokens),
            )
        parts += [Text(), table]
    if failing := [error for error in overview.errors if error.count_1m]:
        table = _table("failures of the last minute", "how many")
        for error in failing[:5]:
            table.add_row(error.code, str(error.count_1m))
        parts += [Text(), table]
    parts += [Text(), _foot(overview)]
    return Group(*parts)


def _banner(diagnosis: list[Diagnosis]) -> Text:
    text = Text()
    for number, found in enumerate(diagnosis[:3]):
        if number:
            text.append("\n")
        text.append(found.what, style=_STYLES[found.severity])
        if number == 0:
            text.append(f"\n{found.why}\n", style="dim")
            text.append(f"Run: {found.command}")
    return text


def _figures(overview: Overview) -> Table:
    stats, latency = overview.stats, overview.latency
    table = Table.grid(padding=(0, 3))
    rows = (
        ("requests", f"{overview.requests.per_s:.1f}/s", "running", str(overview.requests.running)),
        ("tokens", f"{stats.tokens_per_second:.0f}/s", "failed", _percent(stats)),
        ("queue time", _ms(stats.queue_time), "generation", _ms(stats.generation_time)),
        ("first token", _pair(latency.ttft.p50, latency.ttft.p99), "between tokens",
         _pair(latency.inter_token.p50, latency.inter_token.p99)),
    )  # fmt: skip
    for name, value, other, other_value in rows:
        table.add_row(Text(name, style="dim"), value, Text(other, style="dim"), other_value)
    return table


def _workers(overview: Overview, max_lines: int) -> Table:
    """Who is not well stands first."""
    workers = sorted(overview.workers, key=lambda worker: worker.state == "ready")
    num_shown = len(workers) if len(workers) <= max_lines else max_lines - 1
    table = _table("worker", "state", "batch", "cache", "tokens/s", "memory", "heard", "held")
    for worker in workers[:num_shown]:
        table.add_row(
            worker.name,
            Text(worker.state, style=_STATES.get(worker.state, "red")),
            f"{worker.batch_size:.0f}/{worker.max_batch_size}",
            f"{100 * worker.kv_used:.0f} %",
            f"{worker.tokens_per_second:.1f}",
            shown_memory(worker),
            f"{worker.heartbeat_age_s:.1f} s",
            str(worker.held),
        )
    if more := len(workers) - num_shown:
        table.add_row(f"and {more} more")
    if not workers:
        table.add_row("none")
    return table


def _foot(overview: Overview) -> Text:
    redis = overview.redis
    limit = f" of {redis.max_bytes / 2**20:.0f}" if redis.max_bytes else ""
    return Text(
        f"{overview.model}  {counted(len(overview.gateways), 'gateway')}, "
        f"{counted(overview.streams, 'stream')}  {counted(len(overview.batches), 'batch', 'es')}  "
        f"{counted(overview.dead_letters, 'dead letter')}  "
        f"Redis {redis.used_bytes / 2**20:.0f}{limit} MiB",
        style="dim",
    )


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _percent(stats: Stats) -> str:
    return f"{100 * stats.error_rate:.1f} %"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _pair(p50: float | None, p99: float | None) -> str:
    return f"{_ms(p50)}, 99th {_ms(p99)}"
