"""Frames: from batches of tokens to the bytes of an SSE stream, in the format of each API.

A token's text arrives as the inside of an ASCII-escaped JSON string, so a frame is made by joining
bytes around it; no payload is parsed or encoded again. Every frame has an ``id:``, the cursor
behind it. A stream that is resumed elsewhere lacks only what :class:`Presentation` does not hold,
the prompt's text.

Each answer tells its timings in an extra object ``headrace`` (SDKs keep or ignore it)::

    {"queue_time": 0.004, "time_to_first_token": 0.05, "generation_time": 1.2,
     "tokens_per_second": 47.5, "model_version": "name@0123456789ab", "attempts": 1,
     "finish_reason": "eos_token"}

Seconds by the clock of Redis. It stands in the final event of a native stream, in the chunk with
the finish reason on ``/v1``, and in the body of a whole answer. Its ``finish_reason`` is always the
true one: ``/v1`` has no word for ``cancelled`` and says ``stop`` outside.
"""

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from common.broker import Presentation
from common.failures import KINDS, Failure
from common.messages import Finish, FinishReason, Timing
from common.models.tokenizer import Tokenizer
from gateway.cursor import DONE, FINISH, USAGE, Cursor
from gateway.errors import Wire, envelope
from gateway.order import DETAILS, FULL_TEXT, INCLUDE_USAGE, SHOW_TIER
from gateway.stream import Batch

PING = b": ping\n"
"""One newline only: SDKs dispatch an empty event on a blank line once an ``id:`` was seen."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What an answer says of itself, beside its tokens."""

    request_id: str
    model: str
    model_version: str
    """As known when the answer starts; the final one stands in the timing."""
    presentation: Presentation
    prompt_text: str = ""
    lane: str = "default"

    def has(self, flag: int) -> bool:
        return bool(self.presentation.flags & flag)


class Frames(ABC):
    """Makes the frames of one answer behind ``cursor``, in order, each exactly once."""

    wire: Wire

    def __init__(self, subject: Subject, cursor: Cursor | None = None) -> None:
        cursor = cursor or Cursor()
        self.subject = subject
        self.is_complete = False
        self._num_tokens = cursor.position
        self._chain = cursor.chain or 0
        self._stage = cursor.stage

    def render(self, batch: Batch) -> bytes:
        """The frames of a batch. After the one that brings the finish, ``is_complete`` is set."""
        frames = self.tokens(batch)
        self._num_tokens = batch.start + len(batch.tokens)
        if batch.chains:
            self._chain = batch.chains[-1]
        if batch.finish is not None:
            frames += self.end(batch.finish, batch.timing)
            self.is_complete = True
        return b"".join(frames)

    @abstractmethod
    def tokens(self, batch: Batch) -> list[bytes]: ...

    @abstractmethod
    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        """The final frames that stand behind the reader's stage."""

    def failure(self, failure: Failure) -> bytes:
        """A failure of this connection, not of the generation.

        It has no ``id:``, so that the last token's cursor stays the place to resume from.
        """
        return b"data: " + _json(envelope(failure, self.wire)) + b"\n\n"

    def _final(self, stage: int, data: bytes) -> list[bytes]:
        if stage <= self._stage:
            return []
        cursor = Cursor(self._num_tokens, self._chain, stage)
        return [f"id: {cursor}\ndata: ".encode() + data + b"\n\n"]

    def _broken(self, finish: Finish) -> bytes:
        """The error event of a generation that failed."""
        code = finish.code if finish.code in KINDS else "INTERNAL"
        return _json(envelope(Failure(code, finish.message or None), self.wire))


class TgiFrames(Frames):
    """``/generate_stream`` and ``POST /``: one event per token, no ``[DONE]``.

    The last token's event is also the final one, with text, details and timings. ``pieces`` are the
    texts before ``cursor``: the final event repeats the whole text.
    """

    wire: Wire = "tgi"

    def __init__(
        self,
        subject: Subject,
        tokenizer: Tokenizer,
        cursor: Cursor | None = None,
        pieces: list[bytes] | None = None,
    ) -> None:
        super().__init__(subject, cursor)
        self._tokenizer = tokenizer
        self._pieces = list(pieces or [])
        self._last_event: bytes | None = None

    def tokens(self, batch: Batch) -> list[bytes]:
        self._pieces += batch.pieces
        events = [
            self._event(position, token, piece, logprob)
            for position, (token, piece, logprob) in enumerate(
                zip(batch.tokens, batch.pieces, batch.logprobs, strict=True), batch.start + 1
            )
        ]
        if events and batch.finish is not None and not _is_failed(batch.finish):
            self._last_event = events.pop()
        return [
            b'id: %d-%08x\ndata: %b,"generated_text":null,"details":null}\n\n'
            % (position, chain, event)
            for position, (chain, event) in enumerate(
                zip(batch.chains, events, strict=False), batch.start + 1
            )
        ]

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        if _is_failed(finish):
            return self._final(FINISH, self._broken(finish))
        event = self._last_event or self._event_without_token()
        return self._final(FINISH, event + self._summary(finish, timing))

    def _event(self, index: int, token: int, piece: bytes, logprob: float | None) -> bytes:
        is_special = token in self._tokenizer.special_ids
        return b'{"index":%d,"token":{"id":%d,"text":"%b","logprob":%b,"special":%b}' % (
            index,
            token,
            _json(self._tokenizer.token_text(token))[1:-1] if is_special else piece,
            _number(logprob),
            b"true" if is_special else b"false",
        )

    def _event_without_token(self) -> bytes:
        """The end came alone: cancelled, or behind a cursor at the last token.

        Every event of this format needs a token: an empty special one, which clients do not show.
        """
        return b'{"index":%d,"token":{"id":0,"text":"","logprob":0.0,"special":true}' % (
            self._num_tokens + 1
        )

    def _summary(self, finish: Finish, timing: Timing | None) -> bytes:
        text = b"".join(self._pieces)
        if self.subject.has(FULL_TEXT):
            text = _json(self.subject.prompt_text)[1:-1] + text
        details = b"null"
        if self.subject.has(DETAILS):
            shown = self.subject.presentation
            details = _json(
                {
                    "finish_reason": finish.reason,
                    "generated_tokens": self._num_tokens,
                    "seed": shown.seed,
                    "input_length": shown.prompt_tokens,
                }
            )
        told = _json(timings(finish, timing, self._num_tokens))
        return b',"generated_text":"%b","details":%b,"headrace":%b}' % (text, details, told)


