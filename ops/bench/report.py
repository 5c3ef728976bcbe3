"""What a load test shows: a table, the same as JSON, and a plot."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from ops.bench.load import Level, Spread


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One server's levels. ``notes`` say what a reader must know before comparing."""

    url: str
    model: str
    api: str
    levels: list[Level]
    notes: list[str] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A load test: what was asked for, of whom, and what came."""

    prompt_tokens: int
    new_tokens: int
    shared_prefix: int
    measured: list[Measured]


def show(report: Report, console: Console) -> None:
    """A table of each server; of several also their rates as multiples of the first one's."""
    first = {_load_of(level): level for level in report.measured[0].levels}
    for number, measured in enumerate(report.measured):
        table = _table(f"{measured.model} at {measured.url} ({measured.api})", compares=number > 0)
        for level in measured.levels:
            row = _row(level)
            if number > 0:
                row.insert(2, _ratio(level, first.get(_load_of(level))))
            table.add_row(*row)
        console.print(table)
        for note in (*measured.notes, *_notes(measured.levels)):
            console.print(f"  {note}", style="dim")
        console.print()


def _table(title: str, *, compares: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    columns = ["clients", "tokens/s", "first token", "gap", "whole answer", "failed"]
    if compares:
        columns.insert(2, "× first")
    for column in columns:
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    return table


def _row(level: Level) -> list[str]:
    return [
        _load_of(level),
        f"{level.tokens_per_second:.1f}",
        _shown(level.first_token_ms),
        _shown(level.gap_ms),
        _shown(level.whole_ms),
        str(sum(level.failures.values())),
    ]


def _load_of(level: Level) -> str:
    return f"{level.rate:g}/s" if level.rate else str(level.concurrency)


def _shown(spread: Spread | None) -> str:
    return "–" if spread is None else f"{_figures(spread.p50)} / {_figures(spread.p99)}"


def _figures(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(level: Level, first: Level | None) -> str:
    if first is None or not first.tokens_per_second:
        return "–"
    return f"{level.tokens_per_second / first.tokens_per_second:.2f}"


def _notes(levels: Sequence[Level]) -> list[str]:
    failures: dict[str, int] = {}
    for level in levels:
        for kind, count in level.failures.items():
            failures[kind] = failures.get(kind, 0) + count
    busiest = max((level.client_cpu for level in levels), default=0.0)
    return [
        "times in ms, p50 / p99",
        *(f"{level.tokens_per_event:g} tokens an event" for level in levels[-1:] if _merges(level)),
        *(f"failed: {count} × {kind}" for kind, count in sorted(failures.items())),
        f"the load client itself used up to {busiest:.1%} of a core",
    ]


def _merges(level: Level) -> bool:
    """Whether gaps are not times between tokens."""
    return level.tokens_per_event > 1.05


def write_json(report: Report, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def draw(report: Report, path: Path) -> None:
    """Rate, first token and gap over the load; the suffix of ``path`` is the format (svg, png).

    Raises: ModuleNotFoundError without matplotlib, which is in the extra ``bench``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    rate, first_token, gap = figure.subplots(1, 3)
    for measured in report.measured:
        levels = measured.levels
        x = [level.rate or level.concurrency for level in levels]
        label = measured.model if len(report.measured) == 1 else f"{measured.model} {measured.url}"
        (line,) = rate.plot(x, [level.tokens_per_second for level in levels], "o-", label=label)
        for axes, spreads in (
            (first_token, [level.first_token_ms for level in levels]),
            (gap, [level.gap_ms for level in levels]),
        ):
            for name, style in (("p50", "o-"), ("p99", "o:")):
                values = [getattr(s, name) if s else float("nan") for s in spreads]
                axes.plot(x, values, style, color=line.get_color(), label=name)
    load = "requests/s" if report.measured[0].levels[0].rate else "clients"
    for axes, title in (
        (rate, "output tokens/s"),
        (first_token, "time to first token, ms"),
        (gap, "time between tokens, ms"),
    ):
        axes.set_title(title)
        axes.set_xlabel(load)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    gap.legend(["p50", "p99"])
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path)
