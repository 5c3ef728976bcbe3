"""Model stores for tests: the real SmolLM2, converted once per checkout, and the simulated model.

The real one lies in ``$HEADRACE_TEST_CACHE`` (default: ``var/test-models`` of this checkout), so
that only the first test session pays for the download and the conversion. Processes that start at
the same time wait for the one that does it. ``python -m tests.support.models`` does it ahead of the
tests, whose time limits are shorter than a slow machine may need.
"""

import os
import sys
from pathlib import Path

from common.models.store import DEFAULT_MODEL, ModelStore, StoredModel

ROOT = Path(__file__).resolve().parents[2]


def smollm2_data_dir() -> Path:
    """A data directory whose store holds the default model; shared, so do not write into it."""
    data_dir = Path(os.environ.get("HEADRACE_TEST_CACHE") or ROOT / "var" / "test-models")
    ModelStore(data_dir).add(DEFAULT_MODEL)
    return data_dir


def smollm2() -> StoredModel:
    return ModelStore(smollm2_data_dir()).get(DEFAULT_MODEL)


def simulated(data_dir: Path) -> StoredModel:
    """The model without weights, in a store of its own below ``data_dir``."""
    store = ModelStore(data_dir)
    return store.get(store.add_simulated().name)


if __name__ == "__main__":
    model = smollm2()
    model.verify()
    sys.stdout.write(f"{model.manifest.version} in {model.path}\n")
