"""What a running batch costs those who chat, and how much of what they leave it gets.

A round has three windows: readers alone, the same readers beside a batch, and the batch alone.
Readers ask at random times, the same ones in every window, whether or not they were answered.
Prompts and answers have one shape everywhere, so that a token is worth the same in all of them.
What readers leave is the batch's rate alone less what readers took; its share is its rate beside
them over that.
"""

import asyncio
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
import httpx
import msgspec
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from common.batches import FINAL
from common.clock import monotonic_s
from common.models.store import DEFAULT_MODEL
from ops.bench.instance import own_instance
from ops.bench.load import Load, LoadError, Session, Spread, Target, find_target, gaps_s, spread
from ops.bench.prompts import Prompts
from ops.bench.stream import Answer

_LOOK_S = 0.1
_RETRY_S = 0.2
_START_LIMIT_S = 120.0
_SETTLE_S = 2.0
"""From a batch's first tokens to its full size."""
_PLAIN_AT_ONCE = 64

Body = dict[str, object]


class Readers(msgspec.Struct, frozen=True, kw_only=True):
    """What the interactive load saw, all windows of a kind together; times in milliseconds."""

    requests: int
    failures: int
    tokens_per_second: float
    first_token_ms: Spread | None
    gap_ms: Spread | None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Ratios are of p99, beside the batch over alone; rates in tokens per second."""

    alone: Readers
    beside: Readers
    first_token_ratio: float
    gap_ratio: float
    batch_alone: float
    batch_beside: float
    batch_share: float
    """Of what readers leave: 1 is all of it."""


class Backlog(Protocol):
    """Work in the lane ``batch`` for longer than any window."""

    async def start(self) -> None: ...

    async def num_tokens(self) -> float:
        """How many of its tokens have been made."""
        ...

    async def stop(self) -> None: ...


@dataclass
class Job:
    """A batch, by the API. ``fresh`` makes bodies whose prompts were in no batch before."""

    client: httpx.AsyncClient
    fresh: Callable[[], list[Body]]
    new_tokens: int
    id: str = ""

    async def start(self) -> None:
        file = await self.client.post(
            "/v1/files",
            data={"purpose": "batch"},
            files={"file": ("bench.jsonl", io.BytesIO(_batch_file(self.fresh())))},
        )
        body = {"endpoint": "/v1/completions", "completion_window": "24h"}
        made = await self.client.post(
            "/v1/batches", json={**body, "input_file_id": _checked(file)["id"]}
        )
        self.id = _checked(made)["id"]

    async def num_tokens(self) -> float:
        batch = _checked(await self.client.get(f"/v1/batches/{self.id}"))
        if batch["status"] in FINAL:
            raise click.ClickException(f"the batch is {batch['status']}: it needs more --lines")
        return batch["request_counts"]["completed"] * self.new_tokens

    async def stop(self) -> None:
        _checked(await self.client.post(f"/v1/batches/{self.id}/cancel"))
        batch: dict[str, Any] = {"status": ""}
        while batch["status"] not in FINAL:
            await asyncio.sleep(_RETRY_S)
            batch = _checked(await self.client.get(f"/v1/batches/{self.id}"))


@dataclass
class PlainRequests:
    """Requests one after another at ``_PLAIN_AT_ONCE`` places; the client's key puts them into the
    lane.
    """

    client: httpx.AsyncClient
    fresh: Callable[[], list[Body]]
    new_tokens: int
    num_done: int = 0
    _places: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def start(self) -> None:
        bodies, self.num_done = self.fresh(), 0
        self._places = [
            asyncio.create_task(self._keep_asking(bodies[number::_PLAIN_AT_ONCE]))
            for number in range(_PLAIN_AT_ONCE)
        ]

    async def _keep_asking(self, bodies: Sequence[Body]) -> None:
        headers = {"x-headrace-disconnect": "cancel"}
        for body in bodies:
            _checked(await self.client.post("/v1/completions", json=body, headers=headers))
            self.num_done += 1

    async def num_tokens(self) -> float:
        for place in self._places:
            if place.done():
                place.result()
                raise click.ClickException("the requests have run out: it needs more --lines")
        return self.num_done * self.new_tokens

    async def stop(self) -> None:
        for place in self._places:
            place.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)


def _checked(response: httpx.Response) -> dict[str, Any]:
    """Raises: click.ClickException with the server's own words."""
    if not response.is_success:
        raise click.ClickException(f"{response.request.url.path}: {response.text[:300]}")
    return response.json()


