"""LoRA adapters for the whole step in one call: their weights in the layout that it reads.

A model's layer is four packed weights, queries, keys and values being one of them and gate and up
another. What an adapter adds to one of these is one A, whose rows are those of all the linears in
it, and one B per linear in tiles of 16 outputs, as section 8 of kernels.cpp says.
"""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere

from workers.model.adapters import AdapterWeights, LowRank
from workers.model.attention import Stretch

_RANKS_TOGETHER = 4
_STEP = 32
"""Inputs that the kernels read at once; a block of a weight has as many outputs."""

_WEIGHTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linears of each packed weight of a layer, in the order of ``kQkv`` and so on."""


class _Expand(ctypes.Structure):
    _fields_ = [("tiles", ctypes.c_void_p), ("first", ctypes.c_int), ("rank", ctypes.c_int)]


class _LowRank(ctypes.Structure):
    _fields_ = [("shrink", ctypes.c_void_p), ("rank", ctypes.c_int), ("parts", _Expand * 3)]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the form of the kernels; ``address`` is good for as long as this lives."""

    address: int
    kept: tuple[object, ...]


class _Memory:
    """One piece of memory on pages of 2 MiB where the system has them, handed out in the order in
    which a step reads.
    """

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._all = torch.frombuffer(self._map, dtype=torch.bfloat16)
        self._used = 0

    def take(self, tensor: torch.Tensor) -> int:
        """The address of a copy in bfloat16, at the start of a cache line."""
        place = self._all[self._used : self._used + tensor.numel()]
        place.view(tensor.shape).copy_(tensor)
        self._used += -(-tensor.numel() // _STEP) * _STEP
        return place.data_ptr()


class StepAdapters:
    """Implements :class:`workers.model.adapters.AdapterHost`."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._held: dict[str, PackedAdapter] = {}

    def convert(self, weights: AdapterWeights) -> PackedAdapter:
        linears = [
            [weights.parts.get(f"model.layers.{layer}.{name}") for name in names]
            for layer in range(self._num_layers)
            for names in _WEIGHTS
        ]
        memory = _Memory(sum(map(_num_bytes, linears)))
        array = (_LowRank * len(linears))(*[_pack(parts, memory) for parts in linears])
        return PackedAdapter(ctypes.addressof(array), (array, memory))

    def put(self, version: str, converted: PackedAdapter) -> None:
        self._held[version] = converted

    def drop(self, version: str) -> None:
        self._held.pop(version, None)

    def addresses(self, stretches: Sequence[Stretch]) -> list[int | None] | None:
        """For :meth:`workers.model.native.binding.Step.run`."""
        if not any(stretch.adapter for stretch in stretches):
            return None
        held = self._held
        return [held[s.adapter].address if s.adapter else None for s in stretches]


def _num_bytes(linears: list[LowRank | None]) -> int:
    """Of :func:`_pack`, at most."""
    sizes = [
        _round_up(part.shrink.shape[0], _RANKS_TOGETHER)
        * (_round_up(part.shrink.shape[1], _STEP) + _round_up(part.expand.shape[0], _STEP))
        for part in linears
        if part is not None
    ]
    return 2 * sum(sizes)


def _pack(linears: list[LowRank | None], memory: _Memory) -> _LowRank:
    """Of one packed weight."""
    present = [linear for linear in linears if linear is not None]
    if not present:
        return _LowRank()
    shrinks = torch.cat([_padded(part.shrink, _RANKS_TOGETHER, _STEP) for part in present])
    packed = _LowRank(shrink=memory.take(shrinks), rank=len(shrinks))
    first = 0
    for number, linear in enumerate(linears):
        if linear is not None:
            expand = _padded(linear.expand, _STEP, _RANKS_TOGETHER)
            num_outputs, rank = expand.shape
            tiles = expand.view(num_outputs // 16, 16, rank // 2, 2).permute(0, 2, 1, 3)
            packed.parts[number] = _Expand(memory.take(tiles), first, rank)
            first += rank
    return packed


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """With zeros to multiples of ``rows`` and ``columns``."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
