"""`headrace webhooks`: endpoints, their secrets, and what was sent to them."""

import asyncio
import secrets
import time
from typing import Any

import click
import msgspec
from rich.table import Table

from common import keys
from common.broker import Broker, WebhookStore
from common.failures import Failure
from common.settings import KeySettings
from common.webhooks import (
    EVENTS,
    Delivery,
    Endpoint,
    EventType,
    new_endpoint_id,
    new_salt,
    target_of,
)
from ops.keys import seconds, tenant_name, with_broker
from ops.options import build, options_of
from ops.tables import print_table, shown_time

_TEST_WAIT_S = 20.0
_TEST_LOOK_S = 0.2


class WebhookSettings(KeySettings):
    """What it takes to add endpoints."""

    allow_private_webhooks: bool = False
    """Take private addresses, HTTP and any port, too; the background worker needs the same."""


class NoSuchThing(click.ClickException):
    """No endpoint, or no delivery, has that id."""


@click.command("add")
@click.argument("tenant", callback=tenant_name)
@click.argument("url")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice(EVENTS),
    help="What it is told of; more than once: several; none: everything.",
)
@options_of(WebhookSettings)
def add(tenant: str, url: str, events: tuple[EventType, ...], **given: Any) -> None:
    """Tell URL of the ends of TENANT's batches and background responses; print its secret, once.

    Without API keys everybody is the tenant `public`.
    """
    settings = build(WebhookSettings, given)
    try:
        target_of(url, allow_private=settings.allow_private_webhooks)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="URL") from error

    async def act(broker: Broker) -> tuple[Endpoint, bytes]:
        pepper = await _pepper(settings, broker, may_make=True)
        endpoint = Endpoint(
            id=new_endpoint_id(),
            tenant=tenant,
            url=url,
            created_s=int(time.time()),
            salt=new_salt(),
            pepper=keys.fingerprint(pepper),
            events=events or EVENTS,
        )
        await broker.webhook_store.add_endpoint(endpoint)
        return endpoint, pepper

    endpoint, pepper = with_broker(settings, act)
    click.echo(endpoint.secrets(pepper, time.time())[0])
    click.echo(f"Endpoint {endpoint.id} of {tenant}. Its secret is not shown again.", err=True)


@click.command("rotate-secret")
@click.argument("endpoint_id")
@click.option(
    "--overlap",
    "overlap_s",
    default="24h",
    show_default=True,
    callback=seconds,
    help="How long events are signed with the secret before, too.",
)
@options_of(KeySettings)
def rotate_secret(endpoint_id: str, overlap_s: int, **given: Any) -> None:
    """Give an endpoint a new secret and print it, once; both sign for a while."""
    settings = build(KeySettings, given)
    now_s = int(time.time())

    async def act(broker: Broker) -> str:
        pepper = await _pepper(settings, broker)
        endpoint = await broker.webhook_store.change_endpoint(
            endpoint_id,
            lambda known: msgspec.structs.replace(
                known, salt=new_salt(), old_salt=known.salt, old_until_s=now_s + overlap_s
            ),
        )
        return _found(endpoint, endpoint_id).secrets(pepper, now_s)[0]

    click.echo(with_broker(settings, act))
    until = shown_time(now_s + overlap_s)
    click.echo(f"Events are signed with the secret before, too, until {until}.", err=True)


@click.command("remove")
@click.argument("endpoint_id")
@options_of(KeySettings)
def remove(endpoint_id: str, **given: Any) -> None:
    """Tell an endpoint nothing any more; what is on its way there is given up."""
    settings = build(KeySettings, given)
    if not with_broker(settings, lambda broker: broker.webhook_store.remove_endpoint(endpoint_id)):
        raise _no_endpoint(endpoint_id)
    click.echo(f"Endpoint {endpoint_id} is removed.", err=True)


@click.command("enable")
@click.argument("endpoint_id")
@options_of(KeySettings)
def enable(endpoint_id: str, **given: Any) -> None:
    """Serve an endpoint again that answered 410, and so said that it is gone."""
    endpoint = with_broker(
        build(KeySettings, given),
        lambda broker: broker.webhook_store.change_endpoint(
            endpoint_id, lambda known: msgspec.structs.replace(known, disabled="")
        ),
    )
    _found(endpoint, endpoint_id)
    click.echo(f"Endpoint {endpoint_id} is served.", err=True)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(KeySettings)
def show_list(*, as_json: bool, **given: Any) -> None:
    """List the endpoints; never a secret."""
    found = with_broker(build(KeySettings, given), lambda broker: broker.webhook_store.endpoints())
    rows = [
        {
            "id": endpoint.id,
            "tenant": endpoint.tenant,
            "url": endpoint.url,
            "events": "all" if endpoint.events == EVENTS else " ".join(endpoint.events),
            "state": f"off: {endpoint.disabled}" if endpoint.disabled else "on",
            "created": shown_time(endpoint.created_s),
        }
        for endpoint in found
    ]
    _show(rows, ("id", "tenant", "url", "events", "state", "created"), as_json=as_json)


