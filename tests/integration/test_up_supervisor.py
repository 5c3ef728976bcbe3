"""The supervisor by itself, with small scripts as its processes."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from ops.supervisor import NeverCameUp, ProcessSpec, Slot, State, Supervisor
from tests.support.waiting import wait_until


def script(code: str, *, stop_timeout_s: float = 5.0) -> ProcessSpec:
    return ProcessSpec(
        "worker", "worker 1", [sys.executable, "-c", code], dict(os.environ), stop_timeout_s
    )


def ignore(slot: Slot, words: str) -> None:
    """For tests that look at the slots themselves."""


async def is_running(slot: Slot) -> None:
    await wait_until(lambda: slot.pid, what="a process")


async def test_one_that_never_comes_up_is_given_up_with_its_last_words() -> None:
    """Three starts, then an error that quotes what the process said."""
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script("import sys; sys.exit('no such model')"))
        with pytest.raises(NeverCameUp, match="worker 1 ended with exit code 1: no such model"):
            await slot.came_up
    assert slot.state is State.FAILED
    assert slot.restarts == 2


async def test_the_reason_is_the_line_meant_for_people() -> None:
    """What libraries print around it is left out."""
    code = "import sys; sys.exit('loading\\nheadrace worker: no such model\\nsee the manual')"
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script(code))
        with pytest.raises(NeverCameUp, match=r"code 1: headrace worker: no such model$"):
            await slot.came_up


async def test_wrong_settings_are_not_tried_again() -> None:
    """Exit code 2 says that the next start would end alike."""
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script("import sys; sys.exit(2)"))
        with pytest.raises(NeverCameUp):
            await slot.came_up
    assert slot.restarts == 0


async def test_a_command_that_does_not_exist_is_given_up() -> None:
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(ProcessSpec("server", "server", ["/nowhere/server"], {}, 1.0))
        with pytest.raises(NeverCameUp, match="could not be started"):
            await slot.came_up


async def test_one_that_was_ready_is_restarted_for_ever_with_growing_delays() -> None:
    """A process that dies young each time is tried less and less often, but never given up."""
    waits: list[str] = []

    def note(slot: Slot, words: str) -> None:
        if slot.state is State.WAITING:
            waits.append(words)
        elif slot.state is State.STARTING and slot.pid:
            asyncio.get_running_loop().call_soon(supervisor.mark_ready, slot.pid, "w1")

    async with Supervisor(note) as supervisor:
        supervisor.start(script("pass"))
        await wait_until(lambda: len(waits) == 4, what="four restarts")
    assert [words.rpartition(" in ")[2] for words in waits] == ["0.1 s", "0.2 s", "0.4 s", "0.8 s"]


async def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """A stop ends within the time that the spec allows."""
    armed = tmp_path / "armed"
    code = (
        "import signal, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(armed)!r}).touch()\nwhile True: signal.pause()"
    )
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script(code, stop_timeout_s=0.2))
        await wait_until(armed.exists, what="the script")
        await asyncio.wait_for(supervisor.stop("worker"), 5.0)
    assert slot.state is State.STOPPED


async def test_ctrl_c_at_the_terminal_does_not_reach_the_processes() -> None:
    """Each has a session of its own: the supervisor alone decides who stops when."""
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script("import signal; signal.pause()"))
        await is_running(slot)
        assert os.getsid(slot.pid) == slot.pid != os.getsid(0)


async def test_a_stale_ready_line_does_not_make_the_next_process_ready() -> None:
    """Readiness is of a pid, not of a slot."""
    async with Supervisor(ignore) as supervisor:
        slot = supervisor.start(script("import signal; signal.pause()"))
        await is_running(slot)
        supervisor.mark_ready(slot.pid + 1, "w1")
        assert slot.state is State.STARTING
        supervisor.mark_ready(slot.pid, "w1")
        assert slot.state is State.READY
        assert slot.instance == "w1"
