"""One generation inside the engine: its tokens, how far they are computed, and its text state."""

from dataclasses import dataclass

from common.messages import FinishReason, Sampling
from workers.engine.counts import TokenCounts, are_counts_needed
from workers.engine.detokenizer import Detokenizer, TextDecoder
from workers.engine.port import EngineRequest
from workers.engine.stopping import StopMatcher


@dataclass(frozen=True, slots=True)
class TextRules:
    """What turns tokens into text and an end; one per engine."""

    tokenizer: TextDecoder
    eos_token_ids: frozenset[int]


class Sequence:
    """Tokens of prompt and answer, with the invariant ``num_computed <= num_tokens``.

    A step closes the gap between the two, whether it is a prompt, a replayed log or one new token.
    State is a function of the request's
    prompt and the tokens so far, so a handed-over generation continues with the very same pieces.
    """

    def __init__(self, request: EngineRequest, rules: TextRules) -> None:
        self.id = request.id
        self.sampling: Sampling = request.sampling
        self.cost = request.cost
        self.tokens = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.num_cached: int | None = None
        """Prompt tokens that were found computed when it was first admitted; None before that."""
        self.cache_scope = request.cache_scope
        self.adapter = request.adapter
        self.matcher = request.matcher
        self.digests: list[bytes] = []
        """Names of its prefixes, block by block; see :func:`workers.engine.places.digests`."""
        self.served_at = 0
        """When the scheduler last let it compute: a count of such turns."""
        self.finish: FinishReason | None = None
        self.counts: TokenCounts | None = None
        """Of the tokens so far; None when no penalty asks for them."""
        self._eos_token_ids = rules.eos_token_ids
        self._detokenizer = Detokenizer(rules.tokenizer, request.prompt)
        self._stops = StopMatcher(request.sampling.stop, keep=request.sampling.keep_stop)
        if are_counts_needed(request.sampling):
            self.counts = TokenCounts(request.prompt)
        if request.sampling.max_new_tokens <= 0:
            self.finish = FinishReason.LENGTH
        for token in request.logged:
            if self.finish is None:
                self.append(token)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Also the position in the token log of the next token to come."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that have no place in the cache yet."""
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> str:
        """Take the next token; returns its piece of text and sets ``finish`` when it was the last.

        An end-of-sequence token on the last allowed position counts as that, not as ``length``; a
        stop string completed by the last token counts before both. The last piece carries all text
        that was held back.
        """
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.append(token)
        is_eos = token in self._eos_token_ids
        ends = is_eos and not self.sampling.ignore_eos
        is_last = ends or self.num_generated >= self.sampling.max_new_tokens
        text = "" if is_eos else self._detokenizer.push(token)
        if is_last:
            text += self._detokenizer.flush()
        piece = self._stops.push(text)
        if self._stops.matched:
            self.finish = FinishReason.STOP
        elif is_last:
            piece += self._stops.flush()
            self.finish = FinishReason.EOS if ends else FinishReason.LENGTH
        return piece
