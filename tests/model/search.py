"""Searches everything a scenario can do, breadth first, for broken promises and for stalls.

A stall is a state from which the steps that must happen sooner or later (no fault, no event) lead
to no good end. In a finite graph without such a state, whoever schedules the steps fairly reaches
the good end for certain.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import process_time

from tests.model.protocol_model import (
    INITIAL,
    Scenario,
    State,
    Step,
    describe,
    is_good_end,
    sorted_workers,
    steps,
    trimmed,
    violation,
)


@dataclass(frozen=True, slots=True)
class Found:
    """The shortest way to a state in which a promise is broken."""

    kind: str
    """``violation`` or ``stall``."""
    what: str
    trace: list[Step]

    def __str__(self) -> str:
        lines = [
            f"{number:3}  {label.lstrip('!'):<58}  {describe(s)}"
            for number, (label, s) in enumerate(self.trace)
        ]
        return "\n".join([f"{self.kind}: {self.what}", *lines])


@dataclass(frozen=True, slots=True)
class Result:
    num_states: int
    num_steps: int
    cpu_s: float
    found: Found | None


def search(scenario: Scenario) -> Result:
    """Visit every state; stop at the first broken promise, else report the first stall if any."""
    begun = process_time()
    graph = _Graph(scenario)
    found = graph.first_violation() or graph.first_stall()
    return Result(len(graph.keys), graph.num_steps, process_time() - begun, found)


class _Graph:
    """The states found so far, in the order of their distance; ``progress`` holds the edges that
    must happen, those of state i from ``offsets[i]`` to ``offsets[i + 1]``."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._table = _Table()
        self._index: dict[int, int] = {}
        self._parents = array("i")
        self._good = bytearray()
        self._offsets = array("q", [0])
        self._progress = array("i")
        self.keys: list[int] = []
        self.num_steps = 0

    def first_violation(self) -> Found | None:
        scenario = self._scenario
        self._add(self._normal(INITIAL), -1)
        at = 0
        while at < len(self.keys):
            s = self._table.decode(self.keys[at])
            self._good.append(is_good_end(scenario, s))
            for label, after in steps(scenario, s):
                self.num_steps += 1
                to, what = self._add(self._normal(after), at)
                if what:
                    return Found("violation", what, self._trace(to))
                if not label.startswith("!"):
                    self._progress.append(to)
            self._offsets.append(len(self._progress))
            at += 1
        return None

    def first_stall(self) -> Found | None:
        """Sweep backwards, marking what reaches a good end, until a sweep marks nothing."""
        good, progress, offsets = self._good, self._progress, self._offsets
        left = [i for i in range(len(good) - 1, -1, -1) if not good[i]]
        while left:
            still: list[int] = []
            for i in left:
                if any(good[to] for to in progress[offsets[i] : offsets[i + 1]]):
                    good[i] = 1
                else:
                    still.append(i)
            if len(still) == len(left):
                what = "nothing that must still happen brings this to an end"
                return Found("stall", what, self._trace(still[-1]))
            left = still
        return None

    def _normal(self, s: State) -> State:
        return sorted_workers(trimmed(self._scenario, s))

    def _add(self, s: State, parent: int) -> tuple[int, str]:
        """The number of ``s``, and what is wrong with it if it is new."""
        key = self._table.encode(s)
        number = self._index.get(key)
        if number is not None:
            return number, ""
        number = self._index[key] = len(self.keys)
        self.keys.append(key)
        self._parents.append(parent)
        return number, violation(self._scenario, s)

    def _trace(self, number: int) -> list[Step]:
        path: list[State] = []
        while number >= 0:
            path.append(self._table.decode(self.keys[number]))
            number = self._parents[number]
        return list(self._replay(path[::-1]))

    def _replay(self, path: list[State]) -> Iterator[Step]:
        """Walk the path again without sorting the workers, so that each keeps its name."""
        s = path[0]
        yield "", s
        for _, wanted in pairwise(path):
            label, s = next(
                (label, after)
                for label, after in self._trimmed_steps(s)
                if sorted_workers(after) == wanted
            )
            yield label, s

    def _trimmed_steps(self, s: State) -> Iterator[Step]:
        for label, after in steps(self._scenario, s):
            yield label, trimmed(self._scenario, after)


_PART_BITS = 20


class _Table:
    """Numbers for the parts of states: a state is one int, and equal parts are stored once."""

    def __init__(self) -> None:
        self._numbers: list[dict[object, int]] = [{} for _ in State._fields]
        self._parts: list[list[object]] = [[] for _ in State._fields]

    def encode(self, s: State) -> int:
        key = 0
        for part, numbers, parts in zip(s, self._numbers, self._parts, strict=True):
            number = numbers.get(part)
            if number is None:
                number = numbers[part] = len(parts)
                assert number < 1 << _PART_BITS
                parts.append(part)
            key = key << _PART_BITS | number
        return key

    def decode(self, key: int) -> State:
        parts: list[object] = []
        for table in reversed(self._parts):
            parts.append(table[key & (1 << _PART_BITS) - 1])
            key >>= _PART_BITS
        return State(*reversed(parts))  # pyright: ignore[reportArgumentType]
