"""One generation in the engine: how it ends, and that replaying its log restores it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from common.messages import FinishReason
from common.models.tokenizer import Tokenizer
from tests.support.engines import request
from tests.support.grammars import Residues
from tests.support.tiny_model import EOS_TOKEN_IDS, build_tokenizer
from workers.engine.grammar import GrammarError
from workers.engine.sequence import Sequence, TextRules

TOKENIZER = Tokenizer(build_tokenizer(), {})
RULES = TextRules(TOKENIZER, frozenset(EOS_TOKEN_IDS))
PROMPT = TOKENIZER.encode("Say: ")


def sequence(logged: str = "", **sampling: object) -> Sequence:
    log = TOKENIZER.encode(logged)
    return Sequence(request("g", PROMPT, logged=log, **sampling), RULES)


def write(seq: Sequence, text: str) -> list[str]:
    return [seq.append(id) for id in TOKENIZER.encode(text)]


def test_it_ends_exactly_at_its_limit() -> None:
    seq = sequence(max_new_tokens=3)
    assert write(seq, "xyz") == ["x", "y", "z"]
    assert seq.finish == FinishReason.LENGTH
    assert seq.num_generated == 3


@pytest.mark.parametrize("eos", EOS_TOKEN_IDS)
def test_any_of_several_end_tokens_ends_it(eos: int) -> None:
    seq = sequence()
    assert [*write(seq, "x"), seq.append(eos)] == ["x", ""]
    assert seq.finish == FinishReason.EOS


def test_an_end_token_that_is_to_be_ignored_is_a_token_without_text() -> None:
    seq = sequence(max_new_tokens=3, ignore_eos=True)
    assert [*write(seq, "x"), seq.append(EOS_TOKEN_IDS[0]), *write(seq, "y")] == ["x", "", "y"]
    assert seq.finish == FinishReason.LENGTH


def test_an_end_token_on_the_last_position_is_an_end_not_a_cut() -> None:
    seq = sequence(max_new_tokens=2)
    write(seq, "x")
    seq.append(EOS_TOKEN_IDS[0])
    assert seq.finish == FinishReason.EOS


def test_a_stop_string_on_the_last_position_counts_first() -> None:
    seq = sequence(max_new_tokens=2, stop=("y",))
    assert write(seq, "xy") == ["x", ""]
    assert seq.finish == FinishReason.STOP


def test_the_last_piece_carries_what_was_held_back() -> None:
    """Half a stop string and half a character come out with the end token."""
    seq = sequence(stop=("END",))
    assert write(seq, "EN") == ["", ""]
    assert seq.append(TOKENIZER.encode("👍")[0]) == ""
    assert seq.append(EOS_TOKEN_IDS[0]) == "EN\ufffd"
    assert seq.finish == FinishReason.EOS


def test_a_stop_string_that_half_a_character_completes_counts() -> None:
    seq = sequence(max_new_tokens=2, stop=("x\ufffd",))
    write(seq, "x")
    assert seq.append(TOKENIZER.encode("👍")[0]) == ""
    assert seq.finish == FinishReason.STOP


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_it_and_says_nothing(ignore_eos: bool) -> None:
    """Of the token; what was held back before it is said."""
    (stop,) = TOKENIZER.encode("y")
    seq = sequence(stop_token_ids=(stop,), stop=("xz",), ignore_eos=ignore_eos)
    assert write(seq, "axy") == ["a", "", "x"]
    assert seq.finish == FinishReason.STOP


def test_a_stop_token_is_shown_where_stops_are() -> None:
    seq = sequence(stop_token_ids=tuple(TOKENIZER.encode("y")), keep_stop=True)
    assert write(seq, "xy") == ["x", "y"]
    assert seq.finish == FinishReason.STOP


def test_an_ignored_end_token_still_ends_it_as_a_stop_token() -> None:
    seq = sequence(stop_token_ids=EOS_TOKEN_IDS[:1], ignore_eos=True)
    assert [seq.append(token) for token in reversed(EOS_TOKEN_IDS)] == ["", ""]
    assert seq.finish == FinishReason.STOP


def test_nothing_ends_too_short_an_answer() -> None:
    """Neither tokens, which must not be chosen, nor stop strings, which do not count yet."""
    (stop,) = TOKENIZER.encode("y")
    seq = sequence(min_new_tokens=3, stop_token_ids=(stop,), stop=("x",))
    assert set(seq.banned()) == {stop, *EOS_TOKEN_IDS}
    assert write(seq, "xa") == ["x", "a"]
    assert set(seq.banned()) == {stop, *EOS_TOKEN_IDS}
    assert seq.banned(1) == ()
    assert write(seq, "xbx") == ["x", "b", ""]
    assert seq.finish == FinishReason.STOP


def test_an_end_token_that_is_ignored_is_not_banned() -> None:
    assert sequence(min_new_tokens=3, ignore_eos=True).banned() == ()


def test_a_limit_counts_before_a_minimum() -> None:
    seq = sequence(min_new_tokens=5, max_new_tokens=2)
    write(seq, "xy")
    assert seq.finish == FinishReason.LENGTH


def test_a_grammar_follows_every_token_replayed_ones_too() -> None:
    matcher = Residues()
    log = [70, 71, 72]
    plain = request("g", PROMPT, logged=log)
    seq = Sequence(replace(plain, matcher=matcher), RULES)
    seq.append(73)
    assert matcher.taken == [*log, 73]
    with pytest.raises(GrammarError):
        seq.append(73)
    assert seq.num_generated == 4


def test_the_end_of_a_grammar_is_an_end_even_where_end_tokens_are_ignored() -> None:
    plain = request("g", PROMPT, ignore_eos=True)
    seq = Sequence(replace(plain, matcher=Residues(length=1)), RULES)
    seq.append(70)
    seq.append(EOS_TOKEN_IDS[0])
    assert seq.finish == FinishReason.EOS


def test_guesses_keep_to_the_grammar_and_never_end_it() -> None:
    """What is guessed is cut where the grammar, an end or the limit of tokens comes."""
    said = [70, 71, 72, 73, 75, 70, 71]
    assert sequence_of(said).draft(9, 0.0) == (72, 73, 75, 70, 71, 72, 73, 75, 70)
    assert sequence_of(said, matcher=Residues()).draft(9, 0.0) == (72, 73)
    assert sequence_of(said, stop_token_ids=(75,)).draft(9, 0.0) == (72, 73)
    assert sequence_of(said, max_new_tokens=5).draft(9, 0.0) == (72, 73, 75, 70)
    assert sequence_of(said, matcher=TooHard()).draft(9, 0.0) == ()


class TooHard(Residues):
    def count_allowed(self, tokens: list[int]) -> int:
        raise GrammarError(f"{tokens} are too hard.")


def sequence_of(prompt: list[int], *, matcher: Residues | None = None, **sampling: Any) -> Sequence:
    if matcher is not None:
        matcher.taken.append(prompt[-1])
    return Sequence(replace(request("g", prompt, **sampling), matcher=matcher), RULES)


def test_replay_restores_held_text() -> None:
    """Another worker takes over in the middle of a possible stop string and of a character."""
    text = "a👍 EN👍D ENb"
    whole = write(sequence(stop=("END",)), text)
    for cut in range(len(whole)):
        ids = TOKENIZER.encode(text)
        seq = Sequence(request("g", PROMPT, logged=ids[:cut], stop=("END",)), RULES)
        assert seq.num_generated == cut
        assert [seq.append(id) for id in ids[cut:]] == whole[cut:]


def test_a_log_that_is_complete_already_is_finished() -> None:
    assert sequence("x", max_new_tokens=1).finish == FinishReason.LENGTH
    assert sequence("a stop", stop=("st",)).finish == FinishReason.STOP
    assert sequence(max_new_tokens=0).finish == FinishReason.LENGTH


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {"presence_penalty": 0.5},
        {"relative_frequency_penalty": 0.5},
    ],
    ids=lambda penalty: next(iter(penalty)),
)
def test_tokens_are_counted_for_penalties_replayed_ones_too(penalty: dict[str, float]) -> None:
    seq = sequence("xyx", **penalty)
    write(seq, "zx")
    assert seq.counts is not None
    counts = seq.counts.with_draft()
    answer = Counter(TOKENIZER.encode("xyxzx"))
    assert dict(zip(counts.ids, counts.in_answer, strict=True)) == {
        id: answer[id] for id in [*PROMPT, *answer]
    }
    assert dict(zip(counts.ids, counts.in_all, strict=True)) == Counter(PROMPT) + answer


def test_nothing_is_counted_for_nobody() -> None:
    assert sequence("xyx").counts is None
