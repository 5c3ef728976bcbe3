"""Whole answers: generations read to their end, and the JSON body that each API makes of them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.failures import KINDS, Failure
from common.messages import (
    Finish,
    FinishReason,
    PromptLogprobs,
    Timing,
    TopTokens,
    seed_of_choice,
    unescape_pieces,
)
from common.models.tokenizer import Tokenizer
from gateway.frames import Subject, openai_reason, response_id, timings, tool_call, usage
from gateway.logprobs import (
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    finite,
    offsets_of,
    prefill,
    top_tokens,
)
from gateway.order import (
    AS_LIST,
    AS_PREDICTIONS,
    DETAILS,
    ECHO,
    FULL_TEXT,
    LOGPROBS,
    PREFILL,
    SHOW_TIER,
    TOOLS,
)
from gateway.stream import Batch, Stream
from gateway.tool_calls import read_answer


@dataclass(slots=True)
class Completion:
    """A finished generation, whole."""

    choice: int
    finish: Finish
    timing: Timing | None
    tokens: list[int] = field(default_factory=list[int])
    pieces: list[bytes] = field(default_factory=list[bytes])
    logprobs: list[float | None] = field(default_factory=list[float | None])
    tops: list[TopTokens] = field(default_factory=list[TopTokens])
    prompt: PromptLogprobs | None = None

    @property
    def text(self) -> str:
        return unescape_pieces(self.pieces)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens: by this TGI and OpenAI choose the best of several answers."""
        return sum(logprob or 0.0 for logprob in self.logprobs) / max(1, len(self.logprobs))


@dataclass(frozen=True, slots=True)
class Reply:
    """All that was made for one prompt: the ``choices`` to be shown, and the tokens of them all."""

    subject: Subject
    choices: list[Completion]
    num_tokens: int


def reply_of(subject: Subject, choices: list[Completion], num_best: int = 0) -> Reply:
    """``num_best``: show only so many, the likeliest first; 0: all of them, in order."""
    num_tokens = sum(len(choice.tokens) for choice in choices)
    if num_best:
        choices = sorted(choices, key=lambda choice: -choice.mean_logprob)[:num_best]
    return Reply(subject, choices, num_tokens)


async def collect_all(
    streams: Sequence[Stream], on_batch: Callable[[Batch], None]
) -> list[Completion]:
    """Read ``streams`` to their ends, all at once; the first one that fails ends the rest.

    Raises: as :func:`collect`.
    """
    reading = [asyncio.create_task(collect(stream, on_batch)) for stream in streams]
    try:
        return await asyncio.gather(*reading)
    finally:
        for task in reading:
            task.cancel()


async def collect(stream: Stream, on_batch: Callable[[Batch], None]) -> Completion:
    """Read a stream to its end, telling ``on_batch`` what arrives.

    Raises: Failure, what the generation failed with; ReaderGone when the client left.
    """
    whole = Completion(stream.choice, Finish(""), None)
    while not whole.finish.reason:
        batch = await stream.next()
        if batch is None:
            continue  # a keep-alive is due, and a whole answer has none
        on_batch(batch)
        whole.tokens += batch.tokens
        whole.pieces += batch.pieces
        whole.logprobs += batch.logprobs
        whole.tops += batch.tops
        whole.prompt = batch.prompt or whole.prompt
        if batch.finish is not None:
            whole.finish, whole.timing = batch.finish, batch.timing
    if whole.finish.reason == FinishReason.FAILED:
        raise failure_of(whole.finish)
    return whole


def failure_of(finish: Finish) -> Failure:
    """What a failed generation raises where no byte was sent yet."""
    code = finish.code if finish.code in KINDS else "INTERNAL"
    return Failure(code, finish.message or None)


def body_of(replies: Sequence[Reply], tokenizer: Tokenizer) -> Any:
    """The JSON of a whole answer in the format of its API; one reply for each prompt."""
    subject = replies[0].subject
    if subject.has(AS_PREDICTIONS):
        return {"predictions": [_tgi_text(reply.subject, reply.choices[0]) for reply in replies]}
    match subject.presentation.api:
        case "chat":
            return _chunk_body(replies, tokenizer, "chat.completion", _chat_choice)
        case "completion":
            return _chunk_body(replies, tokenizer, "text_completion", _completion_choice)
        case _:
            body = _tgi_body(replies[0], tokenizer)
            return [body] if subject.has(AS_LIST) else body


# OpenAI ------------------------------------------------------------------------------------------


