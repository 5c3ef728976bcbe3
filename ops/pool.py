"""`headrace workers` and `headrace dead`: an operator's hand on a pool, straight at its Redis.

They do what the live page does, also where no gateway answers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec
from rich.table import Table

from common import logs
from common.broker import Broker, Census, Evidence, connect
from common.ids import new_process_name
from common.settings import Settings
from ops import runfile
from ops.options import build, options_of
from ops.tables import print_table, shown_memory, shown_time

T = TypeVar("T")

CAUSE = "operator at the command line"


class NoSuchWorker(click.ClickException):
    """No worker of that name is alive."""


def with_pool(settings: Settings, act: Callable[[Broker], Awaitable[T]]) -> T:
    """What ``act`` returns on the pool that the settings name; unless they do, on that of the
    `headrace up` that runs on the data directory.
    """
    settings = runfile.joined(settings)

    async def on_broker() -> T:
        broker = Broker(connect(settings.redis_url), settings.model)
        try:
            return await act(broker)
        finally:
            await broker.close()

    return asyncio.run(on_broker())


# Workers -----------------------------------------------------------------------------------------


@click.command("drain")
@click.argument("name")
@options_of(Settings)
def drain(name: str, **given: Any) -> None:
    """Let the worker NAME finish or hand over what it holds and rest; its process stays alive.

    NAME is what `headrace workers list` shows, or its beginning.
    """
    full = with_pool(
        build(Settings, given), lambda broker: _steer(broker, name, lambda it: _drain(broker, it))
    )
    click.echo(f"{full} rests as soon as it has nothing left: headrace workers list", err=True)


@click.command("resume")
@click.argument("name")
@options_of(Settings)
def resume(name: str, **given: Any) -> None:
    """Let the worker NAME take work again."""
    full = with_pool(
        build(Settings, given), lambda broker: _steer(broker, name, broker.resume_worker)
    )
    click.echo(f"{full} takes work again.", err=True)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(Settings)
def list_workers(*, as_json: bool, **given: Any) -> None:
    """List the workers, what they hold, who asked them to rest, and whom they run on probation."""
    census = with_pool(build(Settings, given), lambda broker: broker.census())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(census.workers), indent=2))
        return
    table = Table(
        *("name", "state", "holds", "model version", "host", "memory"),
        *("asked to rest by", "on probation"),
    )
    for worker in census.workers:
        told = worker.presence
        table.add_row(
            worker.name,
            told.state if told else "unknown",
            str(worker.held),
            told.model_version if told else "",
            told.host if told else "",
            shown_memory(told) if told else "",
            worker.drain_cause,
            worker.suspect,
        )
    print_table(table)


async def _drain(broker: Broker, name: str) -> bool:
    return await broker.drain_worker(name, CAUSE)


async def _steer(broker: Broker, name: str, act: Callable[[str], Awaitable[bool]]) -> str:
    """Do it to the one worker whose name begins so. Raises: NoSuchWorker."""
    full = _full_name(await broker.census(), name)
    if not await act(full):
        raise NoSuchWorker(f"worker {full} has just ended")
    return full


def _full_name(census: Census, name: str) -> str:
    """Raises: NoSuchWorker."""
    names = [worker.name for worker in census.workers]
    found = [it for it in names if it == name] or [it for it in names if it.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(found or names) or "none is alive"
    what = "several workers begin" if found else "no worker's name begins"
    raise NoSuchWorker(f"{what} with {name}: {known}")


# Dead letters ------------------------------------------------------------------------------------


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(Settings)
def list_dead(*, as_json: bool, **given: Any) -> None:
    """List what was set aside because workers died of it, the newest first."""
    found = with_pool(build(Settings, given), lambda broker: broker.dead_letter_store.newest())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    if not found:
        click.echo("Nothing was set aside.")
        return
    table = Table("id", "when", "tenant", "lane", "deaths", "tokens", "last worker")
    for letter in found:
        table.add_row(
            letter.id,
            shown_time(int(letter.at)),
            letter.tenant,
            letter.lane,
            str(letter.deaths),
            str(letter.tokens),
            letter.worker,
        )
    print_table(table)


@click.command("show")
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(Settings)
def show_dead(id: str, *, as_json: bool, **given: Any) -> None:
    """Show how it was asked and how it went; never its text."""
    found = with_pool(build(Settings, given), lambda broker: broker.dead_letter_store.get(id))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
        return
    for name, value in _lines_of(found):
        click.echo(f"{name:<15}{value}")


def _lines_of(found: Evidence) -> list[tuple[str, str]]:
    letter = found.letter
    parameters = " ".join(f"{name}={value}" for name, value in found.parameters.items())
    return [
        ("id", letter.id),
        ("set aside", shown_time(int(letter.at))),
        ("tenant", letter.tenant),
        ("lane", letter.lane),
        ("workers died", f"{letter.deaths}: {', '.join(found.workers)}"),
        ("tokens shown", str(letter.tokens)),
        ("model version", letter.model_version),
        ("asked by", found.api),
        ("prompt tokens", str(found.prompt_tokens) if found.is_kept else "no longer kept"),
        ("parameters", parameters),
        ("waited", _shown_s(found.waited)),
        ("first token", _shown_s(found.first_token)),
        ("lasted", _shown_s(found.lasted)),
        *([("asked anew as", found.requeued_as)] if found.requeued_as else []),
    ]


def _shown_s(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.3f} s"


@click.command("requeue")
@click.argument("id")
@options_of(Settings)
def requeue(id: str, **given: Any) -> None:
    """Ask it anew, once, as a new request; print the id of that.

    Its own end stands, for whoever has read it. Its tenant can read the answer with
    GET /v1/streams/ID as long as streams are kept.
    """
    settings = build(Settings, given)
    with _logged(settings):
        found = with_pool(settings, lambda broker: broker.dead_letter_store.requeue(id, CAUSE))
    click.echo(found.request_id)
    if found.is_repeated:
        click.echo("It had been asked anew before; nothing was done now.", err=True)


@click.command("discard")
@click.argument("id")
@options_of(Settings)
def discard(id: str, **given: Any) -> None:
    """Remove it, prompt and all."""
    settings = build(Settings, given)
    with _logged(settings):
        with_pool(settings, lambda broker: broker.dead_letter_store.discard(id, CAUSE))
    click.echo(f"{id} is gone.", err=True)


@contextmanager
def _logged(settings: Settings) -> Generator[None]:
    """Meanwhile events go where those of this pool's processes go, if that is on this machine."""
    log_dir = settings.log_dir or settings.data_dir / "log"
    if not log_dir.is_dir():
        yield
        return
    logs.configure("command", new_process_name("command"), log_dir=log_dir)
    try:
        yield
    finally:
        logs.shut_down()
