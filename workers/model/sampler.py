"""Choosing tokens: one batch of logits, every row with its own parameters.

Stages: :mod:`workers.model.processors` change the scores; :mod:`workers.model.warpers` find what a
drawn row keeps; a race draws from that. Greedy rows take the best of the processed scores. The
log-probability of a choice, and those of the likeliest tokens beside it, are taken after all of
this, as in TGI: they are those of what is kept, which sums to one.

A row's result depends on its logits, its parameters, its seed and its position, never on its
neighbours in the batch or on the process: on a processor to the last bit. The kernels do the same
much faster (:mod:`workers.model.native.sampler`); this is for machines and devices without them,
and what they are held to. On CUDA :mod:`workers.model.choice_kernels` choose in rows that nothing
changes or narrows, as most are.

Noise is a hash of (seed, position, index), so any worker draws the same. The choice is an
exponential race, ``argmax(p / Exp(1))``, in two rounds: between blocks of the vocabulary by their
mass, then inside the block that won. That is the categorical distribution, exactly, for a hundredth
of the noise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from common.messages import TopTokens
from workers.model.noise import exponential_noise, noise_key
from workers.model.processors import SamplingRow, process
from workers.model.warpers import BLOCK, Band, HeatedRows, Limits, find_bands, weigh

__all__ = ["Sampler", "Samples", "SamplesToCome", "SamplingRow", "sample"]


_BLOCKS_AT_ONCE = 1024
"""So many, 512 KiB, stay in the processor's cache while their mass is computed."""


@dataclass(frozen=True, slots=True)
class Samples:
    """One entry per row; where ``finite`` is False, tokens, logprobs and tops mean nothing."""

    tokens: list[int]
    logprobs: list[float]
    finite: list[bool]
    tops: list[TopTokens | None]
    """None where the row asks for none. Only tokens that are kept: there may be fewer."""
    exhausted: list[bool]
    """Where a mask or bans left nothing to choose. Nothing is wrong with such logits, but
    ``finite`` is False here, too."""


Sampler = Callable[[torch.Tensor, Sequence[SamplingRow]], Samples]
""":func:`sample`, or what does the same in another way."""

PlainChoice = Callable[[torch.Tensor, list[int], Sequence[SamplingRow]], torch.Tensor]
"""Chooses in plain rows, which take the best of all tokens or draw from all, at a temperature.

Takes the logits of a whole batch, the numbers of such rows in it, and these rows; returns
``[3, rows]`` float64: tokens, log-probabilities, not finite where the logits are not, and the best
scores. Tokens are of the vocabulary whatever the logits are.
"""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What some rows were chosen from."""

    rows: HeatedRows
    band: Band
    log_total: torch.Tensor
    """``[rows, 1]``: a heated score less this is a log-probability."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The choices of some rows of a batch."""

    numbers: list[int]
    """Which rows of the batch."""
    found: torch.Tensor
    """As of a :data:`PlainChoice`."""
    kept: _Kept | None = None
    """None where nobody asks for it."""


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Samples:
    """Choose one token per row of ``logits``, ``[rows, vocabulary]`` of any float type.

    Rows without ``do_sample`` take the best token (the first of equals); processors apply to them,
    temperature and the other warpers do not. ``logits`` may be overwritten.
    """
    return SamplesToCome(logits, rows).samples()


