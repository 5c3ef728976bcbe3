"""Guesses from what was said before."""

import random

from workers.engine.lookup import MAX_DRAFT_TOKENS, Lookup

PASSAGE = list(range(100, 140))


def guess(tokens: list[int], max_tokens: int = MAX_DRAFT_TOKENS, price: float = 0.0) -> list[int]:
    return Lookup(tokens).draft(max_tokens, price)


def test_a_pair_that_was_there_goes_on_as_it_did() -> None:
    assert guess([*PASSAGE, 1, 2, 110, 111]) == PASSAGE[12:22]
    assert guess([*PASSAGE, 1, 2, 110, 111], max_tokens=3) == [112, 113, 114]


def test_what_was_never_there_is_not_guessed() -> None:
    assert guess([*PASSAGE, 1, 2, 110]) == []
    assert guess([7]) == guess([]) == []


def test_the_last_occurrence_counts() -> None:
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], max_tokens=1) == [4]


def test_a_repetition_goes_on_beyond_the_last_token() -> None:
    assert guess([9, 1, 2, 3, 1, 2, 3, 1, 2], max_tokens=7) == [3, 1, 2, 3, 1, 2, 3]
    assert guess([5, 5, 5], max_tokens=4) == [5, 5, 5, 5]


def test_who_copies_is_guessed_further_ahead() -> None:
    """At a price at which a new acquaintance is worth little; after the passage less again."""
    tokens = [*PASSAGE, 1, 2, *PASSAGE[:2]]
    lookup = Lookup(tokens)
    lengths: list[int] = []
    for token in PASSAGE[2:30]:
        lengths.append(len(lookup.draft(MAX_DRAFT_TOKENS, 0.3)))
        tokens.append(token)
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == MAX_DRAFT_TOKENS
    for token in (3, 115, 116, 4, 117, 118, 5, 119, 120, 6):
        tokens.append(token)
        lookup.draft(MAX_DRAFT_TOKENS, 0.3)
    tokens += [121, 122]
    assert len(lookup.draft(MAX_DRAFT_TOKENS, 0.3)) <= 1


def test_one_difference_does_not_lose_the_place_for_long() -> None:
    """Two tokens behind an edit the copy is followed again."""
    tokens = [*PASSAGE, 1, 2, *PASSAGE[:9], 3, *PASSAGE[10:12]]
    assert guess(tokens, max_tokens=3) == PASSAGE[12:15]


def test_at_the_highest_price_nothing_is_guessed() -> None:
    assert guess([5, 5, 5], price=1.0) == []


def test_how_often_it_looks_changes_nothing() -> None:
    """Tokens may come many at once."""
    rng = random.Random(1)
    tokens = [rng.randrange(4) for _ in range(20)]
    often, seldom = Lookup(tokens), Lookup(tokens)
    for _ in range(60):
        tokens += [rng.randrange(4) for _ in range(rng.randrange(3))]
        often.draft(3, 0.0)
    assert often.draft(10, 0.0) == seldom.draft(10, 0.0)
    assert often.hit_rate == seldom.hit_rate
