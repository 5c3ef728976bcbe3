r"""The engine on a GPU: whether it is right, and how fast beside transformers' own batching.

One command for a bare machine without network: besides torch for CUDA and transformers it needs
``msgspec``, ``orjson`` and ``structlog``, which are small enough to carry along as wheels:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 \
        -d wheels msgspec orjson structlog

Right means: greedy answers in float32 are those of ``generate``, token by token, while pages run
out and prefixes are shared; in bfloat16, logits are no further from the float32 model than those of
transformers in bfloat16; kernels choose what the sampler in torch chooses. Fast is measured with
random weights in the shape of a Llama of a billion parameters: every generation has a prompt of 64
tokens and makes 128. The floor of a step is the time in which the GPU can copy as many bytes as a
step must read: weights once, keys and values of all that run.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from common.messages import Sampling
from workers.engine.batching import BatchingEngine
from workers.engine.places import PagePlaces
from workers.engine.port import EngineRequest
from workers.engine.scheduler import Limits
from workers.engine.sequence import TextRules
from workers.model.attention import ATTENTION, Stretch
from workers.model.paged_model import PAGE_TOKENS, PagedModel, prepare_paged
from workers.model.paged_runner import PagedRunner
from workers.model.plain_choice import NUM_PROVEN, prove_choice

RESULTS = Path(__file__).parent / "results"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 24},
    "mistral": {"sliding_window": 24},
    "gpt2": {},
}
"""Plain, with norms of queries, with soft caps and windows, with windows, with learnt positions."""

BILLION: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""That of Llama 3.2 1B."""

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

PEER_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "graphs": {"use_cuda_graph": True, "use_async_batching": True},
    "graphs, compiled": {
        "use_cuda_graph": True,
        "use_async_batching": True,
        "default_compile_level": 1,
    },
}
"""Of ``ContinuousBatchingConfig``; the best at one concurrency is measured at all of them. An H100
compiles for the last one longer than all else here takes, so it must be asked for."""

PROMPT_TOKENS, NEW_TOKENS = 64, 128


@dataclass(frozen=True, slots=True)
class Exactness:
    """Greedy answers in float32 against those of ``generate``."""

    architecture: str
    num_answers: int
    num_equal: int
    preempted: bool
    cached_tokens: int
    """Prompt tokens that one of the answers found computed."""
    uncompiled_reason: str | None
    is_recorded: bool
    prepared_s: float

    @property
    def is_right(self) -> bool:
        return self.num_equal == self.num_answers and self.preempted and self.cached_tokens > 0


@dataclass(frozen=True, slots=True)
class Closeness:
    """Kullback-Leibler divergence from the float32 model, mean over positions, in bfloat16."""

    architecture: str
    ours: float
    transformers: float

    @property
    def is_right(self) -> bool:
        return self.ours <= 1.5 * self.transformers + 1e-4


@dataclass(frozen=True, slots=True)
class Choices:
    """Tokens that the kernels choose against those of the sampler in torch."""

    dtype: str
    num_choices: int
    num_differing: int

    @property
    def is_right(self) -> bool:
        return self.num_differing == 0


@dataclass(frozen=True, slots=True)
class Speed:
    """One concurrency. Rates are in tokens per second, from submission to the last token."""

    concurrency: int
    rate: float
    first_token_ms: float
    step_ms: float
    """Median time of a step in which everybody got a token, all of it: scheduling, too."""
    floor_ms: float
    peer_rate: float | None = None

    @property
    def floor_share(self) -> float:
        return self.floor_ms / self.step_ms

    @property
    def peer_ratio(self) -> float | None:
        return self.rate / self.peer_rate if self.peer_rate else None


@dataclass(frozen=True, slots=True)
class Report:
    """All of a run, as it is written."""

    machine: dict[str, str | int | float]
    exactness: list[Exactness]
    closeness: list[Closeness]
    choices: list[Choices]
    """Empty where there are no kernels."""
    speed: list[Speed]
    prepared_s: float
    peer_option: str = ""
    peer_rates: dict[str, float | str] = field(default_factory=dict[str, "float | str"])
    """Of each option at the middle concurrency, or why there is none."""

    @property
    def checks(self) -> list[Exactness | Closeness | Choices]:
        return [*self.exactness, *self.closeness, *self.choices]


class _Mute:
    """A tokenizer without text: the engine's own work is what is measured."""

    special_ids: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()

    def decode(
        self,
        ids: Sequence[int],  # noqa: ARG002 - none of them has any
        *,
        skip_special_tokens: bool = True,  # noqa: ARG002
    ) -> str:
        return ""

    def token_bytes(self, id: int) -> bytes:  # noqa: ARG002 - as above
        return b""