class SamplesToCome:
    """As :func:`sample`, in two parts: what is asked of the device, and what comes of it.

    Between them, a device that computes by itself need not be waited for.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        choose_plainly: PlainChoice | None = None,
    ) -> None:
        self._rows = rows
        self._chosen = _choose(logits, rows, choose_plainly)
        parts: list[torch.Tensor] = []
        for group in self._chosen:
            parts.append(group.found)
            asking, count = _asking(group, rows)
            if asking and group.kept is not None:
                parts += _likeliest(group.kept, asking, count)
        # One copy from the device, where each would wait for all that was asked of it before.
        flat = [part.flatten().double() for part in parts]
        numbers = torch.cat(flat) if len(flat) > 1 else flat[0]
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def tokens(self, rows: list[int]) -> torch.Tensor:
        """What is chosen for some of the rows, by their numbers: ``[len(rows)]`` of float64, on
        the device.
        """
        groups = [group.found[0] for group in self._chosen]
        tokens = torch.cat(groups) if len(groups) > 1 else groups[0]
        order = [number for group in self._chosen for number in group.numbers]
        if rows == order:
            return tokens
        places = {number: place for place, number in enumerate(order)}
        index = torch.tensor([places[row] for row in rows], pin_memory=tokens.is_cuda)
        return tokens[index.to(tokens.device, non_blocking=True)]

    def samples(self) -> Samples:
        """Waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        num_rows = len(self._rows)
        numbers = iter(self._numbers.tolist())
        samples = Samples(
            tokens=[0] * num_rows,
            logprobs=[0.0] * num_rows,
            finite=[False] * num_rows,
            tops=[None] * num_rows,
            exhausted=[False] * num_rows,
        )
        for group in self._chosen:
            _read(samples, group, self._rows, numbers)
        return samples


def _choose(
    logits: torch.Tensor, rows: Sequence[SamplingRow], choose_plainly: PlainChoice | None
) -> list[_Chosen]:
    plain = [i for i, row in enumerate(rows) if _is_plain(row)] if choose_plainly else []
    chosen: list[_Chosen] = []
    if choose_plainly and plain:
        plain_rows = rows if len(plain) == len(rows) else [rows[i] for i in plain]
        chosen.append(_Chosen(plain, choose_plainly(logits, plain, plain_rows)))
    if len(plain) < len(rows):
        are_plain = set(plain)
        others = [i for i in range(len(rows)) if i not in are_plain]
        chosen += _choose_among(logits, others, [rows[i] for i in others])
    return chosen


def _is_plain(row: SamplingRow) -> bool:
    """Whether processors and warpers leave its scores alone, and only its choice is told."""
    sampling = row.sampling
    if row.counts is not None or row.mask is not None or row.banned or sampling.top_logprobs:
        return False
    if sampling.logit_bias or sampling.watermark is not None:
        return False
    return not sampling.do_sample or not (
        sampling.top_k or sampling.top_p < 1.0 or sampling.min_p or sampling.typical_p < 1.0
    )


def _choose_among(
    logits: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
) -> list[_Chosen]:
    """Choose in rows of any kind; ``numbers`` says which of ``logits`` they are."""
    if len(numbers) < len(logits):
        logits = logits[_index(numbers, len(logits), logits.device)]
    blocks = _blocks(logits)
    process(blocks.view(len(rows), -1), rows, logits.shape[1])
    greedy = [i for i, row in enumerate(rows) if not row.sampling.do_sample]
    drawn = [i for i, row in enumerate(rows) if row.sampling.do_sample]
    chosen: list[_Chosen] = []
    if greedy:
        chosen.append(_chosen([numbers[i] for i in greedy], *_take_best(blocks, greedy)))
    if drawn:
        found = _draw(blocks, drawn, [rows[i] for i in drawn])
        chosen.append(_chosen([numbers[i] for i in drawn], *found))
    return chosen


def _chosen(
    numbers: list[int], kept: _Kept, tokens: torch.Tensor, logprobs: torch.Tensor
) -> _Chosen:
    best = kept.rows.best[:, 0]
    found = torch.stack((tokens.double(), logprobs.double(), best.double()))
    return _Chosen(numbers, found, kept)


def _blocks(logits: torch.Tensor) -> torch.Tensor:
    """``[rows, blocks, 128]`` in float32, padded with -inf."""
    scores = logits.float()
    padding = -scores.shape[1] % BLOCK
    if padding:
        scores = F.pad(scores, (0, padding), value=float("-inf"))
    return scores.contiguous().view(scores.shape[0], -1, BLOCK)


