"""LoRA adapters per request in one batch: every way computes what peft does."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from common.failures import Failure
from common.models.adapters import AdapterStore
from common.models.tokenizer import Tokenizer
from tests.support.engines import (
    CPU,
    MAX_COST,
    ROOMY,
    cache_for,
    ready_model,
    request,
    run_all,
    tiny_paged,
)
from tests.support.logits import divergence
from tests.support.native_kernels import are_runnable, quantized
from tests.support.tiny_model import build_tiny_model
from workers.engine.batching import BatchingEngine
from workers.engine.places import PagePlaces
from workers.engine.sequence import TextRules
from workers.model.adapters import LinearShapes, StoredAdapters
from workers.model.attention import Stretch
from workers.model.paged_model import PAGE_TOKENS
from workers.model.runner import Forward, ModelRunner

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""peft asks transformers by an old name."""

LENGTH = 24
NATIVE = ["operations", "step"] if are_runnable() else []
WAYS = ["plain", "modules", "paged", *NATIVE]
TARGETS: Mapping[str, Any] = {
    "llama": "all-linear",
    "qwen2": r".*\.(q_proj|v_proj|up_proj|down_proj)",
    "gpt2": ["c_attn", "c_fc"],
    "phi3": "all-linear",
}
KINDS: Sequence[dict[str, Any]] = (
    {"r": 8, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 4, "use_rslora": True},
    {"r": 6, "lora_alpha": 12, "rank_pattern": {r".*\.1\..*": 3}},
    {"r": 16, "lora_alpha": 8, "alpha_pattern": {r".*\.0\..*": 32}},
)
"""Of which ranks not all are what the kernels count in."""


@dataclass(frozen=True)
class Case:
    """A tiny model with one stored adapter per kind, and the way to know what each must say."""

    path: Path
    store: AdapterStore
    versions: list[str]
    folders: list[Path]

    def expected(self, prompt: list[int], number: int | None) -> torch.Tensor:
        """``[tokens, vocabulary]`` in float32, by peft; ``number`` None is the model alone."""
        model = _peft_model(self.path, None if number is None else self.folders[number])
        with torch.inference_mode():
            return model(input_ids=torch.tensor([prompt])).logits[0]


@cache
def _peft_model(path: Path, adapter: Path | None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def make_case(folder: Path, architecture: str, kinds: Sequence[dict[str, Any]]) -> Case:
    """Adapters as peft itself makes and saves them, with random numbers in A and in B."""
    sizes = {"head_dim": 32} if architecture in ("llama", "qwen2") else {}
    path = build_tiny_model(folder / "model", architecture=architecture, **sizes)
    store = AdapterStore.beside(folder, "model")
    versions: list[str] = []
    folders: list[Path] = []
    for number, kind in enumerate(kinds):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=TARGETS[architecture],
            fan_in_fan_out=architecture == "gpt2",
            **kind,
        )
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.1, generator=generator)
        folders.append(folder / f"adapter-{number}")
        adapted.save_pretrained(str(folders[-1]))
        versions.append(store.add(str(folders[-1]), f"adapter-{number}").version)
    return Case(path, store, versions, folders)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "phi3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param, KINDS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    kinds = [{"r": rank, "lora_alpha": 2 * rank} for rank in (8, 16, 4, 8, 12, 16, 8, 5)]
    return make_case(tmp_path_factory.mktemp("eight"), "llama", kinds)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(3, 300, (count, LENGTH), generator=generator).tolist()


def host(
    case: Case, way: str, dtype: torch.dtype, num_slots: int = 9
) -> tuple[Forward, StoredAdapters]:
    """The model in ``way``, holding no adapter."""
    forward: Forward
    linears: LinearShapes
    if way == "paged":
        paged = tiny_paged(case.path, ROOMY)
        forward, linears = paged.forward, paged.linears
    else:
        ready = ready_model(case.path, way, dtype)
        forward, linears = ready.bind(cache_for(ready, num_slots, dtype)), ready.linears
    return forward, StoredAdapters(case.store, forward.adapters, linears, dtype=dtype, device=CPU)


