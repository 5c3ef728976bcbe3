"""How long property tests search: briefly by default, long with ``HYPOTHESIS_PROFILE=deep``.

In CI (``CI`` is set) Hypothesis derives its examples from the test itself: a run repeats exactly.
"""

import os

from hypothesis import HealthCheck, settings

_DEEP_FACTOR = 25


def searched(max_examples: int, steps: int = 50) -> settings:
    """Settings for about ``max_examples`` examples of at most ``steps`` steps."""
    is_deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
    return settings(
        max_examples=max_examples * (_DEEP_FACTOR if is_deep else 1),
        stateful_step_count=steps,
        deadline=None,  # a step takes as long as the server and the machine under it take
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,  # a server fixture; each example empties it
        ],
    )
