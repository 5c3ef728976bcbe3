"""No death makes an innocent guilty, every poison is found, and everything ends."""

from dataclasses import replace

import pytest

from tests.model.probation_model import InnocentFoundGuilty, Rules, search, simulate

RULES = Rules()
SEEDS = range(100)


@pytest.mark.parametrize(
    ("poisons", "innocents", "workers", "accidents"),
    [(1, 3, 2, 0), (2, 2, 2, 0), (3, 1, 2, 0), (2, 1, 3, 0), (1, 2, 2, 1), (2, 1, 1, 1)],
)
def test_no_innocent_is_found_guilty(
    poisons: int, innocents: int, workers: int, accidents: int
) -> None:
    """In any order of claims, steps and deaths, one accident included; and nothing stalls."""
    search(RULES, poisons=poisons, innocents=innocents, workers=workers, accidents=accidents)


def test_two_accidents_may_look_like_guilt() -> None:
    """Who is alone on two workers that die by chance cannot be told from who killed them."""
    with pytest.raises(InnocentFoundGuilty):
        search(RULES, poisons=1, innocents=1, accidents=2)


@pytest.mark.parametrize(
    ("rule", "poisons", "accidents"), [("probation", 1, 1), ("alone", 2, 0), ("clear", 2, 0)]
)
def test_each_rule_is_there_for_something(rule: str, poisons: int, accidents: int) -> None:
    """Without it so many poisons and accidents have an innocent found guilty; no fewer do."""
    rules = replace(RULES, **{rule: False})
    with pytest.raises(InnocentFoundGuilty):
        search(rules, poisons=poisons, innocents=2, accidents=accidents)
    if accidents:
        search(rules, poisons=poisons, innocents=2, accidents=accidents - 1)
    else:
        search(rules, poisons=poisons - 1, innocents=2)


@pytest.mark.parametrize("poisons", [1, 2, 3])
def test_whole_batches_lose_four_workers_to_a_poison_and_nobody_else(poisons: int) -> None:
    """By chance, a hundred times: two deaths beside others, two alone."""
    for seed in SEEDS:
        assert simulate(RULES, seed, poisons=poisons) <= 4 * poisons


def test_three_deaths_in_a_row_mostly_find_innocents_guilty_too() -> None:
    """One poison among 32, and whoever stood beside it three times goes with it."""
    rules = Rules(probation=False, alone=False, clear=False)
    assert sum(_harms(rules, seed) for seed in SEEDS) > len(SEEDS) / 2


def _harms(rules: Rules, seed: int) -> bool:
    try:
        simulate(rules, seed, poisons=1)
    except InnocentFoundGuilty:
        return True
    return False
