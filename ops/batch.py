"""`headrace batch`: hand over a file of requests, watch it being worked off, fetch the answers."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import click
import orjson
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from common.batches import FINAL
from common.settings import Settings
from ops import runfile
from ops.batch_client import Batch, BatchClient
from ops.gateways import DEFAULT_URL, Gateways
from ops.tables import print_table, shown_time

SOME_FAILED = 3
"""Exit code: the batch is done, and some of its lines failed."""
NOT_COMPLETED = 4
"""Exit code: the batch failed, expired or was cancelled."""
_MAX_LINE_BYTES = 16 * 1024 * 1024
_SHOWN_ERRORS = 10


def _gateway_options(command: Callable[..., Any]) -> Callable[..., Any]:
    url = click.option(
        "--url",
        "urls",
        multiple=True,
        envvar="HEADRACE_URL",
        help="A gateway; more than once: others that serve the same. Default: those of the "
        f"`headrace up` that runs here, else {DEFAULT_URL}. [HEADRACE_URL]",
    )
    key = click.option(
        "--key", envvar="OPENAI_API_KEY", help="API key with the scope batch. [OPENAI_API_KEY]"
    )
    return url(key(command))


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Of ``name=value``. Raises: click.BadParameter."""
    pairs: dict[str, str] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE")
        pairs[name] = text
    return pairs


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("submit")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--endpoint", help="Where its lines go, if not where the first one says.")
@click.option(
    "--metadata", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="May be repeated."
)
@click.option("--watch", is_flag=True, help="Stay until it has ended, then fetch the results.")
@click.option(
    "-o", "--output", type=_FILE, help="With --watch: for answers. [FILE, ending in .output.jsonl]"
)
@click.option(
    "--errors", type=_FILE, help="With --watch: for failed lines. [FILE, ending in .errors.jsonl]"
)
@_gateway_options
def submit(
    file: Path,
    endpoint: str | None,
    metadata: dict[str, str],
    *,
    watch: bool,
    output: Path | None,
    errors: Path | None,
    urls: tuple[str, ...],
    key: str | None,
) -> int:
    """Hand over FILE, with a request in each line, and print the id of the batch.

    Exits with 0; with --watch also with 3 if some lines failed, and with 4 if the batch failed,
    expired or was cancelled. Ctrl-C leaves the batch alone: `headrace batch status --watch ID`.
    """
    endpoint = endpoint or _endpoint_of(file)
    console = _console()
    with _client(urls, key, console) as client:
        client.check()  # before the whole file is sent
        batch = client.create(_upload(client, file, console), endpoint, metadata)
        click.echo(batch["id"])
        if not watch:
            console.print(f"headrace batch status --watch {batch['id']}", style="dim")
            return 0
        batch = _watch(client, batch, console)
        _fetch(client, batch["output_file_id"], output or file.with_suffix(".output.jsonl"))
        _fetch(client, batch["error_file_id"], errors or file.with_suffix(".errors.jsonl"))
        return _tell_end(batch, console)


@click.command("status")
@click.argument("batch_id", required=False)
@click.option("--watch", is_flag=True, help="Stay until it has ended; exits as submit does.")
@click.option("--json", "as_json", is_flag=True, help="As the API shows it, for programs.")
@_gateway_options
def status(
    batch_id: str | None, *, watch: bool, as_json: bool, urls: tuple[str, ...], key: str | None
) -> int:
    """Show a batch; without an id, those that have not ended."""
    console = _console()
    if batch_id is None and watch:
        raise click.UsageError("--watch needs the id of a batch")
    with _client(urls, key, console) as client:
        if batch_id is None:
            batches = [batch for batch in client.newest(100) if batch["status"] not in FINAL]
            _show_all(batches, as_json=as_json)
            return 0
        batch = client.get(batch_id)
        if watch:
            batch = _watch(client, batch, console)
    if as_json:
        click.echo(orjson.dumps(batch, option=orjson.OPT_INDENT_2))
    else:
        _show(batch)
    return _exit_code(batch) if watch else 0


@click.command("list")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="As the API shows them, for programs.")
@_gateway_options
def show_list(*, limit: int, as_json: bool, urls: tuple[str, ...], key: str | None) -> None:
    """List batches, the newest first."""
    with _client(urls, key, _console()) as client:
        _show_all(client.newest(limit), as_json=as_json)


@click.command("cancel")
@click.argument("batch_id")
@_gateway_options
def cancel(batch_id: str, urls: tuple[str, ...], key: str | None) -> None:
    """End a batch. Lines that are finished are kept, the others stand in its error file."""
    with _client(urls, key, _console()) as client:
        batch = client.cancel(batch_id)
    click.echo(f"{batch['id']} is {_words(batch['status'])}", err=True)


@click.command("results")
@click.argument("batch_id")
@click.option("-o", "--output", type=_FILE, help="For answers; else they are printed.")
@click.option("--errors", type=_FILE, help="For failed lines.")
@_gateway_options
def results(
    batch_id: str,
    output: Path | None,
    errors: Path | None,
    urls: tuple[str, ...],
    key: str | None,
) -> int:
    """Fetch what a batch has brought; exits as submit does."""
    console = _console()
    with _client(urls, key, console) as client:
        batch = client.get(batch_id)
        if batch["status"] not in FINAL:
            raise click.ClickException(
                f"{batch_id} is {_words(batch['status'])}: there are files once it has ended"
            )
        _fetch(client, batch["output_file_id"], output)
        if errors is not None:
            _fetch(client, batch["error_file_id"], errors)
        return _tell_end(batch, console)


