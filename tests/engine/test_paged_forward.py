"""The way for CUDA computes what transformers computes, whatever shares its pages and its steps.

Here it runs on the processor: the same cache, tables, tiles, padding and steps, with attention in
plain torch and without recordings.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from common.failures import Failure
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.engines import (
    CPU,
    ROOMY,
    Transcript,
    collect,
    is_busy,
    request,
    run_all,
    run_one,
    tiny_engine,
    tiny_paged,
    tiny_paged_engine,
)
from tests.support.greedy import PROMPTS, generate
from tests.support.tiny_model import build_tiny_model
from workers.engine.factory import build_paged
from workers.engine.scheduler import Limits
from workers.model import paged_attention
from workers.model.attention import Stretch
from workers.model.fused_linears import fuse_linears
from workers.model.loader import load_model
from workers.model.paged_forward import batch_sizes, token_sizes

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma2", "phi", "opt", "mixtral"]
"""Biases, norms of queries, windows, soft caps, learnt positions, fused and unfused linears."""

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate(architecture: str, tmp_path: Path) -> None:
    """Alone, in a mixed batch, and with prompts cut into chunks between the others' tokens."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    expected = [generate(path, prompt, 24) for prompt in prompts]
    requests = [request(str(i), prompt, max_new_tokens=24 - i) for i, prompt in enumerate(prompts)]
    engine = tiny_paged_engine(path)
    alone = [run_one(engine, one).tokens for one in requests]
    batched = run_all(engine, requests)
    chunked = run_all(tiny_paged_engine(path, Limits(3, 1024, step_tokens=7)), requests)
    for i, whole in enumerate(expected):
        assert alone[i] == batched[str(i)].tokens == chunked[str(i)].tokens == whole[: 24 - i]


def test_full_pages_and_preemption_change_nothing(tiny_model: Path, tokenizer: Tokenizer) -> None:
    """The pages hold far less than all need at once; what is sampled is that of slots as well."""
    requests = [
        request(str(i), tokenizer.encode(text), max_new_tokens=90, seed=i, **SAMPLED)
        for i, text in enumerate(PROMPTS)
    ]
    expected = run_all(tiny_engine(tiny_model), requests)
    engine = tiny_paged_engine(tiny_model, Limits(4, cache_tokens=256, step_tokens=24))
    transcripts: dict[str, Transcript] = {}
    for one in requests:
        engine.submit(one)
    num_running, preempted = 0, False
    while is_busy(engine):
        outputs = engine.step()
        collect(transcripts, outputs)
        ended = sum(output.finish is not None for output in outputs)
        preempted |= engine.load().running + ended < num_running
        num_running = engine.load().running
    assert {id: t.tokens for id, t in transcripts.items()} == {
        id: t.tokens for id, t in expected.items()
    }
    assert preempted


def test_a_shared_prefix_is_computed_once(tiny_model: Path, tokenizer: Tokenizer) -> None:
    prefix = tokenizer.encode("Where it ends, the water has somewhere to fall, and the wheel turns")
    first, second = (
        request(id, prefix + tokenizer.encode(id), max_new_tokens=20) for id in ("one", "two")
    )
    expected = run_one(tiny_engine(tiny_model), second)
    engine = tiny_paged_engine(tiny_model)
    run_one(engine, first)
    engine.submit(second)
    outputs = engine.step()
    assert outputs[0].cached_tokens == len(prefix) // 16 * 16
    transcripts: dict[str, Transcript] = {}
    collect(transcripts, outputs)
    while is_busy(engine):
        collect(transcripts, engine.step())
    assert transcripts["two"].tokens == expected.tokens


def test_what_others_left_in_pages_is_never_read(tiny_model: Path) -> None:
    """NaN in every position that the sequence has not written itself."""
    ready = tiny_paged(tiny_model)
    tokens = [3 + i * 37 % 250 for i in range(40)]
    clean = _last_logits(ready.forward, tokens)
    for layer in range(2):
        for held in ready.forward._cache.layer(layer):
            held.fill_(float("nan"))
    assert torch.equal(_last_logits(ready.forward, tokens), clean)
    assert clean.isfinite().all()


def _last_logits(
    forward: Callable[[list[int], list[Stretch], list[int]], torch.Tensor], tokens: list[int]
) -> torch.Tensor:
    """Of a prompt in two chunks and a decode row, on pages in no order."""
    pages = (7, 2, 5)
    with torch.inference_mode():
        forward(tokens[:17], [Stretch(0, 0, 17, pages)], [])
        forward(tokens[17:39], [Stretch(0, 17, 22, pages)], [21])
        return forward(tokens[39:], [Stretch(0, 39, 1, pages)], [0]).clone()


