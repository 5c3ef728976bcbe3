"""The engine's benchmark counts what it claims to count."""

from pathlib import Path

from common.settings import WorkerSettings
from ops.bench.engine import measure
from ops.bench.speculation import compare
from workers.engine.factory import build_engine
from workers.engine.port import Engine


def test_figures_are_those_of_the_run(tmp_path: Path) -> None:
    """With 2 ms a step, three generations make at most three tokens each 2 ms."""
    engine = build_engine(
        WorkerSettings(
            data_dir=tmp_path,
            engine="simulated",
            model="simulated",
            simulated_first_token_ms=5,
            simulated_inter_token_ms=2,
        )
    )
    figures = measure(engine, 3, prompt_tokens=8, new_tokens=20, sampled=True)
    assert figures.concurrency == 3
    assert 0 < figures.tokens_per_second <= 3 * 20 / (0.005 + 19 * 0.002)
    assert figures.time_to_first_token_p50 >= 5
    assert figures.time_to_first_token_max >= figures.time_to_first_token_p50
    assert 2 <= figures.step_p50 <= figures.step_max


def test_what_guessing_is_worth_is_compared_by_turns(tmp_path: Path) -> None:
    """An engine that never guesses is as fast as itself: a token per step, and a ratio of one."""
    asked: list[str] = []

    def build(speculation: str) -> Engine:
        asked.append(speculation)
        settings = WorkerSettings(
            data_dir=tmp_path,
            engine="simulated",
            model="simulated",
            simulated_first_token_ms=0,
            simulated_inter_token_ms=2,
        )
        return build_engine(settings)

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text if ord(letter) < 128]

    copied, free = compare(build, encode, [2], ["copied", "free"], new_tokens=8, num_rounds=2)
    assert asked == ["off", "auto"]
    assert (copied.task, free.task, copied.concurrency) == ("copied", "free", 2)
    assert copied.tokens_per_step == 1
    assert 0 < copied.plain <= 2 / 0.002
    assert min(copied.guessed / copied.plain, copied.ratio) > 0
