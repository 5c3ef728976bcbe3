"""Counted tokens: any history gives what counting it at once gives; a draft leaves no trace."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.counts import Counts, TokenCounts

tokens = st.lists(st.integers(0, 12))


def as_dicts(counts: Counts) -> tuple[dict[int, int], dict[int, int]]:
    assert len(set(counts.ids)) == len(counts.ids)
    assert counts.num_tokens == sum(counts.in_all)
    return (
        dict(zip(counts.ids, counts.in_all, strict=True)),
        {id: n for id, n in zip(counts.ids, counts.in_answer, strict=True) if n},
    )


@given(tokens, tokens, tokens)
def test_counts_are_those_of_prompt_answer_and_draft(
    prompt: list[int], answer: list[int], draft: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for token in answer:
        counts.append(token)
    expected = dict(Counter(prompt + answer + draft)), dict(Counter(answer + draft))
    assert as_dicts(counts.with_draft(draft)) == expected
    assert as_dicts(counts.with_draft()) == (dict(Counter(prompt + answer)), dict(Counter(answer)))
