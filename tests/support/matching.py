"""Matchers of the product over the tiny model's tokens, and answers walked through them."""

import json
import random
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.messages import Grammar
from common.models.tokenizer import Tokenizer
from tests.support.tiny_model import EOS_TOKEN_IDS, build_tokenizer
from workers.engine.grammar import Matcher
from workers.grammar_trial import translate
from workers.guided import Vocabulary

CLOSERS = '"}],:0e.lsua'
"""What brings a JSON text to its end soon, the best first; otherwise the first allowed token."""


@lru_cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(), {})


@lru_cache
def tiny_vocabulary() -> Vocabulary:
    tokenizer = tiny_tokenizer()
    return Vocabulary(tokenizer, tokenizer.vocab_size, list(EOS_TOKEN_IDS))


def schema_of(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def matcher_of(grammar: Grammar, vocabulary: Vocabulary | None = None) -> Matcher:
    return (vocabulary or tiny_vocabulary()).matcher(translate(grammar))


def ids_in(mask: NDArray[np.int32]) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(matcher: Matcher, rng: random.Random, *, free: int = 40) -> list[int]:
    """An answer of tokens drawn from those allowed; after ``free`` it makes for the end."""
    closers = [tiny_tokenizer().encode(sign)[0] for sign in CLOSERS]
    taken: list[int] = []
    while True:
        allowed = ids_in(matcher.mask())
        ends = [token for token in allowed if token in EOS_TOKEN_IDS]
        if len(taken) < free:
            token = rng.choice(allowed)
        else:
            token = next((it for it in (*ends, *closers) if it in allowed), allowed[0])
        if token in EOS_TOKEN_IDS:
            return taken
        matcher.accept(token)
        taken.append(token)
        assert len(taken) < 2000, "it makes for no end"


def text_of(tokens: list[int]) -> str:
    return tiny_tokenizer().decode(tokens)
