"""LoRA adapters for tests: random ones in peft's format, written with numpy alone or by peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODULES: Mapping[str, tuple[int, int]] = {
    f"model.layers.{layer}.{name}": sizes
    for layer in range(2)
    for name, sizes in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }.items()
}
"""(outputs, inputs) of each linear of the tiny Llama."""


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    spread: float = 0.2,
    **config: Any,
) -> Path:
    """An adapter of ``modules`` in ``folder``; ``config`` goes into its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module, (outputs, inputs) in modules.items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = random.normal(0.0, spread, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder
