"""Clocks: which one answers which question.

Times that two processes compare come from Redis ``TIME``, in milliseconds. Inside one process,
intervals come from :func:`monotonic_s`, which stops while the machine sleeps.
"""

import time

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def monotonic_s() -> float:
    return time.monotonic()


def awake_or_not_s() -> float:
    """As :func:`monotonic_s`, but going on while the machine sleeps, if the system can tell."""
    return time.clock_gettime(_BOOT_CLOCK)


def wall_ms() -> int:
    """Wall time of this host in milliseconds; for humans and for ``created`` fields only."""
    return time.time_ns() // 1_000_000
