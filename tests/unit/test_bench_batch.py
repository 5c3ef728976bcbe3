"""What the batch scenario tells of its windows: pooled times, the share of what readers leave."""

from ops.bench.batch import Window, figures
from ops.bench.stream import Answer


def answer(first_s: float, *gaps_s: float, num_tokens: int = 0) -> Answer:
    """One that was asked for at 0 and came in events with these pauses between them."""
    at = [first_s]
    for gap in gaps_s:
        at.append(at[-1] + gap)
    return Answer(0.0, at[-1], at, num_tokens or len(at))


def test_ratios_are_of_the_slowest_hundredth_of_all_windows_of_a_kind() -> None:
    alone = [Window(10, [answer(0.1, 0.010)]), Window(10, [answer(0.2, 0.010)])]
    beside = [Window(10, [answer(0.1, 0.012)]), Window(10, [answer(0.3, 0.015)])]
    told = figures(alone, beside, [Window(10)])
    assert (told.first_token_ratio, told.gap_ratio) == (1.5, 1.5)
    assert (told.alone.requests, told.beside.requests) == (2, 2)


def test_the_share_is_of_what_readers_leave() -> None:
    """1,000 tokens per second with nobody else, 200 of them read: 600 are three quarters."""
    beside = [Window(10, [], num_read=2000.0, batch_rate=600.0)]
    told = figures([Window(10)], beside, [Window(10, batch_rate=1000.0)])
    assert (told.beside.tokens_per_second, told.batch_share) == (200.0, 0.75)


def test_failed_answers_are_counted_and_in_no_time() -> None:
    cut_off = answer(9.0, 9.0)
    cut_off.failure = "cut off"
    told = figures([Window(10, [cut_off, answer(0.1)])], [Window(10)], [Window(10)])
    assert told.alone.failures == 1
    assert told.alone.first_token_ms is not None
    assert told.alone.first_token_ms.max == 100.0