# --- what is sent and fetched


@contextmanager
def _client(urls: tuple[str, ...], key: str | None, console: Console) -> Generator[BatchClient]:
    found = list(urls) or _urls_here() or [DEFAULT_URL]
    with Gateways(found, key, lambda words: console.print(words, style="yellow")) as gateways:
        yield BatchClient(gateways)


def _urls_here() -> list[str]:
    """The gateways of the supervisor that runs on this data directory."""
    run = runfile.read_state(Settings().data_dir)
    return [process.address for process in run.processes if process.address] if run else []


def _endpoint_of(file: Path) -> str:
    """Where the first line goes; all go to the same place.

    Raises: click.BadParameter for a file that does not say.
    """
    with file.open("rb") as lines:
        first = lines.readline(_MAX_LINE_BYTES)
    try:
        return str(orjson.loads(first)["url"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        raise click.BadParameter(
            f"the first line of {file} is no request with a `url`", param_hint="FILE"
        ) from None


def _upload(client: BatchClient, file: Path, console: Console) -> str:
    """The id under which a gateway has it."""
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("", total=file.stat().st_size)

        def shown(content: BinaryIO) -> BinaryIO:
            progress.reset(task)
            return progress.wrap_file(content, task_id=task)

        return client.upload(file, shown)


def _fetch(client: BatchClient, file_id: str | None, path: Path | None) -> None:
    """Write a file of results to ``path``, whole or not at all; without one, to standard output.

    A batch that has no such file leaves no such file.
    """
    if file_id is None:
        return
    if path is None:
        client.copy(file_id, sys.stdout.buffer)
        return
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        client.copy(file_id, file)
    part.replace(path)


# --- watching


def _watch(client: BatchClient, batch: Batch, console: Console) -> Batch:
    """Show a batch until it has ended; returns it as it is then."""
    said = ""
    try:
        with _Bar(console) as bar:
            for now in client.followed(batch["id"]):
                batch = now
                bar.show(batch)
                if batch["status"] != said and not console.is_terminal:
                    said = batch["status"]
                    console.print(f"{batch['id']} is {_words(said)}")
    except KeyboardInterrupt:
        console.print(f"the batch goes on: headrace batch status --watch {batch['id']}")
        raise
    return batch


class _Rate(ProgressColumn):
    """Lines per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} lines/s" if task.speed else "")


class _Bar:
    """How far a batch has come."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[failed]}", style="red"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, failed="", start=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, batch: Batch) -> None:
        counts = batch["request_counts"]
        self._progress.update(
            self._task,
            description=_words(batch["status"]),
            total=counts["total"] or None,
            completed=counts["completed"] + counts["failed"],
            failed=f"{counts['failed']} failed" if counts["failed"] else "",
        )


# --- telling


def _console() -> Console:
    """Standard output is for ids, answers and tables."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def _words(state: str) -> str:
    return state.replace("_", " ")


def _exit_code(batch: Batch) -> int:
    if batch["status"] != "completed":
        return NOT_COMPLETED
    return SOME_FAILED if batch["request_counts"]["failed"] else 0


def _tell_end(batch: Batch, console: Console) -> int:
    """One line on how it ended, and why it was refused; returns the exit code."""
    counts = batch["request_counts"]
    console.print(
        f"{batch['id']} {_words(batch['status'])}: {counts['completed']} of {counts['total']} lines"
        f" answered, {counts['failed']} failed"
    )
    for error in _errors(batch)[:_SHOWN_ERRORS]:
        console.print(f"  {_error_words(error)}", style="red")
    return _exit_code(batch)


def _errors(batch: Batch) -> list[dict[str, Any]]:
    return (batch["errors"] or {}).get("data") or []


def _error_words(error: dict[str, Any]) -> str:
    where = f"line {error['line']}: " if error.get("line") else ""
    return f"{where}{error['message']} ({error['code']})"


def _show(batch: Batch) -> None:
    counts, usage = batch["request_counts"], batch.get("usage") or {}
    done = counts["completed"] + counts["failed"]
    rows = {
        "id": batch["id"],
        "status": _words(batch["status"]),
        "lines": f"{done} of {counts['total']} finished, {counts['failed']} failed",
        "endpoint": batch["endpoint"],
        "model": batch.get("model"),
        "created": _time(batch["created_at"]),
        "expires": _time(batch.get("expires_at")),
        "ended": _time(batch.get(f"{batch['status']}_at")) if batch["status"] in FINAL else "",
        "tokens": usage.get("total_tokens"),
        "input file": batch["input_file_id"],
        "output file": batch.get("output_file_id"),
        "error file": batch.get("error_file_id"),
        **(batch.get("metadata") or {}),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, Text(str(value)))
    for error in _errors(batch)[:_SHOWN_ERRORS]:
        table.add_row("error", Text(_error_words(error)))
    print_table(table)


def _show_all(batches: list[Batch], *, as_json: bool) -> None:
    if as_json:
        click.echo(orjson.dumps(batches, option=orjson.OPT_INDENT_2))
        return
    table = Table("id", "status", "finished", "failed", "endpoint", "created", box=None)
    for batch in batches:
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        table.add_row(
            batch["id"],
            _words(batch["status"]),
            f"{done}/{counts['total']}",
            str(counts["failed"] or ""),
            batch["endpoint"],
            _time(batch["created_at"]),
        )
    print_table(table)


def _time(at_s: int | None) -> str:
    return shown_time(at_s) if at_s else ""
