"""Attention over the slot cache, plugged into unmodified models of transformers.

A step is one flat row of tokens. First come decode rows, one token each and ordered by slot, then
stretches of several tokens of one slot. The model calls :func:`attend` per layer; what belongs to
whom it learns from the :class:`StepLayout` that :func:`running` has set.

No mask interface is registered: transformers then builds no mask, and ours come from the layout.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from transformers import AttentionInterface

from workers.model.kv_cache import LayerShape, SlotCache

ATTENTION = "headrace"
"""Name of this attention among those of transformers."""

_CALL_COST_TOKENS = 256
"""One more attention call costs about as much as this many cached tokens read in vain."""


class Stretch(msgspec.Struct, frozen=True):
    """Neighbouring positions of one sequence, computed in one step."""

    slot: int
    start: int
    count: int
    pages: tuple[int, ...] = ()
    """Paged caches only: the pages of the sequence, enough for ``start + count`` positions."""
    adapter: str = ""
    """Name of the LoRA adapter that computes these positions with the model; empty: none."""

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class _SlotRun:
    """Decode rows of neighbouring slots with similar lengths: one attention call."""

    first_row: int
    first_slot: int
    lengths: list[int]
    """Positions that each row sees, its own included."""


class Layout(Protocol):
    """What :func:`attend` asks in each layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...


class StepLayout:
    """Which token of a step belongs where.

    ``stretches`` stand in the order of the step's tokens: those of one token first, by slot.
    """

    def __init__(self, cache: SlotCache, stretches: Sequence[Stretch]) -> None:
        self._cache = cache
        self._decodes = [stretch for stretch in stretches if stretch.count == 1]
        self._prefills = [stretch for stretch in stretches if stretch.count > 1]
        self._runs = _slot_runs(self._decodes)
        self._row_indices: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    @cached_property
    def positions(self) -> torch.Tensor:
        """As :func:`positions_of` says."""
        return positions_of((*self._decodes, *self._prefills), self._cache.device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Store keys and values, then let each token see its sequence up to itself.

        All are ``[tokens, heads, size]``; the answer is too, with the query's heads.
        """
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        num_decodes = len(self._decodes)
        if num_decodes:
            index = self._row_index(self._cache.num_heads(layer))
            self._cache.write_rows(layer, index, key[:num_decodes], value[:num_decodes])
        for number, run in enumerate(self._runs):
            rows = slice(run.first_row, run.first_row + len(run.lengths))
            mask = self._decode_mask(number, window)
            output[rows] = self._attend_run(layer, run, query[rows], mask, scale, softcap)
        first = num_decodes
        for number, stretch in enumerate(self._prefills):
            rows = slice(first, first + stretch.count)
            first = rows.stop
            self._cache.write_stretch(layer, stretch.slot, stretch.start, key[rows], value[rows])
            mask = self._prefill_mask(number, window)
            output[rows] = self._attend_stretch(layer, stretch, query[rows], mask, scale, softcap)
        return output

    def _attend_run(
        self,
        layer: int,
        run: _SlotRun,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        num_rows, num_heads, size = query.shape
        keys, values = self._cache.read(layer, run.first_slot, num_rows, max(run.lengths))
        # Query heads that share a key head take the place of query tokens: no key is read twice.
        grouped = query.reshape(num_rows, keys.shape[1], -1, size)
        return masked_attention(grouped, keys, values, mask, scale, softcap).reshape(
            num_rows, num_heads, -1
        )

    def _attend_stretch(
        self,
        layer: int,
        stretch: Stretch,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        keys, values = self._cache.read(layer, stretch.slot, 1, stretch.end)
        heads_first = query.transpose(0, 1)[None]
        return masked_attention(heads_first, keys, values, mask, scale, softcap)[0].transpose(0, 1)

    def _row_index(self, num_heads: int) -> torch.Tensor:
        if num_heads not in self._row_indices:
            slots = self._tensor([stretch.slot for stretch in self._decodes])
            positions = self.positions[: len(self._decodes)]
            self._row_indices[num_heads] = self._cache.row_index(num_heads, slots, positions)
        return self._row_indices[num_heads]

    def _decode_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """``[rows, 1, 1, positions]``, or None where every row sees all that is read."""
        key = (number, window)
        if key not in self._masks:
            lengths = self._runs[number].lengths
            longest = max(lengths)
            is_needed = min(lengths) < longest or (window is not None and longest > window)
            last = self._tensor(lengths)[:, None] - 1
            mask = visible_positions(last, longest, window)[:, None, None] if is_needed else None
            self._masks[key] = mask
        return self._masks[key]

    def _prefill_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """``[tokens, positions]``: causal, within the window."""
        key = (-1 - number, window)
        if key not in self._masks:
            stretch = self._prefills[number]
            positions = torch.arange(stretch.start, stretch.end, device=self._cache.device)[:, None]
            self._masks[key] = visible_positions(positions, stretch.end, window)
        return self._masks[key]

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._cache.device)


def positions_of(stretches: Iterable[Stretch], device: torch.device) -> torch.Tensor:
    """``[tokens]``: position of each token in its own sequence."""
    positions = [position for s in stretches for position in range(s.start, s.end)]
    return torch.tensor(positions, dtype=torch.int64, device=device)


class LayerProbe:
    """Computes nothing; notes what each layer would store. See :func:`running`."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windowed: set[int] = set()
        """Layers that see a sliding window only."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,  # noqa: ARG002 - one signature for all layouts
        window: int | None,
        softcap: float | None,  # noqa: ARG002
    ) -> torch.Tensor:
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        if window is not None:
            self.windowed.add(layer)
        return query.new_zeros(*query.shape[:2], value.shape[-1])


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - always None: see the module's docstring
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; tensors are ``[1, heads, tokens, size]``."""
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    layer = cast("int", module.layer_idx)
    output = current_layout().attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output[None], None


_current: ContextVar[Layout] = ContextVar("headrace_step_layout")

AttentionInterface.register(ATTENTION, attend)


def current_layout() -> Layout:
    """The layout of the step that runs in this thread."""
    return _current.get()


@contextmanager
def running(layout: Layout) -> Generator[None]:
    """While this is open, models in this thread attend as ``layout`` says."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """``query`` is ``[batch, heads, queries, size]``; True in ``mask`` means visible."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    repeats = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values


def visible_positions(positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """``[…, length]``: whether a token at ``positions`` (``[…, 1]``) sees each cached position."""
    cached = torch.arange(length, device=positions.device)
    visible = cached <= positions
    return visible if window is None else visible & (cached > positions - window)


def _slot_runs(decodes: Sequence[Stretch]) -> list[_SlotRun]:
    """Group rows by neighbouring slots, as long as padding to one length costs less than a call."""
    runs: list[_SlotRun] = []
    for row, stretch in enumerate(decodes):
        length = stretch.end
        if runs:
            run = runs[-1]
            count = len(run.lengths)
            longest = max(run.lengths)
            padding = max(0, longest - length) + max(0, length - longest) * count
            if stretch.slot == run.first_slot + count and padding <= _CALL_COST_TOKENS:
                run.lengths.append(length)
                continue
        runs.append(_SlotRun(row, stretch.slot, [length]))
    return runs
