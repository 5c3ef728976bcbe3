"""The simulated engine's runner: scripted text and set latencies, no weights and no torch.

Scheduler, sequences, detokenizer and stop strings are those of the real engine. The next token is a
function of (prompt, seed, position) alone, so any worker continues a generation identically.
"""

import random
import time
import zlib
from array import array
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from common.models.simulated import SCRIPT
from workers.engine.batching import Choice, Outcome
from workers.engine.grammar import GrammarError, Matcher
from workers.engine.scheduler import Chunk
from workers.engine.sequence import Sequence

_MIN_SENTENCES, _MAX_SENTENCES = 4, 40
"""How much a generation says before it ends by itself: about 60 to 600 tokens of a common
vocabulary, or 200 to 2,400 bytes."""


class TextEncoder(Protocol):
    """What scripting needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class SimulatedRunner:
    """Implements :class:`workers.engine.batching.Runner`.

    A step takes ``first_token_s`` if it finishes a prompt, else ``inter_token_s`` if it makes
    tokens at all; as on a real device, a prompt beside others makes them wait.
    """

    def __init__(
        self,
        tokenizer: TextEncoder,
        eos_token_id: int,
        *,
        first_token_s: float,
        inter_token_s: float,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._first_token_s = first_token_s
        self._inter_token_s = inter_token_s
        self._scripts: WeakKeyDictionary[Sequence, list[int]] = WeakKeyDictionary()

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        sampled = [chunk for chunk in chunks if chunk.samples]
        if sampled:
            is_prefill = any(chunk.count > 1 or chunk.start == 0 for chunk in sampled)
            # Zero, too: like a real device's work, it lets the event loop have the interpreter.
            time.sleep(self._first_token_s if is_prefill else self._inter_token_s)
        for chunk in chunks:
            _score_prompt(chunk)
        return [self._choose(chunk.sequence) for chunk in sampled]

    def _choose(self, sequence: Sequence) -> Outcome:
        script = self._scripts.get(sequence)
        if script is None:
            script = self._scripts[sequence] = self._write_script(sequence)
        position = sequence.num_generated
        token = self._eos_token_id if position >= len(script) else script[position]
        if sequence.matcher is not None:
            try:
                token = self._allowed(token, sequence.matcher)
            except GrammarError as error:
                return error
        logprob = -(position * 37 % 100) / 100
        others = range(sequence.sampling.top_logprobs)
        top = [(token + i, logprob - i) for i in others]
        return [Choice(token, logprob, top or None)]

    def _allowed(self, token: int, matcher: Matcher) -> int:
        """``token`` if the grammar allows it, else an end if it allows that, else its first."""
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
        for candidate in (token, self._eos_token_id):
            if bits[candidate]:
                return candidate
        return int(bits.argmax())

    def _write_script(self, sequence: Sequence) -> list[int]:
        """All tokens before the end; the seed counts only where a real engine would use it."""
        prompt = array("I", sequence.tokens[: sequence.num_prompt])
        seed = sequence.sampling.seed if sequence.sampling.do_sample else 0
        draw = random.Random(f"{zlib.crc32(prompt)} {seed}")
        count = draw.randint(_MIN_SENTENCES, _MAX_SENTENCES)
        text = " ".join(draw.choices(SCRIPT, k=count))
        return self._tokenizer.encode(text, add_special_tokens=False)


def _score_prompt(chunk: Chunk) -> None:
    sequence, start = chunk.sequence, chunk.start + 1
    if sequence.prompt_scores is None or not chunk.num_scored:
        return
    positions = range(start, start + chunk.num_scored)
    logprobs = [-(position * 37 % 100) / 100 for position in positions]
    others = range(sequence.sampling.top_logprobs)
    tops = [
        [(sequence.tokens[position] + i, logprob - i) for i in others]
        for position, logprob in zip(positions, logprobs, strict=True)
    ]
    sequence.prompt_scores.fill(start, logprobs, tops if others else None)
