"""Pictures of a report as inline SVG: lines over time, stacked bars, and the lives of processes.

All share one time axis, so that what happens above one another happened together. Where there are
no lines of a log there is no figure: such times are hatched, never drawn as zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 84, 12, 10, 22
COLOURS = ("#1f6feb", "#d1242f", "#bf8700", "#8250df", "#1a7f37", "#cf5f00", "#57606a", "#0a7d91")
"""Of series in their order; told apart by most who see fewer colours, and in grey by brightness."""
_LINE, _TEXT = "var(--line)", "var(--soft)"
"""Of the page, which knows light, dark and paper."""
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that concerns all pictures, such as a deployment; seconds since the epoch."""

    at: float
    label: str
    colour: str = "#57606a"


@dataclass(frozen=True, slots=True)
class Axis:
    """The time that all pictures show, in buckets of ``width`` seconds.

    ``troubles`` are shaded, ``gaps`` (no lines at all) hatched.
    """

    start: float
    end: float
    width: float
    troubles: Sequence[tuple[float, float]] = ()
    gaps: Sequence[tuple[float, float]] = ()
    marks: Sequence[Mark] = ()

    def x(self, at: float) -> float:
        share = (at - self.start) / max(self.end - self.start, 1e-9)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)


@dataclass(frozen=True, slots=True)
class Series:
    """One figure by bucket; None: not known there."""

    name: str
    values: Sequence[float | None]
    colour: str


@dataclass(frozen=True, slots=True)
class Life:
    """One process: when it was there, in which states, and what befell it."""

    name: str
    note: str
    spans: Sequence[tuple[float, float, str]]
    """From, to and colour."""
    blows: Sequence[Mark] = field(default_factory=list[Mark])


def lines(axis: Axis, series: Sequence[Series], unit: str, title: str) -> str:
    """A line for each series. ``unit`` is ``s`` (seconds), ``%`` (of 1) or empty (a count)."""
    top = _nice_top(max((v for one in series for v in one.values if v is not None), default=0.0))
    if unit == "%":
        top = 1.0
    height = 150
    parts = [_frame(axis, height), _scale(top, unit, height)]
    for one in series:
        for points in _runs(axis, one.values, top, height):
            if len(points) == 1:
                x, y = points[0]
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" fill="{one.colour}"/>')
                continue
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="1.6"/>'
            )
    return _svg(height, title, parts)


def stacks(axis: Axis, series: Sequence[Series], title: str) -> str:
    """Bars that stand on one another, such as failures by code."""
    sums = [sum(one.values[at] or 0 for one in series) for at in range(_length(series))]
    top, height = _nice_top(max(sums, default=0.0)), 150
    parts = [_frame(axis, height), _scale(top, "", height)]
    plot = height - TOP - BOTTOM
    for at in range(len(sums)):
        x, next_x = axis.x(axis.start + at * axis.width), axis.x(axis.start + (at + 1) * axis.width)
        base = height - BOTTOM
        for one in series:
            tall = (one.values[at] or 0) / top * plot
            if tall <= 0:
                continue
            base -= tall
            parts.append(
                f'<rect x="{x:.1f}" y="{base:.1f}" width="{max(next_x - x - 0.3, 0.8):.1f}"'
                f' height="{tall:.1f}" fill="{one.colour}"/>'
            )
    return _svg(height, title, parts)


def lives(axis: Axis, rows: Sequence[Life], title: str) -> str:
    """A bar for each process, with crosses for what befell it."""
    each, height = 20, TOP + BOTTOM + 20 * max(len(rows), 1)
    parts = [_frame(axis, height)]
    for place, row in enumerate(rows):
        y = TOP + place * each
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end" font-size="10" fill="{_TEXT}">'
            f"{escape(row.name[-12:])}<title>{escape(f'{row.name} {row.note}')}</title></text>"
        )
        for start, end, colour in row.spans:
            wide = max(axis.x(end) - axis.x(start), 1.5)
            parts.append(
                f'<rect x="{axis.x(start):.1f}" y="{y + 4}" width="{wide:.1f}" height="12"'
                f' fill="{colour}" rx="2"/>'
            )
        for blow in row.blows:
            x = axis.x(blow.at)
            parts.append(
                f'<g stroke="{blow.colour}" stroke-width="2.4"><title>{escape(blow.label)}</title>'
                f'<path d="M{x - 4:.1f} {y + 5} l8 10 M{x + 4:.1f} {y + 5} l-8 10"/></g>'
            )
    return _svg(height, title, parts)


