"""LoRA adapters for the whole step in one call: their weights in the layout that it reads.

A model's layer is four packed weights, queries, keys and values being one of them and gate and up
another. What an adapter adds to one of these is one A, whose rows are those of all the linears in
it, and one B per linear in tiles of 16 outputs, as section 8 of kernels.cpp says.
"""

import ctypes
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


class StepAdapters:
    """Implements :class:`workers.model.adapters.AdapterHost`."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._held: dict[str, PackedAdapter] = {}

    def convert(self, weights: AdapterWeights) -> PackedAdapter:
        kept: list[object] = []
        packed = [
            _pack([weights.parts.get(f"model.layers.{layer}.{name}") for name in names], kept)
            for layer in range(self._num_layers)
            for names in _WEIGHTS
        ]
        array = (_LowRank * len(packed))(*packed)
        return PackedAdapter(ctypes.addressof(array), (array, *kept))

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


def _pack(linears: list[LowRank | None], kept: list[object]) -> _LowRank:
    """Of one packed weight; tensors go into ``kept``."""
    present = [linear for linear in linears if linear is not None]
    if not present:
        return _LowRank()
    shrinks = torch.cat([_padded(part.shrink, _RANKS_TOGETHER, _STEP) for part in present])
    packed = _LowRank(shrink=_address(shrinks, kept), rank=len(shrinks))
    first = 0
    for number, linear in enumerate(linears):
        if linear is not None:
            expand = _padded(linear.expand, _STEP, _RANKS_TOGETHER)
            num_outputs, rank = expand.shape
            tiles = expand.view(num_outputs // 16, 16, rank // 2, 2).permute(0, 2, 1, 3)
            packed.parts[number] = _Expand(_address(tiles, kept), first, rank)
            first += rank
    return packed


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """With zeros to multiples of ``rows`` and ``columns``."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))


def _address(tensor: torch.Tensor, kept: list[object]) -> int:
    tensor = tensor.to(torch.bfloat16).contiguous()
    kept.append(tensor)
    return tensor.data_ptr()
