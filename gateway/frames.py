"""Frames: from batches of tokens to the bytes of an SSE stream, in the format of each API.

A token's text arrives as the inside of an ASCII-escaped JSON string, so a frame is made by joining
bytes around it; no payload is parsed or encoded again, but for the log-probabilities of those who
ask for them. Every frame has an ``id:``, the cursor behind it. A stream that is resumed elsewhere
lacks only what :class:`Presentation` does not hold, the prompt's text.

Several choices of one request are frames of their own, joined by :class:`Interleaved`.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from common.broker import Presentation
from common.failures import KINDS, Failure
from common.messages import Finish, FinishReason, Timing, unescape_pieces
from common.models.tokenizer import Tokenizer
from gateway.cursor import DONE, FINISH, SEPARATOR, USAGE, Cursor
from gateway.errors import Wire, envelope
from gateway.logprobs import (
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    offsets_of,
    top_tokens,
)
from gateway.order import (
    DETAILS,
    FULL_TEXT,
    INCLUDE_USAGE,
    LOGPROBS,
    SHOW_TIER,
    TOOLS,
    ResponseDocument,
)
from gateway.stream import Batch, Place
from gateway.tool_calls import Arguments, CallBegins, CallEnds, CallReader, Part, Text

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

    prompt: list[int] = field(default_factory=list[int])
    """Only at hand where the request came in, as the text is."""
    document: ResponseDocument | None = None
    """Of a response."""

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
        self._id_open = b"id: "
        self._id_close = b"\ndata: "

    @property
    def cursor(self) -> Cursor:
        """Behind all that was rendered."""
        return Cursor(self._num_tokens, self._chain, self._stage)

    def opening(self) -> bytes:
        """The frames that need no token, ahead of all others."""
        return b""

    def stand_at(self, stage: int) -> None:
        """Move the cursor behind a final frame that others rendered."""
        self._stage = max(self._stage, stage)

    def render(self, batch: Batch) -> bytes:
        """The frames of a batch. After the one that brings the finish, ``is_complete`` is set."""
        frames = self.tokens(batch)
        self._num_tokens = batch.start + len(batch.tokens)
        if batch.chains:
            self._chain = batch.chains[-1]
        if batch.finish is not None:
            frames += self.end(batch.finish, batch.timing)
            self.is_complete = True
        return frames[0] if len(frames) == 1 else b"".join(frames)

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
        self._stage = stage
        return [self._id_open + str(self.cursor).encode() + self._id_close + data + b"\n\n"]

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
        if batch.tops:
            told = (top_tokens(self._tokenizer, tops) for tops in batch.tops)
            events = [
                event + b',"top_tokens":' + _json(tops)
                for event, tops in zip(events, told, strict=True)
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
    """``/v1``: a chunk per token, one with the finish reason, maybe one with usage, ``[DONE]``.

    ``index`` is the choice. One of several, ``is_alone`` False, leaves the last two to them all.
    """

    wire: Wire = "openai"
    object: str
    first_open: bytes
    """What opens the text of the first token's choice, and, below, of the others'."""
    open: bytes
    close: bytes
    empty: bytes
    """A choice that adds no text."""

    def __init__(
        self,
        subject: Subject,
        tokenizer: Tokenizer,
        cursor: Cursor | None = None,
        *,
        index: int = 0,
        is_alone: bool = True,
    ) -> None:
        super().__init__(subject, cursor)
        self._tokenizer = tokenizer
        self._is_alone = is_alone
        self._num_cached = 0
        self._tells_logprobs = subject.has(LOGPROBS)
        self._head = _head(subject, self.object)
        self._choice = self._head + b',"choices":[{"index":%d,' % index
        self._usage = b',"usage":null' if subject.has(INCLUDE_USAGE) else b""
        self._before = self._id_close + self._choice + self.open
        self._end = b',"finish_reason":null}]%b}\n\n' % self._usage
        self._behind = self.close + b',"logprobs":null' + self._end

    def stand_between(self, before: str, behind: str) -> None:
        """Write each id between the cursors of other choices."""
        self._id_open = b"id: " + before.encode()
        self._id_close = behind.encode() + b"\ndata: "
        self._before = self._id_close + self._choice + self.open

    def tokens(self, batch: Batch) -> list[bytes]:
        if self._tells_logprobs:
            frames = self._tokens_with_logprobs(batch)
        else:
            opened, before, behind = self._id_open, self._before, self._behind
            frames: list[bytes] = []
            position = batch.start
            for piece, chain in zip(batch.pieces, batch.chains, strict=True):
                position += 1
                frames.append(b"%b%d-%08x%b%b%b" % (opened, position, chain, before, piece, behind))
        return frames if batch.start else self._opened(batch, frames)

    def _tokens_with_logprobs(self, batch: Batch) -> list[bytes]:
        return [
            b'%b%d-%08x%b%b%b,"logprobs":%b%b'
            % (
                self._id_open, position, chain, self._before, piece, self.close, _json(told),
                self._end,
            )
            for position, (piece, chain, told) in enumerate(
                zip(batch.pieces, batch.chains, self.logprobs(batch), strict=True), batch.start + 1
            )
        ]  # fmt: skip

    def _opened(self, batch: Batch, frames: list[bytes]) -> list[bytes]:  # noqa: ARG002 - see echo
        """The first frames of an answer."""
        if frames:
            first = self._id_close + self._choice + self.first_open
            frames[0] = frames[0].replace(self._before, first, 1)
        return frames

    @abstractmethod
    def logprobs(self, batch: Batch) -> list[dict[str, Any]]:
        """``logprobs`` of each token's choice."""

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        self._num_cached = finish.cached_tokens
        if _is_failed(finish):
            frames = self._final(FINISH, self._broken(finish))
            return [*frames, *self._final(DONE, b"[DONE]")] if self._is_alone else frames
        nothing = self.empty if self._num_tokens else self.first_open + self.close
        reason = _json(self.reason(finish))
        told = _json(timings(finish, timing, self._num_tokens))
        last = b'%b%b,"logprobs":null,"finish_reason":%b}]%b,"headrace":%b}' % (
            self._choice, nothing, reason, self._usage, told,
        )  # fmt: skip
        frames = self._final(FINISH, last)
        if self._is_alone:
            for stage, data in self.closing(self._num_tokens):
                frames += self._final(stage, data)
        return frames

    def reason(self, finish: Finish) -> str:
        return openai_reason(finish)

    def closing(self, num_tokens: int) -> list[tuple[int, bytes]]:
        """Stages and data of what stands behind the last choice.

        ``num_tokens`` are those of all choices together.
        """
        done = (DONE, b"[DONE]")
        if not self.subject.has(INCLUDE_USAGE):
            return [done]
        prompt_tokens = self.subject.presentation.prompt_tokens
        counts = _json(usage(prompt_tokens, num_tokens, self._num_cached))
        return [(USAGE, b'%b,"choices":[],"usage":%b}' % (self._head, counts)), done]

    def failure(self, failure: Failure) -> bytes:
        return super().failure(failure) + b"data: [DONE]\n\n"


