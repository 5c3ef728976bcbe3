"""`headrace bench incidents`: break a running system in many ways; see whether its logs tell."""

import fnmatch
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from ops.bench import machine
from ops.bench.incidents import truth
from ops.bench.incidents.catalog import Incident, all_incidents, healthy_runs
from ops.bench.incidents.million import time_a_million
from ops.bench.incidents.produce import produce
from ops.bench.incidents.score import Report, Score, markdown, score, summarise

_GOAL = 0.9

Tell = Callable[[str], None]


@click.command("incidents")
@click.option(
    "--only", "patterns", multiple=True, metavar="NAME", help="Runs by name, with * and ?."
)
@click.option(
    "--logs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep logs and truths there, a folder for each run; else they end with the command.",
)
@click.option("--again", is_flag=True, help="Only analyse what is in --logs, without new runs.")
@click.option("--produce-only", is_flag=True, help="Leave the logs, and analyse nothing.")
@click.option(
    "--seed",
    "shift",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Added to the seed of each run: other requests, and others who are to blame.",
)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs at once.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--markdown", "page_path", type=click.Path(path_type=Path), help="Write the table.")
@click.option("--list", "lists", is_flag=True, help="Say what runs there are.")
@click.option("--million", "counts_a_million", is_flag=True, help="Only time large logs.")
def main(
    patterns: tuple[str, ...],
    logs: Path | None,
    again: bool,
    produce_only: bool,
    shift: int,
    jobs: int,
    json_path: Path | None,
    page_path: Path | None,
    lists: bool,
    counts_a_million: bool,
) -> None:
    """Break a running system in known ways, and score what `headrace incident` makes of its logs.

    Each run is an instance of its own with clients and one fault, or none; its truth is kept apart
    from its logs. Exits with 1 when fewer than 90 % of the causes are named first, or a healthy run
    has somebody to blame.
    """
    if counts_a_million:
        timed = time_a_million()
        click.echo(msgspec.json.format(msgspec.json.encode(timed), indent=1))
        if json_path is not None:
            json_path.write_bytes(msgspec.json.encode(timed) + b"\n")
        sys.exit(0 if timed.has_passed else 1)
    chosen = [replace(one, seed=one.seed + shift) for one in _chosen(patterns)]
    if lists:
        click.echo("\n".join(f"{one.name:<28} {one.kind}" for one in chosen))
        return
    if (again or produce_only) and logs is None:
        raise click.UsageError("--again and --produce-only need --logs")
    with nullcontext(logs) if logs else tempfile.TemporaryDirectory(prefix="headrace-bench-") as at:
        folder = Path(str(at))

        def carried_out(incident: Incident) -> Score | None:
            place = folder / incident.name
            is_there = (place / truth.FILE).exists() if again else _produced(incident, place, _say)
            return _scored(place, _say) if is_there and not produce_only else None

        with ThreadPoolExecutor(jobs) as executor:
            scores = [one for one in executor.map(carried_out, chosen) if one is not None]
    if produce_only:
        return
    report = summarise(scores, machine.describe(), _revision())
    page = markdown(report)
    click.echo(page)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if page_path is not None:
        page_path.write_text(page, encoding="utf-8")
    sys.exit(0 if has_passed(report) else 1)


def has_passed(report: Report) -> bool:
    return report.falsely_blamed == 0 and (not report.incidents or report.first >= _GOAL)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _chosen(patterns: Sequence[str]) -> list[Incident]:
    """Raises: click.BadParameter for a name that no run has."""
    runs = [*all_incidents(), *healthy_runs()]
    for pattern in patterns:
        if not any(fnmatch.fnmatch(one.name, pattern) for one in runs):
            raise click.BadParameter(
                f"no run is called {pattern!r}; see --list", param_hint="--only"
            )
    wanted = patterns or ("*",)
    return [one for one in runs if any(fnmatch.fnmatch(one.name, name) for name in wanted)]


def _produced(incident: Incident, folder: Path, tell: Tell) -> bool:
    """Whether it could be; one that could not is told, and has no truth."""
    try:
        told = produce(incident, folder)
    except (click.ClickException, OSError) as error:
        tell(f"{incident.name}: could not be produced: {error}")
        return False
    tell(f"{incident.name}: {told.requests} requests, load {told.load_average}")
    return True


def _scored(folder: Path, tell: Tell) -> Score:
    scored = score(folder)
    words = scored.problem or scored.named or "nobody"
    mark = "right" if scored.is_right else "WRONG"
    tell(f"{mark}  {scored.name}: {scored.true_cause} (rank {scored.rank}); named: {words}")
    return scored


def _revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever is installed
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.decode().strip() or "unknown"