def test_compiled_once_for_all_steps(tiny_model: Path, tokenizer: Tokenizer) -> None:
    """Every size of step runs what was compiled at load, and the answers stay the same."""
    runs, compiled = [0], [0]

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        compiled[0] += 1

        def run(*inputs: Any) -> Any:
            runs[0] += 1
            return graph(*inputs)

        return run

    requests = [
        request(str(i), tokenizer.encode(text), max_new_tokens=9 + i)
        for i, text in enumerate(PROMPTS)
    ]
    expected = run_all(tiny_paged_engine(tiny_model), requests)
    engine = tiny_paged_engine(tiny_model, compiler=counting)
    num_steps = 0
    runs[0] = 0
    got: dict[str, Transcript] = {}
    for one in requests:
        engine.submit(one)
        collect(got, engine.step())
        num_steps += 1
    while is_busy(engine):
        collect(got, engine.step())
        num_steps += 1
    assert {id: t.tokens for id, t in got.items()} == {id: t.tokens for id, t in expected.items()}
    assert (compiled[0], runs[0]) == (1, num_steps)


def test_what_the_compiler_refuses_runs_uncompiled(tiny_model: Path, tokenizer: Tokenizer) -> None:
    def refusing(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        raise NotImplementedError(graph)

    one = request("one", tokenizer.encode(PROMPTS[0]), max_new_tokens=9)
    reason = tiny_paged(tiny_model, compiler=refusing).forward.uncompiled_reason
    assert reason is not None
    assert "NotImplementedError" in reason
    engine = tiny_paged_engine(tiny_model, compiler=refusing)
    assert run_one(engine, one).tokens == run_one(tiny_engine(tiny_model), one).tokens


def test_wrong_attention_is_refused_at_load(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearly(_: torch.device) -> paged_attention.Kernels:
        kernels = paged_attention.PlainKernels()
        monkeypatch.setattr(kernels, "attend_rows", lambda *_: None)
        return kernels

    monkeypatch.setattr(paged_attention, "select_kernels", nearly)
    with pytest.raises(Failure, match="logits would be off") as caught:
        tiny_paged(tiny_model)
    assert caught.value.code == "MODEL_LOAD_FAILED"


@pytest.mark.parametrize(("architecture", "families"), [("qwen2", 4), ("phi", 2), ("gpt2", 0)])
def test_fused_linears_compute_the_same(architecture: str, families: int, tmp_path: Path) -> None:
    """Weights exist once, and the parts fit whatever follows them."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    model = load_model(path, dtype=torch.float32, device=CPU)
    num_weights = sum(weights.numel() for weights in model.parameters())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert fuse_linears(model) == families
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)
    assert sum(weights.numel() for weights in model.parameters()) == num_weights


@pytest.mark.parametrize("max_sequences", [1, 2, 3, 32, 100, 256])
def test_every_batch_has_a_recorded_size(max_sequences: int) -> None:
    sizes = batch_sizes(max_sequences)
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= 2
    assert max_sequences <= sizes[-1] <= 2 * max_sequences


@pytest.mark.parametrize("step_tokens", [64, 65, 512, 2048, 5000])
def test_every_step_with_prompts_has_a_recorded_size(step_tokens: int) -> None:
    sizes = token_sizes(step_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == step_tokens
    assert all(larger <= 1.5 * size for size, larger in pairwise(sizes))


def test_an_engine_over_pages_is_built_from_the_store(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the worker's settings; the compiler is not what is tried here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # pyright: ignore[reportUnknownArgumentType]
    store = ModelStore(tmp_path)
    store.add(str(tiny_model), "tiny")
    settings = WorkerSettings(
        data_dir=tmp_path, model="tiny", dtype="float32", max_batch_size=5, max_total_tokens=100
    )
    stored = store.get("tiny")
    model = load_model(stored.path, dtype=torch.float32, device=CPU)
    engine = build_paged(settings, stored, model)
    assert engine.model_version == stored.manifest.version
    assert (engine.max_cost, engine.load().free_slots) == (100, 5)
    assert engine.device is None
    # Two layers of two heads of 16 numbers, keys and values, in float32.
    assert engine.cache_size.token_bytes == 2 * 2 * 16 * 2 * 4
    one = request("one", Tokenizer.load(tiny_model).encode("The"))
    assert run_one(engine, one).tokens == run_one(tiny_engine(tiny_model), one).tokens


def test_padding_is_told_as_it_was_computed(tiny_model: Path) -> None:
    """Steps have recorded sizes: of prompts at least 64 tokens, of answers two rows at least."""
    engine = tiny_paged_engine(tiny_model)
    engine.submit(request("a", list(range(3, 19)), max_new_tokens=3))
    engine.step()
    [joined] = engine.load().joined
    assert (joined.pad_ratio, engine.last_step.num_padding) == (0.75, 48)
    engine.step()
    assert (engine.last_step.num_tokens, engine.last_step.num_padding) == (1, 1)


@pytest.mark.parametrize(("cache_tokens", "num_pages"), [(1, 2), (100, 7), (4096, 256)])
def test_the_cache_is_as_large_as_asked_for(
    tiny_model: Path, cache_tokens: int, num_pages: int
) -> None:
    limits = Limits(ROOMY.max_sequences, cache_tokens, ROOMY.step_tokens)
    assert tiny_paged(tiny_model, limits).num_pages == num_pages