def build_model(
    architecture: str, sizes: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Random weights, always the same; wide enough that greedy choices are clear."""
    if architecture == "gpt2":
        foreign = {"num_key_value_heads", "head_dim", "intermediate_size"}
        sizes = {name: size for name, size in sizes.items() if name not in foreign}
    values: dict[str, Any] = sizes | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = CONFIG_MAPPING[architecture](**values)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if sizes["hidden_size"] <= TINY["hidden_size"]:
        for name, weights in model.named_parameters():
            std = 0.15 if weights.ndim >= 2 else 0.05
            if weights.ndim >= 2 or name.endswith("bias"):
                torch.nn.init.normal_(weights, std=std)
    model.eval().requires_grad_(requires_grad=False)
    return model


def engine_around(
    model: PreTrainedModel, limits: Limits, *, max_tokens: int, compiler: str | None
) -> tuple[BatchingEngine, PagedModel]:
    """The engine as a worker has it, over ``model``."""
    model.set_attn_implementation(ATTENTION)
    ready = prepare_paged(
        model,
        max_sequences=limits.max_sequences,
        max_tokens=max_tokens,
        step_tokens=limits.step_tokens,
        cache_tokens=limits.cache_tokens,
        memory_share=0.8,
        compiler=compiler,
    )
    runner = PagedRunner(ready.forward, ready.choose_plainly)
    engine = BatchingEngine(
        runner,
        TextRules(_Mute(), frozenset()),
        limits,
        model_version="bench",
        max_cost=ready.max_tokens,
        vocab_size=ready.vocab_size,
        places=PagePlaces(
            ready.num_pages, page_tokens=PAGE_TOKENS, max_sequences=limits.max_sequences
        ),
        launcher=runner,
    )
    return engine, ready


def prompt_of(length: int, seed: int) -> list[int]:
    """Ids that any vocabulary has, and that mean nothing."""
    return [
        3 + (seed * 7919 + place * 104_729 + place * place * seed) % 250 for place in range(length)
    ]


def check_exactness(architecture: str, device: torch.device, compiler: str | None) -> Exactness:
    """More generations than the pages hold at once, two of them with a common prefix."""
    torch.compiler.reset()
    sizes = TINY | ARCHITECTURES[architecture]
    model = build_model(architecture, sizes, torch.float32, device)
    common = prompt_of(70, 1)
    prompts = [common + prompt_of(9, 2), common + prompt_of(12, 3)]
    prompts += [prompt_of(length, length) for length in (3, 17, 33, 64, 80, 2)]
    expected = [_generate(model, prompt, 40) for prompt in prompts]
    began_s = time.monotonic()
    limits = Limits(max_sequences=6, cache_tokens=256, step_tokens=96)
    engine, ready = engine_around(model, limits, max_tokens=160, compiler=compiler)
    prepared_s = time.monotonic() - began_s
    for number, prompt in enumerate(prompts):
        engine.submit(_request(str(number), prompt, 40))
    answers: dict[str, list[int]] = {}
    preempted, cached_tokens, num_running = False, 0, 0
    while engine.load().running + engine.load().waiting > 0:
        outputs = engine.step()
        for output in outputs:
            answers.setdefault(output.id, []).extend(output.tokens)
            cached_tokens = max(cached_tokens, output.cached_tokens)
        ended = sum(output.finish is not None for output in outputs)
        preempted |= engine.load().running + ended < num_running
        num_running = engine.load().running
    return Exactness(
        architecture,
        len(prompts),
        sum(answers.get(str(i)) == tokens for i, tokens in enumerate(expected)),
        preempted,
        cached_tokens,
        ready.forward.uncompiled_reason,
        ready.forward.is_recorded,
        round(prepared_s, 1),
    )


def _generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()


def check_closeness(architecture: str, device: torch.device, compiler: str | None) -> Closeness:
    """Half of the tokens come as a prompt, the others one by one."""
    torch.compiler.reset()
    sizes = TINY | ARCHITECTURES[architecture]
    tokens = prompt_of(96, 5)
    ids = torch.tensor([tokens], device=device)
    plain: list[torch.Tensor] = []
    model: Any = build_model(architecture, sizes, torch.float32, device)
    model.set_attn_implementation("eager")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            plain.append(model.to(dtype)(input_ids=ids).logits[0, 48:].float())
    limits = Limits(max_sequences=2, cache_tokens=256, step_tokens=64)
    _, ready = engine_around(model, limits, max_tokens=128, compiler=compiler)
    pages = tuple(range(6))
    with torch.inference_mode():
        ready.forward(tokens[:48], [Stretch(0, 0, 48, pages)], [])
        rows = [
            ready.forward([tokens[place]], [Stretch(0, place, 1, pages)], [0]).float().clone()
            for place in range(48, 96)
        ]
    exact = plain[0].log_softmax(-1)
    ours, theirs = (
        float(F.kl_div(rows.log_softmax(-1), exact, log_target=True, reduction="batchmean"))
        for rows in (torch.cat(rows), plain[1])
    )
    return Closeness(architecture, ours, theirs)


def measure_ours(
    engine: BatchingEngine, concurrency: int, *, name: str
) -> tuple[float, float, float]:
    """Tokens per second, milliseconds to the median first token and of the median full step."""
    for number in range(concurrency):
        prompt = prompt_of(PROMPT_TOKENS, 1 + number + sum(map(ord, name)) * 1000)
        engine.submit(_request(f"{name}-{number}", prompt, NEW_TOKENS))
    began_s = time.monotonic()
    first_ms: dict[str, float] = {}
    step_ms: list[float] = []
    num_tokens = 0
    while engine.load().running + engine.load().waiting > 0:
        step_began_s = time.monotonic()
        outputs = engine.step()
        now_s = time.monotonic()
        for output in outputs:
            num_tokens += len(output.tokens)
            first_ms.setdefault(output.id, (now_s - began_s) * 1000)
        if len(outputs) == concurrency:
            step_ms.append((now_s - step_began_s) * 1000)
    rate = num_tokens / (time.monotonic() - began_s)
    return rate, statistics.median(first_ms.values()), statistics.median(step_ms)


def measure_peer(model: PreTrainedModel, concurrency: int, options: dict[str, Any]) -> float:
    """Tokens per second of ``generate_batch``, with a manager that has run the same before."""
    from transformers import ContinuousBatchingConfig

    model.set_attn_implementation("sdpa")
    prompts = [prompt_of(PROMPT_TOKENS, 1 + number) for number in range(concurrency)]
    generation = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    config = ContinuousBatchingConfig(max_memory_percent=0.5, **options)
    peer: Any = model

    def generate() -> Any:
        return peer.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=config,
            persistent_manager=True,
        )

    try:
        generate()
        began_s = time.monotonic()
        answers = generate()
        taken_s = time.monotonic() - began_s
    finally:
        peer.destroy_cached_continuous_batching_manager()
    num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if num_tokens != concurrency * NEW_TOKENS:
        raise RuntimeError(f"{num_tokens} tokens came instead of {concurrency * NEW_TOKENS}")
    return num_tokens / taken_s


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy inside the device's memory reads and writes."""
    num_bytes = 1 << (31 if device.type == "cuda" else 26)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    times_s: list[float] = []
    for _ in range(12):
        _wait(device)
        began_s = time.monotonic()
        for _ in range(4):
            target.copy_(source)
        _wait(device)
        times_s.append((time.monotonic() - began_s) / 4)
    return 2 * num_bytes / statistics.median(times_s[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(sizes: dict[str, Any], num_weights: int, concurrency: int) -> int:
    """What a decode step must read, in bfloat16: half of the answer is there on average."""
    kept = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    return 2 * (num_weights + concurrency * (PROMPT_TOKENS + NEW_TOKENS // 2) * kept)


def describe_machine(device: torch.device) -> dict[str, str | int | float]:
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor(),
        "memory_gib": round(torch.cuda.mem_get_info(device)[1] / 2**30) if is_cuda else 0,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _request(id: str, prompt: list[int], new_tokens: int) -> EngineRequest:
    return EngineRequest(id, prompt, Sampling(max_new_tokens=new_tokens, seed=0))


def run(
    device: torch.device,
    sizes: dict[str, Any],
    concurrencies: list[int],
    compiler: str | None,
    peer_options: list[str],
) -> Report:
    """Everything, saying on the way what comes out."""
    machine = describe_machine(device)
    print(json.dumps(machine), flush=True)
    exactness: list[Exactness] = []
    closeness: list[Closeness] = []
    for architecture in ARCHITECTURES:
        exactness.append(check_exactness(architecture, device, compiler))
        print(f"{'right' if exactness[-1].is_right else 'WRONG'}: {exactness[-1]}", flush=True)
        closeness.append(check_closeness(architecture, device, compiler))
        print(f"{'right' if closeness[-1].is_right else 'WRONG'}: {closeness[-1]}", flush=True)
    choices = _check_kernels(sizes, device)
    # Ours first: what the other leaves behind in the process is not to cost us anything.
    speed, prepared_s = _measure_engine(machine, sizes, concurrencies, device, compiler)
    option, rates = "", {}
    if peer_options:
        model = build_model("llama", sizes, torch.bfloat16, device)
        middle = concurrencies[len(concurrencies) // 2]
        option, rates = _best_option(model, middle, peer_options)
        speed = [
            replace(one, peer_rate=measure_peer(model, one.concurrency, PEER_OPTIONS[option]))
            for one in speed
        ]
    return Report(machine, exactness, closeness, choices, speed, prepared_s, option, rates)


def _check_kernels(sizes: dict[str, Any], device: torch.device) -> list[Choices]:
    if device.type != "cuda":
        return []
    from workers.model.choice_kernels import choose_plainly

    choices: list[Choices] = []
    for dtype in (torch.bfloat16, torch.float32):
        num_differing = prove_choice(choose_plainly, sizes["vocab_size"], dtype, device)
        choices.append(Choices(str(dtype), NUM_PROVEN, num_differing))
        print(f"{'right' if choices[-1].is_right else 'WRONG'}: {choices[-1]}", flush=True)
    return choices


def _measure_engine(
    machine: dict[str, str | int | float],
    sizes: dict[str, Any],
    concurrencies: list[int],
    device: torch.device,
    compiler: str | None,
) -> tuple[list[Speed], float]:
    """Also how long it took to prepare, in seconds."""
    torch.compiler.reset()
    model = build_model("llama", sizes, torch.bfloat16, device)
    num_weights = sum(weights.numel() for weights in model.parameters())
    most = max(concurrencies)
    limits = Limits(most, cache_tokens=most * 512, step_tokens=2048)
    began_s = time.monotonic()
    engine, _ = engine_around(model, limits, max_tokens=4096, compiler=compiler)
    prepared_s = time.monotonic() - began_s
    gc.collect()
    gc.freeze()  # as a worker does when its model is loaded
    speed: list[Speed] = []
    for count in concurrencies:
        measure_ours(engine, count, name="warm")
        rate, first_ms, step_ms = measure_ours(engine, count, name="timed")
        floor_s = step_bytes(sizes, num_weights, count) / (float(machine["copy_gb_per_s"]) * 1e9)
        speed.append(Speed(count, rate, first_ms, step_ms, floor_s * 1000))
    del engine, model
    gc.unfreeze()
    gc.collect()
    return speed, round(prepared_s, 1)


def _best_option(
    model: PreTrainedModel, concurrency: int, names: list[str]
) -> tuple[str, dict[str, float | str]]:
    """Which of :data:`PEER_OPTIONS` is fastest, and what each came to."""
    rates: dict[str, float | str] = {}
    for name in names:
        try:
            rates[name] = round(measure_peer(model, concurrency, PEER_OPTIONS[name]), 1)
        except Exception as error:  # noqa: BLE001 - what this machine or version does not have
            rates[name] = f"{type(error).__name__}: {error}"[:200]
        print(f"generate_batch, {name}: {rates[name]}", flush=True)
    measured = {name: rate for name, rate in rates.items() if isinstance(rate, float)}
    return max(measured, key=lambda name: measured[name], default="default"), rates


def as_json(report: Report) -> dict[str, Any]:
    """With what is derived, so that nobody has to compute it again."""
    content = asdict(report)
    for row, one in zip(content["speed"], report.speed, strict=True):
        row |= {"floor_share": one.floor_share, "peer_ratio": one.peer_ratio}
    return content


def show(report: Report) -> None:
    right = sum(check.is_right for check in report.checks)
    print(f"\n{right} of {len(report.checks)} checks are right.")
    print(
        f"Prepared in {report.prepared_s} s; generate_batch with option {report.peer_option!r}.\n"
    )
    print("at once   tokens/s   generate_batch   ratio   TTFT ms   step ms   floor ms   of floor")
    for row in report.speed:
        peer, ratio = row.peer_rate or float("nan"), row.peer_ratio or float("nan")
        print(
            f"{row.concurrency:7d} {row.rate:10.0f} {peer:16.0f} {ratio:7.1f} "
            f"{row.first_token_ms:9.1f} {row.step_ms:9.2f} {row.floor_ms:10.2f} "
            f"{row.floor_share:10.0%}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON; 1 if anything was not right."""
    parser = argparse.ArgumentParser(description="Check and measure the engine on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--concurrency", default="1,8,32,128", help="comma-separated")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument(
        "--peer-option",
        action="append",
        choices=[*PEER_OPTIONS, "none"],
        help="of generate_batch; may be repeated (default: default and graphs)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    report = run(
        torch.device(options.device),
        TINY if options.tiny else BILLION,
        [int(count) for count in options.concurrency.split(",")],
        None if options.plain else "inductor",
        [name for name in options.peer_option or ["default", "graphs"] if name != "none"],
    )
    name = str(report.machine["device"]).lower().replace(" ", "-") or "cpu"
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"gpu-{name}-{report.machine['date']}.json"
    path.write_text(json.dumps(as_json(report), indent=2) + "\n")
    show(report)
    print(f"\n{path}")
    return 0 if all(check.is_right for check in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
