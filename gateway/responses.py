"""Responses (``/v1/responses``): the object, its events, and their numbers.

A response is its token log and a document beside it (:class:`gateway.order.ResponseDocument`). All
that is shown follows from both: the object at any moment, and the events with their sequence
numbers. What a token adds hangs on those before it alone, so that the numbers follow the log, and
any gateway, and any replay, numbers alike::

    0 created · [1 queued, in the background only] · in_progress · then for each item of the output
    output_item.added · content_part.added · output_text.delta, one per token · output_text.done ·
    content_part.done · output_item.done (of a call: function_call_arguments.delta and .done) · and
    completed, incomplete or failed

The clients' types know no event for a cancelled response: its stream ends with
``response.incomplete`` around a response whose status is ``cancelled``.
"""

import json
from copy import deepcopy
from typing import Any

import msgspec

from common.broker import Broker
from common.failures import KINDS, Failure
from common.messages import Finish, FinishReason, Timing, unescape_pieces
from common.models.tokenizer import Tokenizer
from gateway.collect import Completion
from gateway.cursor import FINISH, Cursor
from gateway.frames import Frames, Subject, call_id, timings
from gateway.logprobs import chat_logprobs
from gateway.order import LOGPROBS, TOOLS, ResponseDocument
from gateway.services import Offer, Services
from gateway.stream import Batch
from gateway.tool_calls import Arguments, CallBegins, CallEnds, CallReader, Part, Text

PREFIX = "resp_"
"""Of the id of a response; behind it stands the request's."""

_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(ResponseDocument).decode


# Its output --------------------------------------------------------------------------------------

Event = tuple[str, dict[str, Any]]
"""Type and fields."""


