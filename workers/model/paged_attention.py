"""Attention over pages, plugged into unmodified models of transformers.

A step is one flat row of tokens: decode rows first, one token each, then stretches of several
tokens of one sequence, cut into tiles. All that says which token belongs where lies in tensors on
the device, so that one recording of a step (a CUDA graph) serves whoever is in it.

On CUDA the work is done by :mod:`workers.model.paged_kernels`; elsewhere by plain torch, which says
the same in the simplest words and is what the kernels are tested against. Torch's own
``varlen_attn`` takes block tables from 2.13 on, but neither soft caps nor float32, and would be a
second path to keep right: there is one, which also stores keys and values in the same launch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import library
from transformers import AttentionInterface

from workers.model.attention import current_layout, masked_attention, visible_positions

if TYPE_CHECKING:
    from workers.model.paged_cache import PagedCache

PAGED_ATTENTION = "headrace_paged"
"""Name of this attention among those of transformers."""

TILE_TOKENS = 32
"""Most tokens of a tile: with four query heads to a key head, 128 rows of one matrix product."""


@dataclass(frozen=True, slots=True)
class Masking:
    """How one layer scores: None is the default of each (``size ** -0.5``, no window, no cap)."""

    scale: float | None
    window: int | None
    softcap: float | None


class Kernels(Protocol):
    """The two halves of a step's attention; both store ``key`` and ``value`` first.

    ``query``, ``key`` and ``value`` are ``[tokens, heads, size]``, ``cache`` is a layer's keys and
    values, ``table`` is ``[sequences, pages]`` int32, ``output`` is ``[tokens, query heads, size]``
    and contiguous.
    """

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        """Token ``i`` is the last of ``lengths[i]`` positions of sequence ``i`` of ``table``.

        A length of zero is padding: nothing is stored, and the row's output means nothing.
        """
        ...

    def attend_tiles(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tiles: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        """``tiles`` is ``[tiles, 4]`` int32: (sequence, first token, its position, tokens)."""
        ...


class PagedLayout:
    """Implements :class:`workers.model.attention.Layout` over pages.

    Args:
        cache: where keys and values live.
        lengths: of the step's first tokens, the decode rows; see :class:`Kernels`.
        tiles: of all other tokens.
        table: pages of each sequence in the step, decode rows first.
    """

    def __init__(
        self,
        cache: "PagedCache",
        lengths: torch.Tensor,
        tiles: torch.Tensor,
        table: torch.Tensor,
    ) -> None:
        self._cache = cache
        self._lengths = lengths
        self._tiles = tiles
        self._table = table
        self._kernels = select_kernels(cache.device)

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
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        cache, masking = self._cache.layer(layer), Masking(scale, window, softcap)
        num_rows = len(self._lengths)
        if num_rows:
            self._kernels.attend_rows(
                query[:num_rows],
                key[:num_rows],
                value[:num_rows],
                cache,
                self._lengths,
                self._table,
                output,
                masking,
            )
        if len(self._tiles):
            self._kernels.attend_tiles(
                query, key, value, cache, self._tiles, self._table, output, masking
            )
        return output


class PlainKernels:
    """Implements :class:`Kernels` in plain torch, a sequence at a time; for any device."""

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        for row, length in enumerate(lengths.tolist()):
            if length == 0:
                output[row] = 0
                continue
            token = slice(row, row + 1)
            _store(cache, table[row], length - 1, key[token], value[token])
            output[token] = _attend_plainly(query[token], cache, table[row], length - 1, masking)

    def attend_tiles(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tiles: torch.Tensor,
        table: torch.Tensor,
        output: torch.Tensor,
        masking: Masking,
    ) -> None:
        for sequence, first, position, count in tiles.tolist():
            tokens = slice(first, first + count)
            pages = table[sequence]
            _store(cache, pages, position, key[tokens], value[tokens])
            output[tokens] = _attend_plainly(query[tokens], cache, pages, position, masking)


def select_kernels(device: torch.device) -> Kernels:
    if device.type != "cuda":
        return PlainKernels()
    # Triton comes with torch for CUDA, and only there.
    from workers.model.paged_kernels import TritonKernels

    return TritonKernels()


def _store(
    cache: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    start: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    places = _places(cache[0], pages, start, start + len(key))
    for held, new in zip(cache, (key, value), strict=True):
        held.flatten(0, 1)[places] = new


def _attend_plainly(
    query: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    start: int,
    masking: Masking,
) -> torch.Tensor:
    """``query`` are the positions from ``start`` on; nothing behind the last of them is read."""
    end = start + len(query)
    places = _places(cache[0], pages, 0, end)
    keys, values = (held.flatten(0, 1)[places].transpose(0, 1)[None] for held in cache)
    positions = torch.arange(start, end, device=query.device)[:, None]
    mask = visible_positions(positions, end, masking.window)
    heads_first = query.transpose(0, 1)[None]
    attended = masked_attention(heads_first, keys, values, mask, masking.scale, masking.softcap)
    return attended[0].transpose(0, 1)


def _places(keys: torch.Tensor, pages: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Where positions lie among all positions of all pages."""
    page_size = keys.shape[1]
    positions = torch.arange(start, end, device=pages.device)
    return pages[positions // page_size].long() * page_size + positions % page_size


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - always None: no mask is registered
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls; tensors are ``[1, heads, tokens, size]``."""
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    output = _attend_in_layout(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cast("int", module.layer_idx),
        scaling,
        sliding_window,
        softcap,
    )
    return output[None], None


@library.custom_op("headrace::attend", mutates_args=())
def _attend_in_layout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One operation to the compiler, which must not look inside: the layout differs per step.

    It changes the cache, too, but nobody else reads that, so the compiler need not know.
    """
    return current_layout().attend(
        layer, query, key, value, scale=scale, window=window, softcap=softcap
    )


@_attend_in_layout.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    del key, layer, scale, window, softcap
    return query.new_empty(*query.shape[:2], value.shape[-1])


AttentionInterface.register(PAGED_ATTENTION, attend)
