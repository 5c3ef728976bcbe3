"""One generation in the engine: how it ends, and that replaying its log restores it."""

from collections import Counter

import pytest

from common.messages import FinishReason
from common.models.tokenizer import Tokenizer
from tests.support.engines import request
from tests.support.tiny_model import EOS_TOKEN_IDS, build_tokenizer
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
