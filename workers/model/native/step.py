"""The whole step of a Llama-like model as one call of the kernels: the way "step".

:func:`unfit_reason` says which models that are. :class:`PackedModel` takes a model's weights over,
:class:`StepForward` computes steps with them on a cache.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from workers.model.attention import Stretch
from workers.model.kv_cache import SlotCache
from workers.model.native.adapters import StepAdapters
from workers.model.native.binding import (
    ACTIVATIONS,
    MAX_GROUP,
    MAX_HEAD_SIZE,
    Engine,
    LayerPointers,
    ModelPointers,
    Places,
    Step,
    Weight,
)

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Models of transformers whose forward is the one in kernels.cpp, biases and q/k norms included."""

_STEP_TOKENS = 512
"""Tokens of a step whose scratch memory is there from the start; a larger step adds some."""


def unfit_reason(model: PreTrainedModel) -> str | None:
    """Why the step does not compute this model, or None if it does."""
    config = model.config
    if config.model_type not in _MODEL_TYPES:
        return f"{config.model_type} is not Llama-like"
    if model.dtype != torch.bfloat16:
        return f"it is in {model.dtype}, not bfloat16"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    attention = _layers(model)[0].self_attn
    size, group = attention.head_dim, attention.num_key_value_groups
    if size % 32 or size > MAX_HEAD_SIZE:
        return f"its heads have {size} dimensions"
    if group > MAX_GROUP:
        return f"{group} of its query heads share a key head"
    if _rotary_tables(model, 1)[0].shape[-1] * 2 != size:
        return "it turns only a part of each head"
    return None


class PackedModel:
    """The weights of a model that fits, packed; those of ``model`` are freed on the way.

    Raises:
        MemoryError: if there is no room for a packed layer beside the model.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        config = model.config
        head = cast("nn.Linear", model.get_output_embeddings())
        embedding = cast("nn.Embedding", model.get_input_embeddings()).weight
        is_tied = head.weight.data_ptr() == embedding.data_ptr()
        self.engine = engine
        self.vocab_size = head.out_features
        self._model = model
        self._kept: list[torch.Tensor | Weight] = []
        self._layers = [self._pack_layer(layer, config) for layer in _layers(model)]
        self._last_norm = self._floats(model.model.norm.weight)
        self._head = self._pack(engine.pack(head.weight, head.bias))
        self._embedding = None if is_tied else self._address(embedding.detach().contiguous())
        _free_weights(model)

    def on_cache(self, cache: SlotCache) -> "tuple[ModelPointers, list[object]]":
        """The model with the cache it works on, and what must live as long as it is in use."""
        config = self._model.config
        keys, _ = cache.layer(0)
        num_slots, num_kv_heads, max_tokens, size = keys.shape
        tables = _rotary_tables(self._model, max_tokens)
        layers = (LayerPointers * len(self._layers))(*self._layers)
        for number, layer in enumerate(layers):
            layer.keys, layer.values = (tensor.data_ptr() for tensor in cache.layer(number))
        model = ModelPointers(
            num_layers=len(layers),
            hidden=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=num_kv_heads,
            size=size,
            vocab=self.vocab_size,
            activation=ACTIVATIONS[config.hidden_act],
            num_slots=num_slots,
            max_tokens=max_tokens,
            eps=config.rms_norm_eps,
            scale=_layers(self._model)[0].self_attn.scaling,
            layers=layers,
            last_norm=self._last_norm,
            head=self._head,
            embedding=self._embedding,
            cosines=tables[0].data_ptr(),
            sines=tables[1].data_ptr(),
        )
        return model, [layers, tables, cache]

    def _pack_layer(self, layer: Any, config: Any) -> LayerPointers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight = torch.cat([projection.weight.detach() for projection in projections])
        has_bias = projections[0].bias is not None
        bias = torch.cat([p.bias.detach() for p in projections]) if has_bias else None
        gate, up = mlp.gate_proj, mlp.up_proj
        pointers = LayerPointers(
            qkv=self._pack(self.engine.pack(weight, bias)),
            out=self._pack(self.engine.pack(attention.o_proj.weight, attention.o_proj.bias)),
            gate_up=self._pack(self.engine.pack_gated(gate.weight, up.weight, gate.bias, up.bias)),
            down=self._pack(self.engine.pack(mlp.down_proj.weight, mlp.down_proj.bias)),
            attention_norm=self._floats(layer.input_layernorm.weight),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            query_norm=self._norm_of(attention, "q_norm"),
            key_norm=self._norm_of(attention, "k_norm"),
            window=_window(attention, config),
        )
        _free_weights(layer)
        return pointers

    def _norm_of(self, attention: Any, name: str) -> int | None:
        norm = getattr(attention, name, None)
        return None if norm is None else self._floats(norm.weight)

    def _pack(self, weight: Weight) -> int:
        self._kept.append(weight)
        return weight.handle

    def _floats(self, vector: torch.Tensor) -> int:
        return self._address(vector.detach().float().contiguous())

    def _address(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


class StepForward:
    """Implements :class:`workers.model.runner.Forward` as one call of the kernels."""

    name = "step"

    def __init__(self, packed: PackedModel, cache: SlotCache) -> None:
        pointers, self._kept = packed.on_cache(cache)
        self._packed = packed
        self.adapters = StepAdapters(pointers.num_layers)
        self._step = Step(packed.engine, pointers, _STEP_TOKENS)
        # Written once, so that no step has to take the page faults.
        self._logits = torch.zeros(pointers.num_slots, packed.vocab_size)

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        """See the protocol. The logits are float32 and good until the next step: they lie in the
        same memory.
        """
        if len(rows) > len(self._logits):
            self._logits = self._logits.new_zeros(len(rows), self._packed.vocab_size)
        logits = self._logits[: len(rows)]
        adapters = self.adapters.addresses(stretches)
        self._step.run(tokens, Places(stretches), rows, logits, adapters)
        return logits


def _layers(model: PreTrainedModel) -> Any:
    return model.model.layers


def _window(attention: Any, config: Any) -> int:
    """Positions that a layer sees; 0 is all. Mistral says so in the configuration only."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    is_windowed = config.model_type == "mistral"
    return (config.sliding_window or 0) if is_windowed else 0


def _rotary_tables(model: PreTrainedModel, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[positions, size / 2]`` in float32, scaled as the model does."""
    rotary = cast("Any", model.model).rotary_emb
    positions = torch.arange(num_positions)[None]
    with torch.inference_mode():
        # The first argument only says which type and device the tables shall have.
        cosines, sines = rotary(torch.zeros(1, dtype=torch.float32), positions)
    half = cosines.shape[-1] // 2  # the second half repeats the first
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()


def _free_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
