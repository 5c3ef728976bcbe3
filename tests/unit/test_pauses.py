"""What a process says when it stood still."""

import asyncio
import threading
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from common import pauses
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("late_s", "computed_s", "is_told"),
    [(3.0, 0.01, True), (3.0, 2.9, False), (0.2, 0.0, False)],
    ids=["stopped", "busy", "short"],
)
def test_only_a_long_time_without_computing_is_a_pause(
    late_s: float, computed_s: float, is_told: bool
) -> None:
    with capture_logs() as lines:
        pauses.tell_pause(late_s, computed_s)
    assert [(line["event"], line["paused_s"]) for line in lines] == (
        [("process.paused", late_s)] if is_told else []
    )


async def test_a_process_that_stood_still_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "LOOK_S", 0.01)
    monkeypatch.setattr(pauses, "WORTH_TELLING_S", 0.2)
    with capture_logs() as lines:
        telling = asyncio.create_task(pauses.keep_telling_pauses())
        await asyncio.sleep(0)  # it looks at the clock
        threading.Event().wait(0.5)  # nothing of this process goes on
        await wait_until(lambda: lines, what="a line about it")
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling
    assert lines[0]["event"] == "process.paused"
    assert lines[0]["paused_s"] > 0.4