def _take_best(
    blocks: torch.Tensor, numbers: list[int]
) -> tuple[_Kept, torch.Tensor, torch.Tensor]:
    """What the rows were chosen from, the tokens, and their log-probabilities."""
    index = _index(numbers, len(blocks), blocks.device)
    tokens, best, log_total = _most_likely(blocks, index)
    heated = HeatedRows(blocks, index, best[:, None], torch.ones_like(log_total))
    band = Band.open(len(numbers), blocks.device)
    return _Kept(heated, band, log_total), tokens, -log_total[:, 0]


def _index(numbers: list[int], num_rows: int, device: torch.device) -> torch.Tensor:
    """``numbers`` on the device. All rows are counted there: a copy would wait for what the device
    still computes, and keep it idle while the rest is asked for.
    """
    if len(numbers) == num_rows:
        return torch.arange(num_rows, device=device)
    return torch.tensor(numbers, device=device)


def _most_likely(
    blocks: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best token of each row, its score, and the logarithm of the sum of ``exp(x - best)``."""
    blocks = blocks if len(index) == len(blocks) else blocks[index]
    # Twice over a small part: torch's argmax of a row takes as long as ten of its maxima.
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).argmax(-1)
    tokens = block * BLOCK + inside
    best = blocks.flatten(1).gather(1, tokens)[:, 0]
    return tokens[:, 0], best, -blocks.flatten(1).log_softmax(-1).gather(1, tokens)


def _draw(
    blocks: torch.Tensor, numbers: list[int], rows: Sequence[SamplingRow]
) -> tuple[_Kept, torch.Tensor, torch.Tensor]:
    """As :func:`_take_best`."""
    samplings, device = [row.sampling for row in rows], blocks.device
    limits = Limits.of_samplings(samplings, blocks.shape[1] * BLOCK, device)
    index = _index(numbers, len(blocks), device)
    block_max = blocks.amax(-1)[index]
    heated = HeatedRows(blocks, index, block_max.amax(-1, keepdim=True), limits.temperature)
    heated_max = heated.heat(block_max)
    band = find_bands(heated, heated_max, samplings, limits)
    keys = torch.tensor([[noise_key(row.sampling.seed, row.position)] for row in rows])
    tokens, scores, log_total = _race(heated, heated_max, band, keys.to(device))
    return _Kept(heated, band, log_total), tokens, scores - log_total[:, 0]


def _race(
    rows: HeatedRows, heated_max: torch.Tensor, band: Band, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw from what ``band`` holds: token, its heated score, the logarithm of the mass of all.

    Only blocks that may hold a kept token are looked at, which for most rows are few.
    """
    pairs, numbers = _blocks_to_look_at(heated_max, band)
    mass = torch.zeros_like(heated_max)
    mass[pairs, numbers] = _masses(rows, band, pairs, numbers)
    race = torch.zeros(mass.shape, dtype=torch.float64, device=mass.device)
    race[pairs, numbers] = mass[pairs, numbers] / exponential_noise(keys[pairs, 0], numbers)
    block = race.argmax(-1)
    heated = rows.take(torch.arange(rows.num_rows, device=mass.device), block)
    weights = weigh(heated).mul_(band.holds(heated))
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=mass.device)
    # Behind the block numbers, so that the second round draws noise of its own.
    inside = (weights / exponential_noise(keys, (1 << 32) + ids)).argmax(-1, keepdim=True)
    # In order: neither how many blocks were looked at nor the number of threads changes it.
    log_total = mass.cumsum(-1)[:, -1:].log()
    log_total = torch.where(rows.best.isfinite(), log_total, math.nan)
    return ids.gather(1, inside)[:, 0], heated.gather(1, inside)[:, 0], log_total