def hold(adapters: StoredAdapters, versions: Sequence[str]) -> None:
    for version in versions:
        adapters.put(version, adapters.read(version))


def compute(
    forward: Forward, rows: Sequence[tuple[list[int], str]], *, split: int = 5
) -> list[torch.Tensor]:
    """Logits of whole prompts, ``[tokens, vocabulary]`` each: a part of each as a prompt, together
    with all the others, then a token at a time.
    """
    slots = range(len(rows))
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for start, end in [(0, split), *((at, at + 1) for at in range(split, LENGTH))]:
        tokens = [token for prompt, _ in rows for token in prompt[start:end]]
        stretches = [
            Stretch(slot, start, end - start, (2 * slot, 2 * slot + 1), rows[slot][1])
            for slot in slots
        ]
        with torch.inference_mode():
            logits = forward(tokens, stretches, list(range(len(tokens)))).float().clone()
        for slot, part in zip(slots, logits.split(end - start), strict=True):
            found[slot].append(part)
    return [torch.cat(parts) for parts in found]


def dtype_of(way: str) -> torch.dtype:
    return torch.bfloat16 if way in NATIVE else torch.float32


def assert_close(way: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Exact in float32; in bfloat16 the distributions agree as well as rounding lets them."""
    if dtype_of(way) == torch.float32:
        torch.testing.assert_close(actual, expected, atol=3e-4, rtol=2e-4)
    else:
        assert divergence(expected, actual) < 0.02


def is_computed(way: str, case: Case) -> bool:
    config = json.loads((case.path / "config.json").read_text())
    return way != "step" or config["model_type"] in ("llama", "qwen2")


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_peft(case: Case, way: str) -> None:
    """Each adapter and the model alone, all in one batch."""
    if not is_computed(way, case):
        with pytest.raises(Failure, match="not Llama-like"):
            ready_model(case.path, way, torch.bfloat16)
        return
    forward, adapters = host(case, way, dtype_of(way))
    hold(adapters, case.versions)
    inputs = prompts(5)
    found = compute(forward, list(zip(inputs, [*case.versions, ""], strict=True)))
    for number, (prompt, logits) in enumerate(zip(inputs, found, strict=True)):
        expected = case.expected(prompt, number if number < len(case.versions) else None)
        assert_close(way, logits, expected)
    alone = case.expected(inputs[0], None)
    assert divergence(alone, found[0]) > 0.1, "the adapters of this test change nothing"


@pytest.mark.parametrize("way", WAYS)
def test_eight_adapters_in_one_batch_answer_as_each_alone(llama: Case, way: str) -> None:
    inputs = prompts(8)
    forward, adapters = host(llama, way, dtype_of(way))
    hold(adapters, llama.versions)
    together = compute(forward, list(zip(inputs, llama.versions, strict=True)))
    for number, prompt in enumerate(inputs):
        (alone,) = compute(forward, [(prompt, llama.versions[number])])
        assert_close(way, together[number], alone)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_adapter_and_none_mix_in_any_order(llama: Case, way: str) -> None:
    forward, adapters = host(llama, way, dtype_of(way))
    hold(adapters, llama.versions[:2])
    a, b = llama.versions[:2]
    inputs, names = prompts(8), [a, "", b, a, a, "", a, a]
    found = compute(forward, list(zip(inputs, names, strict=True)), split=3)
    for prompt, name, logits in zip(inputs, names, found, strict=True):
        number = None if name == "" else llama.versions.index(name)
        assert_close(way, logits, llama.expected(prompt, number))


@pytest.mark.parametrize("way", WAYS)
def test_what_was_dropped_comes_again_and_leaves_nothing_behind(llama: Case, way: str) -> None:
    forward, adapters = host(llama, way, dtype_of(way))
    prompt = prompts(1)[0]
    (before,) = compute(forward, [(prompt, "")])
    for version in llama.versions[:3]:
        hold(adapters, [version])
        (first,) = compute(forward, [(prompt, version)])
        adapters.drop(version)
        hold(adapters, [version])
        (second,) = compute(forward, [(prompt, version)])
        assert torch.equal(first, second)
        adapters.drop(version)
    (after,) = compute(forward, [(prompt, "")])
    assert torch.equal(before, after)


@pytest.mark.parametrize("way", NATIVE)
def test_adapters_are_added_to_what_8_bits_left_of_a_model(llama: Case, way: str) -> None:
    """Their own numbers are not quantized: peft says the same of a model that was."""
    ready = ready_model(llama.path, way, torch.bfloat16, quantize=True)
    forward = ready.bind(cache_for(ready, 4, torch.bfloat16))
    place: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU}
    adapters = StoredAdapters(llama.store, forward.adapters, ready.linears, **place)
    hold(adapters, llama.versions[:3])
    inputs, names = prompts(4), [*llama.versions[:3], ""]
    found = compute(forward, list(zip(inputs, names, strict=True)))
    for number, (prompt, logits) in enumerate(zip(inputs, found, strict=True)):
        model = _in_8_bits(llama.path)
        if number < 3:
            model = PeftModel.from_pretrained(model, llama.folders[number])
        with torch.inference_mode():
            expected = model.eval()(input_ids=torch.tensor([prompt])).logits[0]
        assert divergence(expected, logits) < 0.005
        assert divergence(llama.expected(prompt, None), logits) > 0.005 or number == 3


def _in_8_bits(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name:
            parameter.data = quantized(parameter.data.bfloat16())
    return model


@pytest.mark.parametrize("way", ["modules", "paged"])
def test_an_answer_is_the_same_from_any_position_in_any_crowd(llama: Case, way: str) -> None:
    """A worker that dies hands its generation to another, whose batch is of other adapters."""

    engine = _engine(llama, way)
    sampled = request("it", prompts(1)[0], do_sample=True, seed=5, top_k=20)
    it = replace(sampled, adapter=llama.versions[2])
    whole = run_all(engine, [it])["it"].tokens
    assert len(whole) == 16
    cuts = [replace(it, id=f"{cut}", logged=whole[:cut], cache_scope=f"{cut}") for cut in range(16)]
    crowd = [
        replace(request(f"other-{n}", prompts(9)[n + 1]), adapter=version)
        for n, version in enumerate(["", *llama.versions[:4]])
    ]
    got = run_all(engine, [*crowd[:1], *cuts[::2], *crowd[1:], *cuts[1::2]])
    for cut in range(16):
        assert got[f"{cut}"].tokens == whole[cut:]


def _engine(case: Case, way: str) -> BatchingEngine:
    """Holding all adapters."""
    forward, adapters = host(case, way, torch.float32, num_slots=8)
    hold(adapters, case.versions)
    pages = PagePlaces(256, page_tokens=PAGE_TOKENS, max_sequences=8) if way == "paged" else None
    return BatchingEngine(
        ModelRunner(forward),
        TextRules(Tokenizer.load(case.path), frozenset()),
        ROOMY,
        model_version="tiny@1",
        max_cost=MAX_COST,
        vocab_size=300,
        places=pages,
        adapters=adapters,
    )


def test_an_adapter_of_another_model_is_refused_by_name(llama: Case, tmp_path: Path) -> None:
    other = make_case(tmp_path, "gpt2", KINDS[:1])
    _, adapters = host(llama, "plain", torch.float32)
    foreign = StoredAdapters(
        other.store, adapters._host, adapters._linears, dtype=torch.float32, device=CPU
    )
    with pytest.raises(Failure, match=r"no linear transformer\.h\.0") as caught:
        foreign.read(other.versions[0])
    assert caught.value.code == "ADAPTER_LOAD_FAILED"
    assert other.versions[0] in caught.value.message
