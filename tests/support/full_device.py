"""A worker whose device has memory for two sequences at once: its process with that one fault.

Run as ``python -m tests.support.full_device``, with the worker's settings in the environment.
"""

import sys

from workers.__main__ import main
from workers.engine.batching import Outcome
from workers.engine.port import DeviceMemoryError
from workers.engine.scheduler import Chunk
from workers.engine.simulated import SimulatedRunner

_compute = SimulatedRunner.run


def _compute_two(self: SimulatedRunner, chunks: list[Chunk]) -> list[Outcome]:
    if len(chunks) > 2:
        raise DeviceMemoryError
    return _compute(self, chunks)


if __name__ == "__main__":
    SimulatedRunner.run = _compute_two
    sys.exit(main())
