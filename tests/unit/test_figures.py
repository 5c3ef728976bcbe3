"""What a worker says of its steps is what they were."""

from pathlib import Path

import pytest

from common.settings import WorkerSettings
from tests.support.engines import request
from workers.engine.factory import build_engine
from workers.engine.loop import StepReport
from workers.engine.port import Engine, EngineLoad, StepWork
from workers.figures import Figures

PROMPT = list(range(40))


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return build_engine(
        WorkerSettings(
            data_dir=tmp_path,
            engine="simulated",
            model="simulated",
            simulated_first_token_ms=0,
            simulated_inter_token_ms=0,
            max_batch_size=4,
            max_batch_total_tokens=1024,
        )
    )


class Drive:
    """Steps of an engine, told to the figures as its loop would."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.figures = Figures(max_batch_size=4, cache=engine.cache_size)
        self._num_steps = 0

    def step(self, duration_s: float = 0.01) -> StepWork:
        outputs = self.engine.step()
        self._num_steps += 1
        work = self.engine.last_step
        self.figures.note_step(
            StepReport(outputs, self.engine.load(), self._num_steps, duration_s, work)
        )
        return work


@pytest.fixture
def drive(engine: Engine) -> Drive:
    return Drive(engine)


def test_a_batch_is_told_as_it_is(drive: Drive) -> None:
    for name in ("a", "b", "c"):
        drive.engine.submit(request(name, [*PROMPT, ord(name)], max_new_tokens=3))
    first = drive.step()
    figures = drive.figures
    assert (first.num_rows, first.num_joined, first.num_prefill_tokens) == (3, 3, 123)
    assert (figures.batch_size, figures.running, figures.occupancy) == (3, 3, 0.75)
    assert figures.used_tokens == 3 * 41
    assert figures.kv_used == 3 * 41 / 1024
    second = drive.step()
    assert (second.num_rows, second.num_joined, second.num_prefill_tokens) == (3, 0, 0)
    assert figures.prefill.whole_s.count == figures.decode.whole_s.count == 1
    drive.step()
    assert drive.step() == StepWork()
    assert (figures.batch_size, figures.running, figures.kv_used) == (0, 0, 0.0)
    assert figures.num_steps == 3
    assert figures.generated_tokens == 9
    assert figures.prompt_tokens == 123
    assert figures.batch_size_mean == 3.0
    assert figures.batch_size_max == 3
    assert figures.tokens_per_second == pytest.approx(9.0, rel=0.2)
    assert 0.0075 < figures.step_p50_s <= figures.step_p99_s <= 0.01


def test_the_parts_of_a_step_are_no_more_than_the_step(drive: Drive) -> None:
    drive.engine.submit(request("a", PROMPT, max_new_tokens=1))
    work = drive.step()
    assert min(work.plan_s, work.forward_s, work.text_s, work.leave_s) > 0
    assert work.leave_s < work.text_s
    method = drive.figures.prefill
    assert method.leave_s.count == method.join_s.count == method.forward_s.count == 1


def test_found_prefixes_are_counted_in_tokens(drive: Drive) -> None:
    """A second prompt that begins alike finds whole blocks of the first."""
    for name, last in (("a", 1), ("b", 2)):
        drive.engine.submit(request(name, [*PROMPT, last], max_new_tokens=1))
        drive.step()
    figures = drive.figures
    assert figures.queried_tokens == 82
    assert figures.found_tokens == 32


def test_who_comes_into_a_running_batch_is_counted(drive: Drive) -> None:
    drive.engine.submit(request("a", PROMPT, max_new_tokens=8))
    drive.step()
    drive.engine.submit(request("b", [1, *PROMPT], max_new_tokens=8))
    drive.step()
    drive.step()  # what a prompt may take of a step is learnt from a step without one
    assert drive.figures.joined == 1
    assert drive.figures.joined_sizes.count == 2


def test_who_loses_his_place_is_counted(tmp_path: Path) -> None:
    """Two that fit at first and not in the end: one is put back."""
    settings = WorkerSettings(
        data_dir=tmp_path,
        engine="simulated",
        model="simulated",
        simulated_first_token_ms=0,
        simulated_inter_token_ms=0,
        max_batch_total_tokens=64,
    )
    drive = Drive(build_engine(settings))
    for name in ("a", "b"):
        drive.engine.submit(request(name, [*PROMPT[:20], ord(name)], max_new_tokens=30))
    while drive.engine.load().running or drive.engine.load().waiting:
        drive.step()
    assert drive.figures.num_preempted == 1
    assert drive.figures.generated_tokens == 60


def test_an_idle_engine_uses_nothing() -> None:
    figures = Figures(max_batch_size=4)
    figures.note_step(StepReport([], EngineLoad(0, 0, 100, 4), 1, 0.001, StepWork()))
    assert figures.num_steps == 0
    assert figures.batch_size_mean == figures.tokens_per_second == figures.step_p99_s == 0.0
    assert figures.pad_ratio == figures.gpu_mem_bytes == figures.gpu_mem_peak_bytes == 0
    assert figures.rss_bytes > 1_000_000


def test_padding_is_a_share_of_all_that_was_computed() -> None:
    figures = Figures(max_batch_size=4)
    for num_tokens, num_padding in ((6, 2), (1, 1)):
        work = StepWork(num_rows=1, num_tokens=num_tokens, num_padding=num_padding)
        figures.note_step(StepReport([], EngineLoad(1, 0, 100, 4), 1, 0.001, work))
    assert figures.pad_ratio == 0.3
