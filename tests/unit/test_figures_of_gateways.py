"""What processes count: added up and taken away it is exact, and quantiles are near the truth."""

import random

import msgspec
import pytest

from common.figures import Figures, Spread, total


def spread_of(*seconds: float) -> Spread:
    spread = Spread()
    for each in seconds:
        spread.observe(each)
    return spread


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_quantile_is_off_by_less_than_an_eighth(share: float) -> None:
    drawn = random.Random(7)
    times_s = [drawn.lognormvariate(-4, 2) for _ in range(5000)]
    true_s = sorted(times_s)[int(share * len(times_s))]
    assert spread_of(*times_s).quantile_s(share) == pytest.approx(true_s, rel=0.125)


def test_the_ends_of_the_scale_are_taken_too() -> None:
    spread = spread_of(0.0, 1e-9, 1e6)
    assert spread.num_observed == 3
    assert spread.quantile_s(1.0) == pytest.approx(1e6, rel=0.13)
    assert Spread().quantile_s(0.5) is None
    assert Spread().mean_s is None


def test_what_came_between_two_moments_is_their_difference() -> None:
    early, late = spread_of(0.1, 0.2), spread_of(0.1, 0.2, 0.4, 0.4)
    between = late.since(early)
    assert between.num_observed == 2
    assert between.mean_s == pytest.approx(0.4)
    assert late.num_observed == 4, "nothing is changed"


def test_gateways_add_up_and_survive_the_wire() -> None:
    first = Figures({"ok": 3, "QUEUE_FULL": 1}, 30, ttft=spread_of(0.1))
    second = Figures({"ok": 2}, 5, ttft=spread_of(0.3))
    parts = [
        msgspec.msgpack.decode(msgspec.msgpack.encode(it), type=Figures) for it in (first, second)
    ]
    both = total(parts)
    assert both.outcomes == {"ok": 5, "QUEUE_FULL": 1}
    assert both.tokens == 35
    assert both.ttft.mean_s == pytest.approx(0.2)
    assert both.since(second).outcomes == {"ok": 3, "QUEUE_FULL": 1}


def test_a_beat_stays_small() -> None:
    """Six spreads of a busy day: it goes to Redis each second."""
    drawn = random.Random(7)
    spreads = [
        spread_of(*(drawn.lognormvariate(-3, 1.5) for _ in range(100_000))) for _ in range(6)
    ]
    figures = Figures({"ok": 10**6}, 10**9, *spreads)
    assert len(msgspec.msgpack.encode(figures)) < 4000
