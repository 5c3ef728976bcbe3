"""From a stored model to one that runs: device, type, weights, and proof that our attention fits.

A model is trusted only after its answers on a few tokens, computed our way, have been compared with
its own: some architectures keep state beside attention, or have masks of their own, and would run
without an error and wrongly.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.failures import Failure
from workers.model.adapters import LinearShapes
from workers.model.attention import ATTENTION, LayerProbe, Stretch, running
from workers.model.kv_cache import LayerShape, SlotCache
from workers.model.modules import ModulesForward, linear_of
from workers.model.runner import Forward

_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies change once a sequence grows past the trained length."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of logits, relative to the largest logit, that rounding explains."""

_PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8])
"""Few tokens, of ids that any vocabulary has."""


def select_device(wish: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        Failure: MODEL_LOAD_FAILED, if the wish cannot be had.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Failure("MODEL_LOAD_FAILED", f"There is no device {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Failure("MODEL_LOAD_FAILED", "The device is cuda, and torch finds none here.")
    return device


def select_dtype(wish: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32: faster there.

    Raises:
        Failure: MODEL_LOAD_FAILED, for a type that nothing on the device computes in.
    """
    is_cuda = device.type == "cuda"
    has_bfloat16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if wish == "float16" and not is_cuda:
        message = "float16 is for CUDA; a processor takes bfloat16 or float32."
        raise Failure("MODEL_LOAD_FAILED", message)
    if wish == "bfloat16" and is_cuda and not has_bfloat16:
        raise Failure("MODEL_LOAD_FAILED", "This GPU has no bfloat16; take float16 or float32.")
    if wish != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            wish
        ]
    if is_cuda:
        return torch.bfloat16 if has_bfloat16 else torch.float32
    features = torch.cpu.get_capabilities()
    in_hardware = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    return torch.bfloat16 if in_hardware else torch.float32


def load_model(
    path: Path, *, dtype: torch.dtype, device: torch.device, num_ranks: int = 1
) -> PreTrainedModel:
    """The model in ``path``, from safetensors only and without any code of its own.

    With ``num_ranks`` above 1, of each tensor the part of this process, as transformers cuts them
    (:mod:`workers.model.sharding`).

    Raises:
        Failure: MODEL_LOAD_FAILED, if transformers cannot build it or weights are missing.
    """
    transformers_logging.disable_progress_bar()
    shared: dict[str, Any] = {}
    if num_ranks > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        shared["distributed_config"] = DistributedConfig(tp_size=num_ranks)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **shared,
        )
    except Exception as error:
        raise Failure("MODEL_LOAD_FAILED", f"{path.name}: {error}") from error
    # A pair, which the annotations of transformers do not know.
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    # transformers would go on with random numbers in their place.
    if absent := sorted(report["missing_keys"]):
        raise Failure("MODEL_LOAD_FAILED", f"{path.name} lacks {len(absent)} tensors: {absent[0]}")
    model.eval().requires_grad_(requires_grad=False)
    return model.to(device)  # pyright: ignore[reportArgumentType] - transformers' wrapper hides it


def position_limit(config: PreTrainedConfig) -> int:
    """Longest sequence at which a token's position means the same in every batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    limit = config.max_position_embeddings
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        return min(limit, rope.get("original_max_position_embeddings") or limit)
    return limit


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of token ids that the model can read.

    Raises:
        Failure: MODEL_LOAD_FAILED, if its input is no plain embedding.
    """
    # Not every one is torch's own class: of some only a part may be here.
    number = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(number, int):
        raise _unfit(model, "its input is no embedding of tokens")
    return number


def inspect_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """What each attention layer of ``model`` stores per token, learnt by watching it at work.

    Raises:
        Failure: MODEL_LOAD_FAILED, for an architecture that cannot run on our attention.
    """
    probe = LayerProbe()
    token = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    try:
        with torch.inference_mode(), running(probe):
            model(input_ids=token, position_ids=torch.tensor([[0, 1]]).to(token), use_cache=False)
    except Exception as error:
        raise _unfit(model, f"{type(error).__name__}: {error}") from error
    _check_layer_types(model, probe)
    return probe.shapes


def adaptable_linears(model: PreTrainedModel) -> LinearShapes:
    """All linears of the model's layers as transformers made them, but for those of single experts,
    which see some rows of a step only.
    """
    head = model.get_output_embeddings()
    found = {
        path: linear[0].shape
        for path, module in model.named_modules()
        if module is not head
        and "experts" not in path
        and (linear := linear_of(module)) is not None
    }
    return {path: (outputs, inputs) for path, (outputs, inputs) in found.items()}


def check_attention(model: PreTrainedModel, layers: Mapping[int, LayerShape]) -> torch.Tensor:
    """Compare mixed and chunked steps of ours with plain passes of transformers.

    Returns what :func:`difference` expects of any other way to compute this model.

    Raises:
        Failure: MODEL_LOAD_FAILED, if they differ by more than rounding.
    """
    expected = _plain_logits(model)
    off_by = difference(lambda cache: ModulesForward(model, cache), expected, layers, model.dtype)
    if not off_by <= TOLERANCE[model.dtype]:
        raise _unfit(model, f"its logits would be off by {off_by:.0%}")
    return expected


def difference(
    bind: Callable[[SlotCache], Forward],
    expected: torch.Tensor,
    layers: Mapping[int, LayerShape],
    dtype: torch.dtype,
) -> float:
    """How far a way of computing is off, relative to the largest logit; NaN if it computes NaN.

    Two prompts are cut into chunks and decode rows, mixed in one step and in slots used twice.
    """
    first, second = _PROMPTS
    cache = SlotCache(layers, num_slots=2, max_tokens=16, dtype=dtype, device=expected.device)
    forward = bind(cache)
    with torch.inference_mode():
        forward(first[:3], [_stretch(1, 0, 3)], [])
        forward(first[3:5] + second[:3], [_stretch(1, 3, 2), _stretch(0, 0, 3)], [])
        forward([second[3], first[5]], [_stretch(0, 3, 1), _stretch(1, 5, 1)], [])
        ours = forward(first[6:] + second, [_stretch(1, 6, 1), _stretch(0, 0, 4)], [0, 4])
    return float((ours.float() - expected).abs().max() / expected.abs().max())


def _stretch(slot: int, start: int, count: int) -> Stretch:
    """Of a short sequence, in a slot or in the page of the same number."""
    return Stretch(slot, start, count, pages=(slot,))


def _plain_logits(model: PreTrainedModel) -> torch.Tensor:
    """``[2, vocabulary]`` in float32: what transformers says behind each of the prompts."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = [
            model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
            for tokens in _PROMPTS
        ]
    model.set_attn_implementation(ATTENTION)
    return torch.stack([rows[0, -1] for rows in logits]).float()


def _check_layer_types(model: PreTrainedModel, probe: LayerProbe) -> None:
    """A layer that the configuration calls sliding must have told attention so."""
    types = getattr(model.config, "layer_types", None) or []
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise _unfit(model, f"layer {layer} is {kind}")
        if kind == "sliding_attention" and layer not in probe.windowed:
            raise _unfit(model, f"layer {layer} hides its window")


def _unfit(model: PreTrainedModel, reason: str) -> Failure:
    name = type(model).__name__
    return Failure("MODEL_LOAD_FAILED", f"{name} cannot run on this engine: {reason}.")
