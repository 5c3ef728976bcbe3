"""Whom a worker's death finds guilty: suspects and probation, small enough to be searched whole.

Several generations on several workers, and none of the rest of the protocol. A poison ends each
worker that runs it before it has come further; an innocent comes further, and ends. Of tokens only
this counts: whether a generation has come further since it was claimed. What dies by accident dies
for no fault of what ran there.

``search`` visits every state that a few generations can reach; ``simulate`` plays whole batches by
chance, as protocol.md, section 5, tells of.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

SUSPECT_DEATHS = 2
POISON_DEATHS = 2


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that can be switched off, to see what each is for."""

    probation: bool = True
    """Guilty is who kills on probation; else whoever died three times in a row."""
    alone: bool = True
    """A worker with a suspect on probation claims nothing."""
    clear: bool = True
    """A suspect is claimed only where everybody else has come further."""


class Gen(NamedTuple):
    is_poison: bool
    deaths: int = 0
    """In a row, without having come further."""
    failed: int = 0
    """Of these, on probation."""

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS


class Held(NamedTuple):
    gen: Gen
    came_on: bool = False

    @property
    def is_on_probation(self) -> bool:
        return self.gen.is_suspect and not self.came_on


Worker = tuple[Held, ...]


class State(NamedTuple):
    """Sorted throughout: neither workers nor generations of a kind have names."""

    waiting: tuple[Gen, ...]
    workers: tuple[Worker, ...]
    accidents: int
    """That may still happen."""


class InnocentFoundGuilty(Exception):
    """The one thing that must not happen."""


def may_claim(rules: Rules, worker: Worker, gen: Gen) -> bool:
    if rules.alone and any(held.is_on_probation for held in worker):
        return False
    if rules.clear and gen.is_suspect:
        return all(held.came_on for held in worker)
    return True


def judged(rules: Rules, held: Held) -> Gen | None:
    """What waits again after a death of its worker; None: it was found guilty.

    Raises: InnocentFoundGuilty.
    """
    gen = held.gen
    if held.came_on:
        return Gen(gen.is_poison, deaths=1)
    deaths = gen.deaths + 1
    failed = gen.failed + (held.is_on_probation if rules.probation else deaths >= 3)
    if failed >= (POISON_DEATHS if rules.probation else 1):
        if not gen.is_poison:
            raise InnocentFoundGuilty
        return None
    return Gen(gen.is_poison, min(deaths, SUSPECT_DEATHS), failed)


def steps(rules: Rules, s: State) -> Iterator[State]:
    """Every state that one claim, one engine step or one death leads to."""
    for w, worker in enumerate(s.workers):
        for i, gen in enumerate(s.waiting):
            if may_claim(rules, worker, gen):
                waiting = s.waiting[:i] + s.waiting[i + 1 :]
                yield _with(s, w, (*worker, Held(gen)), waiting)
        for i, held in enumerate(worker):
            if not held.gen.is_poison:
                rest = worker[:i] + worker[i + 1 :]
                yield _with(s, w, rest, s.waiting)
                yield _with(s, w, (*rest, held._replace(came_on=True)), s.waiting)
        if any(held.gen.is_poison for held in worker):
            yield _death(rules, s, w)
        if worker and s.accidents:
            yield _death(rules, s._replace(accidents=s.accidents - 1), w)


def _death(rules: Rules, s: State, w: int) -> State:
    back = [gen for held in s.workers[w] if (gen := judged(rules, held)) is not None]
    return _with(s, w, (), (*s.waiting, *back))


def _with(s: State, w: int, worker: Worker, waiting: tuple[Gen, ...]) -> State:
    workers = (*s.workers[:w], tuple(sorted(worker)), *s.workers[w + 1 :])
    return State(tuple(sorted(waiting)), tuple(sorted(workers)), s.accidents)


def search(
    rules: Rules, *, poisons: int, innocents: int, workers: int = 2, accidents: int = 0
) -> int:
    """Visit every state; returns their number.

    Raises:
        InnocentFoundGuilty: in a state that can be reached.
        AssertionError: from some state no way leads to the end of all.
    """
    gens = (*(Gen(is_poison=False),) * innocents, *(Gen(is_poison=True),) * poisons)
    first = State(gens, ((),) * workers, accidents)
    before: dict[State, list[State]] = {first: []}
    left = [first]
    while left:
        s = left.pop()
        for after in steps(rules, s):
            if after not in before:
                before[after] = []
                left.append(after)
            before[after].append(s)
    good = {s for s in before if not s.waiting and not any(s.workers)}
    left = list(good)
    while left:
        for s in before[left.pop()]:
            if s not in good:
                good.add(s)
                left.append(s)
    assert len(good) == len(before), "a suspect is never tried, or never acquitted"
    return len(before)


def simulate(rules: Rules, seed: int, *, poisons: int, batch: int = 32, workers: int = 3) -> int:
    """Play one batch by chance, until all have ended; returns how many workers died.

    Each worker claims what there is, then its engine makes a step; a prompt takes a few.

    Raises: InnocentFoundGuilty.
    """
    rng = random.Random(seed)
    waiting = [Gen(is_poison=i < poisons) for i in range(batch)]
    rng.shuffle(waiting)
    running: list[list[Held]] = [[] for _ in range(workers)]
    num_deaths = 0
    while waiting or any(running):
        w = rng.randrange(workers)
        for gen in sorted(waiting, key=lambda gen: gen.is_suspect):
            if may_claim(rules, tuple(running[w]), gen) and rng.random() < 0.9:
                waiting.remove(gen)
                running[w].append(Held(gen))
        if any(it.gen.is_poison and rng.random() < 0.3 for it in running[w]):
            num_deaths += 1
            waiting += [gen for it in running[w] if (gen := judged(rules, it)) is not None]
            running[w] = []
        else:
            running[w] = [it for held in running[w] if (it := _played(held, rng))]
    return num_deaths


def _played(held: Held, rng: random.Random) -> Held | None:
    """After one engine step: as it was, further, or ended."""
    if held.gen.is_poison or rng.random() < 0.7:
        return held
    return held._replace(came_on=True) if not held.came_on else None
