"""The way of own kernels inside transformers' modules: linears, norms, gated MLPs and attention.

All of them or none: torch's threads and those of the kernels would take the cores from each other.
A model is taken if every parameter in it belongs to a layer of a kind that is recognised.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from transformers import PreTrainedModel

from workers.model.adapters import AdaptableModule, AdapterRows, ModuleAdapters, current_rows
from workers.model.attention import Stretch, positions_of
from workers.model.kv_cache import SlotCache
from workers.model.modules import children_of, linear_of, rms_norm_of, run_model
from workers.model.native.binding import Engine, Places

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
"""What those of :data:`workers.model.native.binding.ACTIVATIONS` compute."""

_MLP_TOLERANCE = 0.05
"""Largest difference, relative to the largest output, that bfloat16 explains in one MLP."""


class OperationsForward:
    """Implements :class:`workers.model.runner.Forward` with a model from :func:`swap_modules`."""

    name = "operations"

    def __init__(self, model: PreTrainedModel, engine: Engine, cache: SlotCache) -> None:
        self._model = model
        self._engine = engine
        self._cache = cache
        self.adapters = ModuleAdapters(model)

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        layout = _NativeLayout(self._engine, self._cache, stretches)
        positions = positions_of(stretches, self._cache.device)
        with self.adapters.computing(stretches):
            return run_model(self._model, layout, tokens, positions, rows)


def unrecognised_module(model: PreTrainedModel) -> str | None:
    """The class of a module whose parameters no operation here takes, if there is one."""
    for _, _, module in children_of(model):
        has_own = any(True for _ in module.parameters(recurse=False))
        if has_own and not isinstance(module, torch.nn.Embedding) and not _is_recognised(module):
            return type(module).__name__
    return None


def swap_modules(model: PreTrainedModel, engine: Engine) -> None:
    """Put the operations of ``engine`` into ``model``; each original is given up on the way.

    Logits come out in float32.
    """
    head = model.get_output_embeddings()
    for parent, name, module in list(children_of(model)):
        mlp = _gated_mlp(module, engine)
        if mlp is not None:
            setattr(parent, name, mlp)
    for parent, name, module in list(children_of(model)):
        dtype = torch.float32 if module is head else torch.bfloat16
        operation = _operation(module, engine, dtype)
        if operation is not None:
            setattr(parent, name, operation)


class _NativeLayout:
    """Implements :class:`workers.model.attention.Layout` on the kernels."""

    def __init__(self, engine: Engine, cache: SlotCache, stretches: Sequence[Stretch]) -> None:
        self._engine = engine
        self._cache = cache
        self._places = Places(stretches)

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
        return self._engine.attend(
            self._places,
            self._cache.layer(layer),
            query,
            key,
            value,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
        )


class _Linear(torch.nn.Module):
    def __init__(
        self, engine: Engine, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._engine = engine
        self._packed = engine.pack(weight, bias)
        self._dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._engine.linear(self._packed, x, dtype=self._dtype)


class _RMSNorm(torch.nn.Module):
    def __init__(self, engine: Engine, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._engine = engine
        self._weight = weight.float().contiguous()
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._engine.rms_norm(x, self._weight, self._eps)


class _LayerNorm(torch.nn.Module):
    def __init__(self, engine: Engine, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self._engine = engine
        floats = {name: p.detach().float().contiguous() for name, p in norm.named_parameters()}
        self._weight, self._bias = floats.get("weight"), floats.get("bias")
        self._eps = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._engine.layer_norm(x, self._weight, self._bias, self._eps)


class _GatedMLP(AdaptableModule):
    def __init__(
        self,
        engine: Engine,
        gate: tuple[torch.Tensor, torch.Tensor | None],
        up: tuple[torch.Tensor, torch.Tensor | None],
        down: tuple[torch.Tensor, torch.Tensor | None],
        activation: str,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._gate_up = engine.pack_gated(gate[0], up[0], gate[1], up[1])
        self._down = engine.pack(*down)
        self._activation = activation
        self._path: str | None = None

    def adapt(self, path: str, name: str) -> None:  # noqa: ARG002 - each is looked for in a step
        self._path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = current_rows()
        if rows is not None and self._path is not None:
            return self._forward_adapted(x, rows, self._path)
        return self._engine.gated_mlp(self._gate_up, self._down, self._activation, x)

    def _forward_adapted(self, x: torch.Tensor, rows: AdapterRows, path: str) -> torch.Tensor:
        both = rows.delta(f"{path}.gate_up_proj", x)
        if both is None:
            none = x.new_zeros((*x.shape[:-1], self._gate_up.num_outputs))
            gate, up = (rows.delta(f"{path}.{name}_proj", x) for name in ("gate", "up"))
            gate, up = none if gate is None else gate, none if up is None else up
        else:
            gate, up = both.chunk(2, -1)
        gated = self._engine.gate(self._gate_up, self._activation, x, gate, up)
        output = self._engine.linear(self._down, gated)
        delta = rows.delta(f"{path}.down_proj", gated)
        return output if delta is None else output + delta


def _is_recognised(module: torch.nn.Module) -> bool:
    return (
        linear_of(module) is not None
        or type(module) is torch.nn.LayerNorm
        or rms_norm_of(module) is not None
    )


def _operation(
    module: torch.nn.Module, engine: Engine, dtype: torch.dtype
) -> torch.nn.Module | None:
    linear = linear_of(module)
    if linear is not None:
        return _Linear(engine, *linear, dtype)
    if type(module) is torch.nn.LayerNorm:
        return _LayerNorm(engine, module)
    norm = rms_norm_of(module)
    return None if norm is None else _RMSNorm(engine, *norm)


def _gated_mlp(module: torch.nn.Module, engine: Engine) -> torch.nn.Module | None:
    """One operation for the whole of ``module``, if that computes what a gated MLP does."""
    children = dict(module.named_children())
    down = linear_of(children.pop("down_proj", module))
    halves = _gate_and_up(children)
    names = [name for name in map(_activation, children.values()) if name is not None]
    if down is None or halves is None or len(names) != 1:
        return None
    gate, up = halves
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, gate[0].shape[1]), generator=generator).to(gate[0].dtype)
    expected = module(x)
    computed = _ACTIVATIONS[names[0]](F.linear(x, *gate)) * F.linear(x, *up)
    difference = (F.linear(computed, *down) - expected).abs().max()
    if not difference <= _MLP_TOLERANCE * expected.abs().max():
        return None
    return _GatedMLP(engine, gate, up, down, names[0])


def _gate_and_up(
    children: dict[str, torch.nn.Module],
) -> (
    tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]] | None
):
    """Taken out of ``children``: two linears, or one whose outputs are those of both."""
    if both := children.pop("gate_up_proj", None):
        linear = linear_of(both)
        if linear is None:
            return None
        weight, bias = linear
        gates, ups = weight.chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return (gates, gate_bias), (ups, up_bias)
    modules = (children.pop("gate_proj", None), children.pop("up_proj", None))
    gate, up = (None if module is None else linear_of(module) for module in modules)
    return None if gate is None or up is None else (gate, up)


def _activation(module: torch.nn.Module) -> str | None:
    """Its name among ours, by what it computes."""
    x = torch.linspace(-6.0, 6.0, 97)
    try:
        computed = module(x)
    except Exception:  # noqa: BLE001 - whatever it is, it is no activation
        return None
    for name, activation in _ACTIVATIONS.items():
        if torch.allclose(computed, activation(x), atol=1e-6):
            return name
    return None
