"""`headrace keys`: make, list, rotate and revoke API keys."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.table import Table

from common import keys
from common.broker import Broker, KeyStore, connect
from common.keys import ApiKey, Limits, Scope
from common.messages import LANES, Lane
from common.settings import KeySettings
from ops import runfile
from ops.options import build, options_of
from ops.tables import print_table, shown_time

T = TypeVar("T")

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class NoSuchKey(click.ClickException):
    """No key has that id."""


def seconds(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Of ``90s``, ``15m``, ``12h`` or ``30d``. Raises: click.BadParameter."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([smhd])", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no duration such as 15m, 12h or 30d")
    return int(found[1]) * _UNITS_S[found[2]]


def tenant_name(_: click.Context, __: click.Parameter, value: str) -> str:
    """Raises: click.BadParameter."""
    if not keys.is_tenant(value):
        raise click.BadParameter(f"{value!r} must be up to 40 of a-z, 0-9, _ and -")
    return value


@click.command("create")
@click.argument("tenant", callback=tenant_name)
@click.option("--name", default="", help="For people: whose, or what for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("generate",),
    show_default=True,
    type=click.Choice(keys.SCOPES),
    help="What it may be used for; more than once: several.",
)
@click.option(
    "--for-model", "models", multiple=True, help="A model or adapter it may ask for; none: all."
)
@click.option(
    "--best-lane",
    default=LANES[0],
    show_default=True,
    type=click.Choice(LANES),
    help="Requests for a better lane, by service_tier, wait in this one.",
)
@click.option("--requests-per-minute", default=0, type=click.IntRange(0), help="0: no limit.")
@click.option(
    "--tokens-per-minute",
    default=0,
    type=click.IntRange(0),
    help="Of prompts and answers together, for each model; 0: no limit.",
)
@click.option(
    "--streams",
    default=0,
    type=click.IntRange(0),
    help="Prompts at once, waiting or running; 0: no limit.",
)
@click.option("--expires-in", "expires_in_s", callback=seconds, help="Such as 12h or 30d.")
@options_of(KeySettings)
def create(
    tenant: str,
    name: str,
    scopes: tuple[Scope, ...],
    models: tuple[str, ...],
    best_lane: Lane,
    requests_per_minute: int,
    tokens_per_minute: int,
    streams: int,
    expires_in_s: int | None,
    **given: Any,
) -> None:
    """Make a key for TENANT and print it, once.

    What belongs to one tenant does not exist for another. Several keys may be of one tenant; limits
    hold for each key.
    """
    settings = build(KeySettings, given)
    key_id, now_s = keys.new_key_id(), int(time.time())
    text = keys.new_key_text(key_id)

    async def add(store: KeyStore) -> None:
        pepper = await _pepper(settings, store)
        key = ApiKey(
            id=key_id,
            tenant=tenant,
            hash=keys.hashed(pepper, text),
            created_s=now_s,
            name=name,
            scopes=scopes,
            models=models,
            best_lane=best_lane,
            limits=Limits(requests_per_minute, tokens_per_minute, streams),
            expires_s=now_s + expires_in_s if expires_in_s else 0,
        )
        await store.add(key, keys.fingerprint(pepper))

    _with_store(settings, add)
    click.echo(text)
    click.echo(f"Key {key_id} of {tenant}. It is not shown again.", err=True)


@click.command("rotate")
@click.argument("key_id")
@click.option(
    "--overlap",
    "overlap_s",
    default="24h",
    show_default=True,
    callback=seconds,
    help="How long the secret before is still taken.",
)
@options_of(KeySettings)
def rotate(key_id: str, overlap_s: int, **given: Any) -> None:
    """Give a key a new secret and print it, once; the one before is still taken for a while."""
    settings = build(KeySettings, given)
    text = keys.new_key_text(key_id)
    until_s = int(time.time()) + overlap_s

    async def change(store: KeyStore) -> ApiKey | None:
        pepper = await _pepper(settings, store)
        await store.check_pepper(keys.fingerprint(pepper))
        digest = keys.hashed(pepper, text)
        return await store.change(
            key_id,
            lambda key: msgspec.structs.replace(
                key, hash=digest, old_hash=key.hash, old_until_s=until_s
            ),
        )

    if _with_store(settings, change) is None:
        raise NoSuchKey(f"there is no key {key_id}")
    click.echo(text)
    click.echo(f"The secret before it is taken until {shown_time(until_s)}.", err=True)


@click.command("revoke")
@click.argument("key_id")
@options_of(KeySettings)
def revoke(key_id: str, **given: Any) -> None:
    """Take a key away: within a second no gateway takes it any more.

    Answers that have begun go on.
    """
    if not _with_store(build(KeySettings, given), lambda store: store.remove(key_id)):
        raise NoSuchKey(f"there is no key {key_id}")
    click.echo(f"Key {key_id} is revoked.", err=True)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(KeySettings)
def show_list(*, as_json: bool, **given: Any) -> None:
    """List the keys: what each allows and when it was last used; never a secret."""
    found = _with_store(build(KeySettings, given), lambda store: store.all())
    if as_json:
        rows = [_without_hashes(key) | {"used_s": used_s} for key, used_s in found]
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    columns = ("id", "tenant", "name", "scopes", "models", "best lane", "limits", "expires")
    table = Table(*columns, "last used")
    for key, used_s in found:
        table.add_row(
            key.id,
            key.tenant,
            key.name,
            " ".join(key.scopes),
            " ".join(key.models) or "all",
            key.best_lane,
            _shown_limits(key.limits),
            shown_time(key.expires_s) if key.expires_s else "never",
            shown_time(used_s) if used_s else "never",
        )
    print_table(table)


async def _pepper(settings: KeySettings, store: KeyStore) -> bytes:
    """The first key draws one; later it must be there."""
    pepper = keys.read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)
    if pepper is None and await store.has_any():
        raise keys.no_pepper(settings.data_dir)
    return pepper or keys.make_pepper(settings.data_dir)


def with_broker(settings: KeySettings, act: Callable[[Broker], Awaitable[T]]) -> T:
    """What ``act`` returns on the Redis that the settings name."""

    async def run() -> T:
        broker = Broker(connect(runfile.redis_url_of(settings)), settings.model)
        try:
            return await act(broker)
        finally:
            await broker.close()

    return asyncio.run(run())


def _with_store(settings: KeySettings, act: Callable[[KeyStore], Awaitable[T]]) -> T:
    return with_broker(settings, lambda broker: act(broker.key_store))


def _without_hashes(key: ApiKey) -> dict[str, Any]:
    shown = msgspec.to_builtins(key)
    return {name: value for name, value in shown.items() if name not in ("hash", "old_hash")}


def _shown_limits(limits: Limits) -> str:
    shown = (
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.streams, "at once"),
    )
    return ", ".join(f"{limit} {unit}" for limit, unit in shown if limit) or "none"
