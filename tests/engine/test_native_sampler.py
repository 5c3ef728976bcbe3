"""The kernels choose what torch chooses, whatever a row asks for, and the same in any company.

That both are right is shown in test_sampler.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.messages import Sampling
from ops.bench.features import FEATURES
from tests.support.engines import ready_model
from tests.support.native_kernels import library
from tests.support.tiny_model import build_tiny_model
from workers.engine.counts import TokenCounts
from workers.model.native.binding import Engine
from workers.model.native.binding import SamplingRow as Asked
from workers.model.native.sampler import NativeSampler
from workers.model.processors import SamplingRow
from workers.model.sampler import sample

VOCABULARIES = [5, 128, 1000, 12_000]

MASKED: Sequence[dict[str, Any]] = ({}, {"do_sample": True, "typical_p": 0.9, "top_logprobs": 3})

EVERYTHING = {name: value for asked in FEATURES for name, value in asked.items()}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(library("installed"), 3)
    yield engine
    engine.close()


def rows_of_all_kinds(vocab_size: int, position: int) -> list[SamplingRow]:
    """One for each set of parameters in the benchmark, some with masks, one with everything."""
    rng = np.random.default_rng(position)
    counts = TokenCounts([1, 2, 2])
    for token in rng.integers(vocab_size, size=9):
        counts.append(int(token))
    words = rng.integers(-(2**31), 2**31, -(-vocab_size // 32)).astype(np.int32)
    rows: list[SamplingRow] = []
    for number, asked in enumerate((*FEATURES, *MASKED, EVERYTHING)):
        sampling = Sampling(max_new_tokens=64, seed=2**63 + number, **asked)
        mask = words if number >= len(FEATURES) else None
        banned = sampling.stop_token_ids
        rows.append(SamplingRow(sampling, position, counts, [3, 1], 4, mask, banned))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_every_row_gets_what_torch_gives(
    engine: Engine, vocab_size: int, dtype: torch.dtype
) -> None:
    """The same tokens, choices and likeliest; log-probabilities up to the rounding of a sum."""
    generator = torch.Generator().manual_seed(vocab_size)
    for position in range(12):
        rows = rows_of_all_kinds(vocab_size, position)
        logits = torch.randn(len(rows), vocab_size, generator=generator) * (0.2 + position / 3)
        logits[3, 0] = float("nan") if position == 5 else 0.0
        logits = logits.to(dtype)
        before = logits.clone()
        got, expected = NativeSampler(engine)(logits, rows), sample(before.clone(), rows)
        assert logits.equal(before) or position == 5
        assert got.finite == expected.finite
        assert got.exhausted == expected.exhausted
        for i in np.flatnonzero(got.finite):
            assert got.tokens[i] == expected.tokens[i]
            assert got.logprobs[i] == pytest.approx(expected.logprobs[i], abs=3e-5)
            assert ids_of(got.tops[i]) == ids_of(expected.tops[i])


def ids_of(tops: list[tuple[int, float]] | None) -> list[int] | None:
    return None if tops is None else [id for id, _ in tops]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_processors_change_every_score_as_in_torch(engine: Engine, vocab_size: int) -> None:
    """Seen in the log-probabilities of the whole vocabulary."""
    rows = [
        SamplingRow(
            msgspec.structs.replace(
                row.sampling, do_sample=False, top_logprobs=vocab_size, logit_bias={0: 2.0, 4: -3.0}
            ),
            row.position,
            row.counts,
            row.draft,
            row.previous,
            row.mask,
        )
        for row in rows_of_all_kinds(vocab_size, 7)
    ]
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(1))
    got, expected = NativeSampler(engine)(logits, rows), sample(logits.clone(), rows)
    for ours, theirs in zip(got.tops, expected.tops, strict=True):
        assert ours is not None
        assert dict(ours) == pytest.approx(dict(theirs or ()), abs=1e-5)


ORDERS = {
    "rising": torch.arange(6000) / 700.0,
    "falling": torch.arange(6000).flip(0) / 700.0,
    "rising and falling": (torch.arange(6000) - 3000).abs() / -400.0,
    "sawtooth": torch.arange(6000) % 128 / 20.0,
    "all but one alike": torch.arange(6000).eq(4321).float(),
    "two that count": torch.arange(6000).remainder(3000).eq(1).float() * 90.0,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize(
    "asked",
    [{"top_k": 45}, {"top_k": 3000}, {"top_p": 0.997}, {"typical_p": 0.8}, {"top_p": 0.0}],
    ids=str,
)
def test_the_end_of_what_is_kept_is_found_in_any_order(
    engine: Engine, order: torch.Tensor, asked: dict[str, Any]
) -> None:
    sampling = Sampling(
        max_new_tokens=1, seed=0, do_sample=True, temperature=1.3, top_logprobs=6000, **asked
    )
    rows, logits = [SamplingRow(sampling, 0)], order[None]
    (got,), (expected,) = NativeSampler(engine)(logits, rows).tops, sample(logits, rows).tops
    assert ids_of(got) == ids_of(expected)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_row_is_the_same_to_the_bit_on_any_thread_in_any_company(
    engine: Engine, vocab_size: int
) -> None:
    rows = rows_of_all_kinds(vocab_size, 3)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(rows), vocab_size, generator=generator) * 3.0
    choose = NativeSampler(engine)
    together = choose(logits, rows)
    for _ in range(5):
        assert choose(logits, rows) == together
    for i, row in enumerate(rows):
        alone = choose(logits[i : i + 1], [row])
        assert alone.tokens == [together.tokens[i]]
        assert alone.logprobs == [together.logprobs[i]]
        assert alone.tops == [together.tops[i]]


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("step", torch.bfloat16),
        ("operations", torch.bfloat16),
        ("modules", torch.float32),
        ("plain", torch.float32),
    ],
)
def test_every_way_on_a_processor_has_the_kernels_choose(
    way: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In torch all would come out alike, a batch of 32 just some 20 ms later."""
    path = build_tiny_model(tmp_path, head_dim=32)  # the step takes no smaller heads
    assert isinstance(ready_model(path, way, dtype).sampler, NativeSampler)


def test_one_engine_takes_vocabularies_of_different_sizes_in_turn(engine: Engine) -> None:
    choose = NativeSampler(engine)
    for vocab_size in (1000, 300, 12_000, 300):
        logits = torch.zeros(2, vocab_size)
        logits[:, vocab_size - 2] = 1.0
        row = SamplingRow(Sampling(max_new_tokens=1, seed=0, top_logprobs=2), 0)
        got = choose(logits, [row, row])
        assert got.tokens == [vocab_size - 2] * 2
        assert ids_of(got.tops[0]) == [vocab_size - 2, 0]


@pytest.mark.parametrize(
    ("logits", "num_rows", "complaint"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 2, "float32 or bfloat16"),
        (torch.zeros(8, 2).T, 2, "contiguous"),
        (torch.zeros(2, 8), 3, "3 rows for logits of 2"),
    ],
)
def test_logits_that_the_kernels_cannot_read_are_refused(
    engine: Engine, logits: torch.Tensor, num_rows: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        engine.sample(logits, (Asked * num_rows)())
