"""The other processes of a worker whose model is spread over devices: started, told, and watched.

Followers end with rank 0, whose end closes their sockets; the end of a follower is the end of the
whole group, since none can compute alone. They know nothing of Redis.
"""

import atexit
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.logs import get_logger
from workers.engine.port import DeviceLostError
from workers.tensor_parallel.messages import Channel, Done, Join, RankPlan, encode

log = get_logger()

_END_LIMIT_S = 5.0
"""How long the end of a process may come after that of its channel."""


class Followers:
    """All ranks but the first; those are started here, and import torch meanwhile.

    ``on_lost`` is called from a thread, once, when one of them has ended. ``module`` is what they
    run.
    """

    def __init__(
        self,
        num_ranks: int,
        on_lost: Callable[[Exception], None],
        *,
        module: str = "workers.tensor_parallel.following",
    ) -> None:
        self._on_lost = on_lost
        self._lost: DeviceLostError | None = None
        self._losing = threading.Lock()
        self._is_closing = False
        self._answers: queue.SimpleQueue[Done | DeviceLostError] = queue.SimpleQueue()
        self._folder = tempfile.mkdtemp(prefix="headrace-ranks-")  # of this user alone: mode 700
        self.store = Path(self._folder) / "ranks"
        """File by which all ranks meet."""
        self._ranks = [_start(module, rank) for rank in range(1, num_ranks)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, *started), daemon=True)
            for rank, started in enumerate(self._ranks, start=1)
        ]
        for watcher in self._watchers:
            watcher.start()
        atexit.register(self.close)

    def join(self, plan: RankPlan) -> None:
        """Have all load what ``plan`` says; they meet rank 0 while it does the same."""
        for rank, (_, channel) in enumerate(self._ranks, start=1):
            self._send(channel, encode(Join(rank, plan)))

    def tell(self, message: msgspec.Struct) -> None:
        """Say the same to all. In the order of the calls; does not wait until it is done.

        Raises:
            DeviceLostError: one of them is gone.
        """
        encoded = encode(message)
        for _, channel in self._ranks:
            self._send(channel, encoded)

    def answers(self) -> list[Done]:
        """One of each, in any order; waits for them.

        Raises:
            DeviceLostError: one of them is gone.
        """
        answers: list[Done] = []
        for _ in self._ranks:
            answer = self._answers.get()
            if isinstance(answer, DeviceLostError):
                self._answers.put(answer)  # for whoever asks next
                raise answer
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End them all. They hold nothing that anybody would miss."""
        self._is_closing = True
        atexit.unregister(self.close)
        for process, _ in self._ranks:
            process.kill()
            process.wait()
        for watcher, (_, channel) in zip(self._watchers, self._ranks, strict=True):
            watcher.join()
            channel.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, channel: Channel[Done], message: bytes) -> None:
        try:
            channel.send(message)
        except OSError as error:
            raise self._lost or DeviceLostError("A follower no longer listens.") from error

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]", channel: Channel[Done]) -> None:
        try:
            while True:
                self._answers.put(channel.receive())
        except (EOFError, OSError, msgspec.MsgspecError):
            with self._losing:
                if self._lost is None and not self._is_closing:
                    self._lose(rank, process)

    def _lose(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = _exit_code(process)
        self._lost = DeviceLostError(f"Rank {rank} has ended with exit code {code}.")
        log.error("follower.lost", rank=rank, child_pid=process.pid, exit_code=code)
        self._answers.put(self._lost)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._on_lost(self._lost)


def _start(module: str, rank: int) -> "tuple[subprocess.Popen[bytes], Channel[Done]]":
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own module
            # -P: what lies in the current directory must not be taken for ours.
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            # It is told all that it needs, and needs no password of Redis.
            env={k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    log.info("follower.started", rank=rank, child_pid=process.pid)
    return process, Channel[Done](ours, Done)


def _exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """None: it lives, and only its channel is broken."""
    try:
        return process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
