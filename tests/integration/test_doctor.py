"""`headrace doctor`: a finding for whatever is wrong, with the command that mends it."""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis

from common.broker import Broker, ServerFacts, connect
from common.models.simulated import SIMULATED_MODEL
from common.storage.local import LocalStorage
from ops import cli as command
from ops import doctor
from tests.support.api_keys import PEPPER, make_key
from tests.support.redis_server import RedisServer, free_port


class Said(NamedTuple):
    code: int
    findings: dict[str, tuple[str, str]]
    """Words and what mends it, by check."""


Examine = Callable[..., Said]


@pytest.fixture
def fsync_always(any_redis_server: RedisServer) -> Iterator[None]:
    """What Redis 7.0 needs so that what it promises is on its disk."""
    with Redis(port=any_redis_server.port) as client:
        client.config_set("appendfsync", "always")
        yield
        client.config_set("appendfsync", "everysec")


@pytest.fixture
def examine(
    fsync_always: None,
    any_redis_server: RedisServer,
    simulated_data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Examine:
    """Runs the command where all is well, unless the options say otherwise."""
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1)

    def run(*flags: str, **options: object) -> Said:
        chosen: dict[str, object] = {
            "redis-url": any_redis_server.url,
            "data-dir": simulated_data_dir,
            "model": SIMULATED_MODEL,
            "port": free_port(),
        } | {name.replace("_", "-"): value for name, value in options.items()}
        given = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
        accepted = ("--accept", "holes")  # the Redis here is what its distribution made of it
        argv = ["headrace", "doctor", "--json", *accepted, *flags, *given]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ending:
            command.main()
        found = json.loads(capsys.readouterr().out)
        assert {finding["check"] for finding in found} <= doctor.EXIT_CODES.keys()
        return Said(
            int(str(ending.value.code)),
            {finding["check"]: (finding["words"], finding["mend"]) for finding in found},
        )

    return run


@pytest.fixture
def settings_of(any_redis_server: RedisServer) -> Iterator[Any]:
    """The server, whose settings are as they were again afterwards."""
    with Redis(port=any_redis_server.port) as client:
        yield client
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")


def test_where_all_is_well_it_says_so(examine: Examine) -> None:
    said = examine("--load")
    assert said.code == 0, said.findings
    assert list(said.findings) == list(doctor.EXIT_CODES)
    found = [check for check, (_, mend) in said.findings.items() if mend]
    assert found in ([], ["holes"])


def test_what_redis_lacks_is_found(
    examine: Examine, settings_of: Any, any_redis_server: RedisServer
) -> None:
    settings_of.function_flush()
    said = examine()
    assert said.code == 12
    assert "doctor --load" in said.findings["functions"][1]
    settings_of.config_set("maxmemory-policy", "allkeys-lru")
    settings_of.config_set("appendonly", "no")
    said = examine("--load")
    assert said.code == 13
    assert "lose prompts in silence" in said.findings["eviction"][0]
    assert "appendonly yes" in said.findings["persistence"][1]
    settings_of.config_set("maxmemory-policy", "noeviction")
    assert examine().code == 14


def test_a_server_that_cannot_wait_for_its_disk_is_found(
    examine: Examine, settings_of: Any, any_redis_server: RedisServer
) -> None:
    """Redis 7.0 has no WAITAOF: only with every command on disk are its promises kept."""
    settings_of.config_set("appendfsync", "everysec")
    words, mend = examine("--load").findings["durability"]
    if any_redis_server.kind == "valkey":
        assert not mend
        return
    assert "last second" in words
    assert "appendfsync always" in mend
    assert examine().code == 20


def test_a_redis_that_does_not_answer_is_found(examine: Examine) -> None:
    said = examine(redis_url=f"redis://user:secret@127.0.0.1:{free_port()}")
    assert said.code == 10
    words, mend = said.findings["redis"]
    assert "user:***@" in words
    assert "headrace up" in mend
    assert "model" in said.findings, "what is not in Redis is looked at all the same"


def test_keys_that_cannot_be_checked_here_are_found(
    examine: Examine, any_redis_server: RedisServer, tmp_path: Path
) -> None:
    async def make() -> None:
        broker = Broker(connect(any_redis_server.url), SIMULATED_MODEL)
        await make_key(broker, "a")
        await broker.close()

    asyncio.run(make())
    said = examine("--load")
    assert said.code == 16
    assert "no pepper" in said.findings["keys"][0]
    assert examine("--load", key_pepper=PEPPER).code == 0
    assert "another pepper" in examine(key_pepper="q" * 32).findings["keys"][0]


