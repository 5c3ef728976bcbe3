"""What guessing is worth: tokens per second with and without it, of copied and of free text.

Two engines on one model take turns, so that whatever else the machine does meets both alike. Only
the time behind the first token counts: guesses make no prompt shorter.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from common.clock import monotonic_s
from common.ids import new_nonce
from common.messages import Sampling
from common.models.store import DEFAULT_MODEL, ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import WorkerSettings
from ops.bench.engine import endless
from workers.engine.factory import build_torch
from workers.engine.port import Engine, EngineRequest
from workers.model.ways import available_threads

_PASSAGE = """The mill at the ford is older than the village. Nobody knows who built the first weir,
but the parish book of 1652 names a miller who paid four sacks of rye a year for the right to the
water. His wheel stood on the left bank, where the current is slow in summer and dangerous in March.
In the dry year of 1684 the stones did not turn for eleven weeks, and flour was brought over the
hills on mules. After that a channel of nine hundred paces was dug along the slope, so that the
water could be kept at one height and led to the wheel as it was needed. A sluice of oak let the
rest of it back into the river. When a second wheel was hung in 1731, the channel was made wider by
two feet, and a spillway was cut beside the sluice, which saved the mill in the great flood of 1784.
The bridge was lost in that flood, and so were both boats, seven sheep, and the lower half of the
garden; but on the third day the stones turned again. The miller of that time, a widow by the name
of Anna Kestrel, had opened the spillway on the evening before, against the advice of everybody who
stood on the bank. She kept the mill for thirty more years and taught the trade to two of her
daughters. The last wheel was taken down in 1911. What is left is the channel, which still carries
water in spring, and the sluice, which the village renews every ten years in oak, as it was."""

_TASKS = {
    "copied": f"{_PASSAGE}\n\nThe same text once more, word for word:\n\n{_PASSAGE[:130]}",
    "free": "This is a long story that I made up about a girl, her dog, and the sea.\n\nOnce, when",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per second; medians over the rounds."""

    task: str
    concurrency: int
    plain: float
    guessed: float
    ratio: float
    """Median of the rounds' own ratios."""
    tokens_per_step: float
    """With guesses, of one generation."""


def measure(
    engine: Engine, prompt: list[int], concurrency: int, new_tokens: int, *, sampled: bool
) -> tuple[float, float]:
    """(tokens per second, tokens per step of one generation) behind the first token of each.

    Until there are ``new_tokens`` on average, and with all of them running: guesses let some end
    before others, and a batch that runs empty says nothing about one that clients keep full.
    """
    unseen = new_nonce()
    for number in range(concurrency):
        sampling = Sampling(2 * new_tokens, seed=number, do_sample=sampled, temperature=0.8)
        engine.submit(EngineRequest(f"{number}", prompt, sampling, cache_scope=f"{unseen}{number}"))
    began: set[str] = set()
    while len(began) < concurrency:
        began |= {output.id for output in engine.step()}
    began_s, num_tokens, num_outputs = monotonic_s(), 0, 0
    while num_tokens < concurrency * new_tokens:
        outputs = engine.step()
        num_tokens += sum(len(output.tokens) for output in outputs)
        num_outputs += len(outputs)
    took_s = monotonic_s() - began_s
    for number in range(concurrency):
        engine.cancel(f"{number}")
    return num_tokens / took_s, num_tokens / num_outputs


def compare(
    build: Callable[[str], Engine],
    encode: Callable[[str], list[int]],
    concurrencies: list[int],
    tasks: list[str],
    *,
    new_tokens: int,
    num_rounds: int,
) -> list[Comparison]:
    """Each of ``tasks`` at each concurrency, ``num_rounds`` times after one that does not count."""
    plain, guessing = build("off"), build("auto")
    found: list[Comparison] = []
    for task in tasks:
        prompt, sampled = encode(_TASKS[task]), task == "free"
        for concurrency in concurrencies:
            rounds = [
                [
                    measure(engine, prompt, concurrency, new_tokens, sampled=sampled)
                    for engine in (plain, guessing)
                ]
                for _ in range(num_rounds + 1)
            ][1:]
            found.append(
                Comparison(
                    task,
                    concurrency,
                    plain=statistics.median(without for (without, _), _ in rounds),
                    guessed=statistics.median(with_ for _, (with_, _) in rounds),
                    ratio=statistics.median(with_ / without for (without, _), (with_, _) in rounds),
                    tokens_per_step=statistics.median(steps for _, (_, steps) in rounds),
                )
            )
    return found


@click.command()
@click.option("--concurrency", default="1,4", help="Generations at once, comma-separated.")
@click.option("--text", type=click.Choice([*_TASKS]), multiple=True, help="Only this one.")
@click.option("--new-tokens", default=192, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", default=Path("var"), type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A last line of JSON instead of a table.")
def main(
    concurrency: str,
    text: tuple[str, ...],
    new_tokens: int,
    rounds: int,
    dtype: str,
    model: str,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Measure what speculation brings on this machine."""
    stored = endless(ModelStore(data_dir).get(model))
    # Found out before the first engine is built, which leaves torch a single thread.
    threads = available_threads()
    values = {"data_dir": data_dir, "model": model, "dtype": dtype, "num_threads": threads}

    def build(speculation: str) -> Engine:
        settings = WorkerSettings.model_validate({**values, "speculation": speculation})
        return build_torch(settings, stored)

    counts = [int(count) for count in concurrency.split(",")]
    encode = Tokenizer.load(stored.path).encode
    tasks = list(text or _TASKS)
    rows = compare(build, encode, counts, tasks, new_tokens=new_tokens, num_rounds=rounds)
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("text", title=f"{model}, {dtype}, {new_tokens} tokens each")
    for name in ("generations", "tokens/s without", "tokens/s with", "ratio", "tokens/step"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.plain, row.guessed, row.ratio, row.tokens_per_step)
        table.add_row(row.task, str(row.concurrency), *(f"{value:.2f}" for value in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
