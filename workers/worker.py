"""The worker: start, serve, drain and stop in order; the one place where the parts meet.

Intake brings generations from Redis, the engine thread computes, the publisher sends what it made.
This file holds the loop that joins them, and decides when and how the process ends.
"""

import asyncio
import gc
import os
import random
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import NoReturn

import uvloop

from common import logs
from common.broker import Broker, connect
from common.clock import monotonic_s
from common.failures import Failure
from common.ids import new_process_name
from common.logs import get_logger
from common.metrics_port import metrics_port
from common.models.store import ModelStore
from common.pauses import keep_telling_pauses
from common.reaping import keep_reaping
from common.redis_clock import RedisClock
from common.settings import WorkerSettings
from common.spans import Spans, open_spans
from workers import exit_codes
from workers.adapters import HeldAdapters
from workers.attempts import Ledger
from workers.device_watch import watch_device
from workers.engine.factory import build_engine
from workers.engine.loop import EngineLoop, StepReport, set_result
from workers.engine.port import DeviceLostError, Engine
from workers.figures import Figures
from workers.grammars import Grammars, build_grammars
from workers.heartbeat import EngineStalledError, Heartbeat, keep_announcing
from workers.intake import Intake
from workers.metrics import Served, WorkerMetrics
from workers.publisher import Publisher
from workers.spans import AttemptSpans
from workers.standby import Standby

log = get_logger()

_SWITCH_INTERVAL_S = 0.0005
"""How soon the engine thread lets the event loop run; Python's 5 ms would show in every token."""
_MAX_BACKOFF_S = 0.5
_TELL_S = 60.0
_AWAY = frozenset({"BROKER_UNAVAILABLE", "BROKER_FULL"})
_MODEL_FAILURES = frozenset(
    {"MODEL_NOT_FOUND", "MODEL_LOAD_FAILED", "WEIGHTS_MISMATCH", "UNSAFE_FORMAT"}
)


class EngineFailedError(Exception):
    """The engine raised; its cause is the engine's exception."""


