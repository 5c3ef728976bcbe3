"""What LoRA adapters cost: steps in which every row has one of several, against the model's own.

Short runs of both kinds take turns, so that whatever else the machine does meets both; told is the
median of the ratios of neighbouring runs. Then one more adapter is loaded while generations run, as
a worker does it, beside their steps; told is the longest wait between two of their tokens.
"""

import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from common.clock import monotonic_s
from common.messages import Sampling
from common.models.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from common.models.files import read_header, to_json
from common.models.store import DEFAULT_MODEL, ModelStore
from common.settings import WorkerSettings
from ops.bench.engine import endless
from workers.engine.factory import build_torch
from workers.engine.port import Adapters, Engine, EngineRequest

_PROMPT_TOKENS = 16
_NEW_TOKENS = 24
_ROUNDS = 8


@click.command()
@click.option("--adapters", "num_adapters", default=8, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--concurrency", default="8,32", help="Generations at once, comma-separated.")
@click.option("--way", default="auto", type=click.Choice(["auto", "step", "operations", "modules"]))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", default=Path("var"), type=click.Path(path_type=Path))
def main(
    num_adapters: int, rank: int, concurrency: str, way: str, model: str, data_dir: Path
) -> None:
    """Measure what adapters add to a step, and what loading one costs the others."""
    counts = [int(count) for count in concurrency.split(",")]
    console = Console(highlight=False)
    with TemporaryDirectory(prefix="headrace-adapters-") as scratch:
        # The models as they are, and adapters of our own beside them.
        (Path(scratch) / "models").symlink_to((data_dir / "models").resolve())
        stored = ModelStore(data_dir).get(model)
        store = AdapterStore.beside(Path(scratch), model)
        shapes = _linears(stored.path)
        versions = [_add(store, Path(scratch), n, rank, shapes) for n in range(num_adapters + 1)]
        settings = WorkerSettings.model_validate(
            {
                "data_dir": scratch,
                "model": model,
                "engine_way": way,
                "max_batch_size": max(counts),
            }
        )
        engine = build_torch(settings, endless(stored))
        adapters = engine.adapters
        if adapters is None:
            raise click.ClickException("this engine computes without adapters")
        for version in versions[:-1]:
            adapters.put(version, adapters.read(version))
        for count in counts:
            base, adapted = measure(engine, count, versions[:-1])
            console.print(
                f"{count} rows, {num_adapters} adapters of rank {rank}: step"
                f" {statistics.median(base):.2f} ms without,"
                f" {statistics.median(adapted):.2f} ms with:"
                f" {_ratio(base, adapted):.2f} times"
            )
        quiet, loading, load_s = measure_load(engine, adapters, counts[0], versions[-1])
        console.print(
            f"loading one beside {counts[0]} generations took {load_s * 1000:.0f} ms; their longest"
            f" gap {loading:.1f} ms, and {quiet:.1f} ms when nothing is loaded"
        )


def measure(engine: Engine, count: int, versions: Sequence[str]) -> tuple[list[float], list[float]]:
    """Median milliseconds of a step of ``count`` rows, per run: without adapters, and with."""
    medians: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, _ROUNDS):  # the first prepares and is not told
        for medians_of, names in zip(medians, ([""], versions), strict=True):
            steps = _run(engine, count, names)
            if number >= 0:
                medians_of.append(statistics.median(steps))
    return medians


def measure_load(
    engine: Engine, adapters: Adapters, count: int, version: str
) -> tuple[float, float, float]:
    """Longest milliseconds between two steps without and with a load, and how long that took."""
    quiet = max(_run(engine, count, [""], new_tokens=4 * _NEW_TOKENS))
    ready: list[Any] = []
    began_s = monotonic_s()
    thread = threading.Thread(target=lambda: ready.append(adapters.read(version)))
    thread.start()
    loaded_s = 0.0

    def between_steps() -> None:
        nonlocal loaded_s
        if ready and not loaded_s:
            adapters.put(version, ready[0])
            loaded_s = monotonic_s() - began_s

    loading = max(_run(engine, count, [""], new_tokens=4 * _NEW_TOKENS, between=between_steps))
    thread.join()
    return quiet, loading, loaded_s


def _run(
    engine: Engine,
    count: int,
    versions: Sequence[str],
    *,
    new_tokens: int = _NEW_TOKENS,
    between: Any = None,
) -> list[float]:
    """Milliseconds from step to step while all ``count`` generations are decoding."""
    for number in range(count):
        prompt = [3 + (number * 7919 + place * 104_729) % 250 for place in range(_PROMPT_TOKENS)]
        sampling = Sampling(max_new_tokens=new_tokens, seed=number)
        version = versions[number % len(versions)]
        engine.submit(EngineRequest(f"bench-{number}", prompt, sampling, adapter=version))
    gaps: list[float] = []
    began_s = monotonic_s()
    while engine.load().running + engine.load().waiting > 0:
        if between is not None:
            between()
        num_tokens = len(engine.step())
        now_s = monotonic_s()
        if num_tokens == count:
            gaps.append((now_s - began_s) * 1000)
        began_s = now_s
    return gaps[1:]


def _ratio(base: Sequence[float], adapted: Sequence[float]) -> float:
    return statistics.median(b / a for a, b in zip(base, adapted, strict=True))


def _linears(model: Path) -> dict[str, list[int]]:
    """``[outputs, inputs]`` of each projection in the stored model, by its path."""
    tensors = {
        name: tensor.shape
        for path in model.glob("model*.safetensors")
        for name, tensor in read_header(path).items()
    }
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith("_proj.weight")
    }


def _add(
    store: AdapterStore, scratch: Path, number: int, rank: int, shapes: dict[str, list[int]]
) -> str:
    """A random adapter of all projections; returns its version."""
    folder = scratch / f"adapter-{number}"
    folder.mkdir()
    random = np.random.default_rng(number)
    tensors: dict[str, Any] = {}
    for path, (outputs, inputs) in shapes.items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = random.normal(0.0, 0.01, shape).astype(np.float32)
            tensors[f"base_model.model.{path}.lora_{part}.weight"] = values
    save_file(tensors, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / CONFIG_FILE).write_bytes(to_json(config))
    return store.add(str(folder), folder.name).version


if __name__ == "__main__":
    main()