class ChatFrames(_ChunkFrames):
    """``pieces`` are the texts before ``cursor``: where tools may be called, what a token means
    hangs on those before it.
    """

    object = "chat.completion.chunk"
    first_open = b'"delta":{"role":"assistant","content":"'
    open = b'"delta":{"content":"'
    close = b'"}'
    empty = b'"delta":{}'

    def __init__(
        self,
        subject: Subject,
        tokenizer: Tokenizer,
        cursor: Cursor | None = None,
        pieces: list[bytes] | None = None,
        *,
        index: int = 0,
        is_alone: bool = True,
    ) -> None:
        super().__init__(subject, tokenizer, cursor, index=index, is_alone=is_alone)
        self._index = index
        self._calls = CallReader() if subject.has(TOOLS) else None
        if self._calls is not None:
            self._calls.feed(unescape_pieces(pieces or []))

    def tokens(self, batch: Batch) -> list[bytes]:
        if self._calls is None:
            return super().tokens(batch)
        told = self.logprobs(batch) if self._tells_logprobs else [None] * len(batch.tokens)
        return [
            b'%b%d-%08x%b%b"delta":%b,"logprobs":%b%b'
            % (
                self._id_open, position, chain, self._id_close, self._choice,
                _json(self._delta(position, self._calls.feed(unescape_pieces([piece])))),
                _json(said), self._end,
            )
            for position, (piece, chain, said) in enumerate(
                zip(batch.pieces, batch.chains, told, strict=True), batch.start + 1
            )
        ]  # fmt: skip

    def _delta(self, position: int, parts: Sequence[Part]) -> dict[str, Any]:
        """What the token before ``position`` adds; the first one says whose words these are."""
        delta: dict[str, Any] = {}
        for part in parts:
            match part:
                case Text(text):
                    delta["content"] = delta.get("content", "") + text
                case CallBegins(index, name):
                    delta.setdefault("tool_calls", []).append(
                        {"index": index} | self.call(index, name, "")
                    )
                case Arguments(index, text):
                    _add_arguments(delta.setdefault("tool_calls", []), index, text)
                case CallEnds():
                    pass
        return delta if position > 1 else {"role": "assistant", "content": None} | delta

    def call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        return tool_call(self.subject, self._index, index, name, arguments)

    def end(self, finish: Finish, timing: Timing | None) -> list[bytes]:
        if self._calls is not None:
            delta = self._delta(max(2, self._num_tokens), self._calls.close())
            self.empty = b'"delta":' + _json(delta)
        return super().end(finish, timing)

    def reason(self, finish: Finish) -> str:
        has_called = self._calls is not None and self._calls.num_calls > 0
        return openai_reason(finish, has_called=has_called)

    def logprobs(self, batch: Batch) -> list[dict[str, Any]]:
        told = chat_logprobs(self._tokenizer, batch.tokens, batch.logprobs, batch.tops)
        return [told | {"content": [entry]} for entry in told["content"]]