# --- measuring


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen in one: of the readers, and the batch's rate in tokens per second."""

    seconds: float
    answers: list[Answer] = field(default_factory=list[Answer])
    num_read: float = 0.0
    """Tokens that readers got inside the window."""
    batch_rate: float = 0.0


async def measure(
    session: Session, backlog: Backlog, rate: float, rounds: int, console: Console
) -> Figures:
    """Run the windows. ``session.load.limit_s`` is how long each one is."""
    alone: list[Window] = []
    beside: list[Window] = []
    batch: list[Window] = []
    for number in range(rounds):
        alone.append(await _window(session, rate, None))
        await backlog.start()
        try:
            await _until_it_runs(backlog)
            beside.append(await _window(session, rate, backlog))
            batch.append(await _window(session, 0.0, backlog))
        finally:
            await backlog.stop()
        now = figures(alone, beside, batch)
        console.print(
            f"round {number + 1}: first token × {now.first_token_ratio:.2f}, gap ×"
            f" {now.gap_ratio:.2f}, the batch's share {now.batch_share:.0%}",
            style="dim",
        )
    return figures(alone, beside, batch)


async def _window(session: Session, rate: float, backlog: Backlog | None) -> Window:
    seconds, began_s = session.load.limit_s, monotonic_s()
    readers = asyncio.create_task(session.arrivals(rate) if rate else asyncio.sleep(seconds, []))
    batch_rate = await _rate_of(backlog, seconds) if backlog else 0.0
    answers = await readers
    within = (began_s, began_s + seconds)
    return Window(seconds, answers, sum(_num_read(a, *within) for a in answers), batch_rate)


async def _rate_of(backlog: Backlog, seconds: float) -> float:
    """Between the first and the last change that is seen: a batch's counts move in steps."""
    end_s = monotonic_s() + seconds
    seen = [(monotonic_s(), await backlog.num_tokens())]
    while monotonic_s() < end_s:
        await asyncio.sleep(_LOOK_S)
        num_tokens = await backlog.num_tokens()
        if num_tokens != seen[-1][1]:
            seen.append((monotonic_s(), num_tokens))
    if len(seen) < 3:
        return (seen[-1][1] - seen[0][1]) / seconds
    (first_s, first), (last_s, last) = seen[1], seen[-1]
    return (last - first) / (last_s - first_s)


async def _until_it_runs(backlog: Backlog) -> None:
    """Raises: click.ClickException when it makes no tokens."""
    deadline_s = monotonic_s() + _START_LIMIT_S
    while not await backlog.num_tokens():
        if monotonic_s() > deadline_s:
            raise click.ClickException("the batch made no progress")
        await asyncio.sleep(_LOOK_S)
    await asyncio.sleep(_SETTLE_S)


def _num_read(answer: Answer, begin_s: float, end_s: float) -> float:
    """Tokens of an answer inside a window: those of its events there."""
    inside = sum(begin_s <= at_s < end_s for at_s in answer.chunk_at_s)
    return answer.num_tokens * inside / len(answer.chunk_at_s) if inside else 0.0


def figures(alone: Sequence[Window], beside: Sequence[Window], batch: Sequence[Window]) -> Figures:
    quiet, disturbed = _readers(alone), _readers(beside)
    batch_alone, batch_beside = _mean_rate(batch), _mean_rate(beside)
    left = batch_alone - disturbed.tokens_per_second
    return Figures(
        alone=quiet,
        beside=disturbed,
        first_token_ratio=_ratio(disturbed.first_token_ms, quiet.first_token_ms),
        gap_ratio=_ratio(disturbed.gap_ms, quiet.gap_ms),
        batch_alone=round(batch_alone, 1),
        batch_beside=round(batch_beside, 1),
        batch_share=round(batch_beside / left, 3) if left > 0 else 0.0,
    )


def _readers(windows: Sequence[Window]) -> Readers:
    answers = [answer for window in windows for answer in window.answers]
    good = [answer for answer in answers if not answer.failure]
    seconds = sum(window.seconds for window in windows)
    return Readers(
        requests=len(answers),
        failures=len(answers) - len(good),
        tokens_per_second=round(sum(window.num_read for window in windows) / seconds, 1),
        first_token_ms=spread([a.chunk_at_s[0] - a.began_s for a in good if a.chunk_at_s]),
        gap_ms=spread([gap for answer in good for gap in gaps_s(answer)]),
    )


def _mean_rate(windows: Sequence[Window]) -> float:
    return sum(window.batch_rate for window in windows) / len(windows)


