"""A form with one file in it (``multipart/form-data``, RFC 7578), read while it comes.

Nothing of the file is kept here; of the texts beside it a few short ones are.
"""

from collections.abc import AsyncGenerator, AsyncIterable

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from common.failures import Failure

MAX_PARTS = 16
MAX_PART_HEADERS = 8
MAX_HEADER_BYTES = 4096
MAX_TEXT_BYTES = 1024
MAX_BOUNDARY_BYTES = 200
"""The standard says 70."""
MAX_FILENAME = 255
"""In characters, as on most file systems."""

_FIELD = "file"


class FileForm:
    """The form whose file is in the field ``file``; a browser, curl and every SDK sends such.

    Raises: Failure UNSUPPORTED_MEDIA_TYPE for another ``content_type``.
    """

    def __init__(self, content_type: str) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if media_type != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
            raise Failure(
                "UNSUPPORTED_MEDIA_TYPE",
                "Expected request with `Content-Type: multipart/form-data; boundary=…`",
            )
        self.texts: dict[str, str] = {}
        """Of the other fields, by their names; complete once the file was read to its end."""
        self.filename: str | None = None
        """As the client names it; None: the form has no file, or not yet."""
        self._num_parts = 0
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None
        """Of the part that is being read; None: the file's."""
        self._text = b""
        self._pieces: list[bytes] = []
        self._has_ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._take_header,
                "on_header_value": self._take_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    async def file(self, body: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
        """The bytes of the file, as they come.

        Raises: Failure BAD_REQUEST for a form that is broken or has two files, and what ``body``
            raises.
        """
        async for chunk in body:
            try:
                self._parser.write(chunk)
            except MultipartParseError as error:
                raise _refused("The form is no valid multipart/form-data.") from error
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                yield piece
        if not self._has_ended:
            raise _refused("The form was not sent completely.")

    # What the parser calls:

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise _refused(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        if name != _FIELD:
            self._name, self._text = name, b""
            return
        if self.filename is not None:
            raise _refused(f"The form has more than one `{_FIELD}`.", _FIELD)
        if b"filename" not in options:
            raise _refused(f"`{_FIELD}` must be a file, with a name.", _FIELD)
        self._name = None
        self.filename = _last_part(options[b"filename"].decode(errors="replace"))

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._pieces.append(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_TEXT_BYTES:
            raise _refused(
                f"`{self._name[:80]}` may have at most {MAX_TEXT_BYTES} bytes.", self._name[:80]
            )

    def _end_part(self) -> None:
        if self._name is None:
            return
        if self._name in self.texts:
            raise _refused(f"The form has more than one `{self._name[:80]}`.", self._name[:80])
        try:
            self.texts[self._name] = self._text.decode()
        except UnicodeDecodeError as error:
            raise _refused(f"`{self._name[:80]}` is no UTF-8.", self._name[:80]) from error

    def _end(self) -> None:
        self._has_ended = True


def _last_part(filename: str) -> str:
    """Without the directories that some browsers tell, and without what no list could show."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in name if character.isprintable())
    return shown[:MAX_FILENAME] or "upload"


def _refused(message: str, field: str | None = None) -> Failure:
    return Failure("BAD_REQUEST", message, field=field)
