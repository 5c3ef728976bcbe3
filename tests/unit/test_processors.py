"""What changes scores: each processor against a plain reference, on some rows of a batch only."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from common.messages import Sampling, Watermark
from tests.support.samplers import SAMPLERS, sampler
from workers.engine.counts import TokenCounts
from workers.model.processors import SamplingRow, process
from workers.model.watermark import detect, green_lists

VOCAB = 1000
CPU = torch.device("cpu")


def scores_of(num_rows: int) -> torch.Tensor:
    scores = torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(1)) * 3.0
    scores[:, VOCAB:] = float("-inf")
    return scores


def sampling(**rest: Any) -> Sampling:
    return Sampling(max_new_tokens=1, seed=0, **rest)


def counts_of(prompt: Sequence[int], answer: Sequence[int]) -> TokenCounts:
    counts = TokenCounts(prompt)
    for token in answer:
        counts.append(token)
    return counts


def process_one(row: SamplingRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Before and after, ``[1, vocabulary]``; rows without parameters around it must not change."""
    before = scores_of(3)
    after, plain = before.clone(), SamplingRow(sampling(), 0)
    process(after, [plain, row, plain], VOCAB)
    assert after[[0, 2]].equal(before[[0, 2]])
    assert after[1, VOCAB:].isneginf().all()
    return before[1:2, :VOCAB], after[1:2, :VOCAB]


def by_transformers(processor: Any, before: torch.Tensor, ids: Sequence[int] = (0,)) -> Any:
    tokens = cast("torch.LongTensor", torch.tensor([list(ids)]))
    return processor(tokens, before.clone())


PROMPT, ANSWER = [3, 3, 5, 7, 999], [5, 8, 8, 8, 3]


@pytest.mark.parametrize("draft", [[], [8, 11, 11]])
def test_penalties_count_prompt_answer_and_draft_as_documented(draft: list[int]) -> None:
    """OpenAI's over the answer, TGI's as a share of all tokens, repetition over all."""
    asked = sampling(
        repetition_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=-0.4,
        relative_frequency_penalty=1.1,
    )
    before, after = process_one(SamplingRow(asked, 0, counts_of(PROMPT, ANSWER), draft))
    tokens, answer = PROMPT + ANSWER + draft, ANSWER + draft
    expected = by_transformers(RepetitionPenaltyLogitsProcessor(1.3), before, tokens)
    for id in set(tokens):
        expected[0, id] -= 0.7 * answer.count(id) - 0.4 * (id in answer)
        expected[0, id] -= 1.1 * tokens.count(id) / len(tokens)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_nothing_generated_yet_is_penalized_by_the_prompt_alone() -> None:
    asked = sampling(frequency_penalty=2.0, presence_penalty=2.0)
    before, after = process_one(SamplingRow(asked, 0, counts_of(PROMPT, [])))
    assert after.equal(before)


def test_biases_are_those_of_transformers_and_banned_tokens_are_gone() -> None:
    bias = {4: 2.5, 999: -100.0, 17: 0.5}
    asked = sampling(logit_bias=bias | {VOCAB: 9.0, 10**6: 9.0})
    before, after = process_one(SamplingRow(asked, 0, banned=(4, 20, 20, -1, VOCAB)))
    biased = SequenceBiasLogitsProcessor([[[id], value] for id, value in bias.items()])
    expected = by_transformers(biased, before)
    torch.testing.assert_close(
        after, by_transformers(SuppressTokensLogitsProcessor([4, 20]), expected)
    )


@pytest.mark.parametrize("num_words", [20, 32, 40])
def test_a_mask_leaves_what_its_bits_allow(num_words: int) -> None:
    """Shorter than the scores, as long, or longer; and no bias brings anything back."""
    words = np.random.default_rng(0).integers(-(2**31), 2**31, num_words).astype(np.int32)
    allowed = [id for id in range(min(VOCAB, 32 * num_words)) if words[id // 32] >> (id % 32) & 1]
    forbidden = next(id for id in range(VOCAB) if id not in allowed)
    asked = sampling(logit_bias={forbidden: 100.0})
    before, after = process_one(SamplingRow(asked, 0, mask=words))
    assert after[0].isfinite().nonzero()[:, 0].tolist() == allowed
    assert after[0, allowed].equal(before[0, allowed])


@pytest.mark.parametrize("restriction", [{"mask": np.zeros(32, np.int32)}, {"banned": (17,)}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_not_finite_is_not_hidden_by_what_forbids_it(
    restriction: dict[str, Any], poison: float, name: str
) -> None:
    """Or numbers of a broken generation would pass for sound."""
    scores = scores_of(1)
    scores[0, 17] = poison
    assert sampler(name)(scores, [SamplingRow(sampling(), 0, **restriction)]).finite == [False]


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5])
def test_a_watermark_adds_delta_to_a_share_gamma_behind_each_token(gamma: float) -> None:
    asked = sampling(watermark=Watermark(gamma, 2.0))
    before, after = process_one(SamplingRow(asked, 0, previous=5))
    is_green = green_lists([5], [gamma], VOCAB, CPU)
    torch.testing.assert_close(after, before + 2.0 * is_green)
    lists = green_lists(list(range(200)), [gamma] * 200, VOCAB, CPU)
    assert lists[5].equal(is_green[0])
    assert set(lists.unique().tolist()) == {0.0, 1.0}
    assert float(lists.mean()) == pytest.approx(gamma, abs=0.005)
    shared = (lists[:100] * lists[100:]).mean()
    assert float(shared) == pytest.approx(gamma * gamma, abs=0.005), "lists are independent"


def test_green_lists_are_a_fixed_function() -> None:
    """Written down: a detector must know them in years to come, whatever the vocabulary was."""
    greens = green_lists([0, 1], [0.25, 0.5], VOCAB, CPU)
    assert [line.nonzero()[:8, 0].tolist() for line in greens] == GREEN
    assert green_lists([1], [0.5], 37, CPU)[0].equal(greens[1, :37])


GREEN = [[1, 4, 6, 11, 16, 24, 28, 38], [0, 5, 6, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("do_sample", [True, False])
def test_watermarked_text_is_detected_and_other_text_is_not(do_sample: bool, name: str) -> None:
    """100 tokens out of random logits: 4 standard deviations, against none."""
    generator = torch.Generator().manual_seed(2)
    texts: dict[float, list[int]] = {0.0: [1], 2.0: [1]}
    for position in range(100):
        logits = torch.randn(1, VOCAB, generator=generator)
        for delta, text in texts.items():
            asked = sampling(do_sample=do_sample, watermark=Watermark(0.5, delta))
            row = SamplingRow(asked, position, previous=text[-1])
            text.extend(sampler(name)(logits.clone(), [row]).tokens)
    assert detect(texts[2.0], 0.5) > 4.0
    assert abs(detect(texts[0.0], 0.5)) < 3.0
    with pytest.raises(ValueError, match="two tokens"):
        detect([1], 0.5)