class CompletionFrames(_ChunkFrames):
    """``pieces`` are the texts before ``cursor``: log-probabilities come with a place in the text.

    A prompt that is repeated stands in a chunk of its own ahead of the first token's. It has no
    ``id:``, because no stream that is resumed can bring it again.
    """

    object = "text_completion"
    first_open = open = b'"text":"'
    close = b'"'
    empty = b'"text":""'

    def __init__(
        self,
        subject: Subject,
        tokenizer: Tokenizer,
        cursor: Cursor | None = None,
        pieces: list[bytes] | None = None,
        **place: Any,
    ) -> None:
        super().__init__(subject, tokenizer, cursor, **place)
        self._offset = subject.presentation.prompt_characters + len(unescape_pieces(pieces or []))

    def _opened(self, batch: Batch, frames: list[bytes]) -> list[bytes]:
        is_echoed = frames and self.subject.prompt_text
        return [*([self._echo(batch)] if is_echoed else []), *super()._opened(batch, frames)]

    def logprobs(self, batch: Batch) -> list[dict[str, Any]]:
        offsets = offsets_of(batch.pieces, self._offset)
        self._offset = offsets.pop()
        told = completion_logprobs(
            self._tokenizer, batch.tokens, batch.logprobs, batch.tops, offsets
        )
        return [{name: [told[name][i]] for name in told} for i in range(len(offsets))]

    def _echo(self, batch: Batch) -> bytes:
        told = None
        if self._tells_logprobs:
            told = echoed_logprobs(self._tokenizer, self.subject.prompt, batch.prompt)
        text = _json(self.subject.prompt_text)[1:-1]
        return b'data: %b%b%b%b,"logprobs":%b%b' % (
            self._choice, self.open, text, self.close, _json(told), self._end,
        )  # fmt: skip


class Interleaved:
    """Frames of several choices in one stream: each ``id:`` holds the cursors of them all.

    The last choice to end is followed by what ends the stream. One that fails ends it at once, as
    clients take the error for the end; behind its ``id:`` the others can still be read.
    """

    def __init__(self, choices: Sequence[ChatFrames | CompletionFrames]) -> None:
        self.is_complete = False
        self._choices = choices
        self._is_ended = [False] * len(choices)

    def opening(self) -> bytes:
        return b""

    def render(self, batch: Batch) -> bytes:
        """The frames of a batch of ``batch.choice``."""
        chosen = self._choices[batch.choice]
        cursors = [str(choice.cursor) for choice in self._choices]
        before, behind = cursors[: batch.choice], cursors[batch.choice + 1 :]
        chosen.stand_between(
            "".join(cursor + SEPARATOR for cursor in before),
            "".join(SEPARATOR + cursor for cursor in behind),
        )
        had_ended = chosen.cursor.stage >= FINISH
        frames = chosen.render(batch)
        self._is_ended[batch.choice] = chosen.is_complete
        if batch.finish is not None and _is_failed(batch.finish) and not had_ended:
            self.is_complete = True
            return frames + b"data: [DONE]\n\n"
        if all(self._is_ended):
            self.is_complete = True
            frames += self._closing()
        return frames

    def failure(self, failure: Failure) -> bytes:
        return self._choices[0].failure(failure)

    def _closing(self) -> bytes:
        """These frames are everybody's, so every cursor stands behind them."""
        num_tokens = sum(choice.cursor.position for choice in self._choices)
        frames = b""
        for stage, data in self._choices[0].closing(num_tokens):
            if all(choice.cursor.stage >= stage for choice in self._choices):
                continue
            for choice in self._choices:
                choice.stand_at(stage)
            cursors = SEPARATOR.join(str(choice.cursor) for choice in self._choices)
            frames += b"id: %b\ndata: %b\n\n" % (cursors.encode(), data)
        return frames


