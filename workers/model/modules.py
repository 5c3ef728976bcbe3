"""The way that needs nothing but torch: any decoder of transformers, by its own modules."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from workers.model.attention import StepLayout, Stretch, running
from workers.model.kv_cache import SlotCache


class ModulesForward:
    """Implements :class:`workers.model.runner.Forward`.

    The model must have been loaded with :data:`workers.model.attention.ATTENTION`.
    """

    name = "modules"

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        layout = StepLayout(self._cache, stretches)
        with running(layout):
            output = self._model(
                input_ids=torch.tensor([tokens], device=self._cache.device),
                position_ids=layout.positions[None],
                use_cache=False,
                # Never empty: not every kernel takes a matrix without rows.
                logits_to_keep=torch.tensor(rows or [0], device=self._cache.device),
            )
        return output.logits[0, : len(rows)]