@click.command("deliveries")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(KeySettings)
def show_deliveries(*, as_json: bool, **given: Any) -> None:
    """List what was sent, or is to be, the newest first."""
    _show_deliveries(build(KeySettings, given), only_dead=False, as_json=as_json)


@click.command("dead")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@options_of(KeySettings)
def show_dead(*, as_json: bool, **given: Any) -> None:
    """List what was given up: nobody took it for 72 hours, or its endpoint is gone."""
    _show_deliveries(build(KeySettings, given), only_dead=True, as_json=as_json)


@click.command("resend")
@click.argument("delivery_id")
@options_of(KeySettings)
def resend(delivery_id: str, **given: Any) -> None:
    """Send a delivery anew, under its old webhook-id; again for 72 hours."""
    settings = build(KeySettings, given)
    sent = with_broker(settings, lambda broker: broker.webhook_store.send_again(delivery_id))
    if sent is None:
        raise NoSuchThing(f"there is no delivery {delivery_id}")
    click.echo(f"{delivery_id} is sent again.", err=True)


@click.command("test")
@click.argument("endpoint_id")
@options_of(KeySettings)
def send_test(endpoint_id: str, **given: Any) -> None:
    """Have an event of nothing sent to an endpoint, and say what came of it.

    Its object's id begins with `test_`.
    """

    async def act(broker: Broker) -> Delivery:
        store = broker.webhook_store
        endpoint = _found(await store.endpoint(endpoint_id), endpoint_id)
        object_id = f"test_{secrets.token_hex(8)}"
        sent = await store.enqueue_for(endpoint, endpoint.events[0], object_id)
        return await _outcome(store, sent)

    delivery = with_broker(build(KeySettings, given), act)
    if delivery.state != "delivered":
        came_to = delivery.last or "nobody sends it: does a background worker run?"
        raise click.ClickException(f"{delivery.id} {delivery.state}: {came_to}")
    click.echo(f"{delivery.id} delivered: {delivery.last}")


async def _outcome(store: WebhookStore, delivery: Delivery) -> Delivery:
    """After the first attempt, or as it is if there is none in time."""
    until_s = time.monotonic() + _TEST_WAIT_S
    while time.monotonic() < until_s:
        delivery = await store.delivery(delivery.id) or delivery
        if delivery.attempts or delivery.state != "waiting":
            break
        await asyncio.sleep(_TEST_LOOK_S)
    return delivery


def _show_deliveries(settings: KeySettings, *, only_dead: bool, as_json: bool) -> None:
    found = with_broker(
        settings, lambda broker: broker.webhook_store.deliveries(only_dead=only_dead)
    )
    rows = [
        {
            "id": delivery.id,
            "tenant": delivery.tenant,
            "event": delivery.event_type,
            "of": delivery.object_id,
            "state": delivery.state,
            "attempts": delivery.attempts,
            "last attempt": shown_time(delivery.last_s) if delivery.last_s else "",
            "came to": delivery.last,
        }
        for delivery in found
    ]
    columns = ("id", "tenant", "event", "of", "state", "attempts", "last attempt", "came to")
    _show(rows, columns, as_json=as_json)


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    print_table(table)


async def _pepper(settings: KeySettings, broker: Broker, *, may_make: bool = False) -> bytes:
    """What secrets hang on: the pepper that API keys are hashed with, too.

    Raises: Failure ACCESS_MISCONFIGURED where it is not here, or is another one.
    """
    pepper = keys.read_pepper(settings.key_pepper.get_secret_value(), settings.data_dir)
    endpoints = await broker.webhook_store.endpoints()
    if pepper is None and may_make and not endpoints and not await broker.key_store.has_any():
        pepper = keys.make_pepper(settings.data_dir)
    if pepper is None:
        raise Failure(
            "ACCESS_MISCONFIGURED",
            "Secrets of webhooks hang on the pepper of API keys, and it is not here: neither "
            f"{keys.pepper_path(settings.data_dir)} nor HEADRACE_KEY_PEPPER",
        )
    await broker.key_store.check_pepper(keys.fingerprint(pepper))
    if any(endpoint.pepper != keys.fingerprint(pepper) for endpoint in endpoints):
        raise Failure(
            "ACCESS_MISCONFIGURED", "The secrets of the webhooks in Redis hang on another pepper"
        )
    return pepper


def _found(endpoint: Endpoint | None, endpoint_id: str) -> Endpoint:
    if endpoint is None:
        raise _no_endpoint(endpoint_id)
    return endpoint


def _no_endpoint(endpoint_id: str) -> NoSuchThing:
    return NoSuchThing(f"there is no endpoint {endpoint_id}")
