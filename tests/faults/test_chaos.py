"""The chaos run on a tiny real model: processes die under load and no client notices."""

from pathlib import Path

import pytest

from common.models.store import ModelStore
from ops.bench import chaos
from tests.support.tiny_model import build_tiny_model


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("victims", "gateways"), [(("worker",), 1), (("worker", "gateway", "background"), 2)]
)
async def test_no_answer_changes_while_processes_are_killed(
    tmp_path: Path, victims: tuple[str, ...], gateways: int
) -> None:
    """Killed with SIGKILL every three seconds: nothing failed, missing, repeated or different."""
    ModelStore(tmp_path).add(str(build_tiny_model(tmp_path / "source")), name="tiny")
    report = await chaos.run(
        chaos.Plan(
            data_dir=tmp_path,
            model="tiny",
            num_workers=2,
            num_gateways=gateways,
            num_clients=4,
            num_streams=10,
            max_new_tokens=200,
            kill_every_s=3.0,
            victims=victims,
            log_path=tmp_path / "up.log",
        )
    )
    assert report.has_passed, "\n".join(report.lines())
    assert sum(report.kills.values()) >= 2
