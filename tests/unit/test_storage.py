"""Files in a directory: whole or not at all, private, durable, and nowhere else."""

import asyncio
import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from common.failures import Failure
from common.storage import Storage, open_storage
from common.storage.local import LocalStorage
from tests.support.waiting import wait_until


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[LocalStorage]:
    opened = open_storage("", tmp_path / "data")
    assert isinstance(opened, LocalStorage)
    yield opened
    opened.close()


async def chunks_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def drafts(storage: LocalStorage) -> list[Path]:
    return list(storage.root.glob(".drafts/*"))


async def test_what_was_put_is_there_to_get(storage: Storage) -> None:
    assert await storage.put("batches/b/parts/00000001", b"one")
    assert await storage.get("batches/b/parts/00000001") == b"one"
    assert await storage.size("batches/b/parts/00000001") == 3


async def test_a_second_put_takes_the_place_of_the_first(storage: Storage) -> None:
    await storage.put("a", b"first")
    assert await storage.put("a", b"second")
    assert await storage.get("a") == b"second"


async def test_of_many_who_write_if_absent_one_wins(storage: Storage) -> None:
    """And what it wrote is what everybody reads."""
    bodies = [b"%d" % number for number in range(20)]
    won = await asyncio.gather(*(storage.put("a/b", x, only_if_absent=True) for x in bodies))
    assert won.count(True) == 1
    assert await storage.get("a/b") == bodies[won.index(True)]


async def test_two_processes_agree_on_who_was_first(storage: LocalStorage, tmp_path: Path) -> None:
    other = open_storage(f"file://{storage.root}", tmp_path / "elsewhere")
    assert await storage.put("a", b"one", only_if_absent=True)
    assert not await other.put("a", b"two", only_if_absent=True)
    assert await other.get("a") == b"one"
    other.close()


async def test_a_streamed_put_appears_when_all_is_there(storage: LocalStorage) -> None:
    more = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x" * 3_000_000
        await more.wait()
        yield b"y" * 10

    putting = asyncio.create_task(storage.put_stream("a/b", slowly()))
    await wait_until(lambda: bool(drafts(storage)), what="a draft")
    assert await storage.list("") == []
    more.set()
    await putting
    assert await storage.get("a/b") == b"x" * 3_000_000 + b"y" * 10
    assert drafts(storage) == []


async def test_a_source_that_fails_leaves_nothing(storage: LocalStorage) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * 3_000_000
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        await storage.put_stream("a/b", breaking())
    assert await storage.list("") == drafts(storage) == []


async def test_a_stream_that_is_cancelled_leaves_nothing(storage: LocalStorage) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1_500_000

    putting = asyncio.create_task(storage.put_stream("a/b", endless()))
    await wait_until(lambda: any(path.stat().st_size for path in drafts(storage)), what="a draft")
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await storage.list("") == drafts(storage) == []


async def test_a_range_is_read_and_no_more(storage: Storage) -> None:
    body = bytes(range(256)) * 4096
    await storage.put("a", body)

    async def read(*span: int) -> bytes:
        return b"".join([block async for block in storage.read("a", *span)])

    assert await read() == body
    assert await read(5, 5) == b""
    assert await read(5, 700_000) == body[5:700_000]
    assert await read(1_000_000) == body[1_000_000:]
    assert await read(len(body) + 1) == b""
    assert await read(10, len(body) + 99) == body[10:]


async def test_who_reads_may_stop_and_may_outlast_the_object(storage: Storage) -> None:
    await storage.put("a", b"x" * 1_000_000)
    async with aclosing(storage.read("a")) as blocks:
        first = await anext(blocks)
        await storage.delete("a")
        rest = [block async for block in blocks]
    assert len(first) + sum(map(len, rest)) == 1_000_000


