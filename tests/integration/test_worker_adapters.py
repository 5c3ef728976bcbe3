"""A worker loads adapters on first use: nobody else waits, and a bad one fails its own only."""

import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
from msgspec import structs

from common.broker import Broker
from common.failures import Failure
from common.ids import generation_id
from common.messages import Finish
from tests.support.generations import admission, admit
from tests.support.waiting import wait_until
from tests.support.worker_parts import Parts, logged
from workers.attempts import Attempt


@dataclass
class SlowAdapters:
    """Reading one takes as long as the test wants; the engine's side is a list of what it holds."""

    gates: dict[str, threading.Event] = field(default_factory=dict[str, threading.Event])
    bad: set[str] = field(default_factory=set[str])
    held: list[str] = field(default_factory=list[str])
    reads: list[str] = field(default_factory=list[str])

    def read(self, version: str) -> str:
        self.reads.append(version)
        if version in self.gates:
            assert self.gates[version].wait(10)
        if version in self.bad:
            raise Failure("ADAPTER_LOAD_FAILED", f"The adapter {version} is damaged.")
        return version

    def put(self, version: str, adapter: str) -> None:
        assert adapter == version
        self.held.append(version)

    def drop(self, version: str) -> None:
        self.held.remove(version)


async def admit_with(broker: Broker, adapter: str) -> str:
    request = admission()
    spec = structs.replace(request.spec, adapter=adapter)
    return generation_id((await broker.admit(replace(request, spec=spec))).request_id)


@dataclass
class Scene:
    """A worker that holds at most two adapters."""

    parts: Parts
    adapters: SlowAdapters

    async def start(self, adapter: str) -> Attempt:
        """Claim a generation with ``adapter``, which need not be loaded yet."""
        before = {attempt.id for attempt in self.parts.ledger.running()}
        await admit_with(self.parts.broker, adapter)
        (new,) = [a for a in await self.parts.claim() if a.id not in before]
        return new

    async def start_running(self, adapter: str) -> Attempt:
        """The same, until the engine has it."""
        attempt = await self.start(adapter)
        await wait_until(lambda: attempt.engine_id in self.engine_ids())
        return attempt

    def engine_ids(self) -> list[str]:
        return [request.id for request in self.parts.engine.submitted]

    def submitted(self) -> list[str]:
        return [request.adapter for request in self.parts.engine.submitted]


@pytest.fixture
async def scene(broker: Broker, blocking_broker: Broker) -> AsyncIterator[Scene]:
    adapters = SlowAdapters()
    parts = Parts(broker, blocking_broker, adapters=adapters, slots=8)
    await parts.beat()
    yield Scene(parts, adapters)
    for gate in adapters.gates.values():
        gate.set()
    await parts.close()


async def test_nobody_waits_for_the_adapter_of_another(scene: Scene) -> None:
    """It is read once however many ask, and held before the first of them is submitted."""
    gate = scene.adapters.gates["slow@1"] = threading.Event()
    await scene.start("slow@1")
    await scene.start("slow@1")
    await admit(scene.parts.broker)
    await scene.parts.claim()
    assert scene.submitted() == [""]
    gate.set()
    await wait_until(lambda: len(scene.submitted()) == 3)
    assert scene.submitted() == ["", "slow@1", "slow@1"]
    assert (scene.adapters.reads, scene.adapters.held) == (["slow@1"], ["slow@1"])


async def test_a_bad_adapter_fails_its_own_generation_by_name(scene: Scene) -> None:
    scene.adapters.bad.add("bad@1")
    bad = await scene.start("bad@1")
    await scene.start("good@1")
    await wait_until(lambda: scene.submitted() == ["good@1"])
    await wait_until(lambda: bad.finish is not None)
    await scene.parts.publisher.publish()
    [end] = await logged(scene.parts.broker, bad.id)
    message = "The adapter bad@1 is damaged."
    assert end.record.finish == Finish("failed", "ADAPTER_LOAD_FAILED", message)
    assert scene.adapters.held == ["good@1"]


async def test_the_adapter_that_was_longest_without_work_gives_way(scene: Scene) -> None:
    for version in ("a@1", "b@1", "a@1", "c@1"):
        attempt = await scene.start_running(version)
        scene.parts.step(attempt, 5, finish="length")
    assert scene.adapters.held == ["a@1", "c@1"]
    assert scene.adapters.reads == ["a@1", "b@1", "c@1"]
    await scene.start_running("b@1")
    assert scene.adapters.held == ["c@1", "b@1"]


async def test_what_runs_keeps_its_adapter_and_others_wait_for_room(scene: Scene) -> None:
    first = await scene.start("a@1")
    await scene.start("b@1")
    await wait_until(lambda: len(scene.submitted()) == 2)
    await scene.start("c@1")
    await admit(scene.parts.broker)
    await scene.parts.claim()
    assert scene.submitted() == ["a@1", "b@1", ""]
    assert scene.adapters.held == ["a@1", "b@1"]
    scene.parts.step(first, 5, finish="length")
    scene.parts.intake.room_changed()
    await wait_until(lambda: scene.submitted()[-1] == "c@1")
    assert scene.adapters.held == ["b@1", "c@1"]


async def test_prefixes_are_shared_within_an_adapter_only(scene: Scene) -> None:
    for adapter in ("", "a@1", "a@1", "a@2"):
        await scene.start_running(adapter)
    scopes = [(request.adapter, request.cache_scope) for request in scene.parts.engine.submitted]
    assert len(set(scopes)) == 3
    assert len({scope for _, scope in scopes}) == 3
