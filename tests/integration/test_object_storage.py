"""Files in an object store that speaks S3: the same promises as in a directory."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from common.failures import Failure
from common.storage import Storage, open_storage
from tests.support.gateway_app import Stand
from tests.support.redis_server import free_port
from tests.support.s3_server import install, new_bucket, s3_server, unfinished_uploads

MB = 1_000_000

pytestmark = pytest.mark.timeout(300)  # pip's, the first time


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(install(folder / "env"), folder) as address:
        yield address


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new one, on a server that the environment names as an operator would."""
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return new_bucket(address)


@pytest.fixture
def storage(bucket: str) -> Storage:
    return open_storage(f"s3://{bucket}/some/prefix", Path())


async def sent(number: int, *, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for index in range(number):
        yield bytes([index]) * MB
    if then is not None:
        raise then


async def test_what_was_put_is_there_and_one_of_many_wins(storage: Storage) -> None:
    bodies = [b"%d" % number for number in range(8)]
    won = await asyncio.gather(*(storage.put("a/b", x, only_if_absent=True) for x in bodies))
    assert won.count(True) == 1
    assert await storage.get("a/b") == bodies[won.index(True)]
    assert await storage.put("a/b", b"another")
    assert await storage.get("a/b") == b"another"
    assert await storage.size("a/b") == 7


async def test_a_list_is_sorted_and_stays_within_its_prefix(storage: Storage, bucket: str) -> None:
    other = open_storage(f"s3://{bucket}/some/prefix-beside", Path())
    await other.put("a/p/00000003", b"")
    names = ["a/p/00000002", "a/p/00000010", "a/p/00000001", "a/px/1", "b"]
    for name in names:
        await storage.put(name, b"")
    assert await storage.list("a/p") == ["a/p/00000001", "a/p/00000002", "a/p/00000010"]
    assert await storage.list("a/p/", "a/p/00000001") == ["a/p/00000002", "a/p/00000010"]
    assert await storage.list("") == sorted(names)
    await storage.delete(*names, "nothing")
    await storage.delete("nothing")
    assert await storage.list("") == []


async def test_a_streamed_put_is_whole(storage: Storage, address: str, bucket: str) -> None:
    """Also one without a byte, and one that is no more than one part."""
    for number in (20, 1, 0):
        await storage.put_stream("a", sent(number))
        blocks = [block async for block in storage.read("a")]
        assert b"".join(blocks) == b"".join([chunk async for chunk in sent(number)])
    assert unfinished_uploads(address, bucket) == 0


async def test_a_range_is_read_and_no_more(storage: Storage) -> None:
    await storage.put_stream("a", sent(5))
    whole = b"".join([chunk async for chunk in sent(5)])

    async def read(*span: int) -> bytes:
        return b"".join([block async for block in storage.read("a", *span)])

    assert await read(10, 20) == whole[10:20]
    assert await read(1_500_000, 4_500_000) == whole[1_500_000:4_500_000]
    assert await read(4_999_999) == whole[-1:]
    assert await read(4_999_990, 99_999_999) == whole[-10:]
    assert await read(5_000_000) == await read(7, 7) == b""
    async with aclosing(storage.read("a")) as blocks:
        await anext(blocks)


async def test_a_broken_stream_leaves_nothing(storage: Storage, address: str, bucket: str) -> None:
    """Neither an object nor parts of one, whether its source breaks or who waits for it."""
    with pytest.raises(ConnectionResetError):
        await storage.put_stream("a", sent(20, then=ConnectionResetError()))
    has_sent_much = asyncio.Event()

    async def stopping() -> AsyncIterator[bytes]:
        async for chunk in sent(20):
            yield chunk
        has_sent_much.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(storage.put_stream("a", stopping()))
    await has_sent_much.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert unfinished_uploads(address, bucket) == 0
    assert await storage.list("") == []


async def test_what_is_not_there_is_not_found_but_a_missing_bucket_is_the_operators(
    storage: Storage,
) -> None:
    for call in (storage.get("a"), storage.size("a"), anext(storage.read("a"))):
        with pytest.raises(FileNotFoundError):
            await call
    nowhere = open_storage("s3://another-bucket", Path())
    for call in (nowhere.put("a", b""), nowhere.put_stream("a", sent(12)), nowhere.list("")):
        with pytest.raises(Failure) as raised:
            await call
        assert raised.value.code == "STORAGE_UNAVAILABLE"


async def test_a_store_that_is_away_is_a_failure_of_its_own(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.storage.objects._NUM_RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    away = open_storage(f"s3://{bucket}", Path())
    for call in (away.put("a", b""), away.put_stream("a", sent(12)), away.get("a"), away.list("")):
        with pytest.raises(Failure) as raised:
            await call
        assert raised.value.code == "STORAGE_UNAVAILABLE"


async def test_a_gateway_keeps_files_there(stand: Stand, bucket: str) -> None:
    gateway = await stand.gateway(storage_url=f"s3://{bucket}")
    rows = b"".join([chunk async for chunk in sent(12)])
    form = {"file": ("rows.jsonl", rows)}
    answer = await gateway.client.post("/v1/files", files=form, data={"purpose": "evals"})
    path = f"/v1/files/{answer.json()['id']}"
    assert (await gateway.client.get(f"{path}/content")).content == rows
    part = await gateway.client.get(f"{path}/content", headers={"range": "bytes=-5"})
    assert part.content == rows[-5:]
    assert (await gateway.client.delete(path)).status_code == 200
    assert (await gateway.client.get(path)).status_code == 404