@pytest.mark.parametrize("call", ["get", "size"])
async def test_what_is_not_there_is_not_found(storage: Storage, call: str) -> None:
    await storage.put("a/b", b"")
    for name in ("b", "a", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            await getattr(storage, call)(name)


async def test_a_list_is_sorted_and_goes_on_behind_a_name(storage: Storage) -> None:
    names = ["a/p/00000002", "a/p/00000010", "a/p/00000001", "a/px/1", "a/p.x", "b"]
    for name in names:
        await storage.put(name, b"")
    assert await storage.list("a/p") == ["a/p/00000001", "a/p/00000002", "a/p/00000010"]
    assert await storage.list("a/p/") == await storage.list("a/p")
    assert await storage.list("a/p", "a/p/00000001") == ["a/p/00000002", "a/p/00000010"]
    assert await storage.list("") == sorted(names)
    assert await storage.list("nothing/here") == []


async def test_deleting_takes_what_is_there(storage: LocalStorage) -> None:
    """And the directories that it leaves empty, under the hands of who writes there."""
    await storage.put("a/b/c", b"")
    await storage.put("a/d", b"")
    await storage.delete("a/b/c", "nothing", "a/b/x")
    assert await storage.list("") == ["a/d"]
    assert not (storage.root / "a" / "b").exists()

    async def write(number: int) -> None:
        await storage.put(f"e/f/{number}", b"")
        await storage.delete(f"e/f/{number}")

    await asyncio.gather(*map(write, range(40)))
    assert await storage.list("") == ["a/d"]


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", ".drafts/x", "a/.b", "a b", "ä", "a\n", "a\\b"]
)
async def test_odd_names_are_no_names(storage: LocalStorage, name: str) -> None:
    """Whoever let one through would be the one to blame: no caller's words become a name."""
    for call in (
        storage.put(name, b""),
        storage.put_stream(name, chunks_of(b"")),
        storage.get(name),
        storage.delete(name),
        storage.size(name),
    ):
        with pytest.raises(ValueError, match="no name"):
            await call


async def test_nobody_else_may_look(storage: LocalStorage) -> None:
    before = os.umask(0)
    try:
        await storage.put("a/b/c", b"secret")
        await storage.put_stream("a/d", chunks_of(b"secret"))
    finally:
        os.umask(before)
    for directory, folders, files in os.walk(storage.root):
        modes = {stat.S_IMODE((Path(directory) / name).stat().st_mode) for name in folders}
        assert modes <= {0o700}
        modes = {stat.S_IMODE((Path(directory) / name).stat().st_mode) for name in files}
        assert modes <= {0o600}
    assert stat.S_IMODE(storage.root.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "STORAGE_FULL"),
        (errno.EDQUOT, "STORAGE_FULL"),
        (errno.EIO, "STORAGE_UNAVAILABLE"),
        (errno.EACCES, "STORAGE_UNAVAILABLE"),
    ],
)
async def test_a_disk_that_refuses_is_a_failure_and_leaves_nothing(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    for call in (storage.put("a", b"x"), storage.put_stream("a", chunks_of(b"x"))):
        with pytest.raises(Failure) as raised:
            await call
        assert raised.value.code == code
    assert await storage.list("") == drafts(storage) == []


async def test_drafts_of_the_dead_are_swept(storage: LocalStorage) -> None:
    """Those of the living are not."""
    await storage.put("a", b"")
    dead, alive = (storage.root / ".drafts" / name for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"x")
    long_ago = time.time() - 90_000
    os.utime(dead, (long_ago, long_ago))
    other = LocalStorage(storage.root)
    assert await other.list("") == ["a"]
    other.close()
    assert drafts(storage) == [alive]


async def test_a_directory_that_can_not_be_is_a_failure(tmp_path: Path) -> None:
    """Of who needs it: a gateway serves without one."""
    (tmp_path / "file").write_bytes(b"")
    storage = open_storage("", tmp_path / "file")
    with pytest.raises(Failure) as raised:
        await storage.put("a", b"")
    assert raised.value.code == "STORAGE_UNAVAILABLE"
    storage.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "s3://"),
        ("files", "s3://"),
        ("file://files", "whole/path"),
        ("s3://", "bucket"),
        ("s3://bucket/x?endpoint=y", "environment"),
        ("s3://key:secret@bucket/x", "environment"),
    ],
)
def test_another_place_is_refused_with_what_would_do(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        open_storage(url, tmp_path)
