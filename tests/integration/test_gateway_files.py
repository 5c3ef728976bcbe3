"""``/v1/files`` on the wire: files come and go whole, for their tenant alone, and leave nothing."""

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from common import files as product_files
from common.broker import keys
from common.storage import open_storage
from gateway import uploads
from gateway.api import files as api
from gateway.app import drain
from tests.support.api_keys import PEPPER, bearer, make_key
from tests.support.gateway_app import Connection, RunningGateway, Stand
from tests.support.waiting import wait_until

ROWS = b'{"custom_id": "a"}\n{"custom_id": "b"}\n'
BATCH = {"purpose": "batch"}
DAY_S = 24 * 3600
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
TAIL = b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
"""Of a form, around its file."""


@pytest.fixture
async def gateway(stand: Stand, tmp_path: Path) -> RunningGateway:
    return await stand.gateway(storage_url=f"file://{tmp_path}/files", key_pepper=PEPPER)


async def upload(
    gateway: RunningGateway,
    content: Any = ROWS,
    data: dict[str, str] | None = None,
    name: str = "rows.jsonl",
    **options: Any,
) -> httpx.Response:
    files = {"file": (name, content)}
    return await gateway.client.post("/v1/files", files=files, data=data or BATCH, **options)


async def stored(tmp_path: Path) -> list[str]:
    """All there is in storage, also what is still being written."""
    storage = open_storage(f"file://{tmp_path}/files", tmp_path)
    names = await storage.list("")
    storage.close()
    return names + [path.name for path in (tmp_path / "files" / ".drafts").iterdir()]


async def due(stand: Stand) -> list[str]:
    return await stand.broker.file_store.due(2**40, 1000)


async def is_clean(stand: Stand, tmp_path: Path) -> bool:
    return not await stored(tmp_path) and not await due(stand)


@asynccontextmanager
async def announced(
    gateway: RunningGateway, length: int, sent: bytes
) -> AsyncGenerator[Connection]:
    """A connection on which a form of ``length`` was announced, and ``sent`` of it."""
    async with gateway.connected() as (reader, writer):
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n%b" % (length, sent)
        )
        await writer.drain()
        yield reader, writer


@asynccontextmanager
async def begun(
    stand: Stand, gateway: RunningGateway, length: int = 10**6, sent: bytes = HEAD
) -> AsyncGenerator[Connection]:
    """As ``announced``, on which the gateway has begun to write the file."""
    async with announced(gateway, length, sent) as connection:
        await wait_until(lambda: due(stand), what="the upload begins")
        yield connection


# What everybody does -----------------------------------------------------------------------------


async def test_a_file_comes_back_as_it_went_in(gateway: RunningGateway) -> None:
    answer = await upload(gateway)
    file = answer.json()
    assert answer.status_code == 200
    assert file["id"].startswith("file-")
    assert file["expires_at"] == file["created_at"] + 30 * DAY_S
    assert {name: file[name] for name in ("object", "bytes", "filename", "purpose", "status")} == {
        "object": "file",
        "bytes": len(ROWS),
        "filename": "rows.jsonl",
        "purpose": "batch",
        "status": "processed",
    }
    assert (await gateway.client.get(f"/v1/files/{file['id']}")).json() == file
    content = await gateway.client.get(f"/v1/files/{file['id']}/content")
    assert content.content == ROWS
    assert content.headers["content-type"] == "application/octet-stream"
    assert content.headers["content-length"] == str(len(ROWS))
    assert "rows.jsonl" in content.headers["content-disposition"]


async def test_a_file_is_there_for_every_gateway(
    stand: Stand, gateway: RunningGateway, tmp_path: Path
) -> None:
    other = await stand.gateway(storage_url=f"file://{tmp_path}/files", key_pepper=PEPPER)
    file = (await upload(gateway)).json()
    assert (await other.client.get(f"/v1/files/{file['id']}/content")).content == ROWS
    assert (await other.client.delete(f"/v1/files/{file['id']}")).status_code == 200
    assert (await gateway.client.get(f"/v1/files/{file['id']}")).status_code == 404


async def test_a_deleted_file_is_gone_altogether(
    stand: Stand, gateway: RunningGateway, tmp_path: Path
) -> None:
    id = (await upload(gateway)).json()["id"]
    answer = await gateway.client.delete(f"/v1/files/{id}")
    assert answer.json() == {"id": id, "object": "file", "deleted": True}
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = await gateway.client.request(method, f"/v1/files/{id}{path}")
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": f"No such File object: {id}",
            "type": "invalid_request_error",
            "param": "id",
            "code": "not_found",
            "http_status_code": 404,
        }
    assert (await gateway.client.get("/v1/files")).json()["data"] == []
    assert await is_clean(stand, tmp_path)


