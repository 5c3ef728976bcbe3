"""A group of `headrace` commands in this process: what they say, and with which code they end."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ops import cli
from tests.support.redis_server import RedisServer


@dataclass
class Said:
    code: int
    out: str
    err: str


Headrace = Callable[..., Said]


def headrace_of(group: str) -> Any:
    """A fixture that runs `headrace GROUP …` on the server and in the data directory of a test."""

    @pytest.fixture
    def headrace(
        redis_server: RedisServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> Headrace:
        def run(*arguments: str, data_dir: Path = tmp_path) -> Said:
            options = ("--redis-url", redis_server.url, "--data-dir", str(data_dir))
            monkeypatch.setattr(sys, "argv", ["headrace", group, *arguments, *options])
            with pytest.raises(SystemExit) as ending:
                cli.main()
            captured = capsys.readouterr()
            return Said(int(str(ending.value.code)), captured.out, captured.err)

        return run

    return headrace
