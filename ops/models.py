"""`headrace model`: the commands around the model store, with a progress bar."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Table

from common.failures import Failure
from common.models.adapters import AdapterManifest, AdapterStore
from common.models.manifest import Manifest
from common.models.simulated import SIMULATED_MODEL
from common.models.store import DEFAULT_MODEL, ModelStore
from common.settings import Settings
from ops.processes import UpSettings
from ops.supervisor import die_with

_INTERRUPT_TIMEOUT_S = 5.0
_BYTES_FROM = 100_000
"""A step of at least this size counts bytes, a smaller one counts parts."""


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
        await _fetch(_source_of(settings), settings.model, settings.data_dir)


def _source_of(settings: UpSettings) -> str:
    if settings.model_id:
        return settings.model_id
    if settings.model in (DEFAULT_MODEL, SIMULATED_MODEL):
        return settings.model
    raise Failure(
        "MODEL_NOT_FOUND",
        f"{settings.model} is not in {settings.data_dir}; put it there first: "
        f"headrace model add SOURCE --name {settings.model} --data-dir {settings.data_dir}",
    )


async def _fetch(source: str, name: str, data_dir: Path) -> None:
    """Run ``headrace model add`` as a child on this terminal; it ends with the task that waits."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "ops.cli", "model", "add", source),
        *("--name", name, "--data-dir", str(data_dir)),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C comes from us alone, once
        preexec_fn=die_with(os.getpid()),
    )
    try:
        code = await process.wait()
    finally:
        await _interrupt(process)
    if code != 0:
        raise CouldNotFetch(f"the model {source} could not be fetched")


async def _interrupt(process: asyncio.subprocess.Process) -> None:
    """End a child as Ctrl-C would, which gives the terminal its cursor back; kill it if need be."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        await asyncio.wait_for(process.wait(), _INTERRUPT_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


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


def add_adapter(source: str, name: str | None, settings: Settings, *, force: bool) -> None:
    """Put an adapter beside its model and say what it is."""
    ModelStore(settings.data_dir).get(settings.model)
    name = name or Path(source.partition("@")[0]).expanduser().resolve().name
    with _progress() as on_progress:
        manifest = _adapters(settings).add(source, name, on_progress, force=force)
    modules = len(manifest.scales)
    _console().print(f"  [green]✓[/] {manifest.version}  rank {manifest.rank}, {modules} modules")


def show_adapters(settings: Settings, *, as_json: bool) -> None:
    manifests = _adapters(settings).list()
    if as_json:
        _print_json(manifests)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("version", "rank", "modules", "size", "licence", "source"):
        table.add_column(heading)
    for manifest in manifests:
        table.add_row(
            manifest.version,
            str(manifest.rank),
            str(len(manifest.scales)),
            _size(manifest),
            manifest.licence,
            manifest.source,
        )
    none = f"no adapters of {settings.model} yet: headrace adapter add SOURCE"
    _console().print(table if manifests else none)


def remove_adapter(name: str, settings: Settings) -> None:
    """Take an adapter out of the list of those that requests may ask for."""
    _adapters(settings).remove(name)
    _console().print(f"  [green]✓[/] {name} is gone")


def _adapters(settings: Settings) -> AdapterStore:
    return AdapterStore.beside(settings.data_dir, settings.model)


class _Amount(ProgressColumn):
    """A bar, how much, and how fast; nothing for a step whose size nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=30)

    def render(self, task: Task) -> RenderableType:
        if task.total is None:
            return ""
        grid = Table.grid(padding=(0, 2))
        grid.add_row(self._bar(task), _amount(task.completed, task.total), _speed(task))
        return grid


def _amount(done: float, total: float) -> str:
    if total < _BYTES_FROM:
        return f"{done:.0f} of {total:.0f}"
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"


def _speed(task: Task) -> str:
    speed = task.finished_speed or task.speed
    is_bytes = task.total is not None and task.total >= _BYTES_FROM
    return f"{speed / 1e6:.1f} MB/s" if is_bytes and speed else ""


@contextmanager
def _progress() -> Generator[Callable[[str, int, int], None]]:
    """One line for each step; a bar where its size is known, else it vanishes when it is over."""
    spinner = SpinnerColumn(finished_text="[green]✓[/]")
    columns = (TextColumn(" "), spinner, TextColumn("{task.description}"))
    with Progress(*columns, _Amount(), console=_console()) as progress:
        current: tuple[str, TaskID] | None = None

        def end() -> None:
            if current is not None and not progress.tasks[current[1]].finished:
                progress.update(current[1], visible=False)

        def on_progress(step: str, done: int, total: int) -> None:
            nonlocal current
            if current is None or current[0] != step:
                end()
                current = (step, progress.add_task(step, total=None))
            progress.update(current[1], completed=done, total=total or None)

        yield on_progress
        end()


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _size(manifest: Manifest | AdapterManifest) -> str:
    return f"{manifest.total_bytes / 1e6:,.0f} MB"


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
