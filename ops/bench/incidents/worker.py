"""A worker process that misbehaves on order: the product's own, around a simulated engine that lies
in wait for what a file of orders says.

The file may change at any time; what concerns the process as a whole (``edition``, ``clock_s``) is
read at its start. Run as ``python -m ops.bench.incidents.worker``, with the worker's settings and
``INCIDENT_ORDERS``, the path of the file, in the environment.
"""

import datetime as dt
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from common import logs
from workers.__main__ import main
from workers.engine import factory, simulated
from workers.engine.batching import Choice, Outcome
from workers.engine.port import DeviceMemoryError
from workers.engine.scheduler import Chunk
from workers.engine.sequence import Sequence
from workers.engine.simulated import SimulatedRunner

ORDERS = "INCIDENT_ORDERS"
PREFILL_S_PER_TOKEN = 50e-6
"""What a token of a prompt takes: without it, long prompts would cost nothing."""
_NO_TOKEN = -1
"""In no vocabulary, as a faulty kernel may choose it: the detokenizer raises."""


class Flaw(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which generations fail, and how: with a token that is none, or with numbers that are none."""

    kind: Literal["token", "numbers"] = "token"
    share: float = 1.0
    """Of those that the rest is true of, chosen by their ids."""
    is_guided: bool = False
    is_sampled: bool = False
    min_batch: int = 0
    min_prompt_tokens: int = 0
    min_position: int = 0
    max_position: int = 1 << 30

    def strikes(self, sequence: Sequence, batch_size: int) -> bool:
        return (
            self.min_position <= sequence.num_generated <= self.max_position
            and sequence.num_prompt >= self.min_prompt_tokens
            and batch_size >= self.min_batch
            and (sequence.matcher is not None or not self.is_guided)
            and (sequence.sampling.do_sample or not self.is_sampled)
            and zlib.crc32(sequence.id.encode()) % 1000 < self.share * 1000
        )


class Orders(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong with a worker; nothing, by default."""

    step_factor: float = 1.0
    """How many times longer every step takes."""
    prefill_factor: float = 1.0
    """The same for prompts alone."""
    flaw: Flaw | None = None
    memory_tokens: int = 0
    """Longest sequence that the device has memory for; 0: no limit."""
    crash_on: str = ""
    """A prompt with these words ends the process with SIGSEGV, as a fault in a kernel would."""
    is_stuck: bool = False
    """Steps do not end."""
    edition: int = 1
    """Of the model: each has a script, and so a version, of its own. What stands beside it is not
    for a process that began with another one."""
    clock_s: float = 0.0
    """How far the wall clock of this process is ahead."""


class OrdersFile:
    """The orders as they stand in the file now; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed_ns = 0
        self._orders = Orders()

    def now(self) -> Orders:
        try:
            changed_ns = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return self._orders
        if changed_ns != self._changed_ns:
            self._orders = msgspec.json.decode(self._path.read_bytes(), type=Orders)
            self._changed_ns = changed_ns
        return self._orders


class MisledRunner(SimulatedRunner):
    """The simulated engine's runner, under orders."""

    orders = OrdersFile(Path(os.devnull) / "none")
    edition = 1

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        orders = self.orders.now()
        if orders.edition != self.edition:
            orders = Orders()
        for chunk in chunks:
            if orders.crash_on and orders.crash_on in _prompt_of(chunk.sequence):
                os.kill(os.getpid(), signal.SIGSEGV)
        longest = max(chunk.start + chunk.count for chunk in chunks)
        if orders.memory_tokens and longest > orders.memory_tokens:
            raise DeviceMemoryError
        while orders.is_stuck:
            time.sleep(0.1)
            orders = self.orders.now()
        prompt_tokens = sum(chunk.count for chunk in chunks if chunk.count > 1)
        prefill_s = prompt_tokens * PREFILL_S_PER_TOKEN * orders.prefill_factor
        base_s = self._first_token_s if prompt_tokens else self._inter_token_s
        time.sleep(prefill_s + base_s * (orders.step_factor - 1))
        outcomes = super().run(chunks)
        if orders.flaw is None:
            return outcomes
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        return [
            _flawed(orders.flaw) if orders.flaw.strikes(sequence, len(chunks)) else outcome
            for sequence, outcome in zip(sampled, outcomes, strict=True)
        ]


def _prompt_of(sequence: Sequence) -> str:
    """The simulated model's tokens below 256 are bytes."""
    return bytes(token for token in sequence.tokens[: sequence.num_prompt] if token < 256).decode(
        errors="replace"
    )


def _flawed(flaw: Flaw) -> Outcome:
    return None if flaw.kind == "numbers" else [Choice(_NO_TOKEN, 0.0)]


def _prepare(path: Path) -> None:
    MisledRunner.orders = OrdersFile(path)
    orders = MisledRunner.orders.now()
    MisledRunner.edition = orders.edition
    factory.SimulatedRunner = MisledRunner
    if orders.edition > 1:
        turned = simulated.SCRIPT[orders.edition :] + simulated.SCRIPT[: orders.edition]
        factory.SCRIPT = simulated.SCRIPT = turned
    if orders.clock_s:
        _shift_clock(orders.clock_s)


def _shift_clock(ahead_s: float) -> None:
    """Let this process see a wall clock that is wrong; monotonic ones are not touched."""
    true_s, true_ns = time.time, time.time_ns
    time.time = lambda: true_s() + ahead_s
    time.time_ns = lambda: true_ns() + int(ahead_s * 1e9)

    class WrongTime(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return super().now(tz) + dt.timedelta(seconds=ahead_s)

    logs.datetime = WrongTime


if __name__ == "__main__":
    _prepare(Path(os.environ[ORDERS]))
    sys.exit(main())
