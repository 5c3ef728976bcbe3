"""One model over several devices: each rank holds its part of the large matrices, in plain modules.

transformers knows, architecture by architecture, what is cut and how (``tp_plan``), and loads of
each tensor only what a rank keeps. Its own forward passes around the cut modules are taken off
again: what they do is done here, in one collective each, by modules that hold the original. So a
linear stays a linear, to be packed, fused and adapted as on one device.

All ranks run the same steps in the same order; that is what collectives need, and all they need.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from common.failures import Failure
from workers.model.adapters import AdapterHost, AdapterWeights, LinearShapes, LowRank
from workers.model.loader import adaptable_linears, load_model

_JOIN_LIMIT = timedelta(hours=1)
"""For loading, where ranks may be minutes apart. A step has limits of its own."""

_GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})
_SPLIT_INPUT = frozenset({"rowwise_split_input", "rowwise_rep"})
_SUMMED = frozenset({"rowwise", "moe_tp_experts"})
_UNCHANGED = frozenset({"colwise", "replicated_with_grad_allreduce", "replicate"})
_OF_TENSORS = frozenset({"packed_colwise"})
_VOCABULARY = "embedding_rowwise"
"""Styles of transformers' plans, by what happens to what comes out of a module: parts are put
together, summed over the ranks (of an input that each cuts for itself, or that is cut already), or
left as they are; the last but one is of tensors in a module that has a style of its own."""

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def join_ranks(store: Path, rank: int, num_ranks: int, device: torch.device) -> None:
    """Meet all other ranks, which name the same ``store``, a file that does not exist yet.

    It must lie in a folder of this user alone: whoever can write it can join.
    """
    # On this machine alone: both would otherwise listen on the address of its name.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    os.environ["LOCAL_RANK"] = str(rank)  # by which transformers chooses the device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=distributed.FileStore(str(store), num_ranks),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=num_ranks,
        device_id=device if is_cuda else None,
        timeout=_JOIN_LIMIT,
    )


def check_shardable(path: Path, num_ranks: int) -> None:
    """Refuse what cannot be cut into so many parts before anything is loaded.

    Raises:
        Failure: MODEL_LOAD_FAILED, which names the type of the model.
    """
    config, plan = _plan_of(path)
    if not any("*" in name for name in plan):  # which stands for the numbers of layers
        raise _uncut(config, "transformers has no plan (tp_plan) for it")
    styles = set(plan.values())
    known = _GATHERED | _SPLIT_INPUT | _SUMMED | _UNCHANGED | _OF_TENSORS | {_VOCABULARY}
    if unknown := sorted(styles - known):
        raise _uncut(config, f"its plan has {unknown[0]}")
    if "colwise" not in styles:
        return
    num_heads: int = config.num_attention_heads
    num_key_heads: int = getattr(config, "num_key_value_heads", None) or num_heads
    if num_heads % num_ranks or num_key_heads % num_ranks:
        heads = f"it has {num_heads} attention heads on {num_key_heads} key heads"
        raise _uncut(config, f"{heads}, which cannot be dealt out evenly to {num_ranks}")


def _plan_of(path: Path) -> tuple[PreTrainedConfig, dict[str, str]]:
    """The configuration of its text, and how transformers would cut it: module or tensor, style."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise Failure("MODEL_LOAD_FAILED", f"{path.name}: {error}") from error
    return config.get_text_config(), model.tp_plan


