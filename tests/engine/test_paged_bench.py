"""The GPU benchmark judges rightly; tried on the processor with tiny models."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ops.bench import gpu
from tests.support.engines import CPU


@pytest.fixture(autouse=True)
def _seeds_stay() -> Iterator[None]:
    """Its models are always the same ones, by torch's global generator."""
    with torch.random.fork_rng():
        yield


def test_it_checks_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preemption and a shared prefix have happened, or it would not call the answers right."""
    monkeypatch.setattr(gpu, "ARCHITECTURES", {"mistral": {"sliding_window": 24}})
    monkeypatch.setattr(gpu, "PEER_OPTIONS", {"small": {"num_blocks": 16, "max_batch_tokens": 256}})
    monkeypatch.setattr(gpu, "NEW_TOKENS", 8)
    arguments = ["--device", "cpu", "--tiny", "--plain", "--concurrency", "1,3"]
    arguments += ["--peer-option", "small"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 0
    assert "2 of 2 checks are right." in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["exactness"][0]["num_equal"] == report["exactness"][0]["num_answers"] == 8
    assert [row["concurrency"] for row in report["speed"]] == [1, 3]
    for row in report["speed"]:
        assert row["rate"] > 0
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        assert row["peer_ratio"] == pytest.approx(row["rate"] / row["peer_rate"])


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes another model than the one that was asked for the truth."""
    original = gpu.engine_around

    def damaged(*arguments: object, **options: object) -> object:
        model = arguments[0]
        assert isinstance(model, torch.nn.Module)
        list(model.parameters())[-1].mul_(-1)
        return original(*arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(gpu, "engine_around", damaged)
    assert not gpu.check_exactness("llama", CPU, None).is_right
    assert not gpu.check_closeness("llama", CPU, None).is_right


def test_the_floor_is_weights_once_and_what_all_keep() -> None:
    """1.2 billion weights of two bytes; 32 KiB for each position of the larger model."""
    one, two = (gpu.step_bytes(gpu.BILLION, 1_236_000_000, count) for count in (1, 2))
    assert two - one == (64 + 128 // 2) * 32 * 1024
    assert one == 2 * 1_236_000_000 + two - one