class Output:
    """The items of a response, as its tokens make them, and the events that tell of each step."""

    def __init__(self, subject: Subject) -> None:
        self.items: list[dict[str, Any]] = []
        self._subject = subject
        self._reader = CallReader() if subject.has(TOOLS) else None
        self._is_open = False

    def add(self, text: str, logprobs: list[Any]) -> list[Event]:
        """The text of one token, and, where it is told, its log-probability."""
        parts = [Text(text)] if self._reader is None else self._reader.feed(text)
        return [event for part in parts for event in self._add(part, logprobs)]

    def end(self, status: str) -> list[Event]:
        """Whatever is open ends with ``status``; there is at least a message without text."""
        rest = [] if self._reader is None else self._reader.close()
        events = [event for part in rest for event in self._add(part, [])]
        if not self.items:
            events += self._open_message()
        return events + self._close(status)

    def _add(self, part: Part, logprobs: list[Any]) -> list[Event]:
        match part:
            case Text(text):
                opened = [] if self._is_open else self._open_message()
                content = self.items[-1]["content"][0]
                content["text"] += text
                content["logprobs"] += logprobs
                told = {"delta": text, "logprobs": logprobs}
                return [*opened, ("response.output_text.delta", self._place() | told)]
            case CallBegins(index, name):
                closed = self._close("completed")
                return [*closed, self._open(self._call(index, name))]
            case Arguments(_, text):
                self.items[-1]["arguments"] += text
                return [("response.function_call_arguments.delta", self._at() | {"delta": text})]
            case CallEnds():
                return self._close("completed")

    def _open(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        self._is_open = True
        return "response.output_item.added", {
            "output_index": len(self.items) - 1,
            "item": item | ({"content": []} if "content" in item else {}),
        }

    def _open_message(self) -> list[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        number = "" if not self.items else f"_{len(self.items)}"
        opened = self._open(
            {
                "id": f"msg_{self._subject.request_id}{number}",
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [part],
            }
        )
        return [opened, ("response.content_part.added", self._place() | {"part": deepcopy(part)})]

    def _call(self, index: int, name: str) -> dict[str, Any]:
        return {
            "id": f"fc_{self._subject.request_id}_{index}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(self._subject, 0, index),
            "name": name,
            "arguments": "",
        }

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        done = ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            return [("response.function_call_arguments.done", self._at() | told), done]
        part = item["content"][0]
        told = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            ("response.output_text.done", self._place() | told),
            ("response.content_part.done", self._place() | {"part": part}),
            done,
        ]

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _place(self) -> dict[str, Any]:
        return self._at() | {"content_index": 0}


def _told(subject: Subject, whole: Completion | Batch, tokenizer: Tokenizer) -> list[list[Any]]:
    """The log-probabilities of each token, as a list of one, or of none where nobody asked."""
    if not subject.has(LOGPROBS):
        return [[]] * len(whole.tokens)
    told = chat_logprobs(tokenizer, whole.tokens, whole.logprobs, whole.tops)
    return [[entry] for entry in told["content"]]


# The object --------------------------------------------------------------------------------------


def subject_of(offer: Offer, request_id: str, document: ResponseDocument) -> Subject:
    """Of a response that was made before, maybe on another gateway."""
    return Subject(
        request_id=request_id,
        model=offer.model.name,
        model_version=offer.model.version,
        presentation=document.presentation,
        document=document,
    )


def document_of(subject: Subject) -> ResponseDocument:
    """Whoever shows a response has read its document."""
    if subject.document is None:
        raise ValueError(f"{subject.request_id} is no response")
    return subject.document


def response_object(
    subject: Subject, whole: Completion, tokenizer: Tokenizer, *, is_waiting: bool = False
) -> dict[str, Any]:
    """The response as far as ``whole`` knows it; ``is_waiting``: no worker has it yet."""
    document, finish = document_of(subject), whole.finish
    status = _status(finish, is_waiting=is_waiting)
    shown: dict[str, Any] = {
        "id": PREFIX + subject.request_id,
        "object": "response",
        "created_at": subject.presentation.created,
        "status": status,
        "background": document.is_background,
        "error": _error(finish) if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": subject.model,
        "output": output_items(subject, whole, tokenizer),
        "usage": _usage(subject, whole) if finish.reason and status != "failed" else None,
        "completed_at": whole.timing.ended // 1000 if whole.timing else None,
    }
    if finish.reason:
        shown["headrace"] = timings(finish, whole.timing, len(whole.tokens))
    return shown | document.echo


def output_items(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What the tokens of ``whole`` say, as items."""
    output = Output(subject)
    for piece, told in zip(whole.pieces, _told(subject, whole, tokenizer), strict=True):
        output.add(unescape_pieces([piece]), told)
    if whole.finish.reason not in ("", FinishReason.FAILED):
        output.end(_item_status(whole.finish))
    return output.items


def _item_status(finish: Finish) -> str:
    status = _status(finish, is_waiting=False)
    return "completed" if status == "completed" else "incomplete"


def _status(finish: Finish, *, is_waiting: bool) -> str:
    match finish.reason:
        case "":
            return "queued" if is_waiting else "in_progress"
        case FinishReason.FAILED:
            return "failed"
        case FinishReason.CANCELLED:
            return "cancelled"
        case FinishReason.LENGTH:
            return "incomplete"
        case _:
            return "completed"


def _error(finish: Finish) -> dict[str, Any]:
    """OpenAI's closed set of codes has one for this; ours stands beside it."""
    code = finish.code if finish.code in KINDS else "INTERNAL"
    message = finish.message or KINDS[code].meaning
    return {"code": "server_error", "message": message, "headrace_code": code.lower()}


def _usage(subject: Subject, whole: Completion) -> dict[str, Any]:
    prompt, answer = subject.presentation.prompt_tokens, len(whole.tokens)
    cached = min(prompt, whole.finish.cached_tokens)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }


# Its events --------------------------------------------------------------------------------------


class ResponseFrames(Frames):
    """The events of a response behind ``cursor``, or those with numbers above ``after``.

    ``whole`` holds what stands before ``cursor``: numbers go on from there, and the last events
    repeat the whole text. Only the last event of a token has an ``id:``, so that none is missing
    behind it.
    """

    wire = "openai"

    def __init__(
        self,
        subject: Subject,
        tokenizer: Tokenizer,
        cursor: Cursor | None = None,
        whole: Completion | None = None,
        *,
        after: int = -1,
    ) -> None:
        super().__init__(subject, cursor)
        self._tokenizer = tokenizer
        self._whole = whole or nothing()
        self._after = after
        self._number = 0
        self._is_background = document_of(subject).is_background
        self._is_opened = self._is_begun = False
        self._output = Output(subject)
        if self._num_tokens:
            self.opening()
            self._begin()
            for piece, told in self._pieces(self._whole):
                self._number += len(self._output.add(piece, told))

    def opening(self) -> bytes:
        """What is said before the first token."""
        if self._is_opened:
            return b""
        self._is_opened = True
        shown = self._shown(nothing(), is_waiting=self._is_background)
        second = "response.queued" if self._is_background else "response.in_progress"
        return self._event("response.created", response=shown) + self._event(second, response=shown)

    def tokens(self, batch: Batch) -> list[bytes]:
        frames = self._begin() if batch.tokens else []
        self._whole.tokens += batch.tokens
        self._whole.pieces += batch.pieces
        self._whole.logprobs += batch.logprobs
        self._whole.tops += batch.tops
        for position, (chain, (piece, told)) in enumerate(
            zip(batch.chains, self._pieces(batch), strict=True), batch.start + 1
        ):
            cursor = f"{position}-{chain:08x}"
            events = self._output.add(piece, told)
            frames += [
                self._event(kind, cursor if number == len(events) else "", **fields)
                for number, (kind, fields) in enumerate(events, 1)
            ]
        return frames

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        if self._stage >= FINISH:
            return []
        self._whole.finish, self._whole.timing = finish, timing
        shown = self._shown(self._whole)
        kind, frames = "response.failed", self._begin()
        if finish.reason != FinishReason.FAILED:
            kind = "response.completed" if shown["status"] == "completed" else "response.incomplete"
            events = self._output.end(_item_status(finish))
            frames += [self._event(told, **fields) for told, fields in events]
        self._stage = FINISH
        return [*frames, self._event(kind, str(self.cursor), response=shown)]

    def failure(self, failure: Failure) -> bytes:
        code = failure.code.lower()
        return self._event("error", code=code, message=failure.message, param=None)

    def _begin(self) -> list[bytes]:
        """Of a response in the background: it does not wait any more."""
        if self._is_begun or not self._is_background:
            return []
        self._is_begun = True
        return [self._event("response.in_progress", response=self._shown(nothing()))]

    def _pieces(self, whole: Completion | Batch) -> list[tuple[str, list[Any]]]:
        told = _told(self.subject, whole, self._tokenizer)
        return [
            (unescape_pieces([piece]), said) for piece, said in zip(whole.pieces, told, strict=True)
        ]

    def _shown(self, whole: Completion, *, is_waiting: bool = False) -> dict[str, Any]:
        return response_object(self.subject, whole, self._tokenizer, is_waiting=is_waiting)

    def _event(self, kind: str, id: str = "", **fields: Any) -> bytes:
        """The next event; nothing, if its reader has it."""
        number = self._number
        self._number += 1
        if number <= self._after:
            return b""
        data = json.dumps({"type": kind, "sequence_number": number} | fields, separators=(",", ":"))
        named = f"id: {id}\n" if id else ""
        return f"{named}event: {kind}\ndata: {data}\n\n".encode()


def nothing() -> Completion:
    """Of a generation that has not begun."""
    return Completion(0, Finish(""), None)


# The log -----------------------------------------------------------------------------------------


async def keep_document(
    services: Services, request_id: str, document: ResponseDocument, retention_s: float
) -> None:
    """Keep it as long as the log may live: the longest wait and run, and then ``retention_s``."""
    settings = services.settings
    kept_s = settings.queue_limit_s + settings.run_limit_s + retention_s
    packed, ttl_ms = _pack(document), int(kept_s * 1000)
    await services.broker.keep_document(request_id, packed, ttl_ms)
    services.admissions.keep_document(request_id, packed, ttl_ms)


async def read_document(broker: Broker, request_id: str) -> ResponseDocument | None:
    data = await broker.read_document(request_id)
    return None if data is None else _unpack(data)


async def read_log(
    broker: Broker, id: str, end: int | None = None
) -> tuple[Completion, str] | None:
    """What the log of a generation holds now, up to position ``end``, and the state it is in.

    None: it is not there any more.
    """
    whole = nothing()
    while True:
        page = await broker.read(id, len(whole.tokens))
        if page is None:
            return None
        known = len(whole.tokens)
        for entry in page.entries:
            record, skipped = entry.record, len(whole.tokens) - entry.record.start
            if skipped <= len(record.tokens):
                whole.tokens += record.tokens[skipped:]
                whole.pieces += record.pieces[skipped:]
                whole.logprobs += (record.logprobs or [None] * len(record.tokens))[skipped:]
                whole.tops += (record.tops or [])[skipped:]
                whole.prompt = record.prompt or whole.prompt
            if record.finish is not None:
                whole.finish, whole.timing = record.finish, entry.timing
        is_enough = end is not None and len(whole.tokens) >= end
        if is_enough or whole.finish.reason or len(whole.tokens) == known:
            return _until(whole, end), page.state


def _until(whole: Completion, end: int | None) -> Completion:
    if end is not None and len(whole.tokens) >= end:
        for parts in (whole.tokens, whole.pieces, whole.logprobs, whole.tops):
            del parts[end:]
        whole.finish, whole.timing = Finish(""), None
    return whole
