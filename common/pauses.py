"""Tells that this process stood still: stopped by a signal, frozen with its machine, or starved.

Who stands still cannot say so, but afterwards. Without that line a pause too short to cost a lease
leaves nothing in the log but some slow requests.
"""

import asyncio
import time

from common.clock import monotonic_s
from common.logs import get_logger

log = get_logger()

LOOK_S = 0.25
WORTH_TELLING_S = 1.0
"""Shorter ones happen on any busy machine."""
_IDLE_SHARE = 0.2
"""Who computes more of the time than that was busy rather than paused."""


async def keep_telling_pauses() -> None:
    """Look four times a second, until cancelled, whether this look comes late."""
    while True:
        due_s, computed_s = monotonic_s() + LOOK_S, time.process_time()
        await asyncio.sleep(LOOK_S)
        tell_pause(monotonic_s() - due_s, time.process_time() - computed_s)


def tell_pause(late_s: float, computed_s: float) -> None:
    """Log that the event loop came ``late_s`` too late, if that is much and this process hardly
    computed meanwhile.
    """
    if late_s >= WORTH_TELLING_S and computed_s < _IDLE_SHARE * late_s:
        log.warning("process.paused", paused_s=round(late_s, 3), computed_s=round(computed_s, 3))
