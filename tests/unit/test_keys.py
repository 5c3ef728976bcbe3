"""API keys: their text, what is stored of them, the pepper's file, and what each path needs."""

import stat
from pathlib import Path

import pytest

from common import keys
from common.failures import Failure
from common.keys import ApiKey
from common.settings import is_loopback, is_open_redis
from gateway.callers import scope_of
from gateway.errors import go_duration

PEPPER = b"p" * 32


def stored(text: str) -> ApiKey:
    key_id = keys.key_id_of(text)
    assert key_id
    return ApiKey(id=key_id, tenant="t", hash=keys.hashed(PEPPER, text), created_s=1)


def test_no_two_keys_are_alike_and_each_tells_its_id() -> None:
    made = [keys.new_key_text("0123456789ab") for _ in range(50)]
    assert len(set(made)) == 50
    assert {keys.key_id_of(text) for text in made} == {"0123456789ab"}


@pytest.mark.parametrize("text", ["", "sk-proj-abc", "sk-headrace-0123456789ab-short", "é" * 67])
def test_what_is_no_key_of_ours_has_no_id(text: str) -> None:
    assert keys.key_id_of(text) is None


def test_a_key_opens_with_its_secret_only() -> None:
    text, other = keys.new_key_text("0123456789ab"), keys.new_key_text("0123456789ab")
    key = stored(text)
    assert key.opens_with(keys.hashed(PEPPER, text), now_s=10)
    assert not key.opens_with(keys.hashed(PEPPER, other), now_s=10)
    assert not key.opens_with(keys.hashed(b"another", text), now_s=10)
    assert not key.opens_with(b"", now_s=10), "a key that was never rotated has no old secret"


def test_what_is_stored_tells_nothing_of_the_secret() -> None:
    text = keys.new_key_text("0123456789ab")
    assert text[-43:] not in repr(stored(text))
    assert text[-43:].encode() not in keys.hashed(PEPPER, text)


def test_the_pepper_is_drawn_once_and_for_this_user_alone(tmp_path: Path) -> None:
    pepper = keys.make_pepper(tmp_path)
    path = keys.pepper_path(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.read_pepper("", tmp_path) == pepper
    with pytest.raises(FileExistsError):
        keys.make_pepper(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_pepper_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keys.make_pepper(tmp_path)
    keys.pepper_path(tmp_path).chmod(0o640)
    with pytest.raises(Failure, match="chmod 600"):
        keys.read_pepper("", tmp_path)


def test_a_given_pepper_comes_first_and_has_a_length(tmp_path: Path) -> None:
    assert keys.read_pepper("", tmp_path) is None
    assert keys.read_pepper("x" * 32, tmp_path) == b"x" * 32
    with pytest.raises(Failure, match="at least 32"):
        keys.read_pepper("short", tmp_path)


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/", None),
        ("POST", "/", "generate"),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/ui/app.js", None),
        ("GET", "/uix", "generate"),
        ("GET", "/metrics", "metrics"),
        ("GET", "/metrics/", "metrics"),
        ("GET", "/ops/", None),
        ("GET", "/ops/keys", "admin"),
        ("POST", "/v1/files", "batch"),
        ("GET", "/v1/batches/batch_1", "batch"),
        ("GET", "/v1/models", "generate"),
        ("POST", "/v1/what/nobody/thought/of", "generate"),
    ],
)
def test_each_path_needs_a_scope_unless_it_is_known_to_need_none(
    method: str, path: str, scope: str | None
) -> None:
    assert scope_of(method, path) == scope


@pytest.mark.parametrize(
    ("url", "is_open"),
    [
        ("redis://127.0.0.1:6379/0", False),
        ("redis://localhost", False),
        ("redis://[::1]:6379", False),
        ("unix:///run/redis.sock", False),
        ("redis://10.0.0.7:6379/0", True),
        ("rediss://redis.example:6379", True),
        ("redis://:secret@redis.example", False),
        ("redis://gateway:secret@redis.example", False),
        ("rediss://redis.example?ssl_certfile=c.pem&ssl_keyfile=k.pem", False),
    ],
)
def test_a_redis_on_another_host_is_open_unless_it_asks_for_something(
    url: str, is_open: bool
) -> None:
    assert is_open_redis(url) == is_open


def test_only_this_machine_reaches_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.org")))  # noqa: S104


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"),
        (120, "120ms"),
        (1000, "1s"),
        (1500, "1.5s"),
        (8640, "8.64s"),
        (60_000, "1m0s"),
        (359_999, "5m59.999s"),
        (360_000, "6m0s"),
    ],
)
def test_durations_are_written_as_go_and_openai_do(ms: int, text: str) -> None:
    assert go_duration(ms) == text
