"""How fast the engine is by itself: tokens per second with 1, 8 and 32 generations at once.

Prompts of one length arrive together and each makes the same number of tokens, so prefill, the
mixing of chunks and the choice of tokens are all inside. No gateway and no Redis.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from rich.console import Console
from rich.table import Table

from common.clock import monotonic_s
from common.ids import new_nonce
from common.messages import Sampling
from common.models.store import DEFAULT_MODEL, ModelStore, StoredModel
from common.settings import Dtype, EngineWay, Quantize, WorkerSettings
from workers.engine.factory import build_torch
from workers.engine.port import Engine, EngineRequest


@dataclass(frozen=True, slots=True)
class Figures:
    """One row: times in milliseconds; ``step`` is a decode step with everybody in it."""

    concurrency: int
    tokens_per_second: float
    time_to_first_token_p50: float
    time_to_first_token_max: float
    step_p50: float
    step_max: float


def measure(
    engine: Engine, concurrency: int, *, prompt_tokens: int, new_tokens: int, sampled: bool
) -> Figures:
    """Run ``concurrency`` generations from submission to end."""
    unseen = new_nonce()  # or the prompts of the last measurement would be found computed
    for number in range(concurrency):
        engine.submit(_request(number, prompt_tokens, new_tokens, sampled, unseen))
    began_s = monotonic_s()
    first_ms: dict[str, float] = {}
    step_ms: list[float] = []
    num_tokens = 0
    while engine.load().running + engine.load().waiting > 0:
        step_began_s = monotonic_s()
        outputs = engine.step()
        now_s = monotonic_s()
        num_tokens += sum(len(output.tokens) for output in outputs)
        for output in outputs:
            first_ms.setdefault(output.id, (now_s - began_s) * 1000)
        if len(outputs) == concurrency:
            step_ms.append((now_s - step_began_s) * 1000)
    return Figures(
        concurrency=concurrency,
        tokens_per_second=num_tokens / (monotonic_s() - began_s),
        time_to_first_token_p50=statistics.median(first_ms.values()),
        time_to_first_token_max=max(first_ms.values()),
        step_p50=statistics.median(step_ms) if step_ms else 0.0,
        step_max=max(step_ms, default=0.0),
    )


def _request(
    number: int, prompt_tokens: int, new_tokens: int, sampled: bool, cache_scope: str
) -> EngineRequest:
    """A prompt that means nothing, in ids that any vocabulary has; no two begin alike."""
    prompt = [3 + (number * 7919 + place * 104_729) % 250 for place in range(prompt_tokens)]
    sampling = Sampling(
        max_new_tokens=new_tokens,
        seed=number,
        do_sample=sampled,
        temperature=0.8 if sampled else 1.0,
        top_k=50 if sampled else 0,
        top_p=0.95 if sampled else 1.0,
    )
    return EngineRequest(f"bench-{number}", prompt, sampling, cache_scope=cache_scope)


@click.command()
@click.option("--concurrency", default="1,8,32", help="Generations at once, comma-separated.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--sampled", is_flag=True, help="Temperature, top-k and top-p instead of greedy.")
@click.option("--dtype", default="auto", type=click.Choice(get_args(Dtype)))
@click.option("--quantize", default="none", type=click.Choice(get_args(Quantize)))
@click.option(
    "--way",
    default="auto",
    type=click.Choice(get_args(EngineWay)),
    help="How a step is computed.",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", default=Path("var"), type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A last line of JSON instead of a table.")
def main(
    concurrency: str,
    prompt_tokens: int,
    new_tokens: int,
    sampled: bool,
    dtype: str,
    quantize: str,
    way: str,
    model: str,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Measure the engine of this machine."""
    counts = [int(count) for count in concurrency.split(",")]
    settings = WorkerSettings.model_validate(
        {
            "data_dir": data_dir,
            "model": model,
            "dtype": dtype,
            "quantize": quantize,
            "speculation": "off",  # it repeats itself when it may not end: every guess is right
            "engine_way": way,
            "max_batch_size": max(counts),
        }
    )
    engine = build_torch(settings, endless(ModelStore(data_dir).get(model)))
    shape: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "sampled": sampled,
    }
    # Prepares kernels and touches every slot once: a cache never written reads from one page.
    measure(engine, max(counts), prompt_tokens=prompt_tokens, new_tokens=4, sampled=sampled)
    rows = [measure(engine, count, **shape) for count in counts]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
    else:
        _show(rows, f"{engine.model_version}, {dtype}, {way}, {json.dumps(shape)}")


def endless(stored: StoredModel) -> StoredModel:
    """The same model without an end-of-sequence token: each generation has its full length."""
    return StoredModel(stored.path, msgspec.structs.replace(stored.manifest, eos_token_ids=[]))


def _show(rows: list[Figures], title: str) -> None:
    table = Table(title=title)
    for name in (
        "generations",
        "tokens/s",
        "ttft p50 ms",
        "ttft max ms",
        "step p50 ms",
        "step max ms",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [f"{value:.1f}" for value in asdict(row).values()]
        table.add_row(str(row.concurrency), *numbers[1:])
    Console().print(table)


if __name__ == "__main__":
    main()
