"""`headrace keys`: a secret is shown once, and everything else about a key is for the list."""

import asyncio
import json
import stat
import time
from pathlib import Path

import pytest

from common import keys
from common.broker import Broker, connect
from common.keys import ApiKey
from common.models.simulated import SIMULATED_MODEL
from tests.support.command import Headrace, headrace_of
from tests.support.redis_server import RedisServer

headrace = headrace_of("keys")


def stored(server: RedisServer) -> dict[str, ApiKey]:
    async def read() -> dict[str, ApiKey]:
        broker = Broker(connect(server.url), SIMULATED_MODEL)
        try:
            return {key.id: key for key, _ in await broker.key_store.all()}
        finally:
            await broker.close()

    return asyncio.run(read())


def opens(server: RedisServer, data_dir: Path, text: str, now_s: float) -> bool:
    key = stored(server)[text.split("-")[2]]
    return key.opens_with(keys.hashed(keys.pepper_path(data_dir).read_bytes(), text), now_s)


def test_a_new_key_is_printed_alone_and_stored_without_its_secret(
    headrace: Headrace, redis_server: RedisServer, tmp_path: Path
) -> None:
    said = headrace(
        *("create", "acme", "--name", "batch jobs", "--scope", "batch", "--scope", "generate"),
        *("--for-model", "m", "--best-lane", "flex", "--requests-per-minute", "60"),
        *("--tokens-per-minute", "1000", "--streams", "2", "--expires-in", "30d"),
    )
    assert said.code == 0
    text = said.out.strip()
    assert keys.key_id_of(text)
    assert text not in said.err
    assert opens(redis_server, tmp_path, text, time.time())
    assert stat.S_IMODE(keys.pepper_path(tmp_path).stat().st_mode) == 0o600
    listed = headrace("list", "--json")
    [shown] = json.loads(listed.out)
    assert shown["tenant"] == "acme"
    assert shown["scopes"] == ["batch", "generate"]
    assert shown["limits"] == {"requests_per_minute": 60, "tokens_per_minute": 1000, "streams": 2}
    assert (shown["models"], shown["best_lane"]) == (["m"], "flex")
    assert shown["expires_s"] - shown["created_s"] == 30 * 86_400
    assert "hash" not in listed.out
    table = headrace("list").out
    for words in ("acme", "batch jobs", "60 requests/min, 1000 tokens/min, 2 at once", "flex"):
        assert words in table
    assert text.split("-")[3] not in table + listed.out


def test_a_rotation_keeps_the_old_secret_for_the_time_it_says(
    headrace: Headrace, redis_server: RedisServer, tmp_path: Path
) -> None:
    old = headrace("create", "acme", "--streams", "2").out.strip()
    said = headrace("rotate", old.split("-")[2], "--overlap", "1h")
    new, now = said.out.strip(), time.time()
    assert new.split("-")[2] == old.split("-")[2]
    assert opens(redis_server, tmp_path, new, now)
    assert opens(redis_server, tmp_path, old, now + 3000)
    assert not opens(redis_server, tmp_path, old, now + 3700)
    assert stored(redis_server)[new.split("-")[2]].limits.streams == 2


def test_a_revoked_key_is_gone(headrace: Headrace, redis_server: RedisServer) -> None:
    key_id = headrace("create", "acme").out.strip().split("-")[2]
    assert headrace("revoke", key_id).code == 0
    assert stored(redis_server) == {}
    for action in ("revoke", "rotate"):
        said = headrace(action, key_id)
        assert (said.code, said.err) == (1, f"headrace: there is no key {key_id}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "Acme:x"), "must be up to 40 of a-z"),
        (("create", "acme", "--expires-in", "soon"), "no duration such as 15m"),
        (("create", "acme", "--scope", "root"), "'root' is not one of"),
        (("create", "acme", "--streams", "-1"), "x>=0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    headrace: Headrace, arguments: tuple[str, ...], words: str
) -> None:
    said = headrace(*arguments)
    assert said.code == 2
    assert words in said.err


def test_keys_of_another_pepper_are_not_mixed(
    headrace: Headrace, redis_server: RedisServer, tmp_path: Path
) -> None:
    """They would look well in the list and open nothing."""
    key_id = headrace("create", "acme").out.strip().split("-")[2]
    before = stored(redis_server)
    elsewhere = tmp_path / "elsewhere"
    said = headrace("create", "acme", data_dir=elsewhere)
    assert said.code == 1
    assert "no pepper" in said.err
    keys.make_pepper(elsewhere)
    for arguments in (("create", "acme"), ("rotate", key_id)):
        said = headrace(*arguments, data_dir=elsewhere)
        assert (said.code, said.out) == (1, "")
        assert "another pepper" in said.err
    assert stored(redis_server) == before