def _chunk_body(
    replies: Sequence[Reply],
    tokenizer: Tokenizer,
    kind: str,
    say: Callable[[Subject, Completion, Tokenizer], dict[str, Any]],
) -> dict[str, Any]:
    """Choices are numbered through all prompts. Each tells its timings, if there are several."""
    subject, first = replies[0].subject, replies[0].choices[0]
    pairs = [(reply.subject, choice) for reply in replies for choice in reply.choices]
    choices = [
        {"index": index}
        | {"finish_reason": openai_reason(choice.finish)}
        | say(of, choice, tokenizer)
        for index, (of, choice) in enumerate(pairs)
    ]
    body: dict[str, Any] = {
        "id": response_id(subject),
        "object": kind,
        "created": subject.presentation.created,
        "model": subject.model,
        "system_fingerprint": _version(subject, first) or None,
        "choices": choices,
        "usage": _total_usage(replies),
    }
    told = [timings(it.finish, it.timing, len(it.tokens)) for _, it in pairs]
    if len(pairs) == 1:
        body["headrace"] = told[0]
    else:
        for choice, times in zip(choices, told, strict=True):
            choice["headrace"] = times
    if subject.has(SHOW_TIER):
        body["service_tier"] = subject.lane
    return body


def _chat_choice(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    told = None
    if subject.has(LOGPROBS):
        told = chat_logprobs(tokenizer, whole.tokens, whole.logprobs, whole.tops)
    if not subject.has(TOOLS):
        return {"message": {"role": "assistant", "content": whole.text}, "logprobs": told}
    text, calls = read_answer(whole.text)
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = [
            tool_call(subject, whole.choice, index, call.name, call.arguments)
            for index, call in enumerate(calls)
        ]
    reason = openai_reason(whole.finish, has_called=bool(calls))
    return {"message": message, "logprobs": told, "finish_reason": reason}


def _completion_choice(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt = subject.prompt_text if subject.has(ECHO) else ""
    told: dict[str, list[Any]] | None = None
    if subject.has(LOGPROBS):
        offsets = offsets_of(whole.pieces, len(prompt))[:-1]
        told = completion_logprobs(tokenizer, whole.tokens, whole.logprobs, whole.tops, offsets)
        if subject.has(ECHO):
            before = echoed_logprobs(tokenizer, subject.prompt, whole.prompt)
            told = {name: before[name] + told[name] for name in told}
    return {"text": prompt + whole.text, "logprobs": told}


def _version(subject: Subject, whole: Completion) -> str:
    return whole.timing.model_version if whole.timing else subject.model_version


def _total_usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Every prompt once, and the tokens of all choices, of those too that were not the best."""
    prompts = sum(reply.subject.presentation.prompt_tokens for reply in replies)
    num_tokens = sum(reply.num_tokens for reply in replies)
    return usage(prompts, num_tokens, sum(map(_num_cached, replies)))


def _num_cached(reply: Reply) -> int:
    """Of several choices, the first one computes what the others find: it is what counts."""
    return min(choice.finish.cached_tokens for choice in reply.choices)


# TGI ---------------------------------------------------------------------------------------------


def _tgi_body(reply: Reply, tokenizer: Tokenizer) -> dict[str, Any]:
    """The best choice; the others stand in its details."""
    subject, (whole, *others) = reply.subject, reply.choices
    body: dict[str, Any] = {"generated_text": _tgi_text(subject, whole)}
    if subject.has(DETAILS):
        body["details"] = _details(subject, whole, tokenizer)
        if others:
            body["details"]["best_of_sequences"] = [
                {"generated_text": _tgi_text(subject, other)} | _details(subject, other, tokenizer)
                for other in others
            ]
    body["headrace"] = timings(whole.finish, whole.timing, len(whole.tokens))
    return body


def _tgi_text(subject: Subject, whole: Completion) -> str:
    return (subject.prompt_text if subject.has(FULL_TEXT) else "") + whole.text


def _details(subject: Subject, whole: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    seed = subject.presentation.seed
    details: dict[str, Any] = {
        "finish_reason": whole.finish.reason,
        "generated_tokens": len(whole.tokens),
        "seed": seed if seed is None else seed_of_choice(seed, whole.choice),
        "prefill": prefill(tokenizer, subject.prompt, whole.prompt) if subject.has(PREFILL) else [],
        "tokens": _tokens(whole, tokenizer),
    }
    if whole.tops:
        details["top_tokens"] = [top_tokens(tokenizer, tops) for tops in whole.tops]
    return details


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
