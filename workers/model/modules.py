"""The way that needs nothing but torch: any decoder of transformers, by its own modules.

On a processor, linear layers get their weights in the order in which oneDNN reads them, and the
norms of the RMS kind become one call each. Nothing else of a model is touched.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from workers.model.adapters import ModuleAdapters
from workers.model.attention import Layout, StepLayout, Stretch, running
from workers.model.kv_cache import SlotCache

_PACKED_FOR_ROWS = 32
"""Rows of input that oneDNN orders a weight for. Equal to smaller hints up to 16 rows, and 10 %
better at 32 and above."""


class ModulesForward:
    """Implements :class:`workers.model.runner.Forward`.

    The model must have been loaded with :data:`workers.model.attention.ATTENTION`.
    """

    name = "modules"

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self._model = model
        self._cache = cache
        self.adapters = ModuleAdapters(model)

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        layout = StepLayout(self._cache, stretches)
        with self.adapters.computing(stretches):
            return run_model(self._model, layout, tokens, layout.positions, rows)


def run_model(
    model: PreTrainedModel,
    layout: Layout,
    tokens: list[int],
    positions: torch.Tensor,
    rows: list[int],
) -> torch.Tensor:
    """Logits of ``rows`` among ``tokens``, with attention as ``layout`` says."""
    with running(layout):
        output = model(
            input_ids=torch.tensor([tokens], device=positions.device),
            position_ids=positions[None],
            use_cache=False,
            # Never empty: not every kernel takes a matrix without rows.
            logits_to_keep=torch.tensor(rows or [0], device=positions.device),
        )
    return output.logits[0, : len(rows)]


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight lies as oneDNN reads it; ``weight`` is ``[out, in]``."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._bias = bias
        reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - has no public name
        self._packed = reorder(weight.detach().contiguous(), _PACKED_FOR_ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x, self._packed, self._bias, "none", [], ""
        )


class FusedRMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` (Zhang and Sennrich 2019), rounded at the end."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._weight = weight.detach()
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self._weight.dtype:
            return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
        return F.rms_norm(x.float(), self._weight.shape, self._weight, self._eps).to(x.dtype)


def pack_modules(model: PreTrainedModel) -> None:
    """Replace what is faster otherwise; each original is given up before the next is copied."""
    for parent, name, module in list(children_of(model)):
        packed = _packed(module)
        if packed is not None:
            setattr(parent, name, packed)


def children_of(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, name, child) of every module below ``model``."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def linear_of(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """``([out, in], [out])`` of a linear layer, GPT-2's transposed kind included; else None."""
    if type(module) is torch.nn.Linear:
        return module.weight, module.bias
    if type(module) is Conv1D:
        return module.weight.t(), module.bias
    return None


def rms_norm_of(module: torch.nn.Module) -> tuple[torch.Tensor, float] | None:
    """``([size], eps)`` of an RMS norm, recognised by what it computes; else None.

    The class differs from architecture to architecture, and Gemma's adds one to its weight: what
    comes back here is the factor that is applied.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or list(module.children()):
        return None
    weight = parameters["weight"]
    if weight.ndim != 1:
        return None
    for offset in (0.0, 1.0):
        if _computes_rms_norm(module, offset, eps):
            factor = weight.detach().float() + offset if offset else weight.detach()
            return factor, eps
    return None


def _packed(module: torch.nn.Module) -> torch.nn.Module | None:
    linear = linear_of(module)
    if linear is not None:
        return PackedLinear(*linear)
    norm = rms_norm_of(module)
    return None if norm is None else FusedRMSNorm(*norm)


def _computes_rms_norm(module: torch.nn.Module, offset: float, eps: float) -> bool:
    """Ask a copy in float32 with another weight; numbers this small show where ``eps`` goes."""
    probe = copy.deepcopy(module).float()
    weight = probe.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn((3, len(weight)), generator=generator) * eps**0.5
    try:
        computed = probe(x)
    except Exception:  # noqa: BLE001 - whatever it is, it is no norm
        return False
    expected = F.rms_norm(x, weight.shape, weight + offset, eps)
    return isinstance(computed, torch.Tensor) and torch.allclose(computed, expected, atol=1e-5)
