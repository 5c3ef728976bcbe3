"""What is wrong with an answer that came to its end: seen in its tokens, never acted upon.

Looked for once, when a generation ends, in some microseconds. An answer that was cut off, or was
forced to go on, is not blamed for that; nor is one that repeats what it was asked to.
"""

import re
from collections.abc import Sequence

from common.messages import FinishReason, Sampling
from workers.engine.detokenizer import TextDecoder

FLAWS = ("invalid_utf8", "repetition", "grammar")
"""Bytes that are no characters; a short cycle without end; an end that its grammar forbids."""

_MAX_CYCLE = 32
"""Tokens: a long sentence."""
_MIN_CYCLES = 4
"""A refrain comes back less often in a row."""
_MIN_LOOP_TOKENS = 64


def has_invalid_bytes(content: bytes, *, is_cut: bool) -> bool:
    """Whether ``content`` is no UTF-8; the end of one that ``is_cut`` may lack its last bytes."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        is_tail = error.reason == "unexpected end of data"
        return not (is_cut and is_tail)
    return False


def find_cycle(tokens: Sequence[int]) -> Sequence[int]:
    """The shortest run of tokens that ``tokens`` end in over and over; empty: there is none."""
    for period in range(1, _MAX_CYCLE + 1):
        needed = max(_MIN_LOOP_TOKENS, _MIN_CYCLES * period)
        if needed > len(tokens):
            break
        last = len(tokens)
        if all(
            tokens[i] == tokens[i - period] for i in range(last - 1, last - needed + period, -1)
        ):
            return tokens[last - period :]
    return ()


def is_endless(
    prompt: Sequence[int],
    answer: Sequence[int],
    reason: FinishReason,
    sampling: Sampling,
    tokenizer: TextDecoder,
) -> bool:
    """Whether ``answer`` went round in a circle until it was cut off, unless somebody wished so."""
    grammar = sampling.grammar
    is_forced = sampling.ignore_eos or sampling.logit_bias
    if reason != FinishReason.LENGTH or is_forced or (grammar and grammar.kind != "json_schema"):
        return False
    cycle = list(find_cycle(answer[sampling.min_new_tokens :]))
    return bool(cycle) and not _is_asked_for(cycle, prompt, tokenizer)


def _is_asked_for(cycle: list[int], prompt: Sequence[int], tokenizer: TextDecoder) -> bool:
    """Whether the prompt has the cycle's words next to one another, wherever the cycle begins."""
    twice, thrice = (tokenizer.decode(cycle * times).split() for times in (2, 3))
    num_words = len(thrice) - len(twice)
    # A cycle may begin within a word; whole ones stand behind the first.
    words = thrice[1 : 1 + num_words] if num_words else tokenizer.decode(cycle).split()
    said = tokenizer.decode(prompt).casefold()
    for start in range(len(words)):
        phrase = r"\s+".join(re.escape(word.casefold()) for word in words[start:] + words[:start])
        if re.search(rf"(?<!\w){phrase}(?!\w)", said):
            return True
    return False