def _ratio(beside: Spread | None, alone: Spread | None) -> float:
    return round(beside.p99 / alone.p99, 3) if beside and alone and alone.p99 else 0.0


# --- the command


@click.command()
@click.option("--url", default="", help="A running gateway; else Headrace is started for this.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="For --url. [OPENAI_API_KEY]")
@click.option(
    "--plain-key",
    help="Instead of a batch, plain requests with this key, whose best lane is batch.",
)
@click.option("--rate", default=2.0, show_default=True, help="Readers' requests per second.")
@click.option("--seconds", default=10.0, show_default=True, help="Length of each window.")
@click.option("--rounds", default=3, show_default=True, help="Of three windows each.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--lines", "num_lines", default=5000, show_default=True, help="In the batch.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", default=Path("var"), type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A line of JSON instead of a table.")
def main(
    url: str,
    api_key: str | None,
    plain_key: str | None,
    rate: float,
    seconds: float,
    rounds: int,
    prompt_tokens: int,
    new_tokens: int,
    num_lines: int,
    model: str,
    data_dir: Path,
    as_json: bool,
) -> None:
    """What a running batch costs those who chat, and how much of the rest it gets.

    The machine must be quiet: p99 of a few hundred answers is what the slowest moments make of it.
    """
    load = Load(prompt_tokens=prompt_tokens, new_tokens=new_tokens, limit_s=seconds)
    console = Console(stderr=True, highlight=False)
    own = own_instance("--model", model, models=data_dir / "models")
    with nullcontext((None, [url])) if url else own as (_, addresses):
        run = _run(addresses[0], load, api_key, plain_key, rate, rounds, num_lines, console)
        try:
            result = uvloop.run(run)
        except LoadError as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(msgspec.json.encode(result))
    else:
        _show(result)


async def _run(
    url: str,
    load: Load,
    api_key: str | None,
    plain_key: str | None,
    rate: float,
    rounds: int,
    num_lines: int,
    console: Console,
) -> Figures:
    target = await find_target(url, load, api="completions", api_key=api_key)
    session = Session(target, load)
    await session.warm_up(_PLAIN_AT_ONCE)
    headers = {"Authorization": f"Bearer {plain_key}"} if plain_key else target.headers
    async with httpx.AsyncClient(
        base_url=target.url.removesuffix(target.dialect.path),
        headers=headers,
        timeout=load.timeout_s,
        limits=httpx.Limits(max_connections=2 * _PLAIN_AT_ONCE),
    ) as client:
        kind = PlainRequests if plain_key else Job
        backlog = kind(client, _bodies(target, load, num_lines), load.new_tokens)
        return await measure(session, backlog, rate, rounds, console)


def _bodies(target: Target, load: Load, num_lines: int) -> Callable[[], list[Body]]:
    prompts = Prompts(target.num_words, seed=load.seed + 1)
    shape = {"model": target.model, "max_tokens": load.new_tokens, "temperature": 0}

    def fresh() -> list[Body]:
        return [{"prompt": prompts.next(), **shape, **target.run_on} for _ in range(num_lines)]

    return fresh


def _batch_file(bodies: Sequence[Body]) -> bytes:
    where = {"method": "POST", "url": "/v1/completions"}
    lines = ({"custom_id": f"{n}", **where, "body": body} for n, body in enumerate(bodies))
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def _show(figures: Figures) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("ms, p50 / p99", "readers alone", "beside the batch", "ratio of p99"):
        table.add_column(heading, justify="left" if heading.startswith("ms") else "right")
    alone, beside = figures.alone, figures.beside
    for name, quiet, disturbed, ratio in (
        ("first token", alone.first_token_ms, beside.first_token_ms, figures.first_token_ratio),
        ("gap", alone.gap_ms, beside.gap_ms, figures.gap_ratio),
    ):
        table.add_row(name, _shown(quiet), _shown(disturbed), f"{ratio:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nreaders {alone.tokens_per_second:.0f} tokens/s alone, {beside.tokens_per_second:.0f}"
        f" beside the batch; {alone.requests + beside.requests} requests,"
        f" {alone.failures + beside.failures} failed"
        f"\nbatch {figures.batch_alone:.0f} tokens/s alone, {figures.batch_beside:.0f} beside"
        f" readers: {figures.batch_share:.0%} of what they leave\n"
    )


def _shown(spread: Spread | None) -> str:
    return f"{spread.p50:.1f} / {spread.p99:.1f}" if spread else "–"
