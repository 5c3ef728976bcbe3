"""LoRA adapters at run time: read from the store, held by a way of computing, added row by row.

What an adapter adds to a linear is ``scale * B(A(x))`` (Hu et al., arXiv 2106.09685), for the rows
of its own generations only. Here is how modules of torch do it, by hooks on their linears; the way
of whole steps has :mod:`workers.model.native.adapters`.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from common.failures import Failure
from common.models.adapters import WEIGHTS_FILE, AdapterStore
from workers.model.attention import Stretch

LinearShapes = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each linear that an adapter may change, by its path in the model."""


class LowRank(NamedTuple):
    """What is added to one linear: ``expand @ (shrink @ x)``."""

    shrink: torch.Tensor
    """A, ``[rank, inputs]``."""
    expand: torch.Tensor
    """B times the scale, ``[outputs, rank]``."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One adapter as it was read: its parts by the paths of their linears."""

    version: str
    parts: Mapping[str, LowRank]


class AdapterHost(Protocol):
    """Where a way of computing holds adapters."""

    def convert(self, weights: AdapterWeights) -> Any:
        """Bring an adapter into the form of this way; from any thread."""
        ...

    def put(self, version: str, converted: Any) -> None:
        """Hold it from the next step on; takes no time to speak of."""
        ...

    def drop(self, version: str) -> None:
        """Hold it no longer. No later step may name it."""
        ...


class StoredAdapters:
    """Implements :class:`workers.engine.port.Adapters` for one model in one way."""

    def __init__(
        self,
        store: AdapterStore,
        host: AdapterHost,
        linears: LinearShapes,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._store = store
        self._host = host
        self._linears = linears
        self._dtype = dtype
        self._device = device

    def read(self, version: str) -> Any:
        path, manifest = self._store.get(version)
        try:
            tensors = load_file(path / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise _unfit(version, f"{WEIGHTS_FILE} cannot be read: {error}") from error
        parts = {
            module: self._part(version, module, scale, tensors)
            for module, scale in manifest.scales.items()
        }
        with torch.inference_mode():
            return self._host.convert(AdapterWeights(version, parts))

    def put(self, version: str, adapter: Any) -> None:
        self._host.put(version, adapter)

    def drop(self, version: str) -> None:
        self._host.drop(version)

    def _part(
        self, version: str, module: str, scale: float, tensors: Mapping[str, torch.Tensor]
    ) -> LowRank:
        """The scale goes into B before it is rounded."""
        shape = self._linears.get(module)
        if shape is None:
            raise _unfit(version, f"the model has no linear {module} that can be adapted")
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        if (b.shape[0], a.shape[1]) != shape:
            found = f"{b.shape[0]} x {a.shape[1]}"
            raise _unfit(version, f"{module} is {shape[0]} x {shape[1]} and not {found}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _unfit(version, f"{module} holds numbers that are not finite")
        place: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        return LowRank(a.to(**place), (b.float() * scale).to(**place))


class ModuleAdapters:
    """Implements :class:`AdapterHost` for a model whose linears are modules, by hooks on them.

    A linear is hooked when the first adapter comes that changes it; who has none pays nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._held: dict[str, AdapterWeights] = {}
        self._hooked: set[str] = set()

    def convert(self, weights: AdapterWeights) -> AdapterWeights:
        return weights

    def put(self, version: str, converted: AdapterWeights) -> None:
        for path in converted.parts.keys() - self._hooked:
            self._hooked.add(path)
            self._hook(path)
        self._held[version] = converted

    def drop(self, version: str) -> None:
        self._held.pop(version, None)

    @contextmanager
    def computing(self, stretches: Sequence[Stretch]) -> Generator[None]:
        """While this is open, hooks in this thread add what the adapters of ``stretches`` say."""
        token = _current.set(self._rows(stretches))
        try:
            yield
        finally:
            _current.reset(token)

    def _hook(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        owner = self._model.get_submodule(parent)
        if isinstance(owner, AdaptableModule):
            owner.adapt(parent, name)
        else:
            owner.get_submodule(name).register_forward_hook(partial(_add, path))

    def _rows(self, stretches: Sequence[Stretch]) -> "AdapterRows | None":
        rows: dict[str, list[int]] = {}
        first = 0
        for stretch in stretches:
            if stretch.adapter:
                rows.setdefault(stretch.adapter, []).extend(range(first, first + stretch.count))
            first += stretch.count
        if not rows:
            return None
        return AdapterRows(
            [(self._held[v], torch.tensor(n, device=self._model.device)) for v, n in rows.items()]
        )


class AdaptableModule(torch.nn.Module):
    """One module in the place of several linears, which asks itself for what is added to each."""

    def adapt(self, path: str, name: str) -> None:
        """From now on adapters may change the linear ``name`` of the module at ``path``."""
        raise NotImplementedError


class AdapterRows:
    """Which rows of the step that runs belong to which adapter."""

    def __init__(self, groups: list[tuple[AdapterWeights, torch.Tensor]]) -> None:
        self._groups = groups

    def delta(self, path: str, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to the linear at ``path`` for inputs ``[…, inputs]``; None: nothing."""
        delta: torch.Tensor | None = None
        flat = x.reshape(-1, x.shape[-1])
        for adapter, rows in self._groups:
            part = adapter.parts.get(path)
            if part is None:
                continue
            if delta is None:
                delta = x.new_zeros((len(flat), len(part.expand)))
            delta[rows] = flat[rows] @ part.shrink.t() @ part.expand.t()
        return None if delta is None else delta.view(*x.shape[:-1], -1)


def current_rows() -> AdapterRows | None:
    """Those of the step that runs in this thread; None where no row has an adapter."""
    return _current.get()


_current: ContextVar[AdapterRows | None] = ContextVar("headrace_adapter_rows", default=None)


def _add(
    path: str, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    """The forward hook of the linear at ``path``."""
    rows = _current.get()
    delta = None if rows is None else rows.delta(path, inputs[0])
    return None if delta is None else output + delta


def _unfit(version: str, reason: str) -> Failure:
    return Failure("ADAPTER_LOAD_FAILED", f"The adapter {version} cannot be used: {reason}.")
