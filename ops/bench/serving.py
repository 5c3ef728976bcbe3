"""`headrace bench --url`: measure running servers one after another, show them side by side."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ops.bench import report
from ops.bench.dialects import ApiName
from ops.bench.load import Level, Load, LoadError, Session, Target, find_target
from ops.bench.report import Measured, Report

_SHOW_EVERY_S = 0.25


def bench(
    urls: Sequence[str],
    load: Load,
    *,
    counts: Sequence[int],
    rates: Sequence[float] = (),
    api: ApiName | None = None,
    model: str | None = None,
    api_key: str | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> None:
    """Measure each server at each number of clients, or at each rate where ``rates`` are given.

    Raises: click.ClickException when a server cannot be measured, or answered no request.
    """
    if plot_path is not None:
        import_module("matplotlib")  # missed now, not after minutes of measuring

    async def measure_all() -> list[Measured]:
        targets = [
            await find_target(url, load, api=api, model=model, api_key=api_key) for url in urls
        ]
        return [await _measure(target, load, counts, rates) for target in targets]

    try:
        measured = uvloop.run(measure_all())
    except LoadError as error:
        raise click.ClickException(str(error)) from error
    result = Report(
        prompt_tokens=load.prompt_tokens,
        new_tokens=load.new_tokens,
        shared_prefix=load.shared_prefix,
        measured=measured,
    )
    report.show(result, Console(highlight=False))
    if json_path is not None:
        report.write_json(result, json_path)
    if plot_path is not None:
        report.draw(result, plot_path)
    if not any(level.output_tokens for each in measured for level in each.levels):
        raise click.ClickException("no request was answered")


async def _measure(
    target: Target, load: Load, counts: Sequence[int], rates: Sequence[float]
) -> Measured:
    session = Session(target, load)
    tokens = sum(rate * load.limit_s * load.new_tokens for rate in rates) or sum(
        count * load.requests * load.new_tokens for count in counts
    )
    levels: list[Level] = []
    async with _progress(session, f"{target.model} at {target.url}", tokens) as tell:
        tell("warming up")
        await session.warm_up(max(counts))
        for rate in rates:
            tell(f"{rate:g} requests/s")
            levels.append(await session.open_loop(rate))
        for count in () if rates else counts:
            tell(f"{count} clients")
            levels.append(await session.closed_loop(count))
    return Measured(
        url=target.url,
        model=target.model,
        api=target.dialect.name,
        levels=levels,
        notes=_notes(target, load),
    )


def _notes(target: Target, load: Load) -> list[str]:
    notes: list[str] = []
    if not target.run_on:
        notes.append("this API cannot be told to ignore the end token: answers may be shorter")
    if not target.counts_prompts:
        notes.append(f"the server does not count prompts: {load.prompt_tokens} words each")
    return notes


@asynccontextmanager
async def _progress(
    session: Session, title: str, total: float
) -> AsyncGenerator[Callable[[str], None]]:
    """A bar over all tokens that are to come; drawn four times a second, as drawing costs time.

    Gives a function that names the current stage.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        auto_refresh=False,
        transient=True,
        console=Console(stderr=True),
    )
    task = bar.add_task(title, total=total)

    async def follow() -> None:
        while True:
            bar.update(task, completed=session.meter.num_chunks, refresh=True)
            await asyncio.sleep(_SHOW_EVERY_S)

    with bar:
        following = asyncio.create_task(follow())
        try:
            yield lambda stage: bar.update(task, description=f"{title}, {stage}")
        finally:
            following.cancel()
