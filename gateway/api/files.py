"""``/v1/files``: OpenAI's Files API, over whatever storage there is.

A file goes into storage as it comes and out of it as it is read; no gateway ever holds one. It is
there for all gateways once the answer to its upload is, and that waits for the disks.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common.batches import MAX_FILE_BYTES, MAX_LINES
from common.clock import monotonic_s
from common.failures import Failure
from common.files import (
    LIFE_S,
    MAX_LIFE_S,
    MIN_LIFE_S,
    UPLOAD_PURPOSES,
    FileRecord,
    Files,
    UploadPurpose,
)
from common.logs import get_logger
from common.request_metrics import RequestEnd
from gateway.api.lists import is_newest_first, page_limit, shown_page
from gateway.bodies import is_number, number_in
from gateway.callers import caller_of
from gateway.errors import failure_response
from gateway.middleware import arrival_of
from gateway.multipart import FileForm
from gateway.services import services_of
from gateway.uploads import paced

log = get_logger()

MAX_PAGE = 10_000

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"


# Upload ------------------------------------------------------------------------------------------


async def upload_file(request: Request) -> Response:
    """Raises: Failure BAD_REQUEST, BODY_TOO_LARGE, BODY_TIMEOUT, UNSUPPORTED_MEDIA_TYPE,
    QUOTA_EXHAUSTED, DRAINING; those of :class:`Files`.
    """
    services, tenant = services_of(request), caller_of(request).tenant
    if services.is_draining:
        await _read_over(request)
        raise Failure("DRAINING")
    form = FileForm(request.headers.get("content-type", ""))
    max_tenant_bytes = services.settings.tenant_files_bytes
    await services.files.check_room(tenant, max_tenant_bytes)
    async with services.upload_places.taken(tenant):
        content = await services.files.write(_within_limits(form, request))
    try:
        wish = _wish(form)
        file = await services.files.record(
            content,
            tenant,
            wish.filename,
            wish.purpose,
            expires_s=wish.expires_s,
            max_tenant_bytes=max_tenant_bytes,
        )
        await services.broker.durable()
    except BaseException:
        await services.files.drop(content)
        raise
    services.metrics.requests.note_end(RequestEnd(api="file", code="ok"))
    log.info(
        "file.created",
        file_id=file.id,
        purpose=file.purpose,
        bytes=file.bytes,
        duration=round(monotonic_s() - arrival_of(request), 6),
    )
    return JSONResponse(file.shown())


@dataclass(frozen=True, slots=True)
class _Wish:
    filename: str
    purpose: UploadPurpose
    expires_s: int


def _wish(form: FileForm) -> _Wish:
    """What the texts of a form ask for. Raises: Failure BAD_REQUEST, which names the field."""
    if form.filename is None:
        raise _refused("`file` is missing: a file must be sent.", "file")
    purpose = form.texts.get("purpose", "")
    if purpose not in UPLOAD_PURPOSES:
        raise _refused(f"`purpose` must be one of {', '.join(UPLOAD_PURPOSES)}.", "purpose")
    return _Wish(form.filename, purpose, _life(form.texts))


def _life(texts: dict[str, str]) -> int:
    """Seconds that a file is wished to live."""
    if _ANCHOR not in texts and _SECONDS not in texts:
        return LIFE_S
    if texts.get(_ANCHOR) != "created_at":
        raise _refused(f"`{_ANCHOR}` must be created_at.", _ANCHOR)
    return number_in(_SECONDS, texts.get(_SECONDS, ""), MIN_LIFE_S, MAX_LIFE_S)


async def _within_limits(form: FileForm, request: Request) -> AsyncIterator[bytes]:
    """The file's bytes. What stands before it in the form is checked before they are taken.

    Raises: Failure BAD_REQUEST, BODY_TOO_LARGE.
    """
    num_bytes = num_lines = 0
    async for piece in form.file(paced(request)):
        if not num_bytes and "purpose" in form.texts:
            _wish(form)
        num_bytes += len(piece)
        num_lines += piece.count(b"\n")
        if num_bytes > MAX_FILE_BYTES:
            raise Failure(
                "BODY_TOO_LARGE", f"A file may have at most {MAX_FILE_BYTES} bytes.", field="file"
            )
        if num_lines > MAX_LINES and form.texts.get("purpose") == "batch":
            raise _too_many_lines()
        yield piece
    if num_lines > MAX_LINES and form.texts.get("purpose") == "batch":
        raise _too_many_lines()


async def _read_over(request: Request) -> None:
    """The answer closes the connection: what is not read by then would keep it from the client."""
    async for _ in paced(request):
        pass


def _too_many_lines() -> Failure:
    return _refused(f"A file for a batch may have at most {MAX_LINES} lines.", "file")


# What is there -----------------------------------------------------------------------------------


async def list_files(request: Request) -> Response:
    """Files of the caller, the newest first unless ``order`` is ``asc``.

    Raises: Failure BAD_REQUEST.
    """
    query = request.query_params
    page = await services_of(request).files.list(
        caller_of(request).tenant,
        limit=page_limit(query, default=MAX_PAGE, most=MAX_PAGE),
        after=query.get("after", ""),
        purpose=query.get("purpose", ""),
        newest_first=is_newest_first(query),
    )
    if page is None:
        raise _refused("`after` must be the id of a file", "after")
    files, has_more = page
    return shown_page([file.shown() for file in files], has_more=has_more)


async def show_file(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    return JSONResponse((await _find(request)).shown())


async def delete_file(request: Request) -> Response:
    """Raises: Failure NOT_FOUND."""
    file = await _find(request)
    await services_of(request).files.delete(file.id, file.tenant)
    log.info("file.deleted", file_id=file.id)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


async def read_file(request: Request) -> Response:
    """The bytes of a file, or the one range of them that ``Range`` asks for (RFC 9110, 14.2).

    Raises: Failure NOT_FOUND.
    """
    file = await _find(request)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "content-type": "application/octet-stream",
        "etag": f'"{file.sha256}"',
    }
    asked = _range(request, file, headers["etag"])
    if asked is None:
        return _out_of_range(file)
    start, end = asked
    headers["content-length"] = str(end - start)
    status = 200
    if (start, end) != (0, file.bytes):
        status, headers["content-range"] = 206, f"bytes {start}-{end - 1}/{file.bytes}"
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers)
    return StreamingResponse(
        await _begun(services_of(request).files, file, start, end),
        status_code=status,
        headers=headers,
    )


async def _begun(files: Files, file: FileRecord, start: int, end: int) -> AsyncIterator[bytes]:
    """The bytes, the first of which are there: so that what is gone is said by a status."""
    blocks = files.read(file, start, end)
    try:
        first = await anext(blocks)
    except (FileNotFoundError, StopAsyncIteration) as error:
        raise _not_found(file.id) from error

    async def whole() -> AsyncIterator[bytes]:
        async with aclosing(blocks):
            yield first
            async for block in blocks:
                yield block

    return whole()


def _range(request: Request, file: FileRecord, etag: str) -> tuple[int, int] | None:
    """From and up to where the client wants to read; what is no one range is answered with
    everything, as the RFC says. None: it lies behind the end.
    """
    everything = (0, file.bytes)
    unit, _, text = request.headers.get("range", "").partition("=")
    first, dash, last = text.strip().partition("-")
    has_changed = request.headers.get("if-range", etag) != etag
    if unit.strip().lower() != "bytes" or not dash or has_changed:
        return everything
    if not all(is_number(each) or not each for each in (first, last)) or not (first or last):
        return everything
    if not first:
        start, end = max(0, file.bytes - int(last)), file.bytes
    else:
        start, end = int(first), min(int(last) + 1 if last else file.bytes, file.bytes)
        if last and int(last) < start:
            return everything
    return (start, end) if start < end else None


def _out_of_range(file: FileRecord) -> Response:
    failure = _refused(f"`Range` lies behind the end: the file has {file.bytes} bytes.", "range")
    return failure_response(
        failure, "openai", status=416, headers={"content-range": f"bytes */{file.bytes}"}
    )


async def _find(request: Request) -> FileRecord:
    """Raises: Failure NOT_FOUND, also for another tenant's."""
    file_id = request.path_params["id"]
    file = await services_of(request).files.get(file_id, caller_of(request).tenant)
    if file is None:
        raise _not_found(file_id)
    return file


def _not_found(file_id: str) -> Failure:
    return Failure("NOT_FOUND", f"No such File object: {file_id[:80]}", field="id")


def _refused(message: str, field: str) -> Failure:
    return Failure("BAD_REQUEST", message, field=field)


routes = [
    Route("/v1/files", upload_file, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{id}", show_file, methods=["GET"]),
    Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/content", read_file, methods=["GET"]),
]
