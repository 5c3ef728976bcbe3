"""Rows that nothing changes or narrows may be chosen by kernels; nobody else notices.

The kernels need a GPU, where ``make bench-gpu`` checks them; in their place stands the sampler.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from common.messages import Sampling, Watermark
from workers.engine.counts import TokenCounts
from workers.model.plain_choice import NUM_PROVEN, prove_choice, select_choice
from workers.model.processors import SamplingRow
from workers.model.sampler import SamplesToCome, sample

VOCAB = 300
CPU = torch.device("cpu")


def choose(logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]) -> torch.Tensor:
    """A PlainChoice in torch."""
    some = logits[numbers]
    samples = sample(some.clone(), rows)
    best = some.amax(-1).double()
    return torch.stack((torch.tensor(samples.tokens), torch.tensor(samples.logprobs), best))


class Recording:
    """Also remembers what it was asked for."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(
        self, logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
    ) -> torch.Tensor:
        self.numbers += numbers
        return choose(logits, numbers, rows)


def plain_row(number: int, **rest: Any) -> SamplingRow:
    return SamplingRow(Sampling(max_new_tokens=1, seed=number, **rest), number)


def other_rows() -> list[SamplingRow]:
    """One for each thing that changes or narrows a row, or asks for more than its choice."""
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    mask[2] = 0x00FF
    changed = [
        {"logit_bias": {5: 4.0}},
        {"watermark": Watermark(0.5, 2.0)},
        {"top_logprobs": 3},
        *({"do_sample": True, **narrow} for narrow in ({"top_k": 9}, {"top_p": 0.7})),
        *({"do_sample": True, **narrow} for narrow in ({"min_p": 0.1}, {"typical_p": 0.6})),
    ]
    rows = [plain_row(50 + number, **rest) for number, rest in enumerate(changed)]
    rows[1].previous = 8
    sampling = Sampling(max_new_tokens=1, seed=3, repetition_penalty=1.4)
    rows.append(SamplingRow(sampling, 2, TokenCounts([1, 2, 3])))
    rows.append(SamplingRow(Sampling(max_new_tokens=1, seed=4), 3, mask=mask))
    rows.append(SamplingRow(Sampling(max_new_tokens=1, seed=5), 4, banned=range(VOCAB)))
    return rows


def test_kernels_get_the_plain_rows_and_all_rows_come_out_as_ever() -> None:
    """Greedy and drawn ones among others: same tokens, log-probabilities, tops and faults."""
    others = other_rows()
    plain = [plain_row(i, do_sample=i % 2 == 0, temperature=0.5 + i) for i in range(len(others))]
    plain[1] = plain_row(1, top_k=3, top_p=0.2)  # of a greedy row no warper asks
    rows = [row for pair in zip(others, plain, strict=True) for row in pair]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1)) * 3.0
    logits[7, 4] = float("nan")
    expected = sample(logits.clone(), rows)
    kernels = Recording()
    to_come = SamplesToCome(logits.clone(), rows, kernels)
    got = to_come.samples()
    assert kernels.numbers == list(range(1, len(rows), 2))
    assert got.finite == expected.finite
    assert got.finite.count(False) == 2
    assert got.exhausted == expected.exhausted
    assert got.exhausted.count(True) == 1
    assert got.tops == expected.tops
    for row, is_finite in enumerate(expected.finite):
        if is_finite:
            assert got.tokens[row] == expected.tokens[row]
            assert got.logprobs[row] == pytest.approx(expected.logprobs[row])
    asked = [4, 3, 10, 0, 11]
    assert to_come.tokens(asked).tolist() == [expected.tokens[row] for row in asked]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_chooses_as_the_sampler_is_proven(dtype: torch.dtype) -> None:
    assert prove_choice(choose, VOCAB, dtype, CPU) == 0


def test_a_wrong_choice_is_not_proven() -> None:
    """Not with other tokens, nor other likelihoods, nor where it takes what is not finite."""

    def damaged(line: int, by: float) -> int:
        def choose_wrongly(
            logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
        ) -> torch.Tensor:
            found = choose(logits, numbers, rows)
            found[line] = (found[line] + by) % VOCAB if line == 0 else found[line] + by
            return found

        return prove_choice(choose_wrongly, VOCAB, torch.float32, CPU)

    def choose_anything(
        logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
    ) -> torch.Tensor:
        return choose(logits, numbers, rows).nan_to_num()

    assert damaged(0, 1) > NUM_PROVEN // 2
    assert damaged(1, 0.01) > NUM_PROVEN // 2
    assert damaged(1, 0.0) == 0
    assert prove_choice(choose_anything, VOCAB, torch.float32, CPU) >= 5


def test_a_processor_has_no_such_kernels() -> None:
    assert select_choice(VOCAB, torch.float32, CPU) == (None, None)