async def test_files_are_listed_page_by_page(gateway: RunningGateway) -> None:
    ids: list[str] = []
    for number in range(5):
        purpose = "evals" if number == 2 else "batch"
        ids.append((await upload(gateway, data={"purpose": purpose})).json()["id"])
    newest = ids[::-1]

    async def page(**query: Any) -> tuple[list[str], bool]:
        answer = (await gateway.client.get("/v1/files", params=query)).json()
        found = [file["id"] for file in answer["data"]]
        assert answer["first_id"] == (found[0] if found else None)
        assert answer["last_id"] == (found[-1] if found else None)
        return found, answer["has_more"]

    assert await page() == (newest, False)
    assert await page(limit=2) == (newest[:2], True)
    assert await page(limit=2, after=newest[1]) == (newest[2:4], True)
    assert await page(limit=2, after=newest[3]) == (newest[4:], False)
    assert await page(order="asc", limit=3, after=ids[0]) == (ids[1:4], True)
    assert await page(purpose="evals") == ([ids[2]], False)
    assert await page(purpose="batch_output") == ([], False)


@pytest.mark.parametrize(
    ("asked", "span"),
    [
        ("bytes=0-3", (0, 4)),
        ("bytes=5-", (5, len(ROWS))),
        ("bytes=-6", (len(ROWS) - 6, len(ROWS))),
        ("bytes=3-99999", (3, len(ROWS))),
        ("bytes=-99999", None),
        ("bytes=0-1,4-5", None),
        ("bytes=5-2", None),
        ("lines=1-2", None),
        ("bytes=x-y", None),
        ("bytes=-", None),
    ],
)
async def test_a_range_is_read_alone(
    gateway: RunningGateway, asked: str, span: tuple[int, int] | None
) -> None:
    """What is no one range is answered with everything."""
    path = f"/v1/files/{(await upload(gateway)).json()['id']}/content"
    answer = await gateway.client.get(path, headers={"range": asked})
    if span is None:
        assert (answer.status_code, answer.content) == (200, ROWS)
        return
    assert (answer.status_code, answer.content) == (206, ROWS[slice(*span)])
    assert answer.headers["content-range"] == f"bytes {span[0]}-{span[1] - 1}/{len(ROWS)}"