def _uncut(config: PreTrainedConfig, reason: str) -> Failure:
    message = f"A model of type {config.model_type} cannot be spread over devices: {reason}."
    return Failure("MODEL_LOAD_FAILED", message)


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a linear is here, and the path of the module that computes it."""

    path: str
    inputs: slice
    outputs: slice


@dataclass(frozen=True, slots=True)
class LinearParts:
    """What adapters must know of a model that is cut."""

    linears: LinearShapes
    """Shapes of the whole linears, by their paths in the model as it was."""
    cuts: Mapping[str, Cut]
    """By the same paths; whoever is not named is here as a whole."""


def load_part(
    path: Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, LinearParts]:
    """Of the model in ``path`` the part of this rank; see :func:`workers.model.loader.load_model`.

    Raises:
        Failure: MODEL_LOAD_FAILED.
    """
    num_ranks = distributed.get_world_size()
    model = load_model(path, dtype=dtype, device=device, num_ranks=num_ranks)
    linears = adaptable_linears(model)
    return model, LinearParts(linears, use_plain_modules(model))


def use_plain_modules(model: PreTrainedModel) -> dict[str, Cut]:
    """Take transformers' forward passes off a model that it has cut, and put ours in their place.

    Raises:
        Failure: MODEL_LOAD_FAILED, for a module that is cut in a way nobody here knows.
    """
    kept: dict[torch.Tensor, torch.nn.Parameter] = {}
    cuts: dict[str, Cut] = {}
    for path, module in list(model.named_modules()):
        style = model.tp_plan.get(_LAYER_NUMBER.sub("*", path))
        has_parts = _keep_local_parts(module, kept)
        if style is None and not has_parts:
            continue
        vars(module).pop("forward", None)  # its class still has its own
        replacement = _replacement(module, style)
        if replacement is None and style not in _UNCHANGED:
            raise _uncut(model.config, f"{path} is cut as {style}")
        if isinstance(module, torch.nn.Linear):
            inner = path if replacement is None else f"{path}.inner"
            cuts[path] = _cut(module, inner, is_summed=isinstance(replacement, Summed))
        if replacement is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacement)
    return cuts


def _keep_local_parts(
    module: torch.nn.Module, kept: dict[torch.Tensor, torch.nn.Parameter]
) -> bool:
    """Whether ``module`` had parts of tensors; they are plain tensors now, shared as before."""
    has_parts = False
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter.data, DTensor):
            has_parts = True
            if parameter not in kept:
                local = parameter.data.to_local()
                kept[parameter] = torch.nn.Parameter(local, requires_grad=False)
            setattr(module, name, kept[parameter])
    return has_parts


def _replacement(module: torch.nn.Module, style: str | None) -> torch.nn.Module | None:
    """What computes with the part of ``module`` that is here; None where it does so itself."""
    if style == _VOCABULARY and isinstance(module, torch.nn.Embedding):
        return VocabularyPart(module)
    if style in _GATHERED and isinstance(module, torch.nn.Linear):
        return Gathered(module)
    if style in _SPLIT_INPUT and isinstance(module, torch.nn.Linear):
        return Summed(module, columns=_part(module.in_features))
    return Summed(module) if style in _SUMMED else None


def _cut(linear: torch.nn.Linear, path: str, *, is_summed: bool) -> Cut:
    """Where its part lies in the whole. From here on it says of itself what it is now."""
    whole = slice(None)
    part = _part(linear.in_features if is_summed else linear.out_features)
    linear.out_features, linear.in_features = linear.weight.shape
    return Cut(path, part, whole) if is_summed else Cut(path, whole, part)


class Summed(torch.nn.Module):
    """The sum over all ranks of what ``inner`` makes of its part of the input.

    With ``columns``, those of this rank, the input is not cut yet.
    """

    def __init__(self, inner: torch.nn.Module, *, columns: slice | None = None) -> None:
        super().__init__()
        self.inner = inner
        self._columns = columns
        if isinstance(inner, torch.nn.Linear) and distributed.get_rank() > 0:
            inner.register_parameter("bias", None)  # which counts once

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        output = self.inner(x if self._columns is None else x[..., self._columns], *others)
        output = output.contiguous()
        distributed.all_reduce(output)
        return output


class Gathered(torch.nn.Module):
    """What the parts of ``inner`` on all ranks make of the same input, side by side."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self._num_outputs = inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.inner(x)
        num_ranks = distributed.get_world_size()
        # Only equal parts can be gathered; behind the end of the last one is padding.
        width = -(-self._num_outputs // num_ranks)
        output = F.pad(output, (0, width - output.shape[-1])).contiguous()
        parts = [torch.empty_like(output) for _ in range(num_ranks)]
        distributed.all_gather(parts, output)
        return torch.cat(parts, -1)[..., : self._num_outputs]


class VocabularyPart(torch.nn.Module):
    """An embedding of whose rows a part is here: zeros for all other tokens, summed over ranks."""

    def __init__(self, inner: torch.nn.Embedding) -> None:
        super().__init__()
        self.inner = inner
        self.num_embeddings = inner.num_embeddings
        self._rows = _part(inner.num_embeddings)
        inner.padding_idx = None  # it may be no row of this part; gradients are its only use

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        is_here = (tokens >= self._rows.start) & (tokens < self._rows.stop)
        output = self.inner((tokens - self._rows.start).where(is_here, 0))
        output = output.where(is_here[..., None], 0)
        distributed.all_reduce(output)
        return output


class AdapterParts:
    """Implements :class:`workers.model.adapters.AdapterHost`: of each adapter, this rank's part."""

    def __init__(self, host: AdapterHost, cuts: Mapping[str, Cut]) -> None:
        self._host = host
        self._cuts = cuts

    def convert(self, weights: AdapterWeights) -> Any:
        parts = dict(self._cut(path, part) for path, part in weights.parts.items())
        return self._host.convert(AdapterWeights(weights.version, parts))

    def put(self, version: str, converted: Any) -> None:
        self._host.put(version, converted)

    def drop(self, version: str) -> None:
        self._host.drop(version)

    def _cut(self, path: str, whole: LowRank) -> tuple[str, LowRank]:
        """Where it is added here, before sums and before parts are put together, and what."""
        cut = self._cuts.get(path)
        if cut is None:
            return path, whole
        shrink, expand = whole.shrink[:, cut.inputs], whole.expand[cut.outputs]
        return cut.path, LowRank(shrink.contiguous(), expand.contiguous())


def least_of_all(number: int, device: torch.device) -> int:
    """The least of what the ranks say; ``number`` itself where there is one device only."""
    if not distributed.is_initialized():
        return number
    numbers = torch.tensor(number, dtype=torch.int64, device=device)
    distributed.all_reduce(numbers, distributed.ReduceOp.MIN)
    return int(numbers)


def _part(size: int) -> slice:
    """Of so many rows or columns those of this rank, as torch cuts them: the last may be fewer."""
    width = -(-size // distributed.get_world_size())
    start = min(distributed.get_rank() * width, size)
    return slice(start, min(start + width, size))