class Worker:
    """One engine behind one pool. Use :func:`run` to run one as a process."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        engine: Engine,
        grammars: Grammars,
        lost: asyncio.Future[Exception],
        *,
        load_s: float = 0.0,
        clock: RedisClock | None = None,
        spans: Spans | None = None,
    ) -> None:
        """``lost`` is done once the engine can compute no more, be it idle or in a step; ``load_s``
        is how long its model took to load.
        """
        self.name = name
        self._lost = lost
        self._settings = settings
        self._engine = engine
        self._ordered = Broker(connect(settings.redis_url, single=True), settings.model)
        self._beats = Broker(connect(settings.redis_url), settings.model)
        self._bell = Broker(connect(settings.redis_url, blocking=True), settings.model)
        self._clock = clock or RedisClock()
        self._device = watch_device(engine.device, name, partial(_tell_lost, lost))
        capacity = engine.load()
        self._wake = asyncio.Event()
        self._wake.set()  # look once for what waited before this worker came
        self._drain_until_s: float | None = None
        self._tasks = asyncio.TaskGroup()
        self._ledger = Ledger()
        self.figures = Figures(
            model_version=engine.model_version,
            max_batch_size=settings.max_batch_size,
            max_tokens=engine.max_cost,
            cache=engine.cache_size,
            load_s=load_s,
            device=self._device,
        )
        self._loop = EngineLoop(engine, self._on_step, step_timeout_s=settings.step_timeout_s)
        self._publisher = Publisher(
            self._ordered,
            name,
            self._ledger,
            self._loop,
            lease_ms=settings.lease_ms,
            model_version=engine.model_version,
            wake=self._wake.set,
            figures=self.figures,
            spans=spans and AttemptSpans(spans, self._clock, settings.model),
        )
        self._grammars = grammars
        self._intake = Intake(
            self._ordered,
            self._bell,
            name,
            self._ledger,
            self._loop,
            capacity=capacity,
            model_version=engine.model_version,
            prefix_cache=settings.prefix_cache,
            grammars=self._grammars,
            adapters=HeldAdapters(
                engine.adapters,
                self._loop,
                max_adapters=settings.max_adapters,
                needed=self._ledger.adapters,
            ),
            wake=self._wake.set,
            spawn=self._spawn,
            figures=self.figures,
            clock=self._clock,
            gpu_uuid=self._device.uuid if self._device else None,
        )
        self._standby = Standby(
            self._ledger,
            self._intake,
            self._publisher,
            drain_s=settings.drain_s,
            change_state=self._change_state,
            wake=self._wake.set,
        )
        self._heartbeat = Heartbeat(
            self._beats,
            name,
            self._ledger,
            self._loop,
            model_version=engine.model_version,
            # What never fits must not be admitted: room would be reserved for it for ever.
            max_cost=min(engine.max_cost, capacity.free_tokens),
            beat_ms=settings.beat_ms,
            lease_ms=settings.lease_ms,
            free_tokens=lambda: self._intake.free_tokens,
            max_batch_size=settings.max_batch_size,
            figures=self.figures,
            heed=self._standby.heed,
        )

    def metrics(self) -> WorkerMetrics:
        """All that it has to show."""
        settings = self._settings
        manifest = ModelStore(settings.data_dir).get(settings.model).manifest
        return WorkerMetrics(
            Served(
                model=settings.model,
                model_version=self._engine.model_version,
                worker=self.name,
                revision=manifest.revision,
                weights_sha256=manifest.weights_sha256,
                dtype=manifest.dtype,
                quant=settings.quantize,
                max_adapters=settings.max_adapters,
            ),
            self.figures,
            settings.metrics_compat,
            num_held=lambda: sum(it.is_in_engine for it in self._ledger.running()),
            adapters=self._ledger.adapters,
        )

    async def run(self) -> None:
        """Serve until drained.

        Raises, most of them inside an exception group:
            EngineStalledError, EngineFailedError, DeviceLostError: end the process.
            Failure: Redis was unreachable at the start or while draining.
        """
        await self._heartbeat.beat()
        self._loop.start()
        async with self._tasks:
            beside = [
                self._spawn(self._heartbeat.keep_beating()),
                self._spawn(self._intake.listen()),
                self._spawn(keep_reaping(self._beats, may_reap=lambda: self._heartbeat.has_lease)),
                self._spawn(self._watch_engine()),
                self._spawn(self._clock.keep_sampling(self._beats)),
                self._spawn(self._keep_telling()),
                self._spawn(keep_telling_pauses()),
            ]
            log.info("worker.ready", model_version=self._engine.model_version)
            self._tell_state("loading", "ready", "started")
            await self._serve()
            await self._hand_over(beside)
            self._tell_state("draining", "drained", "asked")
        await asyncio.to_thread(self._loop.stop)

    def _tell_state(self, before: str, after: str, cause: str) -> None:
        log.info("worker.state", worker=self.name, cause=cause, **{"from": before, "to": after})

    def _change_state(self, state: str, cause: str) -> None:
        """To what others read with the next beat."""
        before, self._heartbeat.state = self._heartbeat.state, state
        self._tell_state(before, state, cause)

    async def close(self) -> None:
        """Close the connections and end what runs beside, however :meth:`run` ended."""
        if self._device is not None:
            self._device.stop()
        self._grammars.close()
        for broker in (self._ordered, self._beats, self._bell):
            with suppress(Failure):
                await broker.close()

    async def _serve(self) -> None:
        """The worker's loop. What the engine made goes out, and what it has room for comes in.

        Each engine step wakes it, and the bell; meanwhile the engine computes its next step.
        """
        while not self._is_drained():
            await self._wake.wait()
            self._wake.clear()
            try:
                waiting = await self._publisher.publish()
                self._intake.room_changed()
                if self._intake.should_claim(waiting):
                    await self._intake.claim()
                too_many = self._intake.first_to_give_way()
                await self._publisher.release(too_many, event="generation.yielded")
                await self._standby.settle()
            except Failure as failure:
                await self._outlast(failure)

    def _on_step(self, report: StepReport) -> None:
        self._heartbeat.num_steps = report.step
        self.figures.note_step(report)
        self._publisher.take(report.outputs, report.load.joined, step=report.step)

    async def _keep_telling(self) -> None:
        """One line a minute, until cancelled: for whoever has only the logs."""
        figures = self.figures
        while True:
            await asyncio.sleep(_TELL_S)
            log.info(
                "worker.measured",
                worker=self.name,
                batch_size_mean=round(figures.batch_size_mean, 3),
                kv_used=round(figures.kv_used, 4),
                tokens_per_second=round(figures.tokens_per_second, 3),
                step_p50_s=round(figures.step_p50_s, 6),
                step_p99_s=round(figures.step_p99_s, 6),
                rss_bytes=figures.rss_bytes,
                gpu_mem_bytes=figures.gpu_mem_bytes,
                clock_offset_s=self._clock.offset_s,
            )

    async def _outlast(self, failure: Failure) -> None:
        """Redis is away. When it is back: first a beat, then what it may lack, then claims again.

        Raises:
            Failure: it is not Redis being away, or this worker drains and need not wait.
        """
        log.warning("redis.disconnected", code=failure.code, message=failure.message)
        self._tell_state(self._heartbeat.state, "degraded", "redis")
        away_since_s, backoff_s = monotonic_s(), _MAX_BACKOFF_S / 8
        while failure.code in _AWAY and self._drain_until_s is None:
            self._publisher.throttle()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            try:
                await self._heartbeat.beat()
                self._publisher.doubt_ended()
                await self._publisher.publish()
            except Failure as again:
                failure = again
            else:
                log.info("redis.reconnected", away_s=round(monotonic_s() - away_since_s, 3))
                self._tell_state("degraded", self._heartbeat.state, "redis")
                self._wake.set()
                return
        raise failure

    # The end -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Stop claiming; what runs may end within ``drain_s``, the rest is handed over."""
        self._drain_until_s = monotonic_s() + self._settings.drain_s
        self._standby.end()
        self._intake.close()
        log.info(
            "worker.draining", holding=len(self._ledger.running()), drain_s=self._settings.drain_s
        )
        self._change_state("draining", "asked")
        self._wake.set()
        asyncio.get_running_loop().call_later(self._settings.drain_s, self._wake.set)

    def _is_drained(self) -> bool:
        if self._drain_until_s is None:
            return False
        return not self._ledger.running() or monotonic_s() >= self._drain_until_s

    async def _hand_over(self, beside: list[asyncio.Task[None]]) -> None:
        """Flush, give back what is left, and take leave, so that nobody waits for the lease."""
        self._loop.pause()
        await self._intake.stop_reading()
        await self._publisher.publish()
        await self._publisher.release(self._ledger.running(), event="generation.released")
        for task in beside:  # a beat behind the leave would bring the lease back
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await self._ordered.leave_worker(self.name)

    async def _watch_engine(self) -> None:
        """Raises EngineFailedError, or DeviceLostError, once the engine has raised."""
        ends = (self._loop.failed, self._lost)
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().result()
        _log_failed(error)
        raise error if isinstance(error, DeviceLostError) else EngineFailedError from error

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)


