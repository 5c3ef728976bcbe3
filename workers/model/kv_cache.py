"""The key/value cache: one contiguous stretch of positions per slot and layer.

On a processor, attention reads a run of neighbouring slots in place; gathering pages first would
cost two to three times the attention itself.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps per position."""

    num_heads: int
    key_size: int
    value_size: int


class SlotCache:
    """Keys and values as ``[slot, head, position, size]`` per layer.

    Memory is reserved for every slot at full length but becomes real only where it is written, so
    ``num_slots * max_tokens`` may exceed what the machine has as long as the tokens in it do not.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_tokens = max_tokens
        self.device = device
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        for layer, shape in layers.items():
            lead = (num_slots, shape.num_heads, max_tokens)
            self._keys[layer] = _zeros((*lead, shape.key_size), dtype, device)
            self._values[layer] = _zeros((*lead, shape.value_size), dtype, device)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, ``[slot, head, position, size]``, contiguous."""
        return self._keys[layer], self._values[layer]

    def num_heads(self, layer: int) -> int:
        return self._keys[layer].shape[1]

    def row_index(
        self, num_heads: int, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Where the vectors of single tokens lie, for :meth:`write_rows`: ``[tokens * heads]``."""
        heads = torch.arange(num_heads, device=slots.device)
        rows = (slots[:, None] * num_heads + heads) * self.max_tokens + positions[:, None]
        return rows.flatten()

    def write_rows(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store tokens of any slots; ``keys`` and ``values`` are ``[tokens, heads, size]``."""
        for cache, new in ((self._keys[layer], keys), (self._values[layer], values)):
            cache.view(-1, cache.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))

    def write_stretch(
        self, layer: int, slot: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store neighbouring tokens of one slot; ``keys`` and ``values`` as in ``write_rows``."""
        end = start + keys.shape[0]
        self._keys[layer][slot, :, start:end] = keys.transpose(0, 1)
        self._values[layer][slot, :, start:end] = values.transpose(0, 1)

    def read(
        self, layer: int, first_slot: int, num_slots: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``length`` positions of neighbouring slots, not copied: ``[slots, heads, …]``.

        What lies behind the end of a shorter slot is old but finite, so a mask hides it.
        """
        slots = slice(first_slot, first_slot + num_slots)
        return self._keys[layer][slots, :, :length], self._values[layer][slots, :, :length]

    def copy(self, from_slot: int, to_slot: int, num_tokens: int) -> None:
        """Copy the first positions of one slot to another."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[to_slot, :, :num_tokens] = cache[from_slot, :, :num_tokens]

    def scrub(self, slot: int, start: int, end: int) -> None:
        """Overwrite positions with zeros: a mask does not hide NaN."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[slot, :, start:end] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory before they are written, where the system can do that."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
