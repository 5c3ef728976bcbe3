"""Choosing tokens: the same sets as transformers' processors, the right distribution, any batch.

All of it in torch, and by the kernels where they run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from common.messages import Sampling, Watermark
from tests.support.samplers import SAMPLERS, sampler
from workers.engine.counts import TokenCounts
from workers.model.noise import exponential_noise, noise_key
from workers.model.sampler import Sampler, SamplingRow

VOCAB = 1000

LARGE_VOCAB = 12_000
"""So many blocks that those with kept tokens are taken out first, or too many for that."""


@pytest.fixture(params=SAMPLERS)
def sample(request: pytest.FixtureRequest) -> Sampler:
    return sampler(request.param)


def row(
    position: int = 0,
    seen: Sequence[int] = (),
    *,
    seed: int = 0,
    greedy: bool = False,
    **rest: Any,
) -> SamplingRow:
    sampling = Sampling(max_new_tokens=1, seed=seed, do_sample=not greedy, **rest)
    return SamplingRow(sampling, position, TokenCounts(seen) if seen else None)


def random_logits(num_rows: int, vocab_size: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3.0


def warped(logits: torch.Tensor, sampling: Sampling, seen: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of one row as transformers computes them."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1.0:
        steps.append(TypicalLogitsWarper(sampling.typical_p))
    ids = cast("torch.LongTensor", torch.tensor([list(seen)]))
    return steps(ids, cast("torch.FloatTensor", logits[None].clone()))[0].log_softmax(-1)


def processed(
    logits: torch.Tensor, sampling: Sampling, prompt: list[int], answer: list[int]
) -> torch.Tensor:
    """One row behind penalties and biases, token by token."""
    scores, tokens = logits.clone(), prompt + answer
    for id in set(tokens):
        scores[id] *= sampling.repetition_penalty ** (1 if scores[id] < 0 else -1)
        scores[id] -= sampling.frequency_penalty * answer.count(id)
        scores[id] -= sampling.presence_penalty * (id in answer)
        scores[id] -= sampling.relative_frequency_penalty * tokens.count(id) / len(tokens)
    for id, bias in sampling.logit_bias.items():
        scores[id] += bias
    return scores


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k 1": {"top_k": 1},
    "top_k 50": {"top_k": 50},
    "top_k beyond the blocks": {"top_k": 600},
    "top_k beyond the vocabulary": {"top_k": 5000},
    "top_p narrow": {"top_p": 0.2},
    "top_p wide": {"top_p": 0.99},
    "top_p wide and hot": {"top_p": 0.999, "temperature": 3.0},
    "top_k and top_p": {"top_k": 40, "top_p": 0.7},
    "penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.7},
    "min_p": {"min_p": 0.05},
    "min_p wide": {"min_p": 0.0001, "temperature": 2.0},
    "min_p and top_p": {"min_p": 0.02, "top_p": 0.95},
    "typical_p": {"typical_p": 0.6},
    "typical_p narrow": {"typical_p": 0.1, "temperature": 1.5},
    "typical_p wide": {"typical_p": 0.99},
    "typical_p among few": {"typical_p": 0.5, "top_k": 20},
    "as langchain asks": {"temperature": 0.8, "top_p": 0.95, "typical_p": 0.95},
    "typical_p among many": {"typical_p": 0.8, "top_p": 0.99, "temperature": 2.0},
    "all": {
        "repetition_penalty": 1.2,
        "temperature": 0.8,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.9,
    },
}


@pytest.mark.parametrize("vocab_size", [VOCAB, LARGE_VOCAB])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kept_tokens_and_logprobs_are_those_of_transformers(
    sample: Sampler, case: dict[str, Any], vocab_size: int
) -> None:
    """Drawn often enough: the tokens that the warpers keep, each with its log-probability."""
    logits = random_logits(1, vocab_size)[0]
    seen = [1, 5, 999, int(logits.argmax())]
    expected = warped(logits, row(**case).sampling, seen)
    num_draws = 100
    rows = [row(position, seen, **case) for position in range(num_draws)]
    got = sample(logits.repeat(num_draws, 1), rows)
    assert all(got.finite)
    assert set(got.tokens) <= set(expected.isfinite().nonzero()[:, 0].tolist())
    torch.testing.assert_close(
        torch.tensor(got.logprobs), expected[got.tokens], atol=2e-5, rtol=1e-5
    )
    if (kept := int(expected.isfinite().sum())) <= 5:
        assert len(set(got.tokens)) == kept


def likeliest(sample: Sampler, logits: torch.Tensor, asked: SamplingRow) -> dict[int, float]:
    """All that a row keeps, with log-probabilities, out of the sampler."""
    sampling = msgspec.structs.replace(asked.sampling, top_logprobs=len(logits))
    (top,) = sample(logits[None].clone(), [replace(asked, sampling=sampling)]).tops
    assert top is not None
    assert [logprob for _, logprob in top] == sorted((x for _, x in top), reverse=True)
    return dict(top)


@pytest.mark.parametrize("vocab_size", [5, 71, 128, 1000, 12_000])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_whole_distribution_is_that_of_transformers(
    sample: Sampler, vocab_size: int, share: float
) -> None:
    """Vocabularies below and above every limit, and with most tokens at -inf."""
    generator = torch.Generator().manual_seed(vocab_size)
    for number, case in enumerate(CASES.values()):
        logits = torch.randn(vocab_size, generator=generator) * (1 + number % 4)
        logits[torch.rand(vocab_size, generator=generator) > share] = float("-inf")
        logits[number % vocab_size] = 1.0
        seen = [0, 3, vocab_size - 1]
        expected = warped(logits, row(**case).sampling, seen)
        got = likeliest(sample, logits, row(0, seen, **case))
        ids = expected.isfinite().nonzero()[:, 0]
        assert sorted(got) == ids.tolist()
        torch.testing.assert_close(
            torch.tensor([got[id] for id in ids.tolist()]), expected[ids], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("levels", [1, 2, 40])
def test_equal_logits_are_kept_or_left_together(sample: Sampler, levels: int) -> None:
    """Few distinct values, as 16-bit logits have; every end then lies among equals."""
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(levels, (3000,), generator=generator) / 8.0
    for case in CASES.values():
        kept = set(likeliest(sample, logits, row(0, [], **case)))
        values = {float(logits[id]) for id in kept}
        assert kept == {id for id in range(3000) if float(logits[id]) in values}


def test_the_likeliest_come_first_and_of_equals_the_lower_ids(sample: Sampler) -> None:
    logits = torch.zeros(LARGE_VOCAB)
    logits[[9000, 40, 300]] = 2.0
    logits[[11, 10_500]] = 3.0
    for asked in (row(top_logprobs=7, greedy=True), row(top_logprobs=7), row(top_logprobs=3)):
        got = sample(logits[None].clone(), [asked])
        assert got.tops[0] is not None
        expected = [11, 10_500, 40, 300, 9000, 0, 1][: asked.sampling.top_logprobs]
        assert [id for id, _ in got.tops[0]] == expected
        reference = logits.log_softmax(-1)[expected]
        torch.testing.assert_close(torch.tensor([x for _, x in got.tops[0]]), reference)


def test_tops_agree_with_the_choice_and_leave_out_what_is_not_kept(sample: Sampler) -> None:
    logits = random_logits(1)
    for position in range(20):
        got = sample(logits.clone(), [row(position, top_k=3, top_logprobs=5)])
        (top,) = got.tops
        assert top is not None
        assert len(top) == 3
        assert (got.tokens[0], got.logprobs[0]) in top
        assert sum(math.exp(logprob) for _, logprob in top) == pytest.approx(1.0)
    assert sample(logits, [row()]).tops == [None]


COMBINATIONS: dict[str, dict[str, Any]] = {
    "typical_p": {"typical_p": 0.7},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "top_k and typical_p": {"top_k": 15, "typical_p": 0.8, "temperature": 0.7},
    "biased": {"logit_bias": {101: 3.0, 700: -4.0}, "top_p": 0.95},
    "penalized": {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("case", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_frequencies_of_combinations_are_the_probabilities(
    sample: Sampler, case: dict[str, Any]
) -> None:
    """Chi-square against scores computed plainly and warped by transformers, 3,000 draws."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.full((VOCAB,), float("-inf"))
    logits[100:120] = torch.randn(20, generator=generator)
    logits[700:720] = torch.randn(20, generator=generator)
    prompt, answer = [100, 705], [101, 101, 710]
    counts = TokenCounts(prompt)
    for token in answer:
        counts.append(token)
    sampling = row(**case).sampling
    drawn = [SamplingRow(msgspec.structs.replace(sampling, seed=p), p, counts) for p in range(3000)]
    got = torch.bincount(
        torch.tensor(sample(logits.repeat(3000, 1), drawn).tokens), minlength=VOCAB
    )
    plain = msgspec.structs.replace(sampling, repetition_penalty=1.0)
    expected = warped(processed(logits, sampling, prompt, answer), plain, [0]).exp() * 3000
    kept = expected > 0
    assert got[~kept].sum() == 0
    statistic = float(((got[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    # Wilson and Hilferty's approximation of the 99.99th percentile.
    degrees = int(kept.sum()) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


def test_frequencies_are_the_probabilities(sample: Sampler) -> None:
    """Chi-square over 60 tokens in two blocks of the vocabulary, 40,000 draws."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.full((VOCAB,), float("-inf"))
    ids = torch.cat([torch.arange(100, 130), torch.arange(700, 730)])
    logits[ids] = torch.randn(60, generator=generator)
    num_draws = 40_000
    counts = torch.zeros(VOCAB)
    for start in range(0, num_draws, 4000):
        rows = [row(position, seed=12) for position in range(start, start + 4000)]
        counts += torch.bincount(
            torch.tensor(sample(logits.repeat(4000, 1), rows).tokens), minlength=VOCAB
        )
    expected = logits.softmax(-1)[ids] * num_draws
    statistic = float(((counts[ids] - expected) ** 2 / expected).sum())
    assert counts.sum() == counts[ids].sum() == num_draws
    assert statistic < 104.0, "the 99.97th percentile of chi-square with 59 degrees of freedom"


def test_seeds_and_positions_draw_independently(sample: Sampler) -> None:
    """Each alone, uniform over 16 tokens: no seed or position favours one."""
    logits = torch.full((VOCAB,), float("-inf"))
    logits[::64] = 0.0
    for rows in (
        [row(0, seed=seed) for seed in range(4000)],
        [row(position, seed=7) for position in range(4000)],
        [row(5, seed=seed << 32) for seed in range(4000)],
    ):
        counts = torch.bincount(torch.tensor(sample(logits.repeat(4000, 1), rows).tokens))
        counts = counts[counts > 0].float()
        assert len(counts) == 16
        assert float(((counts - 250) ** 2 / 250).sum()) < 45.0, "99.99 % of chi-square with 15"


@pytest.mark.parametrize("vocab_size", [VOCAB, LARGE_VOCAB])
def test_a_row_does_not_depend_on_its_neighbours(sample: Sampler, vocab_size: int) -> None:
    """Alone, in a batch, in another order: the same token and logprob, bit for bit."""
    mixed = [row(3, [1, 2], seed=i, **case) for i, case in enumerate(CASES.values())]
    mixed += [row(3, greedy=True), row(3, [4, 5], greedy=True, repetition_penalty=1.3)]
    counts, mask = TokenCounts([1, 2, 2, 77]), np.zeros(-(-vocab_size // 32), np.int32)
    mask[3:20] = 0x5A5A0FF1
    for do_sample, typical_p in ((True, 1.0), (True, 0.5), (False, 1.0)):
        everything = Sampling(
            max_new_tokens=1,
            seed=9,
            do_sample=do_sample,
            typical_p=typical_p,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            relative_frequency_penalty=0.3,
            logit_bias={5: 2.0, 700: -1.0},
            watermark=Watermark(0.5, 2.0),
            top_logprobs=6,
        )
        mixed.append(SamplingRow(everything, 8, counts, [7, 7, 1], 77, mask, [96, 97]))
        mixed.append(SamplingRow(everything, 9, counts, previous=1))
    logits = random_logits(len(mixed), vocab_size)
    together = sample(logits.clone(), mixed)
    for i, alone in enumerate(mixed):
        one = sample(logits[i : i + 1].clone(), [alone])
        assert one.tokens == [together.tokens[i]]
        assert one.logprobs == [together.logprobs[i]]
        assert one.tops == [together.tops[i]]
    backwards = sample(logits.flip(0), mixed[::-1])
    assert backwards.tokens[::-1] == together.tokens
    assert backwards.logprobs[::-1] == together.logprobs


def test_greedy_takes_the_first_of_the_best_and_ignores_warpers(sample: Sampler) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [300, 301, 950]] = 2.0
    plain = sample(logits.clone(), [row(greedy=True)])
    warm = sample(logits.clone(), [row(greedy=True, temperature=0.1, top_k=3, top_p=0.1)])
    assert plain.tokens == warm.tokens == [300]
    assert plain.logprobs == warm.logprobs
    assert plain.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, 300]), abs=1e-5)


def test_greedy_sees_the_penalty(sample: Sampler) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.9
    assert sample(logits, [row(seen=[7], greedy=True, repetition_penalty=1.5)]).tokens == [8]


def test_tokens_as_good_as_the_last_one_kept_stay(sample: Sampler) -> None:
    """bfloat16 has ties; which of them stay must not depend on a sort."""
    logits = torch.full((VOCAB,), -9.0)
    logits[[10, 200, 500]] = 1.0
    rows = [row(position, top_k=2) for position in range(200)]
    assert set(sample(logits.repeat(200, 1), rows).tokens) == {10, 200, 500}


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(sample: Sampler, temperature: float) -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    got = sample(logits, [row(temperature=temperature)])
    assert got.finite == [True]
    assert (got.tokens == [best]) or temperature > 1


def test_top_p_zero_is_the_best_token(sample: Sampler) -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    assert {sample(logits.clone(), [row(p, top_p=0.0)]).tokens[0] for p in range(20)} == {best}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_spoil_their_own_row_only(
    sample: Sampler, poison: float
) -> None:
    logits = random_logits(3)
    expected = sample(logits.clone(), [row(1), row(1), row(1)])
    logits[1, 17] = poison
    got = sample(logits, [row(1), row(1), row(1)])
    assert got.finite == [True, False, True]
    assert (got.tokens[0], got.tokens[2]) == (expected.tokens[0], expected.tokens[2])


def test_a_row_of_nothing_is_not_finite(sample: Sampler) -> None:
    assert sample(torch.full((1, VOCAB), float("-inf")), [row()]).finite == [False]


@pytest.mark.parametrize("asked", [{"greedy": True}, *CASES.values()])
def test_a_row_that_may_choose_nothing_is_told_from_a_broken_one(
    sample: Sampler, asked: dict[str, Any]
) -> None:
    logits = random_logits(4)
    logits[2, 5] = float("nan")
    nothing = np.zeros(-(-VOCAB // 32), np.int32)
    plain = row(**asked)
    rows = [plain, replace(plain, mask=nothing), replace(plain, mask=nothing)]
    rows.append(replace(plain, banned=range(VOCAB)))
    got = sample(logits, rows)
    assert got.finite == [True, False, False, False]
    assert got.exhausted == [False, True, False, True]


def test_bfloat16_logits_are_taken_as_they_are(sample: Sampler) -> None:
    logits = random_logits(2).bfloat16()
    rows = [row(greedy=True), row(4, top_k=10)]
    assert sample(logits.float(), rows) == sample(logits.clone(), rows)


def test_noise_is_a_fixed_function(sample: Sampler) -> None:
    """Written down, so that a change that would break every running generation is seen.

    The first number is the published test value of SplitMix64 for the state 0, scaled.
    """
    noise = exponential_noise(torch.tensor([[0]]), torch.arange(2))
    uniform = ((0xE220A8397B1DCDAF >> 11) + 0.5) * 2.0**-53
    assert noise[0, 0].item() == pytest.approx(-math.log(uniform), rel=1e-12)
    assert noise_key(0, 0) != noise_key(0, 1) != noise_key(1, 0)
    assert -(2**63) <= noise_key(2**64 - 1, 2**31) < 2**63
    logits = torch.arange(VOCAB).float()[None] / 250
    tokens = [sample(logits.clone(), [row(p, seed=42)]).tokens[0] for p in range(5)]
    assert tokens == NOISE_42


NOISE_42 = [983, 978, 705, 711, 930]
