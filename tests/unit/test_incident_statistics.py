"""What is computed of counts, against values that can be had by hand."""

import math
import random

import pytest

from ops.incident.statistics import Table, false_discovery_rates, scan


def test_a_risk_ratio_has_its_interval() -> None:
    """30 of 100 against 10 of 300: a ratio of nine, with half a thing in each cell."""
    ratio, low, high = Table(hit=30, exposed=100, bad=40, total=400).risk_ratio()
    assert ratio == pytest.approx((30.5 / 101) / (10.5 / 301))
    assert low < ratio < high
    assert math.log(ratio / low) == pytest.approx(math.log(high / ratio))


def test_a_trait_that_is_the_badness_explains_all_and_an_unrelated_one_nothing() -> None:
    perfect = Table(hit=40, exposed=40, bad=40, total=400)
    assert perfect.gain() == pytest.approx(perfect.entropy())
    assert Table(hit=10, exposed=100, bad=40, total=400).gain() == 0


def test_what_goes_with_fewer_bad_ones_is_no_cause() -> None:
    assert Table(hit=1, exposed=200, bad=40, total=400).gain() == 0


def test_the_p_value_is_that_of_the_g_test() -> None:
    """G = 6.635 is the quantile of 99 % with one degree of freedom."""
    table = Table(hit=15, exposed=50, bad=40, total=200)
    assert 2 * table.gain() == pytest.approx(_chi_squared(table.p_value()), rel=1e-6)


def _chi_squared(p_value: float) -> float:
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(math.sqrt(middle / 2)) > p_value else (low, middle)
    return low


def test_false_discovery_rates_are_those_of_benjamini_and_hochberg() -> None:
    rates = false_discovery_rates([0.01, 0.04, 0.03, 0.5])
    assert rates == pytest.approx([0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5])


def test_a_burst_is_found_where_it_is() -> None:
    chance = random.Random(4)
    bad = [float(sum(chance.random() < (0.3 if 60 <= at < 80 else 0.01) for _ in range(40)))
           for at in range(120)]  # fmt: skip
    found = scan(bad, [40.0] * 120)
    assert found is not None
    assert (found.start, found.end) == (60, 80)
    assert found.p_value < 1e-9
    assert found.inside > 10 * found.outside


def test_noise_is_hardly_ever_a_burst() -> None:
    chance = random.Random(5)
    alarms = 0
    for _ in range(200):
        bad = [float(sum(chance.random() < 0.02 for _ in range(30))) for _ in range(80)]
        found = scan(bad, [30.0] * 80)
        alarms += found is not None and found.p_value < 1e-4
    assert alarms == 0


def test_nothing_bad_has_no_interval() -> None:
    assert scan([0.0] * 10, [5.0] * 10) is None
