"""What others wrote and we ship is what they released, and comes with its licence."""

import hashlib
import json
from pathlib import Path

from tests.support.processes import ROOT

STATIC = ROOT / "gateway" / "static"


def test_vendored_files_are_those_that_were_released() -> None:
    """Changed on purpose or by accident, a file is no longer what its version says."""
    records = list(STATIC.glob("**/vendored.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text())
        assert record["version"] in record["source"]
        assert record["license"]
        _check_files(path, record["files"])


def _check_files(record: Path, files: dict[str, dict[str, str]]) -> None:
    there = {path.name for path in record.parent.iterdir()} - {record.name}
    assert there == set(files)
    assert "LICENSE" in there
    for name, told in files.items():
        content = (record.parent / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == told["sha256"], name
