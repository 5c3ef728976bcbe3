"""The step as one call against transformers: every model it takes, in chunks and mixed batches."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.support.engines import CPU
from tests.support.logits import compute_in_pieces, divergence
from tests.support.native_kernels import library
from workers.model.attention import Stretch
from workers.model.kv_cache import LayerShape, SlotCache
from workers.model.native.binding import Engine
from workers.model.native.step import PackedModel, StepForward, unfit_reason

NUM_LAYERS, VOCAB, LENGTH, SLOTS, MAX_TOKENS = 2, 300, 70, 4, 75

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Turns by other angles, and scales what it turned."""


def build(architecture: str, **changes: Any) -> PreTrainedModel:
    """A model of ``architecture`` in bfloat16, whose weights give clear choices."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 90,
        "intermediate_size": 112,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if architecture == "mistral":
        sizes["sliding_window"] = 24
    config = CONFIG_MAPPING[architecture](**(sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        spread = 0.75 * config.hidden_size**-0.5
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=spread)
    return model.to(torch.bfloat16).eval().requires_grad_(requires_grad=False)


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    exact = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    return exact


def cache_for(model: PreTrainedModel) -> SlotCache:
    config = model.config
    size = cast("Any", model).model.layers[0].self_attn.head_dim
    shape = LayerShape(config.num_key_value_heads, size, size)
    return SlotCache(
        dict.fromkeys(range(NUM_LAYERS), shape),
        num_slots=SLOTS,
        max_tokens=MAX_TOKENS,
        dtype=torch.bfloat16,
        device=CPU,
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(library("installed"), 2, use_amx=False)
    yield engine
    engine.close()


def check(model: PreTrainedModel, engine: Engine) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=generator)
    expected = in_float32(model)(input_ids=ids).logits
    theirs = model(input_ids=ids).logits.float()
    assert unfit_reason(model) is None
    cache = cache_for(model)
    forward = StepForward(PackedModel(model, engine), cache)
    ours = compute_in_pieces(forward, ids.tolist())
    assert divergence(expected, ours) <= divergence(expected, theirs)
    assert (ours - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_closer_to_float32_than_those_of_the_modules(
    architecture: str, size: int, is_tied: bool, engine: Engine
) -> None:
    changes: dict[str, Any] = {"head_dim": size}
    if architecture == "qwen2":  # its heads are always a part of the hidden size
        changes = {"hidden_size": 6 * size, "num_hidden_layers": NUM_LAYERS}
    check(build(architecture, tie_word_embeddings=is_tied, **changes), engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN},
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 88},
        {"head_dim": 32, "hidden_size": 54, "intermediate_size": 33},
    ],
    ids=["scaled rotary tables", "biases everywhere", "one key head", "odd sizes"],
)
def test_llamas_of_other_shapes(changes: dict[str, Any], engine: Engine) -> None:
    check(build("llama", **changes), engine)


def test_a_window_per_layer(engine: Engine) -> None:
    """As in Qwen: some layers see everything, others the last few positions."""
    types = ["full_attention", "sliding_attention"]
    check(build("qwen3", layer_types=types, sliding_window=24, use_sliding_window=True), engine)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_same_on_amx(architecture: str) -> None:
    engine = Engine(library("emulated_amx"), 2)
    assert engine.uses_amx
    check(build(architecture), engine)
    engine.close()


def test_only_the_asked_rows_get_logits(engine: Engine) -> None:
    model = build("llama")
    forward = StepForward(PackedModel(model, engine), cache_for(model))
    tokens, stretches = [5, 6, 7, 8, 9], [Stretch(0, 0, 5)]
    everything = forward(tokens, stretches, [0, 1, 2, 3, 4]).clone()
    assert torch.equal(forward(tokens, stretches, [4, 1]), everything[[4, 1]])
    assert forward(tokens, stretches, []).shape == (0, VOCAB)


def test_a_step_larger_than_the_scratch_memory(engine: Engine) -> None:
    """More tokens, and more rows than slots, than were planned for."""
    model = build("llama")
    cache = SlotCache(
        dict.fromkeys(range(NUM_LAYERS), LayerShape(2, 64, 64)),
        num_slots=1,
        max_tokens=700,
        dtype=torch.bfloat16,
        device=CPU,
    )
    forward = StepForward(PackedModel(model, engine), cache)
    tokens = [i % VOCAB for i in range(700)]
    whole = forward(tokens, [Stretch(0, 0, 700)], [0, 699]).clone()
    first = forward(tokens[:400], [Stretch(0, 0, 400)], [0])[0].clone()
    second = forward(tokens[400:], [Stretch(0, 400, 300)], [299])[0]
    torch.testing.assert_close(whole, torch.stack([first, second]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("tokens", "stretch", "rows"),
    [
        ([VOCAB], Stretch(0, 0, 1), [0]),
        ([-1], Stretch(0, 0, 1), [0]),
        ([1], Stretch(SLOTS, 0, 1), [0]),
        ([1], Stretch(-1, 0, 1), [0]),
        ([1], Stretch(0, MAX_TOKENS, 1), [0]),
        ([1], Stretch(0, -1, 1), [0]),
        ([1, 2], Stretch(0, MAX_TOKENS - 1, 2), [0]),
        ([1, 2], Stretch(0, 0, 1), [0]),
        ([1], Stretch(0, 0, 1), [1]),
        ([], Stretch(0, 0, 0), []),
    ],
)
def test_what_does_not_exist_is_refused(
    tokens: list[int], stretch: Stretch, rows: list[int], engine: Engine
) -> None:
    """Native code reads and writes by number: a wrong one must not get there."""
    model = build("llama")
    forward = StepForward(PackedModel(model, engine), cache_for(model))
    with pytest.raises(ValueError, match="not in the model or its cache"):
        forward(tokens, [stretch], rows)


@pytest.mark.parametrize("is_tied", [False, True])
def test_each_weight_is_kept_once(is_tied: bool, engine: Engine) -> None:
    model = build("llama", tie_word_embeddings=is_tied)
    PackedModel(model, engine)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build("llama").float(), "torch.float32"),
        (lambda: build("gemma"), "gemma is not Llama-like"),
        (lambda: build("llama", hidden_act="gelu"), "its activation is gelu"),
        (lambda: build("llama", head_dim=16), "its heads have 16 dimensions"),
    ],
)
def test_what_the_step_cannot_compute_is_left_to_other_ways(model: Any, reason: str) -> None:
    found = unfit_reason(model())
    assert found is not None
    assert reason in found
