"""One generation inside the engine: its tokens, how far they are computed, and its text state."""

from dataclasses import dataclass
from itertools import takewhile

from common.messages import FinishReason, PromptLogprobs, Sampling, TopTokens
from workers.engine.counts import TokenCounts, are_counts_needed
from workers.engine.detokenizer import HALF, Detokenizer, TextDecoder
from workers.engine.flaws import has_invalid_bytes, is_endless
from workers.engine.grammar import GrammarError
from workers.engine.lookup import Lookup
from workers.engine.port import EngineRequest
from workers.engine.stopping import StopMatcher


@dataclass(frozen=True, slots=True)
class TextRules:
    """What turns tokens into text and an end; one per engine."""

    tokenizer: TextDecoder
    eos_token_ids: frozenset[int]


class PromptScores:
    """How likely each token of a prompt was, filled in chunk by chunk, in any order.

    The first token has nothing before it, so nothing is told about it.
    """

    def __init__(self, num_prompt: int, *, has_tops: bool) -> None:
        self._logprobs: list[float | None] = [None] * num_prompt
        self._tops: list[TopTokens | None] | None = None
        if has_tops:
            self._tops = [None for _ in range(num_prompt)]
        self._num_missing = num_prompt - 1

    @property
    def is_complete(self) -> bool:
        return self._num_missing == 0

    def fill(self, start: int, logprobs: list[float], tops: list[TopTokens] | None) -> None:
        """Take those of the tokens from position ``start`` on; known ones may come again."""
        end = start + len(logprobs)
        self._num_missing -= self._logprobs[start:end].count(None)
        self._logprobs[start:end] = logprobs
        if self._tops is not None and tops is not None:
            self._tops[start:end] = tops

    def told(self) -> PromptLogprobs:
        return PromptLogprobs(self._logprobs, self._tops)


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
        self.has_joined = False
        """Whether any step had a part of it."""
        self.cache_scope = request.cache_scope
        self.adapter = request.adapter
        self.rank = request.rank
        self.matcher = request.matcher
        self.digests: list[bytes] = []
        """Names of its prefixes, block by block; see :func:`workers.engine.places.digests`."""
        self.served_at = 0
        """When the scheduler last let it compute: a count of such turns."""
        self.finish: FinishReason | None = None
        """Set when it is over, for whatever reason."""
        self.counts: TokenCounts | None = None
        """Of the tokens so far; None when no penalty asks for them."""
        self._tokenizer = rules.tokenizer
        self._has_half = False
        """Whether its text shows bytes that are no character."""
        self._eos_token_ids = rules.eos_token_ids
        self._detokenizer = Detokenizer(rules.tokenizer, request.prompt)
        self._stops = StopMatcher(request.sampling.stop, keep=request.sampling.keep_stop)
        if are_counts_needed(request.sampling):
            self.counts = TokenCounts(request.prompt)
        self._lookup: Lookup | None = None
        self.prompt_scores: PromptScores | None = None
        """What is told about the prompt, with the first record of a log; None when nothing is."""
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if request.sampling.prompt_logprobs and not request.logged:
            has_tops = request.sampling.top_logprobs > 0
            self.prompt_scores = PromptScores(self.num_prompt, has_tops=has_tops)
        elif request.sampling.max_new_tokens <= 0:
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

    @property
    def is_at_last_token(self) -> bool:
        """Whether the next token is the last, whatever it will be."""
        return self.num_generated + 1 >= self.sampling.max_new_tokens

    def num_unscored(self, start: int) -> int:
        """Tokens from ``start`` on whose logits must tell how likely the prompt's next one was."""
        if self.prompt_scores is None or self.prompt_scores.is_complete:
            return 0
        return max(0, self.num_prompt - 1 - start)

    def draft(self, max_tokens: int, price: float) -> tuple[int, ...]:
        """Guessed next tokens, see :meth:`workers.engine.lookup.Lookup.draft`.

        None of them can be the last, and a grammar allows them all.
        """
        if self._lookup is None:
            self._lookup = Lookup(self.tokens)
        room = self.sampling.max_new_tokens - self.num_generated - 1
        guessed = self._lookup.draft(min(max_tokens, room), price)
        draft = list(takewhile(lambda token: self._reason_to_end(token) is None, guessed))
        if draft and self.matcher is not None:
            try:
                del draft[self.matcher.count_allowed(draft) :]
            except GrammarError:  # as the choice of the next token is going to find out
                return ()
        return tuple(draft)

    def banned(self, num_drafted: int = 0) -> tuple[int, ...]:
        """What may not come ``num_drafted`` tokens from here, since it would end too short an
        answer.
        """
        if self.num_generated + num_drafted >= self.sampling.min_new_tokens:
            return ()
        ends = self._stop_token_ids
        return tuple(ends if self._runs_past_eos else ends | self._eos_token_ids)

    @property
    def _runs_past_eos(self) -> bool:
        """The end of a grammar is an end in any case: nothing can come behind it."""
        return self.sampling.ignore_eos and self.matcher is None

    def append(self, token: int) -> str:
        """Take the next token; returns its piece of text and sets ``finish`` when it was the last.

        An end-of-sequence token on the last allowed position counts as that, not as ``length``, and
        so does a stop token; a stop string completed by the last token counts before all of them.
        What the tokens below ``min_new_tokens`` say is not searched for stop strings. The last
        piece carries all text that was held back.

        Raises:
            GrammarError: the token is not allowed here.
        """
        is_searched = self.num_generated >= self.sampling.min_new_tokens
        reason = self._reason_to_end(token)
        if self.matcher is not None and reason not in (FinishReason.EOS, FinishReason.STOP):
            self.matcher.accept(token)
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.append(token)
        text = self._detokenizer.push(token) if self._is_shown(token) else ""
        if reason is not None:
            text += self._detokenizer.flush()
        self._has_half |= HALF in text
        piece = self._stops.push(text) if is_searched else text
        if self._stops.matched:
            self.finish = FinishReason.STOP
        elif reason is not None:
            piece += self._stops.flush()
            self.finish = reason
        return piece

    def flaw(self) -> str:
        """What is wrong with the answer, now that it has ended: of
        :data:`workers.engine.flaws.FLAWS`, or empty.
        """
        reason = self.finish
        if reason is None or reason in (FinishReason.CANCELLED, FinishReason.FAILED):
            return ""
        answer = self.tokens[self.num_prompt :]
        if self._has_half:
            shown = [id for id in answer if id not in self._tokenizer.special_ids]
            content = b"".join(map(self._tokenizer.token_bytes, shown))
            if has_invalid_bytes(content, is_cut=reason != FinishReason.EOS):
                return "invalid_utf8"
        if self.matcher is not None and reason == FinishReason.EOS and not self._may_end():
            return "grammar"
        prompt = self.tokens[: self.num_prompt]
        if is_endless(prompt, answer, reason, self.sampling, self._tokenizer):
            return "repetition"
        return ""

    def _may_end(self) -> bool:
        """Whether the grammar allows the end that came."""
        if self.matcher is None:
            return True
        try:
            words, bit = divmod(self.tokens[-1], 32)
            return bool(int(self.matcher.mask()[words]) >> bit & 1)
        except GrammarError:  # too much work to tell
            return True

    def _reason_to_end(self, token: int) -> FinishReason | None:
        """Why ``token``, as the next one, would be the last."""
        if token in self._eos_token_ids and not self._runs_past_eos:
            return FinishReason.EOS
        if token in self._stop_token_ids:
            return FinishReason.STOP
        is_last = self.num_generated + 1 >= self.sampling.max_new_tokens
        return FinishReason.LENGTH if is_last else None

    def _is_shown(self, token: int) -> bool:
        if token in self._stop_token_ids and not self.sampling.keep_stop:
            return False
        return token not in self._eos_token_ids
