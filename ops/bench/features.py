"""What parameters cost: a batch in which every row asks for something else, against plain greedy.

Both batches have the same prompts and run on the same engine, in turn. Grammars are ready masks, so
that it is the choice of tokens that is measured and no matcher; and nothing is guessed, since the
steps of text that repeats itself would carry more tokens.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray

from common.clock import monotonic_s
from common.ids import new_nonce
from common.messages import Sampling, Watermark
from common.models.store import DEFAULT_MODEL, ModelStore, StoredModel
from common.settings import WorkerSettings
from workers.engine.factory import build_torch
from workers.engine.port import Engine, EngineRequest

_DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.8}
_PENALTIES: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.4}
_BIAS = {id: 5.0 - id % 11 for id in range(300, 600)}

FEATURES: Sequence[dict[str, Any]] = (
    {},
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.7},
    {"presence_penalty": 0.7},
    {"relative_frequency_penalty": 0.7},
    {"logit_bias": {17: 3.0, 250: -100.0}},
    {"logit_bias": _BIAS},
    {"watermark": Watermark(0.5, 2.0)},
    {"top_logprobs": 5},
    {"top_logprobs": 20},
    {"stop_token_ids": (7, 9), "min_new_tokens": 1 << 20},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "temperature": 1.5},
    {**_DRAWN, "top_k": 1},
    {**_DRAWN, "top_k": 50},
    {**_DRAWN, "top_k": 400},
    {**_DRAWN, "top_p": 0.9},
    {**_DRAWN, "top_p": 0.99},
    {**_DRAWN, "top_k": 50, "top_p": 0.95},
    {**_DRAWN, "typical_p": 0.95},
    {**_DRAWN, "top_p": 0.95, "typical_p": 0.95},
    {**_DRAWN, "min_p": 0.05},
    {**_DRAWN, "min_p": 0.02, "top_p": 0.95},
    {**_DRAWN, **_PENALTIES},
    {**_DRAWN, "top_p": 0.9, "watermark": Watermark(0.25, 2.0)},
    {**_DRAWN, "top_k": 40, "repetition_penalty": 1.1, "top_logprobs": 5},
    {**_DRAWN, "top_p": 0.9, "logit_bias": _BIAS, **_PENALTIES},
)
"""One row each; as many more as are wanted have a grammar, every other one drawn."""


class ReadyMask:
    """Implements :class:`workers.engine.grammar.Matcher`: always the same tokens."""

    def __init__(self, mask: NDArray[np.int32]) -> None:
        self._mask = mask

    def mask(self) -> NDArray[np.int32]:
        return self._mask

    def accept(self, token: int) -> None:
        pass

    def count_allowed(self, tokens: list[int]) -> int:
        return len(tokens)

    def masks(self, tokens: list[int]) -> list[NDArray[np.int32]]:
        return [self._mask] * (len(tokens) + 1)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Medians of decode steps with all rows in them, in milliseconds."""

    rows: int
    greedy_step_p50: float
    features_step_p50: float
    ratio: float


def measure(
    engine: Engine, rows: int, *, vocab_size: int, prompt_tokens: int, new_tokens: int, rounds: int
) -> Ratio:
    """Run both batches ``rounds`` times, in turn."""
    shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for with_features, steps in times.items():
            requests = [
                _request(number, with_features=with_features, vocab_size=vocab_size, **shape)
                for number in range(rows)
            ]
            steps.extend(_step_times_ms(engine, requests))
    greedy, mixed = (statistics.median(steps) for steps in times.values())
    return Ratio(rows, greedy, mixed, mixed / greedy)


def _request(
    number: int, *, with_features: bool, vocab_size: int, prompt_tokens: int, new_tokens: int
) -> EngineRequest:
    """As those of :mod:`ops.bench.engine`; ``number`` chooses the features."""
    prompt = [3 + (number * 7919 + place * 104_729) % 250 for place in range(prompt_tokens)]
    asked: dict[str, Any] = {}
    matcher = None
    if with_features and number < len(FEATURES):
        asked = FEATURES[number]
    elif with_features:
        allowed = np.random.default_rng(number).random(-(-vocab_size // 32) * 32) < 0.1
        matcher = ReadyMask(np.packbits(allowed, bitorder="little").view("<i4"))
        asked = _DRAWN if number % 2 else {}
    sampling = Sampling(max_new_tokens=new_tokens, seed=number, **asked)
    # A scope of its own, or the prompts of the last round would be found computed.
    return EngineRequest(
        f"bench-{number}", prompt, sampling, cache_scope=new_nonce(), matcher=matcher
    )


def _step_times_ms(engine: Engine, requests: Sequence[EngineRequest]) -> list[float]:
    """Of each step in which every request got a token and none had to be prefilled."""
    for request in requests:
        engine.submit(request)
    times: list[float] = []
    while engine.load().running + engine.load().waiting > 0:
        began_s = monotonic_s()
        outputs = engine.step()
        if len(outputs) == len(requests) and all(output.start > 0 for output in outputs):
            times.append((monotonic_s() - began_s) * 1000)
    return times


@click.command()
@click.option("--rows", default=32, show_default=True, help="Generations in a batch.")
@click.option("--prompt-tokens", default=8, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Times that each batch is run.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--data-dir", default=Path("var"), type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A line of JSON instead of a sentence.")
def main(
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    model: str,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Measure what parameters of a generation cost in a batch where all differ."""
    settings = WorkerSettings.model_validate(
        {"data_dir": data_dir, "model": model, "max_batch_size": rows, "speculation": "off"}
    )
    stored = ModelStore(data_dir).get(model)
    # Without end-of-sequence tokens each generation has its full length.
    endless = msgspec.structs.replace(stored.manifest, eos_token_ids=[])
    engine = build_torch(settings, StoredModel(stored.path, endless))
    config = json.loads((stored.path / "config.json").read_text())
    shape = {"vocab_size": config["vocab_size"], "prompt_tokens": prompt_tokens}
    measure(
        engine, rows, new_tokens=new_tokens, rounds=1, **shape
    )  # touches all that is used, once
    found = measure(engine, rows, new_tokens=new_tokens, rounds=rounds, **shape)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(
            f"{found.rows} rows of different features: {found.features_step_p50:.1f} ms a step, "
            f"{found.ratio:.2f} times the {found.greedy_step_p50:.1f} ms of plain greedy rows."
        )


if __name__ == "__main__":
    main()
