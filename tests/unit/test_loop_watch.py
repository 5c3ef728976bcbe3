"""What the gateway says of its event loop: how late it is, and whose doing that is."""

import asyncio
import time
from contextlib import suppress

import pytest

from common.metrics import GatewayMetrics
from gateway.loop_watch import LoopWatch, own_share_s
from ops.bench.malformed import Looks, looks_in
from tests.support.waiting import wait_until

HELD_S = 0.25


@pytest.mark.parametrize(
    ("late_s", "computed_s", "unscheduled_s", "own_s"),
    [
        (0.3, 0.3, 0.0, 0.3),
        (0.3, 0.01, 0.0, 0.01),
        (0.3, 0.3, 0.2, 0.1),
        (0.3, 0.0, 0.4, 0.0),
    ],
    ids=["own", "idle meanwhile", "shared", "not run at all"],
)
def test_only_what_this_process_did_is_its_own(
    late_s: float, computed_s: float, unscheduled_s: float, own_s: float
) -> None:
    after_s = (5.0 + computed_s, 7.0 + unscheduled_s)
    assert own_share_s(late_s, (5.0, 7.0), after_s) == pytest.approx(own_s)


async def test_a_task_that_keeps_the_loop_is_seen() -> None:
    metrics = GatewayMetrics()

    def looks(name: str) -> Looks:
        return looks_in(metrics.text().decode(), f"headrace_event_loop_{name}_seconds")

    watching = asyncio.create_task(LoopWatch(metrics).run())
    await asyncio.sleep(0)  # it looks at the clock
    until_s = time.thread_time() + HELD_S
    while time.thread_time() < until_s:
        pass
    await wait_until(lambda: looks("held").count, what="a look at the loop")
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    for name in ("lag", "held"):
        assert looks(name).num_stalls >= 1
