"""Each way computes what transformers does, and the best that proves it here is taken."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.failures import Failure
from tests.support.engines import cache_for, ready_model
from tests.support.logits import NUM_SEQUENCES, compute_in_pieces, divergence
from tests.support.native_kernels import are_runnable
from tests.support.tiny_model import build_tiny_model
from workers.model import ways
from workers.model.attention import Stretch
from workers.model.modules import ModulesForward
from workers.model.native import binding

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "phi",
    "phi3",
]

NATIVE = ["operations"] if are_runnable() else []
"""test_native_binding.py fails where the kernels should be able to run and are not."""

LENGTH = 70

ROUNDING_MARGIN = 1.3
"""Two computations in bfloat16 round differently: equally far from the truth, but not exactly."""


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 300, (NUM_SEQUENCES, LENGTH), generator=generator)


def plain_logits(path: Path, dtype: torch.dtype, sequences: torch.Tensor) -> torch.Tensor:
    """What transformers computes by itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        return model(input_ids=sequences, attention_mask=torch.ones_like(sequences)).logits


def logits_in(way: str, path: Path, dtype: torch.dtype, sequences: torch.Tensor) -> torch.Tensor:
    ready = ready_model(path, way, dtype)
    return compute_in_pieces(ready.bind(cache_for(ready, 4, dtype)), sequences.tolist())


@pytest.mark.parametrize("way", ["modules", *NATIVE])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    architecture: str, way: str, sequences: torch.Tensor, tmp_path: Path
) -> None:
    path = build_tiny_model(tmp_path, architecture=architecture)
    exact = plain_logits(path, torch.float32, sequences)
    theirs = divergence(exact, plain_logits(path, torch.bfloat16, sequences))
    ours = divergence(exact, logits_in(way, path, torch.bfloat16, sequences))
    assert ours <= ROUNDING_MARGIN * theirs


@pytest.mark.parametrize("way", ["modules", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_is_exact_up_to_rounding(
    architecture: str, way: str, sequences: torch.Tensor, tmp_path: Path
) -> None:
    path = build_tiny_model(tmp_path, architecture=architecture)
    torch.testing.assert_close(
        logits_in(way, path, torch.float32, sequences),
        plain_logits(path, torch.float32, sequences),
        atol=2e-4,
        rtol=1e-4,
    )


def test_float32_is_left_to_torch(tiny_model: Path) -> None:
    """The kernels know bfloat16 only; rounding the weights would be an answer nobody asked for."""
    ready = ready_model(tiny_model, "auto", torch.float32)
    assert ready.way == "modules"
    assert ready.refused.keys() == {"step", "operations"}
    assert all("not in torch.float32" in reason for reason in ready.refused.values())


def test_the_best_way_that_fits_is_taken(tmp_path: Path) -> None:
    """Heads of 16 are too small for the step, and experts are no layer that operations know."""
    llama = ready_model(build_tiny_model(tmp_path / "llama"), "auto", torch.bfloat16)
    path = build_tiny_model(tmp_path / "mixtral", architecture="mixtral")
    mixtral = ready_model(path, "auto", torch.bfloat16)
    assert (llama.way, mixtral.way) == (NATIVE[0] if NATIVE else "modules", "modules")
    if NATIVE:
        assert llama.refused == {"step": "its heads have 16 dimensions"}
        assert mixtral.refused["operations"] == "MixtralTopKRouter is not recognised"


def test_without_the_library_there_is_torch(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "load", lambda: binding.Unavailable("no compiler at install"))
    ready = ready_model(tiny_model, "auto", torch.bfloat16)
    assert ready.way == "modules"
    expected = "native kernels are off: no compiler at install"
    assert ready.refused == {"step": expected, "operations": expected}


class Liar(ModulesForward):
    """Computes, but not this model."""

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        return super().__call__(tokens, stretches, rows).roll(1, -1)


def test_a_way_that_disagrees_or_fails_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it did to the model meanwhile: the next one gets a new one."""

    def lie(model: ways.PreTrainedModel, *_: object) -> ways.TakenModel:
        model.get_input_embeddings().weight.zero_()  # pyright: ignore[reportCallIssue]
        return ways.TakenModel(partial(Liar, model))

    def fail(model: ways.PreTrainedModel, *_: object) -> ways.TakenModel:
        model.get_input_embeddings().weight.zero_()  # pyright: ignore[reportCallIssue]
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ways, "WAYS", {"step": lie, "operations": fail, **BEHIND})
    ready = ready_model(tiny_model, "auto", torch.float32)
    assert ready.way == "modules"
    assert "off by" in ready.refused["step"]
    assert ready.refused["operations"] == "RuntimeError: no such instruction"


BEHIND = {name: way for name, way in ways.WAYS.items() if name in ("modules", "plain")}


def test_a_way_that_was_asked_for_is_taken_or_the_start_fails(tiny_model: Path) -> None:
    ready = ready_model(tiny_model, "plain", torch.float32)
    assert (ready.way, ready.refused) == ("plain", {})
    with pytest.raises(Failure, match=r"operations: .* not in torch\.float32") as caught:
        ready_model(tiny_model, "operations", torch.float32)
    assert caught.value.code == "MODEL_LOAD_FAILED"


@pytest.mark.parametrize("way", ["modules", "plain"])
def test_torch_refuses_to_quantize(tiny_model: Path, way: str) -> None:
    """Rather than to compute with other weights than those that were asked for."""
    with pytest.raises(Failure, match=f"{way}: only the native kernels") as caught:
        ready_model(tiny_model, way, torch.float32, quantize=True)
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_a_container_is_not_given_more_threads_than_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a large machine, torch by itself would start one for every core of it."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(ways, "_CPU_QUOTA", quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert ways.available_threads() == 64
    for text, expected in (("max 100000", 64), ("150000 100000", 2), ("1000 100000", 1)):
        quota.write_text(text)
        assert ways.available_threads() == expected