def _masses(
    rows: HeatedRows, band: Band, pairs: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """``[pairs]``: what ``band`` holds of blocks, by the row and number of each."""
    at_once = _BLOCKS_AT_ONCE if pairs.device.type == "cpu" else max(1, len(pairs))
    masses: list[torch.Tensor] = []
    for some, these in zip(pairs.split(at_once), numbers.split(at_once), strict=True):
        heated = rows.take(some, these)
        masses.append(weigh(heated).mul_(band.of(some).holds(heated)).sum(-1))
    return torch.cat(masses)


def _blocks_to_look_at(heated_max: torch.Tensor, band: Band) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and number of each block that may hold something kept, and of one block at least."""
    if heated_max.device.type != "cpu":  # to look at all costs less than to wait for their number
        every = torch.arange(heated_max.numel(), device=heated_max.device)
        return every // heated_max.shape[1], every % heated_max.shape[1]
    is_kept = heated_max >= band.lowest
    is_kept[:, 0] = True
    rows, numbers = is_kept.nonzero(as_tuple=True)
    return rows, numbers


def _likeliest(kept: _Kept, asking: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[asking, count]`` each: tokens, best first, and log-probabilities; -inf if not kept.

    Of equals the lower ids come first.
    """
    index = torch.tensor(asking, device=kept.log_total.device)
    rows, band = kept.rows.of(index), kept.band.of(index)
    heated_max = rows.heat(rows.blocks[rows.index].amax(-1))
    # Only typical-p takes away from above; for the others the best of a block need not be kept.
    for i in (~band.radius.isposinf())[:, 0].nonzero():
        whole = rows.of(i).whole()
        heated_max[i] = (whole + band.of(i).holds(whole).log()).view(1, -1, BLOCK).amax(-1)
    numbers = _first(heated_max, min(count, rows.num_blocks))
    every = torch.arange(len(asking), device=index.device).repeat_interleave(numbers.shape[1])
    candidates = rows.take(every, numbers.flatten()).view(len(asking), -1)
    ids = (numbers[..., None] * BLOCK + torch.arange(BLOCK, device=index.device)).flatten(1)
    order = ids.argsort(-1)
    candidates, ids = candidates.gather(1, order), ids.gather(1, order)
    held = candidates + band.holds(candidates).log()
    first = _first(held, count)
    return ids.gather(1, first), held.gather(1, first) - kept.log_total[index]


def _first(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` best of each row stand, best first; of equals the first.

    What is ranked is the order of a float32 in the upper half of an int64 (IEEE 754 orders as its
    bits do, negative numbers the other way round), and the place, backwards, in the lower half.
    """
    bits = values.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    places = torch.arange(values.shape[1], device=values.device)
    return ((ordered << 32) - places).topk(count).indices


def _asking(group: _Chosen, rows: Sequence[SamplingRow]) -> tuple[list[int], int]:
    """Who of ``group`` asks for the likeliest tokens, by numbers in it, and the most of them."""
    if group.kept is None:
        return [], 0
    counts = [rows[i].sampling.top_logprobs for i in group.numbers]
    asking = [k for k, count in enumerate(counts) if count > 0]
    return asking, min(max(counts), group.kept.rows.num_blocks * BLOCK)


def _read(
    samples: Samples, group: _Chosen, rows: Sequence[SamplingRow], numbers: Iterator[float]
) -> None:
    """Enter the results of ``group`` as :class:`SamplesToCome` lined them up."""
    size = len(group.numbers)
    tokens, logprobs, best = (list(islice(numbers, size)) for _ in range(3))
    for i, token, logprob, score in zip(group.numbers, tokens, logprobs, best, strict=True):
        samples.tokens[i] = int(token)
        samples.logprobs[i] = logprob
        samples.finite[i] = math.isfinite(logprob)
        samples.exhausted[i] = rows[i].is_restricted and score == -math.inf
    asking, count = _asking(group, rows)
    ids, tops = ([list(islice(numbers, count)) for _ in asking] for _ in range(2))
    for k, likeliest, scores in zip(asking, ids, tops, strict=True):
        i = group.numbers[k]
        pairs = zip(likeliest, scores, strict=True)
        kept = [(int(id), score) for id, score in pairs if math.isfinite(score)]
        samples.tops[i] = kept[: rows[i].sampling.top_logprobs]
