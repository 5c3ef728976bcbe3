"""Validation: a first pass over the input of a batch, which finds its lines and what is wrong.

What is checked is what must hold of the file as a whole, so that each line has a place in the
results. What a line asks for is checked when it runs, as an interactive request is.
"""

import hashlib
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from common.batches import MAX_ERRORS, MAX_LINES, BatchError, Endpoint
from workers.background.line_index import LineIndex, LinePlace

MAX_CUSTOM_ID_CHARACTERS = 512
_ENVELOPE_BYTES = 16 * 1024
"""What a line may hold beside its body."""
_PREFIX_BYTES = 256
"""Lines whose prompts have so much in common at least are run together."""
_DIGEST_BYTES = 16


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    """What of a body is looked at before it runs."""

    model: Any = None
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    inputs: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")

    @property
    def beginning(self) -> bytes:
        parts = (self.instructions, self.messages, self.input, self.inputs, self.prompt)
        return b"".join(bytes(memoryview(part)[:_PREFIX_BYTES]) for part in parts)[:_PREFIX_BYTES]


class InputLine(msgspec.Struct):
    """A line that validation has let pass."""

    custom_id: str
    body: msgspec.Raw


_line = msgspec.json.Decoder(_Line).decode
_body = msgspec.json.Decoder(_Body).decode
read_line = msgspec.json.Decoder(InputLine).decode
"""The parts of a line that are needed to run it."""


class _InvalidLineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code)
        self.code, self.message, self.param = code, message, param


@dataclass(slots=True)
class Validation:
    """What was found. ``index`` is complete where there are no ``errors``."""

    index: LineIndex = field(default_factory=LineIndex)
    errors: list[BatchError] = field(default_factory=list[BatchError])
    model: str | None = None
    """What all lines call their model, as far as they name one."""


async def validate(
    chunks: AsyncIterable[bytes], endpoint: Endpoint, *, max_body_bytes: int
) -> Validation:
    """Look at every line of the input, in as much memory as the longest line and the index take.

    A line whose body is longer than ``max_body_bytes`` is refused when it runs; one that is longer
    than any line with such a body ends the validation.
    """
    checker = _Checker(endpoint)
    max_line_bytes = max_body_bytes + _ENVELOPE_BYTES
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if checker.is_over:
                return checker.found()
            checker.take(line, 1, max_line_bytes)
        if len(rest) > max_line_bytes:
            checker.take(rest, 0, max_line_bytes)
            return checker.found()
    if rest and not checker.is_over:
        checker.take(rest, 0, max_line_bytes)
    return checker.found()


class _Checker:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._found = Validation()
        self._number = 0
        self._offset = 0
        self._seen: set[bytes] = set()
        """Digests of the ids so far: 50,000 take some megabytes, however long the ids are."""
        self._groups: dict[bytes, int] = {}
        self._order: list[tuple[int, int]] = []
        """For each line, the first one of its group, and itself."""
        self.is_over = False

    def take(self, line: bytes, num_end_bytes: int, max_bytes: int) -> None:
        """The next line, with so many bytes behind it that end it."""
        self._number += 1
        offset = self._offset
        self._offset += len(line) + num_end_bytes
        text = line.rstrip(b"\r")
        if not text.strip():
            return
        place = LinePlace(self._number, offset, len(text))
        try:
            self._check_size(text, max_bytes)
            self._check(text, place)
        except _InvalidLineError as invalid:
            error = BatchError(invalid.code, invalid.message, invalid.param, self._number)
            self._found.errors.append(error)
            self.is_over = self.is_over or len(self._found.errors) >= MAX_ERRORS

    def found(self) -> Validation:
        if not self._order and not self._found.errors:
            self._found.errors.append(BatchError("empty_file", "The input file has no lines."))
        if not self._found.errors:
            order = [own for _, own in sorted(self._order)]
            self._found.index = self._found.index.in_order(order)
        return self._found

    def _check_size(self, text: bytes, max_bytes: int) -> None:
        """Behind a line that is too long, or one too many, no other is looked at."""
        if len(text) > max_bytes:
            self.is_over = True
            raise _InvalidLineError("line_too_long", f"A line may have {max_bytes} bytes.")
        if len(self._order) == MAX_LINES:
            self.is_over = True
            raise _InvalidLineError(
                "too_many_tasks", f"A batch may have at most {MAX_LINES} lines."
            )

    def _check(self, text: bytes, place: LinePlace) -> None:
        line, body = _parsed(text)
        self._check_custom_id(line.custom_id)
        if line.method is None:
            raise _missing("method")
        if line.method != "POST":
            raise _InvalidLineError("invalid_method", "`method` must be POST.", "method")
        if line.url is None:
            raise _missing("url")
        if line.url != self._endpoint:
            raise _InvalidLineError(
                "url_mismatch",
                f"`url` must be the endpoint of the batch, {self._endpoint}.",
                "url",
            )
        self._check_model(body.model)
        own = len(self._order)
        beginning = body.beginning
        group = own
        if len(beginning) == _PREFIX_BYTES:
            group = self._groups.setdefault(_digest(beginning), own)
        self._order.append((group, own))
        self._found.index.add(place)

    def _check_custom_id(self, custom_id: Any) -> None:
        if custom_id is None:
            raise _missing("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
            raise _InvalidLineError(
                "invalid_custom_id",
                f"`custom_id` must be a text of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters.",
                "custom_id",
            )
        digest = _digest(custom_id.encode("utf-8", "surrogatepass"))
        if digest in self._seen:
            raise _InvalidLineError(
                "duplicate_custom_id",
                f"`custom_id` {custom_id[:80]!r} is that of an earlier line.",
                "custom_id",
            )
        self._seen.add(digest)

    def _check_model(self, model: Any) -> None:
        """Anything but a text is left to the line's own run to refuse."""
        if not isinstance(model, str):
            return
        if self._found.model is None:
            self._found.model = model
        elif model != self._found.model:
            raise _InvalidLineError(
                "model_mismatch",
                f"All lines of a batch are for one model: this one is for {model[:80]!r}, and "
                f"those before are for {self._found.model[:80]!r}.",
                "body.model",
            )


def _parsed(text: bytes) -> tuple[_Line, _Body]:
    try:
        line = _line(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _InvalidLineError(
            "invalid_json_line", f"This line is not a JSON object: {error}"
        ) from error
    if not line.body:
        raise _missing("body")
    try:
        return line, _body(line.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _InvalidLineError("invalid_body", "`body` must be an object.", "body") from error


def _missing(field: str) -> _InvalidLineError:
    return _InvalidLineError("missing_required_parameter", f"`{field}` is missing.", field)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
