"""The key/value cache of a GPU: pages of neighbouring positions that any sequence may hold.

A page belongs to whoever the policy lends it to (:mod:`workers.engine.places`), or to several
sequences with one prefix. Nothing is ever scrubbed: attention reads only positions that have been
written, so what an earlier owner left behind, be it NaN, is never met.
"""

from collections.abc import Mapping

import torch

from workers.model.kv_cache import LayerShape


class PagedCache:
    """Keys and values as ``[page, position, head, size]`` per layer, all memory taken at once.

    Args:
        layers: what each layer stores per position.
        num_pages: pages per layer; page ``p`` of a sequence is page ``p`` in every layer.
        page_size: positions in a page.
        dtype: type of what is stored, that of the model.
        device: where it lies.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, shape in layers.items():
            lead = (num_pages, page_size, shape.num_heads)
            self._layers[layer] = (
                torch.empty((*lead, shape.key_size), dtype=dtype, device=device),
                torch.empty((*lead, shape.value_size), dtype=dtype, device=device),
            )

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, not copied."""
        return self._layers[layer]


def page_bytes(layers: Mapping[int, LayerShape], page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers."""
    numbers = sum(
        shape.num_heads * (shape.key_size + shape.value_size) for shape in layers.values()
    )
    return numbers * page_size * dtype.itemsize
