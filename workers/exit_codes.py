"""Exit codes of a worker and of the background worker: what a supervisor learns from an end."""

OK = 0
FAILED = 1
"""An error that no other code describes."""
USAGE = 2
"""A setting is wrong; starting again does not help."""
NOT_HANDED_OVER = 3
"""Asked to stop, but could not hand over: Redis was away, or a second SIGTERM came."""
UNREACHABLE = 69
"""Redis was not there at the start (EX_UNAVAILABLE)."""
ENGINE_FAILED = 70
"""The model could not be loaded, or the engine raised (EX_SOFTWARE)."""
DEVICE_LOST = 71
"""The device is unusable; a new process may find it well again, or not at all (EX_OSERR)."""
STALLED = 75
"""No engine step ended within its limit (EX_TEMPFAIL)."""

REASONS = {
    UNREACHABLE: "Redis was not there",
    ENGINE_FAILED: "its engine failed",
    DEVICE_LOST: "its device is unusable",
    STALLED: "no engine step ended in time",
}
"""For people: what stands behind the codes that speak of something outside of our own hands."""
