"""Responses (``/v1/responses``): the object, its events, and their numbers.

A response is its token log and a document beside it (:class:`gateway.order.ResponseDocument`). All
that is shown follows from both: the object at any moment, and the events with their sequence
numbers. Each token is one event, so that the numbers follow the log, and any gateway, and any
replay, numbers alike::

    0 created · [1 queued, in the background only] · in_progress · output_item.added ·
    content_part.added · output_text.delta for each token · output_text.done · content_part.done ·
    output_item.done · completed, incomplete or failed

The clients' types know no event for a cancelled response: its stream ends with
``response.incomplete`` around a response whose status is ``cancelled``.
"""

import json
from typing import Any

import msgspec

from common.broker import Broker
from common.failures import KINDS, Failure
from common.ids import generation_id
from common.messages import Finish, FinishReason, Timing
from common.models.tokenizer import Tokenizer
from gateway.collect import Completion
from gateway.cursor import FINISH, Cursor
from gateway.frames import Frames, Subject, timings
from gateway.logprobs import chat_logprobs
from gateway.order import LOGPROBS, ResponseDocument
from gateway.services import Services
from gateway.stream import Batch

PREFIX = "resp_"
"""Of the id of a response; behind it stands the request's."""

_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(ResponseDocument).decode


# The object --------------------------------------------------------------------------------------


def response_object(
    subject: Subject, whole: Completion, tokenizer: Tokenizer, *, is_waiting: bool = False
) -> dict[str, Any]:
    """The response as far as ``whole`` knows it; ``is_waiting``: no worker has it yet."""
    document = document_of(subject)
    finish = whole.finish
    status = _status(finish, is_waiting=is_waiting)
    is_over = bool(finish.reason)
    shown: dict[str, Any] = {
        "id": PREFIX + subject.request_id,
        "object": "response",
        "created_at": subject.presentation.created,
        "status": status,
        "background": document.is_background,
        "error": _error(finish) if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": subject.model,
        "output": [_message(subject, whole, tokenizer)] if whole.tokens or status in _WHOLE else [],
        "usage": _usage(subject, whole) if is_over and status != "failed" else None,
        "completed_at": whole.timing.ended // 1000 if whole.timing else None,
    }
    if is_over:
        shown["headrace"] = timings(finish, whole.timing, len(whole.tokens))
    return shown | document.echo


def subject_of(services: Services, request_id: str, document: ResponseDocument) -> Subject:
    """Of a response that was made before, maybe on another gateway."""
    return Subject(
        request_id=request_id,
        model=services.model.name,
        model_version=services.model.version,
        presentation=document.presentation,
        document=document,
    )


def document_of(subject: Subject) -> ResponseDocument:
    """Whoever shows a response has read its document."""
    if subject.document is None:
        raise ValueError(f"{subject.request_id} is no response")
    return subject.document


_WHOLE = ("completed", "incomplete")


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


