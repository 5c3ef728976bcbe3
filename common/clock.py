"""Clocks: which one answers which question.

Times that two processes compare come from Redis ``TIME``, in milliseconds. Inside one process,
intervals come from :func:`monotonic_s`, which stops while the machine sleeps.
"""

import time


def monotonic_s() -> float:
    return time.monotonic()


def wall_ms() -> int:
    """Wall time of this host in milliseconds; for humans and for ``created`` fields only."""
    return time.time_ns() // 1_000_000
