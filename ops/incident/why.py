"""Why: which cause explains the bad requests best, ranked by one measure of evidence.

A cause is a set of requests: those with a trait (a worker, a tenant, a length of prompt), or with
two, in the whole log or since something changed; or those that an event touched
(:mod:`ops.incident.causes`). For each kind of symptom a two-by-two table says how well that set and
the bad requests agree. The gain in log-likelihood, summed over the symptoms, ranks them all; a
cause of two traits must gain clearly more than either, and everything else than the bare interval.

After MacroBase (Bailis et al. 2017: risk ratio and support of combinations of attributes) and the
comparison of a selection with its baseline, by every field, that Honeycomb made known as BubbleUp.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import click
from duckdb import DuckDBPyConnection
from msgspec import structs
from rich.text import Text

from ops.incident.causes import Cause, find_causes, quoted, shown_since
from ops.incident.command import (
    Confidence,
    Finding,
    Question,
    question_options,
    shown_moment,
    shown_time,
    tell,
)
from ops.incident.conditions import Condition, condition_option
from ops.incident.statistics import Table, false_discovery_rates
from ops.incident.symptoms import EFFECTS, TRAITS, Symptom, Window, judge
from ops.incident.tally import MIN_HITS, MIN_SUPPORT, Counts, Tally, Traits, inside_sql

BASELINE_S = 3600.0
"""What came before the time asked about, for comparison."""
MAX_FALSE_DISCOVERIES = 0.01
MIN_RATIO = 1.5
"""As MacroBase has it; of the lower end of the interval, which is stricter."""
_MIN_GAIN = 12.0
"""Nats: e**12 to one, against some hundred traits and combinations that were tried."""
_MIN_SHARE = 0.12
"""Least part of all evidence that a trait must explain to be named."""
_MIN_SLOW_SHARE = 0.03
"""Fewer slow, refused or leaving requests than that are in every log that has no sudden trouble."""
_TWO_WAY_GAIN = 1.25
_INTERVAL_GAIN, _STANDING_GAIN = 1.25, 0.8
_PRICE = 6.0
"""Nats that each further parameter (a second trait, an interval) has to earn."""
_EFFECT = 0.8
_SAME = 0.95
"""Two traits are one where so much of either is the other."""


@click.command("why")
@condition_option
@question_options
def main(*, question: Question, bad: Condition | None) -> int:
    """Name what the failed, lost or slow requests have in common.

    All traits of requests are tried, alone and by twos, and all events that may have touched them:
    the first finding is the best single explanation. With --since, the hour before it is what the
    requests are compared with.
    """
    with widened(question).open() as logs:
        verdict = explain(logs.db, since=question.since, until=question.until, bad=bad)
        findings = [told(question, one) for one in verdict.findings]
        return tell(
            question,
            logs,
            findings,
            data={"symptoms": [symptom_data(one) for one in verdict.symptoms]},
            shown=[*map(shown_symptom, verdict.symptoms), *_nothing(verdict)],
        )


def widened(question: Question) -> Question:
    """The same question, of logs that begin earlier: by what it is compared with."""
    if question.since is None:
        return question
    return structs.replace(question, since=question.since - BASELINE_S)


def told(question: Question, one: "Explanation") -> Finding:
    """An explanation as every command tells it."""
    since = "" if one.since is None else f", since {shown_moment(one.since)}"
    aliases = ", ".join(f"{name}={value}" for name, value in one.aliases.items())
    same = f" (the same as {aliases})" if aliases else ""
    return Finding(
        what=f"{one.cause}{same}{since}",
        confidence=one.certainty,
        why=f"confidence {one.confidence:.0%}; {one.figures}",
        next=question.next(one.command),
        data=asdict(one),
    )


def symptom_data(symptom: Symptom) -> dict[str, object]:
    """For programs."""
    return {
        "symptom": symptom.kind.name,
        "words": symptom.kind.words,
        "bad": symptom.bad,
        "total": symptom.total,
        "start": symptom.window.start if symptom.window else None,
        "end": symptom.window.end if symptom.window else None,
        "bucket_s": symptom.window.bucket_s if symptom.window else None,
        "typical_s": symptom.typical_s,
        "slow_s": symptom.slow_s,
    }


def shown_symptom(symptom: Symptom) -> Text:
    """One line: how many, when, how much slower."""
    text = Text.assemble(
        (f"{symptom.bad} of {symptom.total} requests ", "bold"), symptom.kind.words
    )
    text.append(how_slow(symptom))
    if symptom.window is not None:
        window = symptom.window
        text.append(
            f", from {shown_moment(window.start)} to {shown_moment(window.end)[11:]}"
            f" (± {window.bucket_s:.0f} s)",
            style="dim",
        )
    return text


def how_slow(symptom: Symptom) -> str:
    """As the end of a sentence; empty for what is no slowness."""
    if symptom.slow_s is None:
        return ""
    usual = f" instead of {shown_time(symptom.typical_s)}" if symptom.typical_s else ""
    return f": {shown_time(symptom.slow_s)}{usual}"


def _nothing(verdict: "Verdict") -> list[Text]:
    if verdict.findings:
        return [Text()]
    if verdict.symptoms:
        return [Text("No cause can be named: those requests have nothing in common.")]
    return [Text(f"Nothing stands out among {verdict.total} requests: no culprit.")]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One explanation with all its figures, ready to be told."""

    kind: str
    """``trait``, ``interval`` (something at that time, which no event names), or a cause's."""
    cause: str
    """In words, without figures."""
    subject: dict[str, str]
    aliases: dict[str, str]
    since: float | None
    until: float | None
    explains: list[str]
    """Symptoms, in words."""
    num_bad: int
    """Bad requests that it covers, of ``all_bad``; of ``num_exposed`` with its trait."""
    all_bad: int
    num_exposed: int
    num_total: int
    risk_ratio: float
    risk_low: float
    risk_high: float
    support: float
    p_value: float
    share: float
    """Part of all evidence that it explains, 0..1."""
    confidence: float
    facts: list[str]
    command: str
    score: float

    @property
    def names_a_cause(self) -> bool:
        return self.kind != "interval"

    @property
    def certainty(self) -> Confidence:
        if self.confidence >= 0.75:
            return "high"
        return "medium" if self.confidence >= 0.5 else "low"

    @property
    def figures(self) -> str:
        """The evidence in one line."""
        parts: list[str] = []
        if self.num_bad:
            parts.append(
                f"{self.num_bad} of the {self.all_bad} requests that {self.explains[0]} are among"
                f" the {self.num_exposed} (of {self.num_total}) that it touched:"
                f" risk ratio {self.risk_ratio:.3g} (95 % {self.risk_low:.3g}–{self.risk_high:.3g})"
            )
        if len(self.explains) > 1:
            parts.append(f"also those that {'; '.join(self.explains[1:])}")
        parts += self.facts
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong, and the explanations, the best first."""

    symptoms: list[Symptom]
    findings: list[Explanation]
    total: int
    since: float
    until: float

    @property
    def culprit(self) -> Explanation | None:
        """The first finding, if it names a cause."""
        first = self.findings[0] if self.findings else None
        return first if first is not None and first.names_a_cause else None


@dataclass
class _Candidate:
    """A set of requests with its tables, by symptom."""

    kind: str
    traits: Traits = ()
    cause: Cause | None = None
    window: Window | None = None
    exposed: str = "false"
    gains: dict[str, float] = field(default_factory=dict[str, float])
    tables: dict[str, Table] = field(default_factory=dict[str, Table])
    scopes: dict[str, str] = field(default_factory=dict[str, str])
    """By symptom, the condition that fitted best."""
    borrowed: set[str] = field(default_factory=set[str])
    """Symptoms of which it explains something only together with their interval."""
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    score: float = 0.0

    def note(self, symptom: Symptom, table: Table, scope: str, price: float) -> None:
        gain = table.gain() - price
        if gain > self.gains.get(symptom.kind.name, 0.0):
            self.gains[symptom.kind.name] = gain
            self.tables[symptom.kind.name] = table
            self.scopes[symptom.kind.name] = scope


def explain(
    db: DuckDBPyConnection,
    *,
    since: float | None = None,
    until: float | None = None,
    bad: Condition | None = None,
    limit: int = 5,
) -> Verdict:
    """Find symptoms and rank what explains them; makes the table ``judged`` of ``db``.

    ``since`` and ``until`` in seconds since the epoch choose by arrival. ``bad`` says which
    requests are bad, instead of everything that usually is.
    """
    last = db.execute("SELECT max(t) FROM events").fetchone()
    symptoms = judge(db, since=since, until=until, bad=bad, last_seen=last[0] if last else None)
    total, start, end = _span(db)
    candidates = [
        *_traits(db, symptoms),
        *_intervals(db, symptoms),
        *_from_causes(db, find_causes(db, symptoms), symptoms),
    ]
    serious = [one for one in symptoms if _is_serious(one, candidates)]
    ranked = _ranked(candidates, serious)
    chosen = _distinct(db, ranked, serious, limit)
    findings = [_told(one, serious, chosen, total) for one in chosen]
    return Verdict(serious, findings, total, start, end)


def _span(db: DuckDBPyConnection) -> tuple[int, float, float]:
    row = db.execute("SELECT count(*), min(arrived), max(gone) FROM judged").fetchone()
    return (row[0], row[1] or 0.0, row[2] or 0.0) if row else (0, 0.0, 0.0)


# Candidates ----------------------------------------------------------------------------------


def _trait_sql(traits: Traits) -> str:
    return " AND ".join(f"t_{name} = {quoted(value)}" for name, value in traits)


def _traits(db: DuckDBPyConnection, symptoms: Sequence[Symptom]) -> list[_Candidate]:
    """Every value of every trait, and of every two, that enough bad requests have."""
    if not symptoms:
        return []
    counted = Tally(db, symptoms).count()
    candidates = {traits: _Candidate("trait", traits) for traits in counted if traits}
    whole = counted[()]
    for traits, candidate in candidates.items():
        counts = counted[traits]
        for place, symptom in enumerate(symptoms):
            if not _may_explain(traits, symptom):
                continue
            price = _PRICE * (len(traits) - 1)
            _note_trait(candidate, symptom, counts[place], whole[place], price)
    _merge_aliases(candidates, counted)
    return _pruned(list(candidates.values()), candidates)


def _may_explain(traits: Traits, symptom: Symptom) -> bool:
    """Not what is the symptom itself in other words."""
    names = {name for name, _ in traits}
    if "attempts" in names and symptom.kind.name in {"moved", "unfinished"}:
        return False
    # Who waits because many are there is among many: that says nothing of the reason.
    return not ("batch_size" in names and symptom.kind.name in {"queue", "first_token"})


def _note_trait(
    candidate: _Candidate, symptom: Symptom, counts: Counts, whole: Counts, price: float
) -> None:
    trait = _trait_sql(candidate.traits)
    candidate.note(symptom, Table(counts.hit, counts.all, whole.hit, whole.all), trait, price)
    if symptom.window is not None and counts.hit_inside >= MIN_HITS:
        table = Table(counts.hit_inside, counts.inside, whole.hit, whole.all)
        # An interval alone explains something; only what a trait adds to it is the trait's.
        within = Table(counts.hit_inside, counts.inside, whole.hit_inside, whole.inside)
        standing = candidate.gains.get(symptom.kind.name, 0.0)
        if within.gain() >= _PRICE and table.gain() > _INTERVAL_GAIN * standing:
            scope = f"{trait} AND {inside_sql(symptom, symptom.window)}"
            candidate.note(symptom, table, scope, price + _PRICE)
            if candidate.scopes.get(symptom.kind.name) == scope:
                candidate.borrowed.add(symptom.kind.name)


def _merge_aliases(
    candidates: dict[Traits, _Candidate], counted: Mapping[Traits, list[Counts]]
) -> None:
    """Of traits that always go together, the one that says most stays; the others are its names."""
    singles = [traits for traits in candidates if len(traits) == 1]
    order = list(TRAITS)
    singles.sort(key=lambda traits: order.index(traits[0][0]))
    gone: set[Traits] = set()
    for place, first in enumerate(singles):
        if first in gone:
            continue
        for second in singles[place + 1 :]:
            both = counted.get(tuple(sorted(first + second, key=lambda one: order.index(one[0]))))
            if second in gone or both is None:
                continue
            together = max(counts.all for counts in both)
            if all(
                together >= _SAME * max(counts.all for counts in counted[traits])
                for traits in (first, second)
            ):
                candidates[first].aliases[second[0][0]] = second[0][1]
                gone.add(second)
    for traits in list(candidates):
        if any((one,) in gone for one in traits):
            del candidates[traits]


def _pruned(
    candidates: list[_Candidate], by_traits: Mapping[Traits, _Candidate]
) -> list[_Candidate]:
    """Those that are not chance, and of two traits those that say more than either."""
    for candidate in candidates:
        if len(candidate.traits) == 2:
            parts = [by_traits.get((one,)) for one in candidate.traits]
            for name in list(candidate.gains):
                of_parts = max((part.gains.get(name, 0.0) for part in parts if part), default=0.0)
                if candidate.gains[name] < _TWO_WAY_GAIN * of_parts + _PRICE:
                    del candidate.gains[name]
    tested = [(one, name) for one in candidates for name in one.gains]
    rates = false_discovery_rates([one.tables[name].p_value() for one, name in tested])
    for (candidate, name), rate in zip(tested, rates, strict=True):
        table = candidate.tables[name]
        if (
            rate > MAX_FALSE_DISCOVERIES
            or table.risk_ratio()[1] < MIN_RATIO
            or table.support < MIN_SUPPORT
            or candidate.gains[name] < _MIN_GAIN
        ):
            del candidate.gains[name]
    return [one for one in candidates if one.gains]


def _intervals(db: DuckDBPyConnection, symptoms: Sequence[Symptom]) -> list[_Candidate]:
    """The bare times of trouble: what any other explanation has to beat."""
    found: list[_Candidate] = []
    for symptom in symptoms:
        if symptom.window is None:
            continue
        candidate = _Candidate("interval", window=symptom.window)
        _measure(db, candidate, (inside_sql(symptom, symptom.window),), [symptom], price=_PRICE)
        for other in symptoms:
            if other is not symptom and other.window is not None:
                _measure(db, candidate, (inside_sql(other, symptom.window),), [other], price=_PRICE)
        if candidate.gains:
            found.append(candidate)
    return found


def _from_causes(
    db: DuckDBPyConnection, causes: Iterable[Cause], symptoms: Sequence[Symptom]
) -> list[_Candidate]:
    found: list[_Candidate] = []
    for cause in causes:
        candidate = _Candidate(cause.kind, cause=cause)
        explained = [
            one for one in symptoms if cause.explains is None or one.kind.name in cause.explains
        ]
        _measure(db, candidate, cause.exposed, explained, price=0.0)
        if candidate.gains or cause.inherent:
            found.append(candidate)
    return found


def _measure(
    db: DuckDBPyConnection,
    candidate: _Candidate,
    conditions: Sequence[str],
    symptoms: Sequence[Symptom],
    *,
    price: float,
) -> None:
    figures = [
        f"count(*) FILTER (({condition}) AND {what})"
        for condition in conditions
        for one in symptoms
        for what in (one.flag, f"{one.moment} IS NOT NULL")
    ]
    if not figures:
        return
    row = db.execute(f"SELECT {', '.join(figures)} FROM judged").fetchone() or ()
    numbers = iter(row)
    for place, condition in enumerate(conditions):
        for one in symptoms:
            table = Table(next(numbers), next(numbers), one.bad, one.total)
            candidate.note(one, table, condition, price + _PRICE / 2 * place)


# Ranking -------------------------------------------------------------------------------------


def _is_serious(symptom: Symptom, candidates: Sequence[_Candidate]) -> bool:
    """Whether it is more than what always happens: failures are, slowness only with a pattern."""
    name = symptom.kind.name
    if name in {"errors", "unfinished", "moved", "asked"} or symptom.is_sudden:
        return True
    return symptom.bad >= _MIN_SLOW_SHARE * symptom.total and any(
        one.kind == "trait" and one.gains.get(name, 0.0) >= _MIN_SHARE * _entropy(symptom)
        for one in candidates
    )


def _entropy(symptom: Symptom) -> float:
    return max(Table(0, 0, symptom.bad, symptom.total).entropy(), 1e-9)


def _ranked(candidates: Sequence[_Candidate], symptoms: Sequence[Symptom]) -> list[_Candidate]:
    names = {one.kind.name: one for one in symptoms}
    floor: dict[str, float] = defaultdict(float)
    for one in candidates:
        if one.kind == "interval":
            for name, gain in one.gains.items():
                floor[name] = max(floor[name], gain)
    for one in candidates:
        plausibility = one.cause.plausibility if one.cause else _plausibility(one)
        one.score = sum(
            names[name].kind.weight * gain
            for name, gain in one.gains.items()
            if name in names
            and (one.kind != "trait" or gain > _least_over_interval(one, name) * floor[name])
        )
        one.score = one.score * plausibility + (one.cause.inherent if one.cause else 0.0)
    return sorted(
        [one for one in candidates if one.score > 0], key=lambda one: one.score, reverse=True
    )


def _least_over_interval(candidate: _Candidate, name: str) -> float:
    """What a trait must gain, as a multiple of what the bare interval does.

    One that holds for the whole log, such as a version that came with the trouble, may be a little
    worse; one that is only true within the interval must say clearly more than it.
    """
    return _INTERVAL_GAIN if name in candidate.borrowed else _STANDING_GAIN


def _plausibility(candidate: _Candidate) -> float:
    if candidate.kind == "interval":
        return 0.45
    names = {name for name, _ in candidate.traits}
    return _EFFECT if names & EFFECTS else 0.9


def _distinct(
    db: DuckDBPyConnection,
    ranked: Sequence[_Candidate],
    symptoms: Sequence[Symptom],
    limit: int,
) -> list[_Candidate]:
    """The best, then those that explain something which the ones before do not."""
    chosen: list[_Candidate] = []
    for one in ranked[:40]:
        if len(chosen) == limit:
            break
        if not _is_worth_naming(one, symptoms):
            continue
        if not chosen or _adds(db, one, chosen, symptoms):
            chosen.append(one)
    return chosen


def _is_worth_naming(one: _Candidate, symptoms: Sequence[Symptom]) -> bool:
    if one.cause is not None:
        return one.cause.inherent > 0 or one.score >= _MIN_GAIN
    most = sum(each.kind.weight * _entropy(each) for each in symptoms)
    return one.score >= max(_MIN_GAIN, 0.3 * _MIN_SHARE * most)


def _adds(
    db: DuckDBPyConnection,
    one: _Candidate,
    chosen: Sequence[_Candidate],
    symptoms: Sequence[Symptom],
) -> bool:
    """Whether it explains bad requests that the chosen ones do not touch."""
    if one.cause is not None and one.cause.inherent >= 10:
        return not any(_brings_about(each.cause, one.cause) for each in chosen if each.cause)
    before = one.score
    gain = 0.0
    for symptom in symptoms:
        name = symptom.kind.name
        if name not in one.gains:
            continue
        known = " OR ".join(f"({each.scopes[name]})" for each in chosen if name in each.scopes)
        if not known:
            gain += symptom.kind.weight * one.gains[name]
            continue
        rest = f"NOT coalesce({known}, false)"
        there = f"{symptom.moment} IS NOT NULL AND {rest}"
        scope = one.scopes[name]
        row = db.execute(
            f"""SELECT count(*) FILTER ({symptom.flag} AND ({scope})), count(*) FILTER ({scope}),
                count(*) FILTER ({symptom.flag}), count(*) FROM judged WHERE {there}"""
        ).fetchone()
        if row is not None:
            gain += symptom.kind.weight * Table(*row).gain()
    return gain >= max(2 * _MIN_GAIN, 0.25 * before)


def _brings_about(cause: Cause, later: Cause) -> bool:
    """Whether the one may have followed from the other: it began while that lasted."""
    return cause.start - 2.0 <= later.start <= cause.end + 10.0


# Telling -------------------------------------------------------------------------------------


def _told(
    one: _Candidate, symptoms: Sequence[Symptom], chosen: Sequence[_Candidate], total: int
) -> Explanation:
    known = {each.kind.name: each for each in symptoms}
    own = sorted(
        (name for name in one.gains if name in known),
        key=lambda name: known[name].kind.weight * one.gains[name],
        reverse=True,
    )
    table = one.tables[own[0]] if own else Table(0, 0, 0, total)
    ratio, low, high = table.risk_ratio()
    most = sum(each.kind.weight * _entropy(each) for each in symptoms)
    share = sum(known[name].kind.weight * one.gains[name] for name in own) / most if most else 0.0
    windows = [known[name].window for name in own]
    since, until = _when(one, [window for window in windows if window is not None])
    return Explanation(
        kind=one.kind,
        cause=_words(one),
        subject=one.cause.subject if one.cause else dict(one.traits),
        aliases=one.aliases,
        since=since,
        until=until,
        explains=[known[name].kind.words for name in own],
        num_bad=table.hit,
        all_bad=table.bad,
        num_exposed=table.exposed,
        num_total=table.total,
        risk_ratio=ratio,
        risk_low=low,
        risk_high=high,
        support=table.support,
        p_value=table.p_value(),
        share=min(share, 1.0),
        confidence=_confidence(one, symptoms, chosen),
        facts=list(one.cause.facts) if one.cause else [],
        command=one.cause.command if one.cause else _command(one),
        score=one.score,
    )


def _when(one: _Candidate, windows: Sequence[Window]) -> tuple[float | None, float | None]:
    if one.cause is not None:
        return one.cause.start, one.cause.end
    if not windows:
        return None, None
    return min(each.start for each in windows), max(each.end for each in windows)


def _words(one: _Candidate) -> str:
    if one.cause is not None:
        return one.cause.words
    if one.kind == "interval":
        return "something at that time concerned everybody, and no event of the log says what"
    return " and ".join(f"{name}={value}" for name, value in one.traits)


def _command(one: _Candidate) -> str:
    if one.kind == "interval" and one.window is not None:
        return f"changes --since {shown_since(one.window.start)}"
    condition = " and ".join(f'{name}="{value}"' for name, value in one.traits)
    return f"top --bad '{condition}'"


def _confidence(
    one: _Candidate, symptoms: Sequence[Symptom], chosen: Sequence[_Candidate]
) -> float:
    """How sure it is, 0..1; a scale to compare by, not a probability.

    By how many of the bad requests it covers, how much more often those it covers are bad, how far
    the next explanation is behind, and on how many requests all that rests.
    """
    others = [each.score for each in chosen if each is not one]
    margin = 1.0 - min(1.0, max(others, default=0.0) / one.score) if one.score else 0.0
    hits = max((table.hit for table in one.tables.values()), default=0)
    if not hits:
        return 0.9 if one.cause is not None and one.cause.inherent >= 15 else 0.5
    bad = sum(each.kind.weight * each.bad for each in symptoms)
    covered = sum(
        each.kind.weight * one.tables[each.kind.name].hit
        for each in symptoms
        if each.kind.name in one.gains
    )
    surest = max((one.tables[name].risk_ratio()[1] for name in one.gains), default=1.0)
    distinct = 1.0 - 1.0 / max(surest, 1.0)
    certain = 0.25 + 0.5 * (covered / bad if bad else 0.0) * distinct + 0.25 * margin
    support = 1.0 if one.cause is not None and one.cause.inherent else hits / (hits + 3.0)
    return round(min(0.99, certain * support * (0.5 if one.kind == "interval" else 1.0)), 2)
