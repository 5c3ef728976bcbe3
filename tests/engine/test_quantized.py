"""Models with weights in 8 bits: what the numbers say is computed, and little is lost.

Needs the native kernels; test_native_binding.py says where they must be.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.models.tokenizer import Tokenizer
from tests.support.engines import cache_for, ready_model
from tests.support.logits import NUM_SEQUENCES, compute_in_pieces, divergence
from tests.support.models import smollm2
from tests.support.native_kernels import library, quantized
from tests.support.tiny_model import build_tiny_model
from workers.model.kv_cache import LayerShape, SlotCache
from workers.model.native.binding import Engine
from workers.model.native.step import PackedModel, StepForward

LENGTH, HEAD_SIZE = 70, 32

TEXT = """A headrace is the channel that leads water to a mill wheel or a turbine. Where the land
falls, a weir holds the river back and sends a part of it along the slope, nearly level, so that it
arrives high above the river that it left. There it drops on the wheel, turns it, and goes back.
Long headraces were cut by hand through rock, and some of them, centuries old, still carry water.
What they lost on the way by leaks and by weeds was lost for the mill, so somebody walked along them
every day."""


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 300, (NUM_SEQUENCES, LENGTH), generator=generator)


@pytest.fixture(params=["installed", "emulated_amx"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    use_amx = request.param == "emulated_amx"
    engine = Engine(library(request.param), 2, use_amx=use_amx, quantize=True)
    yield engine
    engine.close()


def load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval().requires_grad_(requires_grad=False)


def logits_of(model: PreTrainedModel, sequences: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=sequences, attention_mask=torch.ones_like(sequences)).logits


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_step_computes_with_what_8_bits_left(
    architecture: str, is_tied: bool, sequences: torch.Tensor, engine: Engine, tmp_path: Path
) -> None:
    """Of the embedding, too, where the head has the same numbers."""
    changes = {"num_attention_heads": 2, "head_dim": HEAD_SIZE, "tie_word_embeddings": is_tied}
    path = build_tiny_model(tmp_path, architecture=architecture, **changes)
    model = load(path, torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (is_tied or "embed_tokens" not in name):
            parameter.data = quantized(parameter.data.bfloat16())
    expected = logits_of(model, sequences)
    cache = SlotCache(
        dict.fromkeys(range(2), LayerShape(2, HEAD_SIZE, HEAD_SIZE)),
        num_slots=4,
        max_tokens=LENGTH,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    forward = StepForward(PackedModel(load(path, torch.bfloat16), engine), cache)
    ours = compute_in_pieces(forward, sequences.tolist())
    assert (ours - expected).abs().max() <= 0.05 * expected.abs().max()
    assert divergence(expected, ours) <= 0.0005


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "phi", "phi3"],
)
def test_operations_answer_nearly_as_the_unquantized_model(
    architecture: str, sequences: torch.Tensor, tmp_path: Path
) -> None:
    path = build_tiny_model(tmp_path, architecture=architecture)
    ready = ready_model(path, "operations", torch.bfloat16, quantize=True)
    ours = compute_in_pieces(ready.bind(cache_for(ready, 4, torch.bfloat16)), sequences.tolist())
    exact = logits_of(load(path, torch.float32), sequences)
    assert 1e-5 <= divergence(exact, ours) <= 0.002


@pytest.mark.timeout(300)
def test_the_default_model_is_about_as_close_to_float32_as_in_bfloat16() -> None:
    stored = smollm2()
    ids = Tokenizer.load(stored.path).encode(TEXT)
    length = len(ids) // NUM_SEQUENCES
    sequences = torch.tensor(ids[: NUM_SEQUENCES * length]).view(NUM_SEQUENCES, length)
    exact = logits_of(load(stored.path, torch.float32), sequences)
    theirs = divergence(exact, logits_of(load(stored.path, torch.bfloat16), sequences))
    ready = ready_model(stored.path, "step", torch.bfloat16, quantize=True)
    ours = compute_in_pieces(ready.bind(cache_for(ready, 4, torch.bfloat16)), sequences.tolist())
    assert divergence(exact, ours) <= 2 * theirs
