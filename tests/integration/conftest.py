"""Real worker processes for the tests of this folder."""

from tests.support.worker_pool import pool, started

__all__ = ["pool", "started"]
