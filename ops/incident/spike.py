"""Spikes: when did failures, waiting or slowness begin to be more frequent than chance allows?

Onsets come from the scan of :mod:`ops.incident.symptoms`, symptom by symptom; what is said of
throughput is a drop of finished requests while as many kept coming. Then :mod:`ops.incident.why` is
asked what distinguishes those inside.
"""

from dataclasses import dataclass

import click
from duckdb import DuckDBPyConnection
from rich.text import Text

from ops.incident.command import Question, question_options, shown_moment, tell
from ops.incident.statistics import scan
from ops.incident.symptoms import Symptom, Window, bucket_width, series, window_in
from ops.incident.why import explain, how_slow, told, widened

_MIN_DROP = 0.5
"""Least part of the usual throughput that has to be missing."""


@dataclass(frozen=True, slots=True)
class Spike:
    """One figure that changed. ``inside`` and ``outside`` are shares of bad requests, or requests
    finished per second; times in seconds since the epoch, exact to ``bucket_s``.
    """

    figure: str
    words: str
    start: float
    end: float
    bucket_s: float
    inside: float
    outside: float
    p_value: float
    bad: int

    @property
    def certainty(self) -> str:
        return "high" if self.p_value < 1e-9 else "medium"


@click.command("spike")
@question_options
def main(*, question: Question) -> int:
    """Find when errors, waiting or slowness began, and say why.

    What is inside of that time is compared with the rest, or with the hour before --since.
    """
    with widened(question).open() as logs:
        verdict = explain(logs.db, since=question.since, until=question.until)
        spikes = find_spikes(logs.db, verdict.symptoms)
        findings = [told(question, one) for one in verdict.findings]
        return tell(
            question,
            logs,
            findings,
            data={"spikes": spikes},
            shown=[*map(_shown, spikes), Text() if spikes else Text("Nothing changed suddenly.")],
        )


def find_spikes(db: DuckDBPyConnection, symptoms: list[Symptom]) -> list[Spike]:
    """In order of time; ``judged`` must exist."""
    found = [
        Spike(
            figure=one.kind.name,
            words=one.kind.words + how_slow(one),
            start=window.start,
            end=window.end,
            bucket_s=window.bucket_s,
            inside=one.interval.inside,
            outside=one.interval.outside,
            p_value=one.interval.p_value,
            bad=one.bad,
        )
        for one in symptoms
        if one.window is not None and one.interval is not None
        for window in (refined(db, one, one.window),)
    ]
    drop = _drop(db)
    return sorted([*found, *([drop] if drop else [])], key=lambda spike: spike.start)


def refined(db: DuckDBPyConnection, symptom: Symptom, window: Window) -> Window:
    """The same window with edges that are known better, where its buckets were long."""
    if window.bucket_s <= 2:
        return window
    around = 3 * window.bucket_s
    source = (
        f"SELECT {symptom.flag} AS bad, {symptom.moment} AS moment FROM judged WHERE"
        f" {symptom.moment} BETWEEN {window.start - around!r} AND {window.start + around!r}"
    )
    closer, _ = window_in(db, source)
    if closer is None or abs(closer.start - window.start) > 2 * window.bucket_s:
        return window
    return Window(closer.start, window.end, closer.bucket_s)


def _drop(db: DuckDBPyConnection) -> Spike | None:
    """An interval in which far fewer requests were finished than came."""
    span = db.execute("SELECT min(arrived), max(gone), count(*) FROM judged").fetchone()
    if span is None or not span[2] or span[1] - span[0] < 10:
        return None
    start, end = span[0], span[1]
    width = bucket_width(end - start)
    source = "SELECT arrived AS moment, arrived FROM judged"
    came = series(db, "count(*)", source=source, start=start, end=end, width=width)
    source = "SELECT ended AS moment FROM judged WHERE ended IS NOT NULL"
    done = series(db, "count(*)", source=source, start=start, end=end, width=width)
    missing = [max(0.0, a[0] - b[0]) for a, b in zip(came, done, strict=True)]
    interval = scan(missing, [row[0] for row in came])
    if interval is None or interval.p_value > 1e-6 or interval.inside < _MIN_DROP:
        return None
    seconds = (interval.end - interval.start) * width
    finished = sum(row[0] for row in done[interval.start : interval.end])
    others = sum(row[0] for row in done) - finished
    rest = max(end - start - seconds, 1e-9)
    if finished / seconds > (1 - _MIN_DROP) * others / rest:
        return None
    return Spike(
        figure="throughput",
        words="finished, although as many came",
        start=start + interval.start * width,
        end=start + interval.end * width,
        bucket_s=width,
        inside=finished / seconds,
        outside=others / rest,
        p_value=interval.p_value,
        bad=int(sum(missing[interval.start : interval.end])),
    )


def _shown(spike: Spike) -> Text:
    when = (
        f"{shown_moment(spike.start)} to {shown_moment(spike.end)[11:]} (± {spike.bucket_s:.0f} s)"
    )
    if spike.figure == "throughput":
        change = f"only {spike.inside:.3g} requests a second, not {spike.outside:.3g}, were"
    else:
        change = f"{spike.inside:.1%} of the requests, before and after {spike.outside:.2%},"
    return Text.assemble((when, "bold"), "  ", f"{change} {spike.words}")
