"""Which kernels choose tokens for plain rows: those of the device, if they choose as the sampler.

Without them :mod:`workers.model.sampler` does the same in plain torch, in many small operations.
"""

import math

import torch

from common.messages import Sampling
from workers.model.processors import SamplingRow
from workers.model.sampler import PlainChoice, SamplesToCome, sample

NUM_PROVEN = 32
"""Choices that a proof compares."""


def select_choice(
    vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[PlainChoice | None, str | None]:
    """The kernels for ``device``, proven and with that compiled; or why there are none where there
    could be.
    """
    if device.type != "cuda":
        return None, None
    try:
        # Triton comes with torch for CUDA, and only there.
        from workers.model.choice_kernels import choose_plainly

        num_differing = prove_choice(choose_plainly, vocab_size, dtype, device)
    except Exception as error:  # noqa: BLE001 - tokens can be chosen without kernels, too
        return None, f"{type(error).__name__}: {error}"
    if num_differing:
        return None, f"{num_differing} of {NUM_PROVEN} choices differ."
    return choose_plainly, None


def prove_choice(
    choose_plainly: PlainChoice, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """How many of its choices differ from those of :func:`workers.model.sampler.sample`.

    Among them are equals, rows that are not finite, and rows beside it that are not plain.
    """
    num_rows = NUM_PROVEN // 2
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn((num_rows, vocab_size), generator=generator, device=device) * 3.0
    logits[1, 7], logits[2, 9], logits[3, 9:] = math.nan, math.inf, -math.inf
    logits[4:6], logits[6:8] = 0.0, -math.inf
    greedy = [SamplingRow(Sampling(1, seed=0), 0)] * num_rows
    mixed = [SamplingRow(_asking(row), position=row) for row in range(num_rows)]
    with torch.inference_mode():
        return sum(_num_differing(choose_plainly, logits.to(dtype), r) for r in (greedy, mixed))


def _asking(row: int) -> Sampling:
    """Every other row is drawn, from few tokens where it is one of the last."""
    return Sampling(
        max_new_tokens=1,
        seed=row,
        do_sample=row % 2 == 1,
        temperature=(0.5, 1.0, 1.7)[row % 3],
        top_k=4 if row > 12 else 0,
    )


def _num_differing(
    choose_plainly: PlainChoice, logits: torch.Tensor, rows: list[SamplingRow]
) -> int:
    """Log-probabilities may differ by what rounding brings."""
    expected = sample(logits.clone(), rows)
    got = SamplesToCome(logits.clone(), rows, choose_plainly).samples()
    count = 0
    for row, is_finite in enumerate(expected.finite):
        logprobs = got.logprobs[row], expected.logprobs[row]
        is_equal = not is_finite or (
            got.tokens[row] == expected.tokens[row]
            and math.isclose(*logprobs, rel_tol=1e-4, abs_tol=1e-4)
        )
        count += got.finite[row] != is_finite or not is_equal
    return count