async def test_a_range_behind_the_end_or_of_another_file_is_none(gateway: RunningGateway) -> None:
    path = f"/v1/files/{(await upload(gateway)).json()['id']}/content"
    answer = await gateway.client.get(path, headers={"range": "bytes=9999-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(ROWS)}"
    head = await gateway.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["etag"] == f'"{hashlib.sha256(ROWS).hexdigest()}"'
    same, other = [
        await gateway.client.get(path, headers={"range": "bytes=0-0", "if-range": etag})
        for etag in (head.headers["etag"], '"another"')
    ]
    assert (same.status_code, other.status_code) == (206, 200)


async def test_an_empty_file_is_a_file(gateway: RunningGateway) -> None:
    file = (await upload(gateway, b"")).json()
    assert file["bytes"] == 0
    content = await gateway.client.get(f"/v1/files/{file['id']}/content")
    assert (content.status_code, content.content) == (200, b"")


# Tenants -----------------------------------------------------------------------------------------


async def test_the_files_of_a_tenant_are_its_own(stand: Stand, gateway: RunningGateway) -> None:
    """Whoever names another's is answered as if it had never been."""
    ann, bob = [
        bearer(await make_key(stand.broker, name, scopes=("batch",))) for name in ("ann", "bob")
    ]
    id = (await upload(gateway, headers=ann)).json()["id"]
    never = "file-" + "0" * 32
    for method, path in (
        ("GET", "/v1/files/{}"),
        ("HEAD", "/v1/files/{}"),
        ("GET", "/v1/files/{}/content"),
        ("DELETE", "/v1/files/{}"),
        ("GET", "/v1/files?after={}"),
    ):
        theirs, nobodys = [
            await gateway.client.request(method, path.format(each), headers=bob)
            for each in (id, never)
        ]
        assert theirs.status_code == nobodys.status_code
        assert theirs.status_code in (400, 404)
        assert theirs.text.replace(id, never) == nobodys.text
    assert (await gateway.client.get("/v1/files", headers=bob)).json()["data"] == []
    assert (await gateway.client.get(f"/v1/files/{id}", headers=ann)).status_code == 200


async def test_files_need_a_key_for_batches(stand: Stand, gateway: RunningGateway) -> None:
    key = bearer(await make_key(stand.broker, "ann", scopes=("generate",)))
    answer = await upload(gateway, headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_denied")


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"x": "y"}, "purpose"),
        (BATCH | {"expires_after[seconds]": "7200"}, "expires_after[anchor]"),
        (BATCH | {"expires_after[anchor]": "now", "expires_after[seconds]": "7200"},
         "expires_after[anchor]"),
        (BATCH | {"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (BATCH | {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
         "expires_after[seconds]"),
        (BATCH | {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
         "expires_after[seconds]"),
    ],
)  # fmt: skip
async def test_a_wrong_wish_names_its_field_and_leaves_nothing(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, data: dict[str, str], field: str
) -> None:
    answer = await upload(gateway, data=data)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    await upload(gateway)  # so that there is a directory to look at
    assert len(await stored(tmp_path)) == len(await due(stand)) == 1


async def test_a_life_that_is_wished_for_is_given(gateway: RunningGateway) -> None:
    wish = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = (await upload(gateway, data=BATCH | wish)).json()
    assert file["expires_at"] == file["created_at"] + 3600


async def test_the_purpose_may_come_behind_the_file(
    stand: Stand, gateway: RunningGateway, tmp_path: Path
) -> None:
    def form(purpose: str) -> dict[str, Any]:
        disposition = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
        file = disposition.format("file", '; filename="a"') + "rows\r\n"
        said = disposition.format("purpose", "") + f"{purpose}\r\n"
        return {
            "content": f"--x\r\n{file}--x\r\n{said}--x--\r\n",
            "headers": {"content-type": "multipart/form-data; boundary=x"},
        }

    good = await gateway.client.post("/v1/files", **form("batch"))
    assert good.json()["bytes"] == 4
    wrong = await gateway.client.post("/v1/files", **form("other"))
    assert wrong.json()["error"]["param"] == "purpose"
    assert len(await stored(tmp_path)) == len(await due(stand)) == 1


async def test_a_form_without_a_file_is_refused(gateway: RunningGateway) -> None:
    answer = await gateway.client.post("/v1/files", data=BATCH, files={"other": ("a", b"")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    answer = await gateway.client.post("/v1/files", json={"purpose": "batch"})
    assert answer.status_code == 415


async def test_no_other_route_reads_a_form(gateway: RunningGateway) -> None:
    form = {"file": ("a", b"{}")}
    for path in ("/generate", "/v1/chat/completions", "/v1/responses"):
        assert (await gateway.client.post(path, files=form)).status_code == 415


async def test_a_file_above_the_limit_is_refused_early(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is announced, and by what comes."""
    async with announced(gateway, 10**9, HEAD) as (reader, _):
        assert b" 413 " in await reader.readline()
    monkeypatch.setattr(api, "MAX_FILE_BYTES", 1_000_000)
    monkeypatch.setattr(api, "MAX_LINES", 3)
    assert (await upload(gateway, b"x" * 1_000_000)).status_code == 200
    assert (await upload(gateway, b"x" * 1_000_001)).status_code == 413
    answer = await upload(gateway, b"x\n" * 4)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    assert "3 lines" in answer.json()["error"]["message"]
    assert (await upload(gateway, b"x\n" * 4, {"purpose": "evals"})).status_code == 200
    assert len(await stored(tmp_path)) == len(await due(stand)) == 2


async def test_a_tenant_has_so_much_room_and_no_more(
    stand: Stand, gateway: RunningGateway, tmp_path: Path
) -> None:
    """Whatever it has together, however many come at once; what is deleted makes room again."""
    full = await stand.gateway(
        storage_url=f"file://{tmp_path}/files", key_pepper=PEPPER, tenant_files_bytes=1000
    )
    answers = await asyncio.gather(*(upload(full, b"x" * 300) for _ in range(6)))
    ids = [answer.json()["id"] for answer in answers if answer.status_code == 200]
    assert len(ids) == 3
    refused = next(answer for answer in answers if answer.status_code != 200)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert (await upload(full, b"x" * 100)).status_code == 200
    assert (await upload(full, b"")).status_code == 429, "it is full to the last byte"
    await full.client.delete(f"/v1/files/{ids[0]}")
    assert (await upload(full, b"x" * 301)).status_code == 429
    assert (await upload(full, b"x" * 300)).status_code == 200
    assert len(await stored(tmp_path)) == len(await due(stand)) == 4
    assert await stand.broker.file_store.bytes_of("public") == 1000


async def test_a_gateway_that_is_stopping_takes_no_files(gateway: RunningGateway) -> None:
    gateway.services.is_draining = True
    answer = await upload(gateway)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


async def test_what_is_being_uploaded_may_end_while_a_gateway_stops(
    stand: Stand, gateway: RunningGateway
) -> None:
    async with begun(stand, gateway, len(HEAD + ROWS + TAIL)) as (reader, writer):
        draining = asyncio.create_task(drain(gateway.services, 60))
        await wait_until(lambda: gateway.services.is_draining, what="the drain begins")
        assert not draining.done()
        writer.write(ROWS + TAIL)
        assert b" 200 " in await reader.readline()
        await draining


# What goes wrong ---------------------------------------------------------------------------------


async def test_a_client_that_dies_half_way_leaves_nothing(
    stand: Stand, gateway: RunningGateway, tmp_path: Path
) -> None:
    async with begun(stand, gateway, sent=HEAD + b"x" * 500_000):
        pass
    await wait_until(lambda: is_clean(stand, tmp_path), what="nothing is left")


async def test_a_client_that_stops_is_told_and_leaves_nothing(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "IDLE_LIMIT_S", 0.2)
    async with begun(stand, gateway) as (reader, _):
        assert b" 408 " in await reader.readline()
        assert await is_clean(stand, tmp_path)


async def test_a_client_that_trickles_is_cut_off(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However regularly something comes."""
    monkeypatch.setattr(uploads, "IDLE_LIMIT_S", 0.5)
    async with begun(stand, gateway) as (_, writer):

        async def has_ended() -> bool:
            writer.write(b"x")
            return await is_clean(stand, tmp_path)

        await wait_until(has_ended, what="the upload ends")


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(errno.ENOSPC, 507, "storage_full"), (errno.EIO, 503, "storage_unavailable")],
)
async def test_a_disk_that_refuses_is_said_and_leaves_nothing(
    stand: Stand,
    gateway: RunningGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    code: str,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        answer = await upload(gateway)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert str(tmp_path) not in answer.text
    assert await is_clean(stand, tmp_path)
    assert (await upload(gateway)).status_code == 200


async def test_many_files_at_once_arrive_whole(
    stand: Stand, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are places: who has none waits."""
    monkeypatch.setattr(gateway.services, "upload_places", uploads.UploadPlaces())
    contents = [os.urandom(300_000) for _ in range(12)]
    answers = await asyncio.gather(*(upload(gateway, content) for content in contents))
    for answer, content in zip(answers, contents, strict=True):
        got = await gateway.client.get(f"/v1/files/{answer.json()['id']}/content")
        assert got.content == content


# The end of a file -------------------------------------------------------------------------------


async def test_a_file_expires(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its tenant at once, and in storage as soon as somebody looks."""
    wish = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = (await upload(gateway, data=BATCH | wish)).json()
    kept = (await upload(gateway)).json()["id"]
    monkeypatch.setattr(product_files, "wall_ms", lambda: file["expires_at"] * 1000)
    assert (await gateway.client.get(f"/v1/files/{file['id']}")).status_code == 404
    listed = (await gateway.client.get("/v1/files")).json()["data"]
    assert [each["id"] for each in listed] == [kept]
    assert await gateway.services.files.expire() == 1
    assert await stored(tmp_path) == [f"files/{kept}"]
    assert await due(stand) == [kept]


async def test_what_a_crash_left_behind_goes_within_a_day(
    stand: Stand, gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that no record names; a record whose bytes were to be removed."""

    async def rows() -> AsyncIterator[bytes]:
        yield ROWS

    files = gateway.services.files
    await files.write(rows())
    removed = await files.create("public", "a", "batch", rows())
    await stand.broker.file_store.remove(removed.id)
    assert len(await stored(tmp_path)) == 2
    assert await files.expire() == 1
    now_ms = product_files.wall_ms()
    monkeypatch.setattr(product_files, "wall_ms", lambda: now_ms + DAY_S * 1000)
    assert await files.expire() == 1
    assert await is_clean(stand, tmp_path)


async def test_a_file_that_is_made_again_is_the_same_file(
    stand: Stand, gateway: RunningGateway
) -> None:
    """As the results of a batch are, by whoever goes on with them."""

    async def rows(content: bytes) -> AsyncIterator[bytes]:
        yield content
        if content == b"broken":
            raise RuntimeError

    files, id = gateway.services.files, "file-" + "a" * 32
    for content in (b"one", b"other"):
        file = await files.create("public", "a", "batch_output", rows(content), id=id)
        assert file.id == id
        assert (await gateway.client.get(f"/v1/files/{id}/content")).content == content
    with pytest.raises(RuntimeError):
        await files.create("public", "a", "batch_output", rows(b"broken"), id=id)
    assert (await gateway.client.get(f"/v1/files/{id}/content")).content == b"other"
    assert len((await gateway.client.get("/v1/files")).json()["data"]) == 1
    assert await stand.broker.file_store.bytes_of("public") == len(b"other")
    raw: Any = stand.broker._redis
    assert await raw.zscore(keys.FILES_DUE, id) == file.expires_at
