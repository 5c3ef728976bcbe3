"""`headrace bench --url` is a client as well: of a real gateway, through each of its APIs."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ops.bench.report import Report
from tests.clients.conftest import System
from tests.support.processes import ROOT


@pytest.mark.parametrize(
    ("route", "api"),
    [
        ("", "completions"),
        ("/v1/chat/completions", "chat"),
        ("/generate_stream", "tgi"),
    ],
)
def test_every_token_of_a_gateway_is_counted(
    system: System, tmp_path: Path, route: str, api: str
) -> None:
    """The first token takes a second here, with keep-alives before it: they are no events."""
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "ops.cli", "bench", "--url", system.url + route]
    command += ["--concurrency", "1,3", "--requests", "1", "--new-tokens", "20"]
    command += ["--prompt-tokens", "150", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert system.url in done.stdout
    (measured,) = msgspec.json.decode(path.read_bytes(), type=Report).measured
    assert (measured.model, measured.api) == ("simulated", api)
    assert [level.concurrency for level in measured.levels] == [1, 3]
    for level in measured.levels:
        assert (level.requests, level.failures) == (level.concurrency, {})
        assert level.output_tokens == 20 * level.concurrency
        assert level.first_token_ms is not None
        assert level.first_token_ms.p50 > 900


def test_who_does_not_answer_is_refused_in_one_line(system: System) -> None:
    """A port without a server, a server without such a route, and no server named at all."""
    bench = [sys.executable, "-m", "ops.cli", "bench"]
    for options in (["--url", "127.0.0.1:9"], ["--url", f"{system.url}/v2"], []):
        done = subprocess.run(
            [*bench, *options], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert done.stderr.startswith("headrace: ")
        assert done.stderr.count("\n") == 1
