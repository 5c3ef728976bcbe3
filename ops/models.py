"""`headrace model`: the commands around the model store, with a progress bar."""

import asyncio
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from common.failures import Failure
from common.models.manifest import Manifest
from common.models.simulated import SIMULATED_MODEL
from common.models.store import DEFAULT_MODEL, ModelStore
from common.settings import Settings
from ops.processes import UpSettings


class CouldNotFetch(click.ClickException):
    """The default model could not be fetched; the reason stands on the lines before."""


async def ensure_model(settings: UpSettings) -> None:
    """Fetch the default model into the store unless it is there; others must have been added.

    Runs in a process of its own: converting a model takes memory that the supervisor should not
    keep.

    Raises: Failure MODEL_NOT_FOUND with the command that adds it; CouldNotFetch.
    """
    store = ModelStore(settings.data_dir)
    try:
        store.get(settings.model)
    except Failure as failure:
        if failure.code != "MODEL_NOT_FOUND":
            raise
        await _fetch(_source_of(settings), settings.data_dir)


def _source_of(settings: UpSettings) -> str:
    if settings.model in (DEFAULT_MODEL, SIMULATED_MODEL):
        return settings.model
    raise Failure(
        "MODEL_NOT_FOUND",
        f"{settings.model} is not in {settings.data_dir}; put it there first: "
        f"headrace model add SOURCE --name {settings.model} --data-dir {settings.data_dir}",
    )


async def _fetch(source: str, data_dir: Path) -> None:
    """Run ``headrace model add`` as a child on this terminal; it dies with the task that waits."""
    command = [sys.executable, "-P", "-m", "ops.cli", "model", "add", source]
    process = await asyncio.create_subprocess_exec(
        *command, "--data-dir", str(data_dir), stdin=asyncio.subprocess.DEVNULL
    )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0:
        raise CouldNotFetch(f"the model {source} could not be fetched")


def add(source: str, name: str | None, settings: Settings, *, force: bool) -> None:
    """Put a model into the store and say what it is."""
    with _progress() as on_progress:
        manifest = ModelStore(settings.data_dir).add(source, name, on_progress, force=force)
    _console().print(f"  [green]✓[/] {manifest.version}  {_size(manifest)}, {manifest.licence}")


def show_list(settings: Settings, *, as_json: bool) -> None:
    manifests = ModelStore(settings.data_dir).list()
    if as_json:
        _print_json(manifests)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("version", "architecture", "dtype", "size", "licence", "source"):
        table.add_column(heading)
    for manifest in manifests:
        table.add_row(
            manifest.version,
            manifest.architecture,
            manifest.dtype,
            _size(manifest),
            manifest.licence,
            manifest.source,
        )
    _console().print(table if manifests else "no models yet: headrace model add SOURCE")


def show_one(name: str, settings: Settings) -> None:
    """Print the manifest of one model."""
    _print_json(ModelStore(settings.data_dir).get(name).manifest)


@contextmanager
def _progress() -> Generator[Callable[[str, int, int], None]]:
    """A bar for each step (a file, a conversion); silent where the output is no terminal."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=_console()) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=None)
            progress.update(tasks[step], completed=done, total=total or None)

        yield on_progress


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _size(manifest: Manifest) -> str:
    return f"{manifest.total_bytes / 1e6:,.0f} MB"


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
