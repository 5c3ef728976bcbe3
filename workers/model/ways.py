"""Which way computes a model on this machine: the best one first, each proven before it is taken.

Every way is compared with the modules of transformers on a few tokens. One that does not fit, fails
or disagrees is refused with its reason, and the next is tried on a model loaded anew.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.failures import Failure
from workers.model.adapters import LinearShapes
from workers.model.kv_cache import LayerShape, SlotCache
from workers.model.loader import (
    TOLERANCE,
    adaptable_linears,
    check_attention,
    difference,
    inspect_layers,
    position_limit,
    vocabulary_size,
)
from workers.model.modules import ModulesForward, pack_modules
from workers.model.native import binding, step
from workers.model.native.sampler import NativeSampler
from workers.model.operations import OperationsForward, swap_modules, unrecognised_module
from workers.model.runner import Forward
from workers.model.sampler import Sampler, sample

Bind = Callable[[SlotCache], Forward]
"""What a way becomes: a forward for any cache, on weights that exist once."""

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: "quota period" in microseconds, or "max period" (Linux, cgroup-v2.rst)."""


@dataclass(frozen=True, slots=True)
class TakenModel:
    """A model in the hands of a way."""

    bind: Bind
    sampler: Sampler = sample


class WayRefusedError(Exception):
    """A way does not take this model here; the message completes "not this way: …"."""


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A loaded model in the way that was chosen."""

    way: str
    bind: Bind
    sampler: Sampler
    num_threads: int
    layers: Mapping[int, LayerShape]
    linears: LinearShapes
    """Those that adapters may change."""
    vocab_size: int
    max_tokens: int
    """Longest sequence that the model itself allows."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """Better ways and why they were not taken."""


def prepare_model(
    load: Callable[[], PreTrainedModel], *, wish: str, num_threads: int, quantize: bool = False
) -> ReadyModel:
    """Load a model and choose how to compute it.

    ``wish`` is ``auto`` or the name of a way. ``num_threads`` 0 is what the machine gives. With
    ``quantize`` only ways are taken that hold weights in 8 bits.

    Raises:
        Failure: MODEL_LOAD_FAILED, if it cannot run here, or not in the way that was asked for.
    """
    num_threads = num_threads or available_threads()
    torch.set_num_threads(num_threads)
    model: PreTrainedModel | None = load()
    layers = inspect_layers(model)
    expected = check_attention(model, layers)
    vocab_size, max_tokens = vocabulary_size(model), position_limit(model.config)
    linears, dtype = adaptable_linears(model), model.dtype
    refused: dict[str, str] = {}
    for way in WAYS if wish == "auto" else (wish,):
        model = load() if model is None else model
        try:
            taken = WAYS[way](model, layers, num_threads, quantize)
            model = None  # in whatever form, it belongs to the way now
            off_by = difference(taken.bind, expected, layers, dtype)
            if not off_by <= TOLERANCE[dtype]:
                raise WayRefusedError(f"its logits are off by {off_by:.1%}")  # noqa: TRY301
        except WayRefusedError as refusal:
            refused[way] = str(refusal)
        except Exception as error:  # noqa: BLE001 - a way that fails is one that does not fit
            refused[way] = f"{type(error).__name__}: {error}"
            model = None
        else:
            gc.collect()  # modules refer to one another, and would keep what was replaced
            return ReadyModel(
                way,
                taken.bind,
                taken.sampler,
                num_threads,
                layers,
                linears,
                vocab_size,
                max_tokens,
                refused,
            )
        torch.set_num_threads(num_threads)
    reasons = "; ".join(f"{way}: {reason}" for way, reason in refused.items())
    raise Failure("MODEL_LOAD_FAILED", f"There is no way to compute this model here. {reasons}")


def available_threads() -> int:
    """As many as torch would take: the cores, less if the environment or a container says so."""
    return max(1, min(torch.get_num_threads(), _cpu_quota()))


def _cpu_quota() -> int:
    """Cores that the container may use, rounded up: torch itself would start one thread per core
    of the whole machine.
    """
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):
        return 1 << 16


def _step(
    model: PreTrainedModel, _: Mapping[int, LayerShape], num_threads: int, quantize: bool
) -> TakenModel:
    kernels = _kernels_for(model)
    if (reason := step.unfit_reason(model)) is not None:
        raise WayRefusedError(reason)
    engine = binding.Engine(kernels, num_threads, quantize=quantize)
    packed = step.PackedModel(model, engine)
    torch.set_num_threads(1)
    return TakenModel(partial(step.StepForward, packed), NativeSampler(engine))


def _operations(
    model: PreTrainedModel, layers: Mapping[int, LayerShape], num_threads: int, quantize: bool
) -> TakenModel:
    kernels = _kernels_for(model)
    if (name := unrecognised_module(model)) is not None:
        raise WayRefusedError(f"{name} is not recognised")
    num_heads: int = model.config.num_attention_heads
    for shape in layers.values():
        if not binding.can_attend(num_heads, shape.num_heads, shape.key_size, shape.value_size):
            raise WayRefusedError(f"attention of {num_heads} heads on {shape} is not supported")
    engine = binding.Engine(kernels, num_threads, quantize=quantize)
    swap_modules(model, engine)
    torch.set_num_threads(1)
    return TakenModel(partial(OperationsForward, model, engine), NativeSampler(engine))


def _modules(
    model: PreTrainedModel, _: Mapping[int, LayerShape], __: int, quantize: bool
) -> TakenModel:
    _refuse_to_quantize(quantize)
    if model.device.type != "cpu":
        raise WayRefusedError("the device is no processor")
    pack_modules(model)
    return TakenModel(partial(ModulesForward, model), _sampler_beside_torch(model))


def _plain(
    model: PreTrainedModel, _: Mapping[int, LayerShape], __: int, quantize: bool
) -> TakenModel:
    _refuse_to_quantize(quantize)
    return TakenModel(partial(ModulesForward, model), _sampler_beside_torch(model))


def _refuse_to_quantize(quantize: bool) -> None:
    """Widened in memory for each product, such weights would be slower than others in torch."""
    if quantize:
        raise WayRefusedError("only the native kernels compute with quantized weights")


def _sampler_beside_torch(model: PreTrainedModel) -> Sampler:
    """On one thread, the caller's: two pools would take the cores from each other."""
    found = binding.load()
    if model.device.type != "cpu" or isinstance(found, binding.Unavailable):
        return sample
    return NativeSampler(binding.Engine(found, 1))


def _kernels_for(model: PreTrainedModel) -> binding.Library:
    """The library, where it may compute this model at all."""
    if model.device.type != "cpu":
        raise WayRefusedError("the device is no processor")
    if model.dtype != torch.bfloat16:
        raise WayRefusedError(f"native kernels compute in bfloat16, not in {model.dtype}")
    found = binding.load()
    if isinstance(found, binding.Unavailable):
        raise WayRefusedError(f"native kernels are off: {found.reason}")
    return found


WAYS: Mapping[str, Callable[[PreTrainedModel, Mapping[int, LayerShape], int, bool], TakenModel]] = {
    "step": _step,
    "operations": _operations,
    "modules": _modules,
    "plain": _plain,
}
"""Best first. Each raises :class:`WayRefusedError` before it touches the model, which is its own
afterwards."""
