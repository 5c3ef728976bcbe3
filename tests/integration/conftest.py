"""Real worker processes, and gateways in the test's own loop, for the tests of this folder."""

from tests.support.gateway_app import simulated_data_dir, stand
from tests.support.worker_pool import pool, started

__all__ = ["pool", "simulated_data_dir", "stand", "started"]