def _message(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    status = _status(whole.finish, is_waiting=False)
    return {
        "id": _item_id(subject),
        "type": "message",
        "role": "assistant",
        "status": status if status in ("in_progress", "completed") else "incomplete",
        "content": [_part(whole.text, _logprobs(subject, whole, tokenizer))],
    }


def _part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _logprobs(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> list[Any]:
    if not subject.has(LOGPROBS):
        return []
    return chat_logprobs(tokenizer, whole.tokens, whole.logprobs, whole.tops)["content"]


def _item_id(subject: Subject) -> str:
    return f"msg_{subject.request_id}"


def _usage(subject: Subject, whole: Completion) -> dict[str, Any]:
    prompt, answer = subject.presentation.prompt_tokens, len(whole.tokens)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }


# Its events --------------------------------------------------------------------------------------


class ResponseFrames(Frames):
    """The events of a response behind ``cursor``, or those with numbers above ``after``.

    ``whole`` holds what stands before ``cursor``: the last events repeat the whole text. Only the
    last event of a position has an ``id:``, so that no other is missing behind it.
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
        self._tells_logprobs = subject.has(LOGPROBS)
        self._is_background = document_of(subject).is_background
        self._num_opening = 2 + self._is_background
        self._is_open = self._num_tokens > 0 or self._stage > 0
        place = json.dumps({"item_id": _item_id(subject), "output_index": 0, "content_index": 0})
        self._place = place[1:-1].encode()

    def opening(self) -> bytes:
        """What is said before the first token."""
        if self._is_open:
            return b""
        shown = self._shown(nothing(), is_waiting=self._is_background)
        second = "response.queued" if self._is_background else "response.in_progress"
        return self._event("response.created", 0, response=shown) + self._event(
            second, 1, response=shown
        )

    def tokens(self, batch: Batch) -> list[bytes]:
        opened = self._opened() if batch.tokens else []
        self._whole.tokens += batch.tokens
        self._whole.pieces += batch.pieces
        self._whole.logprobs += batch.logprobs
        self._whole.tops += batch.tops
        first = self._num_opening + 2
        told = self._told(batch)
        return opened + [
            b"id: %d-%08x\nevent: response.output_text.delta\n"
            b'data: {"type":"response.output_text.delta","sequence_number":%d,%b,"delta":"%b",'
            b'"logprobs":%b}\n\n'
            % (position + 1, chain, first + position, self._place, piece, said)
            for position, (piece, chain, said) in enumerate(
                zip(batch.pieces, batch.chains, told, strict=True), batch.start
            )
            if first + position > self._after
        ]

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        if self._stage >= FINISH:
            return []
        self._whole.finish, self._whole.timing = finish, timing
        shown = self._shown(self._whole)
        if finish.reason == FinishReason.FAILED:
            frames, kind, number = self._began(), "response.failed", self._next
        else:
            frames = [*self._opened(), *self._done()]
            kind = "response.completed" if shown["status"] == "completed" else "response.incomplete"
            number = self._next + 3
        self._stage = FINISH
        frames.append(self._event(kind, number, id=str(self.cursor), response=shown))
        return frames

    def failure(self, failure: Failure) -> bytes:
        code = failure.code.lower()
        return self._event("error", self._next, code=code, message=failure.message, param=None)

    @property
    def _next(self) -> int:
        """Number of the event behind those of the tokens so far."""
        if not self._is_open:
            return self._num_opening
        return self._num_opening + 2 + self._num_tokens

    def _began(self) -> list[bytes]:
        """Of a response in the background: it does not wait any more."""
        if self._is_open or not self._is_background:
            return []
        return [self._event("response.in_progress", 2, response=self._shown(nothing()))]

    def _opened(self) -> list[bytes]:
        """What stands ahead of the first token."""
        if self._is_open:
            return []
        frames, number = self._began(), self._num_opening
        self._is_open = True
        item = _message(self.subject, nothing(), self._tokenizer) | {"content": []}
        return [
            *frames,
            self._event("response.output_item.added", number, output_index=0, item=item),
            self._placed("response.content_part.added", number + 1, part=_part("", [])),
        ]

    def _done(self) -> list[bytes]:
        """What stands behind the last token."""
        number = self._next
        item = _message(self.subject, self._whole, self._tokenizer)
        part = item["content"][0]
        told = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            self._placed("response.output_text.done", number, **told),
            self._placed("response.content_part.done", number + 1, part=part),
            self._event("response.output_item.done", number + 2, output_index=0, item=item),
        ]

    def _told(self, batch: Batch) -> list[bytes]:
        """The log-probabilities of each token's event."""
        if not self._tells_logprobs:
            return [b"[]"] * len(batch.tokens)
        told = chat_logprobs(self._tokenizer, batch.tokens, batch.logprobs, batch.tops)
        return [json.dumps([entry]).encode() for entry in told["content"]]

    def _shown(self, whole: Completion, *, is_waiting: bool = False) -> dict[str, Any]:
        return response_object(self.subject, whole, self._tokenizer, is_waiting=is_waiting)

    def _placed(self, kind: str, number: int, **fields: Any) -> bytes:
        place = json.loads(b"{" + self._place + b"}")
        return self._event(kind, number, **place, **fields)

    def _event(self, kind: str, number: int, id: str = "", **fields: Any) -> bytes:
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
    await services.broker.keep_document(request_id, _pack(document), int(kept_s * 1000))


async def read_document(services: Services, request_id: str) -> ResponseDocument | None:
    data = await services.broker.read_document(request_id)
    return None if data is None else _unpack(data)


async def read_log(
    broker: Broker, request_id: str, end: int | None = None
) -> tuple[Completion, str] | None:
    """What the log of ``request_id`` holds now, up to position ``end``, and the state it is in.

    None: it is not there any more.
    """
    whole = nothing()
    while True:
        page = await broker.read(generation_id(request_id), len(whole.tokens))
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
