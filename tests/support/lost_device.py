"""A worker whose device is lost at its tenth step: the product's own process with that one fault.

Run as ``python -m tests.support.lost_device``, with the worker's settings in the environment.
"""

import itertools
import sys

from workers.__main__ import main
from workers.engine.batching import Outcome
from workers.engine.port import DeviceLostError
from workers.engine.scheduler import Chunk
from workers.engine.simulated import SimulatedRunner

_LAST_STEP = 9
_compute = SimulatedRunner.run
_steps = itertools.count(1)


def _compute_until_lost(self: SimulatedRunner, chunks: list[Chunk]) -> list[Outcome]:
    if next(_steps) > _LAST_STEP:
        raise DeviceLostError
    return _compute(self, chunks)


if __name__ == "__main__":
    SimulatedRunner.run = _compute_until_lost
    sys.exit(main())
