"""The gateway's benchmark counts every token that its workers published, on every stream."""

import pytest

from ops.bench.gateway import measure
from ops.bench.stream_readers import Api
from ops.bench.token_source import STAMPS_PER_S, Order, age, stamp


@pytest.mark.parametrize("api", ["chat", "tgi"])
def test_every_token_published_is_read(api: Api) -> None:
    """5 streams in batches of 2 are 3 workers; some 20 tokens a second in two sorts of steps."""
    one, several = measure(api, 5, [Order(20, 0.5), Order(20, 0.5, per_step=4)], rows=2)
    assert (one.missing, several.missing) == (0, 0)
    assert one.tokens >= 40
    assert several.tokens >= 40
    assert several.events_per_piece >= 4
    assert one.latency_p50_ms > 0


def test_a_token_tells_its_age_also_when_the_clock_has_wrapped() -> None:
    wrap_s = 2**32 / STAMPS_PER_S
    assert age(stamp(100.0), 100.25) == STAMPS_PER_S // 4
    assert age(stamp(wrap_s - 0.125), wrap_s + 0.125) == STAMPS_PER_S // 4