def run(settings: WorkerSettings, *, pretty: bool = False) -> int:
    """Run one worker process to its end; returns the exit code."""
    name = new_process_name("worker")
    logs.configure("worker", name, log_dir=settings.log_dir, pretty=pretty)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_run(name, settings))
        if code != exit_codes.OK:
            _exit_now(code)  # the engine thread may hang, or its device be gone: do not wait
    logs.flush()
    return code


async def _run(name: str, settings: WorkerSettings) -> int:
    """Start, serve and stop; every way to end has its line in the log and its exit code."""
    code = exit_codes.OK
    stop = _on_signals()
    log.info("worker.started", engine=settings.engine, model=settings.model)
    try:
        await _check_redis(settings)
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        began_s = monotonic_s()
        async with _announced(name, settings):
            engine = await _build_engine(settings, lost)
        load_s = monotonic_s() - began_s
        grammars = await asyncio.to_thread(build_grammars, settings, vocab_size=engine.vocab_size)
        logs.adopt("transformers", "torch")
        logs.note(model=settings.model, model_version=engine.model_version)
        gc.freeze()  # what was loaded stays: collections need not walk through it
        clock = RedisClock()
        spans = open_spans(settings, "worker", name, clock)
        worker = Worker(
            name, settings, engine, grammars, lost, load_s=load_s, clock=clock, spans=spans
        )
        stop.drain = worker.drain
        try:
            with metrics_port(settings, worker.metrics().text):
                await worker.run()
        finally:
            await worker.close()
            if spans is not None:
                await asyncio.to_thread(spans.close)
    except* EngineStalledError:
        code = exit_codes.STALLED
    except* DeviceLostError:
        code = exit_codes.DEVICE_LOST
    except* EngineFailedError:
        code = exit_codes.ENGINE_FAILED
    except* Failure as failures:
        code = _fail(_first(failures), is_draining=stop.num_received > 0)
    except* Exception:
        log.exception("worker.crashed")
        code = exit_codes.FAILED
    log.info("worker.stopped", exit_code=code)
    return code


