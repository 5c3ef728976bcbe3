"""Unmodified clients in Python that need an environment of their own, because of what they pin."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import SILENCE_S, System, run

HERE = Path(__file__).parent / "python"
INSTALL_S = 200
LIMIT_S = 60 + 6 * SILENCE_S


async def answers(folder: Path, requirements: str, client: str, url: str) -> Any:
    """What ``client`` prints, in an environment with ``requirements`` alone."""
    await run(HERE, sys.executable, "-m", "venv", "--without-pip", folder, limit_s=INSTALL_S)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    # Most of what is installed is never imported: no bytecode of it ahead of time.
    wanted = ("--no-compile", "--no-deps", "-r", HERE / requirements)
    await run(HERE, *pip, *wanted, limit_s=INSTALL_S)
    told, _ = await run(HERE, python, client, url, limit_s=LIMIT_S)
    return json.loads(told)


@pytest.mark.timeout(INSTALL_S + 2 * LIMIT_S)
async def test_tgi_s_own_client(system: System, tmp_path: Path) -> None:
    """Whole, streamed, in a chat, synchronous or not: the same words; and an error of its kind."""
    sync, other = await answers(
        tmp_path / "env", "text_generation.txt", "text_generation_client.py", system.url
    )
    assert sync["tokens"] == 8
    assert sync["reason"] == "length"
    assert sync["tops"] == 8
    assert len({sync["text"], sync["streamed"], sync["pieces"], other["text"]}) == 1
    assert other["streamed"] == sync["text"]
    assert "temperature" in sync["refusal"]
    assert other["chat"] == sync["chat"] != ""


@pytest.mark.timeout(INSTALL_S + 2 * LIMIT_S)
async def test_langchain(system: System, tmp_path: Path) -> None:
    told = await answers(tmp_path / "env", "langchain.txt", "langchain_client.py", system.url)
    assert told["text"]
    assert told["text"] == told["streamed"]