class _ChunkFrames(Frames):
    """``/v1``: a chunk per token, one with the finish reason, maybe one with usage, ``[DONE]``."""

    wire: Wire = "openai"
    object: str
    first_open: bytes
    """What opens the text of the first token's choice, and, below, of the others'."""
    open: bytes
    close: bytes
    empty: bytes
    """A choice that adds no text."""

    def __init__(self, subject: Subject, cursor: Cursor | None = None) -> None:
        super().__init__(subject, cursor)
        head: dict[str, Any] = {
            "id": response_id(subject),
            "object": self.object,
            "created": subject.presentation.created,
            "model": subject.model,
            "system_fingerprint": subject.model_version or None,
        }
        if subject.has(SHOW_TIER):
            head["service_tier"] = subject.lane
        self._head = _json(head)[:-1]
        self._choice = self._head + b',"choices":[{"index":0,'
        self._usage = b',"usage":null' if subject.has(INCLUDE_USAGE) else b""
        self._before = self._choice + self.open
        self._behind = self.close + b',"logprobs":null,"finish_reason":null}]%b}\n\n' % self._usage

    def tokens(self, batch: Batch) -> list[bytes]:
        before, behind = self._before, self._behind
        frames = [
            b"id: %d-%08x\ndata: %b%b%b" % (position, chain, before, piece, behind)
            for position, (piece, chain) in enumerate(
                zip(batch.pieces, batch.chains, strict=True), batch.start + 1
            )
        ]
        if batch.start == 0 and frames:
            frames[0] = frames[0].replace(before, self._choice + self.first_open, 1)
        return frames

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        if _is_failed(finish):
            return [*self._final(FINISH, self._broken(finish)), *self._final(DONE, b"[DONE]")]
        nothing = self.empty if self._num_tokens else self.first_open + self.close
        reason = _json(openai_reason(finish))
        told = _json(timings(finish, timing, self._num_tokens))
        last = b'%b%b,"logprobs":null,"finish_reason":%b}]%b,"headrace":%b}' % (
            self._choice, nothing, reason, self._usage, told,
        )  # fmt: skip
        frames = self._final(FINISH, last)
        if self.subject.has(INCLUDE_USAGE):
            counts = _json(usage(self.subject, self._num_tokens))
            frames += self._final(USAGE, b'%b,"choices":[],"usage":%b}' % (self._head, counts))
        return frames + self._final(DONE, b"[DONE]")

    def failure(self, failure: Failure) -> bytes:
        return super().failure(failure) + b"data: [DONE]\n\n"


class ChatFrames(_ChunkFrames):
    object = "chat.completion.chunk"
    first_open = b'"delta":{"role":"assistant","content":"'
    open = b'"delta":{"content":"'
    close = b'"}'
    empty = b'"delta":{}'


class CompletionFrames(_ChunkFrames):
    object = "text_completion"
    first_open = open = b'"text":"'
    close = b'"'
    empty = b'"text":""'


def frames_for(
    subject: Subject,
    tokenizer: Tokenizer,
    cursor: Cursor | None = None,
    pieces: list[bytes] | None = None,
) -> Frames:
    """The frames of the API that the request came through."""
    match subject.presentation.api:
        case "chat":
            return ChatFrames(subject, cursor)
        case "completion":
            return CompletionFrames(subject, cursor)
        case _:
            return TgiFrames(subject, tokenizer, cursor, pieces)


def last_stage(presentation: Presentation) -> int:
    """The stage behind which a stream of this API has nothing more."""
    return FINISH if presentation.api == "tgi" else DONE


def response_id(subject: Subject) -> str:
    prefix = "chatcmpl-" if subject.presentation.api == "chat" else "cmpl-"
    return prefix + subject.request_id


def openai_reason(finish: Finish) -> str:
    """``stop`` or ``length``: clients with strict types know no other."""
    return "length" if finish.reason == FinishReason.LENGTH else "stop"


def usage(subject: Subject, num_tokens: int) -> dict[str, Any]:
    prompt = subject.presentation.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_tokens,
        "total_tokens": prompt + num_tokens,
    }


def timings(finish: Finish, timing: Timing | None, num_tokens: int) -> dict[str, Any]:
    """The object ``headrace`` of an answer."""
    told: dict[str, Any] = {"finish_reason": finish.reason}
    if timing is None:
        return told
    return {
        "queue_time": timing.queue_time_s,
        "time_to_first_token": timing.time_to_first_token_s,
        "generation_time": timing.generation_time_s,
        "tokens_per_second": round(timing.tokens_per_second(num_tokens), 3),
        "model_version": timing.model_version,
        "attempts": timing.attempts,
    } | told


def finite(value: float | None) -> float | None:
    """``value`` with the seven digits of a float32; None for what JSON cannot say."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> bytes:
    return b"null" if value is None or not math.isfinite(value) else b"%.7g" % value


def _is_failed(finish: Finish) -> bool:
    return finish.reason == FinishReason.FAILED


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