def figure(value: float | None, unit: str) -> str:
    """A figure of an axis or a table."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{value:.0%}"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _length(series: Sequence[Series]) -> int:
    return max((len(one.values) for one in series), default=0)


def _runs(
    axis: Axis, values: Sequence[float | None], top: float, height: int
) -> list[list[tuple[float, float]]]:
    """Points between one unknown value and the next."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            runs.append([])
            continue
        x = axis.x(axis.start + (place + 0.5) * axis.width)
        share = min(value / top, 1.0) if top else 0.0
        runs[-1].append((x, height - BOTTOM - share * (height - TOP - BOTTOM)))
    return [run for run in runs if run]


def _nice_top(most: float) -> float:
    """The least of 1, 2, 5, 10, … times a power of ten that is not below."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= most * 0.999)


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
        f' font-family="inherit">{"".join(parts)}</svg>'
    )


def _frame(axis: Axis, height: int) -> str:
    """Shades, hatches, marks and the moments below."""
    bottom, plot = height - BOTTOM, height - TOP - BOTTOM
    parts: list[str] = []
    for start, end in axis.troubles:
        wide = max(axis.x(end) - axis.x(start), 1.0)
        parts.append(
            f'<rect class="trouble" x="{axis.x(start):.1f}" y="{TOP}" width="{wide:.1f}"'
            f' height="{plot}" fill="#d1242f" fill-opacity="0.09"/>'
        )
    for start, end in axis.gaps:
        wide = max(axis.x(end) - axis.x(start), 1.0)
        parts.append(
            f'<rect class="gap" x="{axis.x(start):.1f}" y="{TOP}" width="{wide:.1f}"'
            f' height="{plot}" fill="url(#nodata)"><title>no lines in the log</title></rect>'
        )
    for mark in axis.marks:
        x = axis.x(mark.at)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="{mark.colour}"'
            f' stroke-dasharray="3 3"><title>{escape(mark.label)}</title></line>'
        )
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="{_LINE}"/>'
    )
    parts += [_moment(axis, at, bottom) for at in _ticks(axis)]
    return "".join(parts)


def _ticks(axis: Axis) -> list[float]:
    span = axis.end - axis.start
    step = next((one for one in _STEPS_S if span / one <= 9), _STEPS_S[-1])
    first = math.ceil(axis.start / step) * step
    return [first + step * number for number in range(int((axis.end - first) / step) + 1)]


def _moment(axis: Axis, at: float, bottom: int) -> str:
    spells_seconds = axis.end - axis.start < 600
    form = "%H:%M:%S" if spells_seconds else "%H:%M" if axis.end - axis.start < 172800 else "%d %b"
    shown = datetime.fromtimestamp(at, UTC).strftime(form)
    return (
        f'<text x="{axis.x(at):.1f}" y="{bottom + 14}" text-anchor="middle" font-size="10"'
        f' fill="{_TEXT}">{shown}</text>'
    )


def _scale(top: float, unit: str, height: int) -> str:
    plot = height - TOP - BOTTOM
    parts: list[str] = []
    for share in (0.0, 0.5, 1.0):
        y = height - BOTTOM - share * plot
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_LINE}"'
            f' stroke-width="0.7"/><text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end"'
            f' font-size="10" fill="{_TEXT}">{figure(top * share, unit)}</text>'
        )
    return "".join(parts)