def test_what_this_machine_lacks_is_found(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = examine("--load", data_dir=tmp_path / "nothing" / "here")
    assert said.code == 17
    assert "headrace model add" in said.findings["model"][1]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = examine(port=listener.getsockname()[1])
        assert said.code == 19
        assert "ss -ltnp" in said.findings["port"][1]
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2 * free)
    said = examine()
    assert said.code == 18
    assert "make room" in said.findings["disk"][1]


def test_a_storage_that_takes_no_files_is_found(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that lets two write what one must write; nothing is left in any."""
    place = tmp_path / "files"
    options = {"storage-url": f"file://{place}"}
    assert examine(**options).findings["storage"] == (
        f"file://{place} is made with the first file",
        "",
    )
    assert not place.exists()
    place.mkdir()
    assert "takes files" in examine(**options).findings["storage"][0]
    assert [path.name for path in place.iterdir()] == [".drafts"]

    async def put_anyway(*_: object, **__: object) -> bool:
        return True

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "put", put_anyway)
        said = examine(**options)
    assert said.code == 22
    assert "If-None-Match" in said.findings["storage"][1]
    (place / ".drafts").rmdir()
    (place / ".drafts").touch()
    assert "--storage-url" in examine(**options).findings["storage"][1]


FACTS = ServerFacts("Redis", "7.0.15", "noeviction", True, 0.0)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (FACTS, ""),
        (replace(FACTS, version="6.2.20"), "has no functions"),
        (replace(FACTS, version="10.0.0"), ""),
        (replace(FACTS, name="Valkey", version="7.2.5"), ""),
    ],
)
def test_a_server_without_functions_is_too_old(facts: ServerFacts, words: str) -> None:
    finding = doctor._version(facts)
    assert bool(finding.mend) == bool(words)
    assert words in finding.words


@pytest.mark.parametrize(
    ("name", "version", "mend"),
    [
        ("Redis", "7.0.15", "install Redis 7.2.16, 7.4.11, 8.2.9, 8.4.6, 8.6.6, 8.8.2, 8.10.1 or"),
        ("Redis", "7.2.15", "install Redis 7.2.16, 7.4.11,"),
        ("Redis", "7.2.16", ""),
        ("Redis", "8.0.6", "install Redis 8.2.9, 8.4.6,"),
        ("Redis", "8.10.0", "install Redis 8.10.1 or newer"),
        ("Redis", "8.12.0", ""),
        ("Valkey", "7.2.12", "install Valkey 8.0.11, 8.1.9, 9.0.5, 9.1.1 or newer"),
        ("Valkey", "9.1.0", "install Valkey 9.1.1 or newer"),
        ("Valkey", "9.1.2", ""),
        ("Valkey", "10.0.0", ""),
    ],
)
def test_a_server_with_known_holes_is_found(name: str, version: str, mend: str) -> None:
    finding = doctor._holes(replace(FACTS, name=name, version=version))
    assert finding.mend.startswith(mend)
    assert bool(finding.mend) == bool(mend)
    assert not mend or f"{name} {version} has security holes" in finding.words


def test_what_is_accepted_is_shown_and_does_not_count(examine: Examine) -> None:
    said = examine("--load", "--accept", "model", model="unknown")
    assert said.code == 0
    assert said.findings["model"][1]


def test_only_a_check_can_be_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["headrace", "doctor", "--accept", "everything"])
    with pytest.raises(SystemExit) as ending:
        command.main()
    assert ending.value.code == 2
    assert "is none of redis, version" in capsys.readouterr().err


def test_clocks_may_differ_by_a_second_and_no_more() -> None:
    assert not doctor._clock(replace(FACTS, clock_offset_s=-0.9)).mend
    finding = doctor._clock(replace(FACTS, clock_offset_s=-75.0))
    assert "-75.0 s" in finding.words
    assert "set-ntp" in finding.mend


def test_the_words_are_for_people(
    examine: Examine,
    simulated_data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert examine("--load").code == 0
    url = f"redis://127.0.0.1:{free_port()}"
    argv = ["headrace", "doctor", "--redis-url", url, "--data-dir", os.fspath(simulated_data_dir)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("redis        redis://127.0.0.1:")
    assert lines[1].startswith("             mend it: headrace up, which brings a server along")