def queue_event(place: Place) -> bytes:
    """Where a request stands before its first token, for a client that asked to be told.

    It has no ``id:``, because it is no part of the stream that could be read again::

        event: queue
        data: {"state":"waiting","position":3,"estimated_wait":1.25}

    ``position`` counts what is ahead, ``estimated_wait`` is in seconds, null where nothing is known
    of how fast the queue moves. ``{"state":"running"}`` is the last one.
    """
    told: dict[str, Any] = {"state": "running"}
    if place.is_waiting:
        wait_s = None if place.wait_ms is None else place.wait_ms / 1000
        told = {"state": "waiting", "position": place.ahead, "estimated_wait": wait_s}
    return b"event: queue\ndata: " + _json(told) + b"\n\n"


def frames_for(
    subject: Subject,
    tokenizer: Tokenizer,
    cursors: Sequence[Cursor] = (),
    pieces: Sequence[list[bytes]] = (),
) -> Frames | Interleaved:
    """The frames of the API that the request came through.

    ``cursors`` and ``pieces``, the texts before them, are those of each choice; none: from the
    beginning. ``pieces`` are asked for where :func:`needs_pieces` says so.
    """
    num_choices = subject.presentation.num_choices
    places = list(zip_longest(cursors, pieces)) or [(None, None)] * num_choices
    if subject.presentation.api == "tgi":
        return TgiFrames(subject, tokenizer, *places[0])
    if num_choices == 1:
        return _chunk_frames(subject, tokenizer, *places[0])
    return Interleaved(
        [
            _chunk_frames(subject, tokenizer, *place, index=index, is_alone=False)
            for index, place in enumerate(places)
        ]
    )


def _chunk_frames(
    subject: Subject,
    tokenizer: Tokenizer,
    cursor: Cursor | None,
    pieces: list[bytes] | None,
    **place: Any,
) -> ChatFrames | CompletionFrames:
    if subject.presentation.api == "chat":
        return ChatFrames(subject, tokenizer, cursor, pieces, **place)
    return CompletionFrames(subject, tokenizer, cursor, pieces, **place)


def needs_pieces(presentation: Presentation) -> bool:
    """Whether what stands behind a cursor depends on the text before it."""
    tells_offsets = presentation.api == "completion" and presentation.flags & LOGPROBS
    return presentation.api == "tgi" or bool(tells_offsets or presentation.flags & TOOLS)


def _head(subject: Subject, kind: str) -> bytes:
    """What every chunk of a stream begins with."""
    head: dict[str, Any] = {
        "id": response_id(subject),
        "object": kind,
        "created": subject.presentation.created,
        "model": subject.model,
        "system_fingerprint": subject.model_version or None,
    }
    if subject.has(SHOW_TIER):
        head["service_tier"] = subject.lane
    return _json(head)[:-1]


def last_stage(presentation: Presentation) -> int:
    """The stage behind which a stream of this API has nothing more."""
    return FINISH if presentation.api in ("tgi", "response") else DONE


def response_id(subject: Subject) -> str:
    prefix = "chatcmpl-" if subject.presentation.api == "chat" else "cmpl-"
    return prefix + subject.request_id


def openai_reason(finish: Finish, *, has_called: bool = False) -> str:
    """``stop``, ``length`` or ``tool_calls``: clients with strict types know no other."""
    if finish.reason == FinishReason.LENGTH:
        return "length"
    return "tool_calls" if has_called else "stop"


def tool_call(
    subject: Subject, choice: int, index: int, name: str, arguments: str
) -> dict[str, Any]:
    """The ``index``-th call in an answer; its id is the same wherever it is told again."""
    return {
        "id": call_id(subject, choice, index),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def call_id(subject: Subject, choice: int, index: int) -> str:
    return f"call_{subject.request_id}_{choice}_{index}"


def _add_arguments(calls: list[dict[str, Any]], index: int, text: str) -> None:
    if calls and calls[-1]["index"] == index:
        calls[-1]["function"]["arguments"] += text
    else:
        calls.append({"index": index, "function": {"arguments": text}})


def usage(prompt_tokens: int, num_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """``cached_tokens`` as the worker counted them, who may have taken over part of the answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached_tokens, prompt_tokens)},
        "completion_tokens_details": {"reasoning_tokens": 0},
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


def _number(value: float | None) -> bytes:
    return b"null" if value is None or not math.isfinite(value) else b"%.7g" % value


def _is_failed(finish: Finish) -> bool:
    return finish.reason == FinishReason.FAILED


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
