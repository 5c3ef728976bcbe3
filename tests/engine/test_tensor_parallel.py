"""A model spread over two ranks computes what one process does, and every feature goes along."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.failures import Failure
from common.messages import PromptLogprobs
from common.models.adapters import AdapterStore
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from tests.support.adapters import write_adapter
from tests.support.engines import (
    CPU,
    MAX_COST,
    ROOMY,
    cache_for,
    engine_around,
    ready_model,
    request,
    run_all,
    run_one,
    tiny_engine,
)
from tests.support.greedy import PROMPTS, generate
from tests.support.logits import NUM_SEQUENCES, compute_in_pieces, divergence
from tests.support.ranks import LedModel, Ranks, started_ranks
from tests.support.tiny_model import EOS_TOKEN_IDS, build_tiny_model
from workers.engine.batching import BatchingEngine
from workers.engine.factory import build_engine
from workers.engine.places import PagePlaces
from workers.engine.scheduler import Limits
from workers.engine.sequence import TextRules
from workers.model.adapters import StoredAdapters
from workers.model.attention import Stretch
from workers.model.paged_model import PAGE_TOKENS
from workers.model.runner import ModelRunner
from workers.model.sharding import check_shardable
from workers.tensor_parallel.rank import select_devices, select_way

ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi",
    "phi3",
    "mixtral",
    "gpt_neox",
]
"""With biases on either side of a sum, fused projections, tied and scaled embeddings, experts."""

LENGTH = 48


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started_ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 300, (NUM_SEQUENCES, LENGTH), generator=generator)


def plain_logits(path: Path, sequences: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What transformers computes by itself, in one process."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        return model(input_ids=sequences, attention_mask=torch.ones_like(sequences)).logits


def engine_on(led: LedModel, path: Path, limits: Limits = ROOMY) -> BatchingEngine:
    tokenizer, is_paged = Tokenizer.load(path), led.rank.cache is None
    places = PagePlaces(
        max(1, led.rank.num_pages),
        page_tokens=PAGE_TOKENS,
        max_sequences=limits.max_sequences,
    )
    return BatchingEngine(
        ModelRunner(led.forward, None if is_paged else led.forward, led.rank.sampler),
        TextRules(tokenizer, frozenset(EOS_TOKEN_IDS)),
        limits,
        model_version="tiny@1+tp2",
        max_cost=MAX_COST,
        vocab_size=led.rank.vocab_size,
        places=places if is_paged else None,
        adapters=led.adapters,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_compute_what_one_process_does(
    architecture: str, ranks: Ranks, sequences: torch.Tensor, tmp_path: Path
) -> None:
    """In float32 up to rounding: sums over ranks are rounded in another order."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    torch.testing.assert_close(
        compute_in_pieces(ranks.load(path).forward, sequences.tolist()),
        plain_logits(path, sequences, torch.float32),
        atol=2e-4,
        rtol=1e-4,
    )


def test_parts_need_not_be_equal(ranks: Ranks, sequences: torch.Tensor, tmp_path: Path) -> None:
    """Nor the first and the last matrix two."""
    sizes: dict[str, Any] = {"intermediate_size": 95, "vocab_size": 301}
    path = build_tiny_model(tmp_path, **sizes, tie_word_embeddings=True)
    torch.testing.assert_close(
        compute_in_pieces(ranks.load(path).forward, sequences.tolist()),
        plain_logits(path, sequences, torch.float32),
        atol=2e-4,
        rtol=1e-4,
    )


