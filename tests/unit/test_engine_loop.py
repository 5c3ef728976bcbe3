"""The engine's thread: order of commands, one call per step, no spinning, an honest end."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.engines import request
from tests.support.waiting import wait_until
from workers.engine.loop import EngineLoop, StepReport
from workers.engine.port import CacheSize, EngineLoad, EngineRequest, StepOutput, StepWork


class StepwiseEngine:
    """Gives each generation one token per step; a gate can hold a step open."""

    model_version = "m@1"
    max_cost = 100
    vocab_size = 512
    adapters = None
    last_step = StepWork()
    cache_size = CacheSize(1000, 16)
    device = None

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.error: Exception | None = None
        self.threads: set[int] = set()

    def submit(self, request: EngineRequest) -> None:
        self.calls.append(f"submit {request.id}")
        self.running[request.id] = request.sampling.max_new_tokens

    def cancel(self, id: str) -> None:
        self.calls.append(f"cancel {id}")
        self.running.pop(id, None)

    def step(self) -> list[StepOutput]:
        self.calls.append("step")
        self.threads.add(threading.get_ident())
        self.in_step.set()
        assert self.gate.wait(10)
        self.in_step.clear()
        if self.error is not None:
            raise self.error
        outputs = [StepOutput(id, 0, [1], [b"x"], [0.0]) for id in self.running]
        self.running = {id: left - 1 for id, left in self.running.items() if left > 1}
        return outputs

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.running), 0, 0, 0)


class Driven:
    """An engine loop and what it reported."""

    def __init__(self, step_timeout_s: float = 5.0) -> None:
        self.engine = StepwiseEngine()
        self.reports: list[StepReport] = []
        self.loop = EngineLoop(self.engine, self.reports.append, step_timeout_s=step_timeout_s)
        self.loop.start()

    async def until(self, condition: Callable[[], bool]) -> None:
        await wait_until(condition)

    async def until_idle(self) -> None:
        await wait_until(lambda: bool(self.reports) and self.reports[-1].load.running == 0)


@pytest.fixture
async def driven() -> AsyncIterator[Driven]:
    driven = Driven()
    yield driven
    driven.engine.gate.set()
    driven.loop.stop()


def req(id: str, num_tokens: int) -> EngineRequest:
    return request(id, [1], max_new_tokens=num_tokens)


async def test_each_step_is_one_report(driven: Driven) -> None:
    """However many generations it served; and only while there is work."""
    driven.loop.submit(req("a", 3))
    await driven.until_idle()
    assert [report.step for report in driven.reports] == [1, 2, 3]
    assert all(len(report.outputs) == 1 for report in driven.reports)
    assert all(report.duration_s >= 0 for report in driven.reports)
    assert driven.engine.threads != {threading.get_ident()}


async def test_an_idle_engine_does_not_step(driven: Driven) -> None:
    """The thread sleeps until it is told something: steps are counted, none is added."""
    driven.loop.submit(req("a", 1))
    await driven.until_idle()
    num_calls = len(driven.engine.calls)
    driven.loop.submit(req("b", 1))
    await driven.until(lambda: len(driven.reports) == 2)
    assert driven.engine.calls[num_calls:] == ["submit b", "step"]
    assert driven.loop.last_step_age_s == 0.0


async def test_a_cancel_is_carried_out_before_the_next_step(driven: Driven) -> None:
    driven.engine.gate.clear()
    driven.loop.submit(req("a", 5))
    await driven.until(driven.engine.in_step.is_set)
    driven.loop.submit(req("b", 1))
    driven.loop.cancel("a")
    driven.engine.gate.set()
    await driven.until_idle()
    assert driven.engine.calls == ["submit a", "step", "submit b", "cancel a", "step"]
    assert [output.id for output in driven.reports[1].outputs] == ["b"]


async def test_paused_it_takes_commands_but_no_steps(driven: Driven) -> None:
    driven.loop.pause()
    driven.loop.submit(req("a", 2))
    await driven.until(lambda: driven.engine.calls == ["submit a"])
    driven.loop.cancel("nobody")
    await driven.until(lambda: driven.engine.calls == ["submit a", "cancel nobody"])
    driven.loop.resume()
    await driven.until_idle()
    assert driven.engine.calls[2:] == ["step", "step"]


async def test_a_pause_in_the_middle_keeps_the_work(driven: Driven) -> None:
    driven.engine.gate.clear()
    driven.loop.submit(req("a", 3))
    await driven.until(driven.engine.in_step.is_set)
    driven.loop.pause()
    driven.engine.gate.set()
    await driven.until(lambda: len(driven.reports) == 1)
    driven.loop.resume()
    await driven.until_idle()
    assert len(driven.reports) == 3


async def test_an_engine_that_raises_is_reported_once(driven: Driven) -> None:
    """The error is the result of ``failed``; afterwards commands have no effect."""
    driven.engine.error = RuntimeError("device lost")
    driven.loop.submit(req("a", 1))
    error = await asyncio.wait_for(driven.loop.failed, 5)
    assert error is driven.engine.error
    driven.loop.submit(req("b", 1))
    driven.loop.stop()
    assert driven.reports == []
    assert driven.loop.last_step_age_s == 0.0


async def test_a_stuck_step_shows_its_age() -> None:
    """What the watchdog looks at; ``stop`` does not wait for it longer than a step may take."""
    driven = Driven(step_timeout_s=0.05)
    driven.engine.gate.clear()
    driven.loop.submit(req("a", 1))
    await driven.until(lambda: driven.loop.is_stalled)
    assert driven.loop.last_step_age_s > 0.05
    driven.loop.stop()
    driven.engine.gate.set()
    await driven.until(lambda: driven.loop.last_step_age_s == 0.0)


async def test_after_stop_nothing_runs(driven: Driven) -> None:
    driven.loop.stop()
    driven.loop.submit(req("a", 1))
    assert not driven.loop._thread.is_alive()
    assert driven.engine.calls == []


def test_an_event_loop_that_ended_first_is_no_error() -> None:
    """A worker that is killed half way must not print a traceback from this thread."""

    async def leave() -> Driven:
        driven = Driven()
        driven.engine.gate.clear()
        driven.loop.submit(req("a", 1))
        await driven.until(driven.engine.in_step.is_set)
        return driven

    driven = asyncio.run(leave())
    driven.engine.gate.set()
    driven.loop.stop()
    assert not driven.loop._thread.is_alive()
