"""A form with a file, in whatever pieces it comes, and in whatever way it is broken."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.failures import Failure
from gateway.multipart import FileForm

BOUNDARY = "7a1c"
CONTENT_TYPE = f'multipart/form-data; boundary="{BOUNDARY}"'
PURPOSE = 'form-data; name="purpose"'
FILE = 'form-data; name="file"; filename="rows.jsonl"'


def form(*parts: tuple[str, bytes]) -> bytes:
    head = [
        f"--{BOUNDARY}\r\nContent-Disposition: {said}\r\n\r\n".encode() + body + b"\r\n"
        for said, body in parts
    ]
    return b"".join([*head, f"--{BOUNDARY}--\r\n".encode()])


async def read(body: bytes, *cuts: int) -> tuple[FileForm, bytes]:
    """The form, sent in pieces that end at ``cuts``."""

    async def sent() -> AsyncIterator[bytes]:
        ends = [*sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        for start, end in zip([0, *ends], ends, strict=False):
            yield body[start:end]

    read_form = FileForm(CONTENT_TYPE)
    return read_form, b"".join([piece async for piece in read_form.file(sent())])


async def test_the_file_and_what_stands_beside_it() -> None:
    for parts in (((PURPOSE, b"batch"), (FILE, b"rows")), ((FILE, b"rows"), (PURPOSE, b"batch"))):
        got, content = await read(form(*parts))
        assert (content, got.filename, got.texts) == (b"rows", "rows.jsonl", {"purpose": "batch"})


@given(
    st.lists(st.sampled_from([b"\r\n--7a1c", b"\r", b"\n", b"--", b"7a1c", b"x", b"--7a1"])),
    st.lists(st.integers(0, 400)),
)
def test_the_bytes_of_a_file_are_its_own(pieces: list[bytes], cuts: list[int]) -> None:
    """Wherever the network cuts, and however much they look like a boundary without being one."""
    content = b"".join(pieces).replace(b"\r\n--7a1c", b"\r\n--7a1d")
    _, got = asyncio.run(read(form((FILE, content), (PURPOSE, b"batch")), *cuts))
    assert got == content


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("a b.jsonl", "a b.jsonl"),
        ("zażółć.jsonl", "zażółć.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\files\\a.jsonl", "a.jsonl"),
        ("a\x00b\x1bc", "abc"),
        ("", "upload"),
        ("x" * 1000, "x" * 255),
    ],
)
async def test_a_name_is_shown_without_harm(filename: str, shown: str) -> None:
    said = f'form-data; name="file"; filename="{filename}"'
    got, _ = await read(form((said, b"")))
    assert got.filename == shown


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "completely"),
        (form((FILE, b"rows"))[:-8], "completely"),
        (b"no form at all", "no valid"),
        (form((FILE, b"a"), (FILE, b"b")), "more than one `file`"),
        (form((PURPOSE, b"a"), (PURPOSE, b"b")), "more than one `purpose`"),
        (form((PURPOSE, b"\xff")), "no UTF-8"),
        (form((PURPOSE, b"x" * 2000)), "`purpose` may have at most"),
        (form(('form-data; name="file"', b"text")), "must be a file"),
        (form(*((f'form-data; name="{number}"', b"") for number in range(20))), "parts"),
        (form((f'form-data; name="file"; filename="{"x" * 5000}"', b"")), "no valid"),
        (b"--7a1c\r\n" + b"a: b\r\n" * 20 + b"\r\n", "no valid"),
    ],
)
async def test_what_is_no_form_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(Failure, match=said) as raised:
        await read(body)
    assert raised.value.code == "BAD_REQUEST"


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 500],
)
def test_another_type_is_refused(content_type: str) -> None:
    with pytest.raises(Failure) as raised:
        FileForm(content_type)
    assert raised.value.code == "UNSUPPORTED_MEDIA_TYPE"


async def test_chance_breaks_nothing() -> None:
    for _ in range(200):
        with pytest.raises(Failure):
            await read(b"--7a1c" + os.urandom(300))