def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    ranks: Ranks, sequences: torch.Tensor, tiny_model: Path
) -> None:
    exact = plain_logits(tiny_model, sequences, torch.float32)
    theirs = divergence(exact, plain_logits(tiny_model, sequences, torch.bfloat16))
    led = ranks.load(tiny_model, dtype="bfloat16")
    ours = divergence(exact, compute_in_pieces(led.forward, sequences.tolist()))
    assert ours <= 1.3 * theirs


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        ("llama", "modules"),
        ("qwen2", "plain"),
        ("qwen3", "modules"),
        ("mistral", "modules"),
        ("llama", "paged"),
        ("mistral", "paged"),
    ],
)
def test_greedy_equals_generate(architecture: str, way: str, ranks: Ranks, tmp_path: Path) -> None:
    """In mixed batches and in chunks, with slots and pages that had other owners before."""
    path = build_tiny_model(tmp_path, architecture=architecture)
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    led = ranks.load(path, way=way)
    requests = [request(str(n), prompt, max_new_tokens=32) for n, prompt in enumerate(prompts)]
    expected = [generate(path, prompt, 32) for prompt in prompts]
    tight = Limits(max_sequences=3, cache_tokens=1024, step_tokens=7)
    for limits in (ROOMY, tight):
        answers = run_all(engine_on(led, path, limits), requests)
        assert [answers[one.id].tokens for one in requests] == expected


@pytest.mark.parametrize("way", ["modules", "paged"])
def test_prefixes_guesses_and_choices_go_along(
    way: str, ranks: Ranks, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """What is copied, shared and guessed here is so on the other rank."""
    preamble = tokenizer.encode("Below the mill the water is calm again, and again. " * 2)
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 24}
    requests = [
        request(f"{n}-{seed}", preamble + tokenizer.encode(text), **sampled, seed=seed)
        for n, text in enumerate(("The miller", "A heron", "The miller"))
        for seed in (1, 2)
    ]
    requests.append(request("greedy", preamble, max_new_tokens=60))
    guessing = Limits(max_sequences=8, cache_tokens=4096, step_tokens=256, draft_tokens=4)
    engine = engine_on(ranks.load(tiny_model, way=way), tiny_model, guessing)
    undisturbed = tiny_engine(tiny_model)
    expected = [run_one(undisturbed, one).tokens for one in requests]
    for _ in range(2):  # a second time everything is found computed
        answers = run_all(engine, requests)
        assert [answers[one.id].tokens for one in requests] == expected


def test_the_cache_is_changed_on_all_ranks(ranks: Ranks, tiny_model: Path) -> None:
    """Copied, and cleared of what must not be met again."""
    ready = ready_model(tiny_model)
    cache = cache_for(ready, 2)
    led = ranks.load(tiny_model).forward
    found: list[torch.Tensor] = []
    for forward, changed in ((led, led), (ready.bind(cache), cache)):
        with torch.inference_mode():
            forward(list(range(5, 15)), [Stretch(0, 0, 10)], [9])
            changed.copy(0, 1, 9)
            changed.scrub(1, 4, 8)
            found.append(forward([7], [Stretch(1, 9, 1)], [0]).clone())
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-4)


