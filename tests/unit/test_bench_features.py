"""The benchmark of parameters compares two batches that differ in nothing else."""

from pathlib import Path

import pytest

from common.settings import WorkerSettings
from ops.bench.features import FEATURES, measure
from workers.engine.factory import build_engine


def test_both_batches_are_measured_in_steps_with_everybody_in_them(tmp_path: Path) -> None:
    """With 2 ms a step no step is faster, and parameters cost a simulated engine nothing."""
    engine = build_engine(
        WorkerSettings(
            data_dir=tmp_path,
            engine="simulated",
            model="simulated",
            max_batch_size=4,
            simulated_first_token_ms=5,
            simulated_inter_token_ms=2,
        )
    )
    found = measure(engine, 4, vocab_size=64, prompt_tokens=8, new_tokens=12, rounds=1)
    assert found.rows == 4
    assert min(found.greedy_step_p50, found.features_step_p50) >= 2
    assert found.ratio == pytest.approx(found.features_step_p50 / found.greedy_step_p50)


def test_every_row_asks_for_something_else() -> None:
    assert all(FEATURES[i] not in FEATURES[:i] for i in range(len(FEATURES)))