async def _build_engine(settings: WorkerSettings, lost: asyncio.Future[Exception]) -> Engine:
    """Build it in a thread, which is left behind if a device that it waits for is ``lost``."""
    on_lost = partial(_tell_lost, lost)
    building = asyncio.create_task(asyncio.to_thread(build_engine, settings, on_lost))
    await asyncio.wait((building, lost), return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        _log_failed(lost.result())
        raise lost.result()
    return await building


def _tell_lost(lost: asyncio.Future[Exception], error: Exception) -> None:
    """From any thread."""
    with suppress(RuntimeError):  # the event loop has ended before
        lost.get_loop().call_soon_threadsafe(set_result, lost, error)


def _log_failed(error: Exception) -> None:
    code = error.code if isinstance(error, DeviceLostError) else None
    log.error("engine.failed", code=code, exc_info=error)


@asynccontextmanager
async def _announced(name: str, settings: WorkerSettings) -> AsyncGenerator[None]:
    """Meanwhile others can see that this worker comes."""
    broker = Broker(connect(settings.redis_url), settings.model)
    announcing = asyncio.create_task(keep_announcing(broker, name))
    try:
        yield
    finally:
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
        await broker.close()


async def _check_redis(settings: WorkerSettings) -> None:
    """Say soon, before a model is loaded, that Redis is not there."""
    broker = Broker(connect(settings.redis_url), settings.model)
    await broker.load_patiently()
    await broker.close()


def _fail(failure: Failure, *, is_draining: bool) -> int:
    log.error("worker.crashed", code=failure.code, message=failure.message)
    sys.stderr.write(f"headrace worker: {failure}\n")
    if failure.code in _AWAY:
        return exit_codes.NOT_HANDED_OVER if is_draining else exit_codes.UNREACHABLE
    return exit_codes.ENGINE_FAILED if failure.code in _MODEL_FAILURES else exit_codes.FAILED


def _first(failures: BaseExceptionGroup[Failure]) -> Failure:
    inner = failures.exceptions[0]
    return inner if isinstance(inner, Failure) else _first(inner)


class _Stop:
    """What the next SIGTERM or SIGINT does: end a start, drain, and at the second: end at once."""

    def __init__(self) -> None:
        self.drain: Callable[[], None] | None = None
        self.num_received = 0

    def receive(self) -> None:
        self.num_received += 1
        if self.num_received > 1:
            log.warning("worker.stopped", exit_code=exit_codes.NOT_HANDED_OVER)
            _exit_now(exit_codes.NOT_HANDED_OVER)
        if self.drain is None:
            log.info("worker.stopped", exit_code=exit_codes.OK)
            _exit_now(exit_codes.OK)
        self.drain()


def _on_signals() -> _Stop:
    stop = _Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.receive)
    return stop


def _exit_now(code: int) -> NoReturn:
    logs.flush()
    os._exit(code)