def test_prompts_are_scored_as_by_one_process(
    ranks: Ranks, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    asked = request(
        "g", tokenizer.encode(PROMPTS[0]), prompt_logprobs=True, top_logprobs=2, max_new_tokens=2
    )
    ours, theirs = (
        scores_of(engine, asked)
        for engine in (engine_on(ranks.load(tiny_model), tiny_model), tiny_engine(tiny_model))
    )
    assert ours.logprobs[1:] == pytest.approx(theirs.logprobs[1:], abs=1e-4)
    assert ours.tops is not None
    assert len(ours.tops) == len(asked.prompt)


def scores_of(engine: BatchingEngine, one: Any) -> PromptLogprobs:
    engine.submit(one)
    while True:
        for output in engine.step():
            if output.prompt is not None:
                return output.prompt


@pytest.mark.parametrize("way", ["modules", "paged"])
def test_adapters_are_read_held_and_dropped_by_all(
    way: str, ranks: Ranks, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Cut as the linears are that they change, beside rows without any."""
    path = build_tiny_model(tmp_path / "model")
    store = AdapterStore.beside(tmp_path, "model")
    version = store.add(str(write_adapter(tmp_path / "a")), "a").version
    prompt = tokenizer.encode(PROMPTS[0])
    # As the intake scopes it: what an adapter computed, the model alone must not find.
    adapted = replace(request("with", prompt), adapter=version, cache_scope=version)
    requests = [adapted, request("without", prompt)]
    led, expected = ranks.load(path, way=way), adapted_engine(path, store, version)
    engine = engine_on(led, path)
    others = run_all(expected, requests)
    assert others["with"].tokens != others["without"].tokens
    for _ in range(2):  # dropped, and held anew
        led.adapters.put(version, led.adapters.read(version))
        answers = run_all(engine, requests)
        for one in requests:
            assert answers[one.id].tokens == others[one.id].tokens
        led.adapters.drop(version)


def test_an_adapter_that_one_rank_cannot_read_is_held_by_none(
    ranks: Ranks, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """It fails alone; the ranks go on."""
    path = build_tiny_model(tmp_path / "model")
    store = AdapterStore.beside(tmp_path, "model")
    version = store.add(str(write_adapter(tmp_path / "a")), "a").version
    led = ranks.load(path)
    with pytest.raises(Failure) as caught:
        led.adapters.read("unknown@1")
    assert caught.value.code == "ADAPTER_NOT_FOUND"
    led.adapters.put(version, led.adapters.read(version))
    one = replace(request("g", tokenizer.encode("The")), adapter=version)
    expected = run_one(adapted_engine(path, store, version), one)
    assert run_one(engine_on(led, path), one).tokens == expected.tokens


def adapted_engine(path: Path, store: AdapterStore, version: str) -> BatchingEngine:
    """One process with the adapter."""
    ready = ready_model(path)
    cache = cache_for(ready, ROOMY.max_sequences)
    forward = ready.bind(cache)
    place: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    adapters = StoredAdapters(store, forward.adapters, ready.linears, **place)
    adapters.put(version, adapters.read(version))
    return engine_around(ModelRunner(forward, cache, ready.sampler), Tokenizer.load(path))


@pytest.mark.parametrize(
    ("architecture", "num_ranks", "reason"),
    [
        ("gpt2", 2, "type gpt2 .* has no plan"),
        ("opt", 2, "type opt .* has no plan"),
        ("llama", 4, "type llama .* 4 attention heads on 2 key heads"),
        ("llama", 3, "type llama .* dealt out evenly to 3"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(
    architecture: str, num_ranks: int, reason: str, tmp_path: Path
) -> None:
    path = build_tiny_model(tmp_path, architecture=architecture)
    with pytest.raises(Failure, match=reason) as caught:
        check_shardable(path, num_ranks)
    assert caught.value.code == "MODEL_LOAD_FAILED"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "gpt2"}, "type gpt2 cannot be spread"),
        ({"quantize": "int8"}, "quantize=int8 is for models that are not spread"),
        ({"engine_way": "step"}, "engine_way=step computes on one processor"),
    ],
)
def test_a_start_that_cannot_be_had_says_why(
    changes: dict[str, Any], reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    """And leaves no process behind."""
    store = ModelStore(tmp_path / "data")
    store.add(str(tiny_model), "tiny")
    store.add(str(build_tiny_model(tmp_path / "gpt2", architecture="gpt2")), "gpt2")
    values: dict[str, Any] = {"data_dir": tmp_path / "data", "model": "tiny", "device": "cpu"}
    with pytest.raises(Failure, match=reason) as caught:
        build_engine(WorkerSettings(tensor_parallel=2, dtype="float32", **(values | changes)))
    assert caught.value.code == "MODEL_LOAD_FAILED"


def test_only_devices_that_are_there_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_devices("auto", "auto", 2) == ("cuda", "bfloat16")
    for wish, reason in (("cuda", "4, and the CUDA devices here are 2"), ("cpu", "hide the GPUs")):
        with pytest.raises(Failure, match=reason):
            select_devices(wish, "float32", 4)
    with pytest.raises(Failure, match="the device is cuda, and not cuda:1"):
        select_devices("cuda:1", "float32", 2)
    assert (select_way("auto", "cuda"), select_way("auto", "cpu")) == ("paged", "modules")
