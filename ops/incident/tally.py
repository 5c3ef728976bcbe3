"""Counts of bad requests for every trait and every two traits, in a few passes over small integers.

Values of traits become numbers of a byte, and what symptoms a request shows, and whether in their
windows, becomes one more. Then each two traits are one grouped count that the database does in an
array, and a value that too few bad requests have is left out before two are combined.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from duckdb import DuckDBPyConnection

from ops.incident.statistics import Table
from ops.incident.symptoms import TRAITS, Symptom, Window

MIN_SUPPORT = 0.1
"""Share of the bad requests that a trait must have to be named as their cause."""
MIN_HITS = 3
_MAX_VALUES = 60
"""Values of one trait that are combined with others: those with the most bad requests."""
_MEASURED = ("prompt_tokens", "max_tokens", "batch_size")
"""Traits that are numbers: one bound may divide them better than buckets do."""
_CUT_PRICE = 6.0

Traits = tuple[tuple[str, str], ...]
"""Names and values, at most two."""


@dataclass(slots=True)
class Counts:
    """Of one set of requests and one symptom; ``inside`` its window."""

    hit: int = 0
    all: int = 0
    hit_inside: int = 0
    inside: int = 0


def inside_sql(symptom: Symptom, window: Window) -> str:
    """The condition that a symptom showed in a window."""
    return f"({symptom.moment} BETWEEN {window.start!r} AND {window.end!r})"


class Tally:
    """Counts over ``judged`` for these symptoms."""

    def __init__(self, db: DuckDBPyConnection, symptoms: Sequence[Symptom]) -> None:
        self._db = db
        self._symptoms = symptoms
        self._least = [max(MIN_HITS, int(MIN_SUPPORT * one.bad)) for one in symptoms]
        bits: list[str] = []
        for place, one in enumerate(symptoms):
            inside = inside_sql(one, one.window) if one.window else "false"
            there = f"{one.moment} IS NOT NULL"
            for offset, flag in enumerate((f"{one.flag} AND {there}", there, inside)):
                bits.append(f"(CAST(coalesce({flag}, false) AS INTEGER) << {3 * place + offset})")
        kept = ", ".join([*_MEASURED, *(f"t_{name}" for name in TRAITS)])
        db.execute(
            f"CREATE OR REPLACE TEMP TABLE shown AS"
            f" SELECT {kept}, {' + '.join(bits)} AS p FROM judged"
        )
        self._patterns = [row[0] for row in db.execute("SELECT DISTINCT p FROM shown").fetchall()]

    def count(self) -> dict[Traits, list[Counts]]:
        """Counts by traits, with those of everybody under ``()``; only what may be a cause."""
        for name in _MEASURED:
            self._divide(name)
        counted: dict[Traits, list[Counts]] = {
            (): self._sum(self._db.execute("SELECT p, count(*) FROM shown GROUP BY 1").fetchall())
        }
        values: dict[str, list[str]] = {}
        for name in TRAITS:
            own = self._by_value(name)
            if len(own) < 2:
                continue  # what all have distinguishes nobody
            kept = [value for value, counts in own.items() if value and self._is_frequent(counts)]
            kept.sort(key=lambda value: -max(counts.hit for counts in own[value]))
            values[name] = kept[:_MAX_VALUES]
            counted |= {((name, value),): own[value] for value in values[name]}
        return counted | self._count_pairs({name: kept for name, kept in values.items() if kept})

    def _sum(self, rows: Iterable[Sequence[int]]) -> list[Counts]:
        """Counts per symptom of ``(pattern, how many)``."""
        counts = [Counts() for _ in self._symptoms]
        for pattern, number in rows:
            for place, own in enumerate(counts):
                bits = pattern >> 3 * place & 7
                if bits & 2:
                    own.all += number
                    own.hit += number * (bits & 1)
                    if bits & 4:
                        own.inside += number
                        own.hit_inside += number * (bits & 1)
        return counts

    def _is_frequent(self, counts: Sequence[Counts]) -> bool:
        return any(own.hit >= least for own, least in zip(counts, self._least, strict=True))

    def _by_value(self, name: str) -> dict[str, list[Counts]]:
        rows: dict[str, list[tuple[int, int]]] = {}
        query = f"SELECT t_{name}, p, count(*) FROM shown GROUP BY ALL"
        for value, pattern, number in self._db.execute(query).fetchall():
            rows.setdefault(value, []).append((pattern, number))
        return {value: self._sum(own) for value, own in rows.items()}

    def _count_pairs(self, values: Mapping[str, list[str]]) -> dict[Traits, list[Counts]]:
        coded = ", ".join(
            f"CAST(coalesce(list_position($v_{name}, t_{name}), 0) AS UTINYINT) AS c_{name}"
            for name in values
        )
        if len(values) < 2:
            return {}
        pattern = "CAST(list_position($patterns, p) AS USMALLINT) AS p"
        given = {f"v_{name}": own for name, own in values.items()} | {"patterns": self._patterns}
        self._db.execute("SET perfect_ht_threshold = 22")
        self._db.execute(
            f"CREATE OR REPLACE TEMP TABLE coded AS SELECT {pattern}, {coded} FROM shown", given
        )
        counted: dict[Traits, list[Counts]] = {}
        for one, other in combinations(values, 2):
            rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for first, second, place, number in self._db.execute(
                f"SELECT c_{one}, c_{other}, p, count(*) FROM coded"
                f" WHERE c_{one} > 0 AND c_{other} > 0 GROUP BY ALL"
            ).fetchall():
                own = rows.setdefault((first, second), [])
                own.append((self._patterns[place - 1], number))
            for (first, second), own in rows.items():
                counts = self._sum(own)
                if self._is_frequent(counts):
                    traits = ((one, values[one][first - 1]), (other, values[other][second - 1]))
                    counted[traits] = counts
        return counted

    def _divide(self, name: str) -> None:
        """Replace the buckets of a number by ``>`` and ``≤`` a bound that tells more."""
        rows = self._db.execute(
            f"SELECT {name}, p, count(*) FROM shown WHERE {name} IS NOT NULL GROUP BY ALL"
        ).fetchall()
        by_number: dict[float, list[tuple[int, int]]] = {}
        for number, pattern, count in rows:
            by_number.setdefault(number, []).append((pattern, count))
        if len(by_number) < 3:
            return
        whole = self._sum((pattern, count) for own in by_number.values() for pattern, count in own)
        best = max(
            (
                Table(counts.hit, counts.all, total.hit, total.all).gain()
                for counted in self._by_value(name).values()
                for counts, total in zip(counted, whole, strict=True)
            ),
            default=0.0,
        )
        bound: float | None = None
        below = [Counts() for _ in self._symptoms]
        numbers = sorted(by_number)
        for number in numbers[:-1]:
            for own, more in zip(below, self._sum(by_number[number]), strict=True):
                own.hit, own.all = own.hit + more.hit, own.all + more.all
            gain = max(_cut_gain(own, total) for own, total in zip(below, whole, strict=True))
            if gain - _CUT_PRICE > best:
                best, bound = gain - _CUT_PRICE, number
        if bound is not None:
            for table in ("judged", "shown"):
                self._db.execute(
                    f"""UPDATE {table} SET t_{name} = CASE WHEN {name} > {bound!r}
                        THEN '> {bound:g}' ELSE '≤ {bound:g}' END
                        WHERE {name} IS NOT NULL"""
                )


def _cut_gain(below: Counts, whole: Counts) -> float:
    above = Table(whole.hit - below.hit, whole.all - below.all, whole.hit, whole.all)
    return max(above.gain(), Table(below.hit, below.all, whole.hit, whole.all).gain())
