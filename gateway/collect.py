"""Whole answers: a generation read to its end, and the JSON body that each API makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.failures import KINDS, Failure
from common.messages import Finish, FinishReason, Timing, unescape_pieces
from common.models.tokenizer import Tokenizer
from gateway.frames import Subject, finite, openai_reason, response_id, timings, usage
from gateway.order import AS_LIST, DETAILS, FULL_TEXT, SHOW_TIER
from gateway.stream import Batch, Stream


@dataclass(slots=True)
class Completion:
    """A finished generation, whole."""

    finish: Finish
    timing: Timing | None
    tokens: list[int] = field(default_factory=list[int])
    pieces: list[bytes] = field(default_factory=list[bytes])
    logprobs: list[float | None] = field(default_factory=list[float | None])

    @property
    def text(self) -> str:
        return unescape_pieces(self.pieces)


async def collect(stream: Stream, on_batch: Callable[[Batch], None]) -> Completion:
    """Read a stream to its end, telling ``on_batch`` what arrives.

    Raises: Failure, what the generation failed with; ReaderGone when the client left.
    """
    whole = Completion(Finish(""), None)
    while not whole.finish.reason:
        batch = await stream.next()
        if batch is None:
            continue  # a keep-alive is due, and a whole answer has none
        on_batch(batch)
        whole.tokens += batch.tokens
        whole.pieces += batch.pieces
        whole.logprobs += batch.logprobs
        if batch.finish is not None:
            whole.finish, whole.timing = batch.finish, batch.timing
    if whole.finish.reason == FinishReason.FAILED:
        raise failure_of(whole.finish)
    return whole


def failure_of(finish: Finish) -> Failure:
    """What a failed generation raises where no byte was sent yet."""
    code = finish.code if finish.code in KINDS else "INTERNAL"
    return Failure(code, finish.message or None)


def body_of(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> Any:
    """The JSON of a whole answer in the format of its API."""
    match subject.presentation.api:
        case "chat":
            return _chunk_body(subject, whole, "chat.completion", _message(whole.text))
        case "completion":
            return _chunk_body(subject, whole, "text_completion", {"text": whole.text})
        case _:
            body = _tgi_body(subject, whole, tokenizer)
            return [body] if subject.has(AS_LIST) else body


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _chunk_body(
    subject: Subject, whole: Completion, kind: str, said: dict[str, Any]
) -> dict[str, Any]:
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": openai_reason(whole.finish)}
    version = whole.timing.model_version if whole.timing else subject.model_version
    body: dict[str, Any] = {
        "id": response_id(subject),
        "object": kind,
        "created": subject.presentation.created,
        "model": subject.model,
        "system_fingerprint": version or None,
        "choices": [choice],
        "usage": usage(subject, len(whole.tokens)),
        "headrace": timings(whole.finish, whole.timing, len(whole.tokens)),
    }
    if subject.has(SHOW_TIER):
        body["service_tier"] = subject.lane
    return body


def _tgi_body(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt = subject.prompt_text if subject.has(FULL_TEXT) else ""
    body: dict[str, Any] = {"generated_text": prompt + whole.text}
    if subject.has(DETAILS):
        body["details"] = {
            "finish_reason": whole.finish.reason,
            "generated_tokens": len(whole.tokens),
            "seed": subject.presentation.seed,
            "prefill": [],
            "tokens": _tokens(whole, tokenizer),
        }
    body["headrace"] = timings(whole.finish, whole.timing, len(whole.tokens))
    return body


def _tokens(whole: Completion, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": tokenizer.token_text(token) if special else unescape_pieces([piece]),
            "logprob": finite(logprob),
            "special": special,
        }
        for token, piece, logprob, special in (
            (token, piece, logprob, token in tokenizer.special_ids)
            for token, piece, logprob in zip(
                whole.tokens, whole.pieces, whole.logprobs, strict=True
            )
        )
    ]
