r"""Tokens and their log-probabilities, as each API tells them.

A token that is no text by itself, a part of a character, is told as U+FFFD by TGI and as
``bytes:\xe2\x80`` by OpenAI. What JSON cannot say, the logarithm of 0, is null for TGI and -9999
for OpenAI, whose clients take nothing but numbers.
"""

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from common.messages import PromptLogprobs, TopTokens, unescape_pieces
from common.models.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0


def finite(value: float | None) -> float | None:
    """``value`` with the seven digits of a float32; None for what JSON cannot say."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


# TGI ---------------------------------------------------------------------------------------------


def top_tokens(tokenizer: Tokenizer, tops: TopTokens) -> list[dict[str, Any]]:
    """The likeliest tokens of one position."""
    return [
        {
            "id": token,
            "text": _text(tokenizer, token),
            "logprob": finite(logprob),
            "special": token in tokenizer.special_ids,
        }
        for token, logprob in tops
    ]


def prefill(
    tokenizer: Tokenizer, prompt: list[int], told: PromptLogprobs | None
) -> list[dict[str, Any]]:
    """The tokens of the prompt."""
    logprobs = told.logprobs if told else [None] * len(prompt)
    return [
        {"id": token, "text": _text(tokenizer, token), "logprob": finite(logprob)}
        for token, logprob in zip(prompt, logprobs, strict=True)
    ]


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


# OpenAI ------------------------------------------------------------------------------------------


def chat_logprobs(
    tokenizer: Tokenizer,
    tokens: list[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopTokens],
) -> dict[str, Any]:
    """``logprobs`` of a chat's choice. ``tops``: one per token, or none at all."""
    content = [
        _named(tokenizer, token, logprob)
        | {"top_logprobs": [_named(tokenizer, *top) for top in best]}
        for token, logprob, best in zip(tokens, logprobs, tops or [[]] * len(tokens), strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: list[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopTokens],
    offsets: list[int],
) -> dict[str, Any]:
    """``logprobs`` of a completion's choice.

    The token itself always stands among the likeliest, so there may be one more than asked for.
    ``offsets`` say where in the text each token begins, in characters.
    """
    names = [_name(tokenizer.token_bytes(token)) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [_number(logprob) for logprob in logprobs],
        "top_logprobs": [
            _by_name(tokenizer, [*best, (token, logprob)])
            for token, logprob, best in zip(
                tokens, logprobs, tops or [[]] * len(tokens), strict=True
            )
        ],
        "text_offset": offsets,
    }


def echoed_logprobs(
    tokenizer: Tokenizer, prompt: list[int], told: PromptLogprobs | None
) -> dict[str, Any]:
    """As :func:`completion_logprobs`, of the prompt; before its first token there is nothing."""
    rest = prompt[1:]
    logprobs = told.logprobs[1:] if told else [None] * len(rest)
    tops = [best or [] for best in told.tops[1:]] if told and told.tops else []
    shown = completion_logprobs(tokenizer, rest, logprobs, tops, [])
    names = [_name(tokenizer.token_bytes(token)) for token in prompt[:1]] + shown["tokens"]
    return {
        "tokens": names,
        "token_logprobs": [None, *shown["token_logprobs"]],
        "top_logprobs": [None, *shown["top_logprobs"]],
        "text_offset": _offsets(tokenizer, prompt),
    }


def offsets_of(pieces: list[bytes], start: int) -> list[int]:
    """Where in the text each of ``pieces`` begins, and where the last one ends."""
    return list(accumulate((len(unescape_pieces([piece])) for piece in pieces), initial=start))


def _offsets(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Where in their text each of ``tokens`` begins; a character counts once it is whole."""
    characters = getincrementaldecoder("utf-8")("replace")
    lengths = (len(characters.decode(tokenizer.token_bytes(token))) for token in tokens[:-1])
    return list(accumulate(lengths, initial=0))


def _by_name(tokenizer: Tokenizer, tops: list[tuple[int, float | None]]) -> dict[str, float]:
    """The likelier one counts where two tokens have one text."""
    shown: dict[str, float] = {}
    for token, logprob in tops:
        shown.setdefault(_name(tokenizer.token_bytes(token)), _number(logprob))
    return shown


def _named(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    return {"token": _name(raw), "logprob": _number(logprob), "bytes": list(raw)}


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float | None) -> float:
    shown = finite(logprob)
    return IMPOSSIBLE if shown is None else shown
