"""Triton kernels that choose tokens straight from logits: the best, or one drawn from all of them.

What :mod:`workers.model.sampler` does in some twenty operations, for rows that nothing changes and
nothing narrows, takes two here: one looks at all logits once, a chunk of a row in each program, and
one settles each row from what was found of its chunks. The race between blocks and the one inside
the block that wins are those of the sampler, and so is the noise: both choose the same tokens.
"""

# Triton gives the language of its kernels no types, and exists on CUDA machines only.
# pyright: reportMissingImports=none, reportUntypedFunctionDecorator=none
# pyright: reportMissingParameterType=none, reportUnknownParameterType=none
# pyright: reportConstantRedefinition=none, reportIndexIssue=none
# ruff: noqa: N803 - constants in capitals

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from workers.model.noise import noise_key
from workers.model.processors import SamplingRow
from workers.model.warpers import BLOCK

_CHUNK = 4096
"""Logits of one program: a single row of 128,000 then has 32, and 128 rows have 4,000."""

_FOUND = 5
"""Numbers about each chunk."""


def choose_plainly(
    logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
) -> torch.Tensor:
    """A :data:`workers.model.sampler.PlainChoice` for CUDA."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = len(numbers), logits.shape[1]
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    chunks = logits.new_empty((num_rows, _FOUND, num_chunks), dtype=torch.float64)
    chosen = logits.new_empty((3, num_rows), dtype=torch.float64)
    is_asked = num_rows < len(logits) or any(row.sampling.do_sample for row in rows)
    asked = _asked(numbers, rows, logits.device) if is_asked else chosen
    _look[num_rows, num_chunks](
        logits,
        asked,
        chunks,
        logits.stride(0),
        vocab_size,
        IS_ASKED=is_asked,
        CHUNK=_CHUNK,
        BLOCK=BLOCK,
        FOUND=_FOUND,
        num_warps=4,
    )
    _settle[num_rows,](
        logits,
        asked,
        chunks,
        chosen,
        logits.stride(0),
        vocab_size,
        num_chunks,
        IS_ASKED=is_asked,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BLOCK=BLOCK,
        FOUND=_FOUND,
        num_warps=1,
    )
    return chosen


def _asked(numbers: list[int], rows: Sequence[SamplingRow], device: torch.device) -> torch.Tensor:
    """``[rows, 3]`` int64: number, key of the noise, bits of the temperature, 0.0 for the best."""
    asked = np.zeros((len(numbers), 3), dtype=np.int64)
    asked[:, 0] = numbers
    temperatures = asked.view(np.float64)
    for line, row in enumerate(rows):
        if row.sampling.do_sample:
            asked[line, 1] = noise_key(row.sampling.seed, row.position)
            temperatures[line, 2] = row.sampling.temperature
    on_host = torch.from_numpy(asked)
    on_host = on_host.pin_memory() if device.type == "cuda" else on_host
    return on_host.to(device, non_blocking=True)


@triton.jit
def _exponential(key, index):
    """:func:`workers.model.noise.exponential_noise`; both are uint64."""
    bits = key + (index + 1) * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    return -tl.log(((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16)


@triton.jit
def _look(
    logits,
    asked,
    chunks,
    row_stride,
    vocab_size,
    IS_ASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FOUND: tl.constexpr,
):
    """Of each chunk: its best score, where that is first, its mass, who wins its race, and where.

    The mass and the race are relative to the chunk's best score.
    """
    line = tl.program_id(0)
    chunk = tl.program_id(1)
    number = line.to(tl.int64)
    if IS_ASKED:
        number = tl.load(asked + line * 3)
    block = chunk * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scores = tl.load(
        logits + number * row_stride + ids, mask=ids < vocab_size, other=float("-inf")
    ).to(tl.float32)
    best = tl.max(tl.max(scores, 1), 0)
    first = tl.min(tl.min(tl.where(scores == best, ids, vocab_size), 1), 0)
    # Of nothing but -inf nothing is to come, not NaN; NaN itself stays in the mass.
    base = tl.where(best == float("-inf"), 0.0, best)
    heated = scores - base
    if IS_ASKED:
        temperature = tl.load(asked + line * 3 + 2).to(tl.float64, bitcast=True)
        heated /= tl.where(temperature > 0.0, temperature, 1.0).to(tl.float32)
    masses = tl.sum(tl.exp(heated), 1)
    num_chunks = tl.num_programs(1)
    found = chunks + line * FOUND * num_chunks + chunk
    tl.store(found, best.to(tl.float64))
    tl.store(found + num_chunks, first.to(tl.float64))
    tl.store(found + 2 * num_chunks, tl.sum(masses, 0).to(tl.float64))
    if IS_ASKED:
        key = tl.load(asked + line * 3 + 1).to(tl.uint64, bitcast=True)
        races = masses.to(tl.float64) / _exponential(key, block.to(tl.uint64))
        race = tl.max(races, 0)
        winner = tl.min(tl.where(races == race, block, vocab_size), 0)
        tl.store(found + 3 * num_chunks, race)
        tl.store(found + 4 * num_chunks, winner.to(tl.float64))


@triton.jit
def _settle(
    logits,
    asked,
    chunks,
    chosen,
    row_stride,
    vocab_size,
    num_chunks,
    IS_ASKED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    FOUND: tl.constexpr,
):
    """A row's token, its log-probability, which is not finite where the logits are not, and the
    best score. Whatever the logits are, the token is one of the vocabulary.
    """
    line = tl.program_id(0)
    num_lines = tl.num_programs(0)
    chunk = tl.arange(0, CHUNKS)
    is_chunk = chunk < num_chunks
    found = chunks + line * FOUND * num_chunks + chunk
    scores = tl.load(found, mask=is_chunk, other=float("-inf"))
    firsts = tl.load(found + num_chunks, mask=is_chunk, other=0.0).to(tl.int64)
    masses = tl.load(found + 2 * num_chunks, mask=is_chunk, other=0.0)
    best = tl.max(scores, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    temperature = tl.full([], 1.0, tl.float64)
    if IS_ASKED:
        temperature = tl.load(asked + line * 3 + 2).to(tl.float64, bitcast=True)
    fades = tl.exp((scores - base) / tl.where(temperature > 0.0, temperature, 1.0))
    logprob = -tl.log(tl.sum(masses * fades, 0))
    token = tl.min(tl.where(scores == best, firsts, vocab_size), 0)
    if IS_ASKED and temperature > 0.0:
        number = tl.load(asked + line * 3)
        key = tl.load(asked + line * 3 + 1).to(tl.uint64, bitcast=True)
        races = tl.load(found + 3 * num_chunks, mask=is_chunk, other=0.0) * fades
        winners = tl.load(found + 4 * num_chunks, mask=is_chunk, other=0.0).to(tl.int64)
        block = tl.min(tl.where(races == tl.max(races, 0), winners, 0x7FFFFFFF), 0)
        ids = tl.minimum(block, vocab_size // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        inside = tl.load(
            logits + number * row_stride + ids, mask=ids < vocab_size, other=float("-inf")
        )
        heated = (inside.to(tl.float64) - base) / temperature
        # Behind the block numbers, so that the second round draws noise of its own.
        races = tl.exp(heated) / _exponential(key, ids.to(tl.uint64) + (1 << 32))
        token = tl.min(tl.where(races == tl.max(races, 0), ids, vocab_size), 0)
        logprob += tl.sum(tl.where(ids == token, heated, 0.0), 0)
    tl.store(chosen + line, tl.minimum(token, vocab_size - 1).to(tl.float64))
    tl.store(chosen + num_lines + line, logprob)
    tl.store(chosen + 2 * num_lines + line, best)
