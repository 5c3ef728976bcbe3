"""A follower: one rank above 0 of a worker's group. Loads its part and does as it is told.

``python -m workers.tensor_parallel.following FD``, where FD is its end of a socket pair. It ends
when the other end is closed, also from within a collective that rank 0 will never come to; and with
an error of its own, which ends the group.
"""

import gc
import os
import select
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from common import logs
from common.failures import Failure
from common.ids import new_process_name
from common.logs import get_logger
from workers import exit_codes
from workers.model.attention import Stretch
from workers.tensor_parallel.messages import (
    Channel,
    Copied,
    Done,
    DropAdapter,
    ForgetAdapter,
    HoldAdapter,
    Join,
    Order,
    RankPlan,
    ReadAdapter,
    Scrubbed,
    Step,
    encode,
)
from workers.tensor_parallel.rank import ReadyRank, prepare_rank

log = get_logger()

_NOTICE_LIMIT_S = 1.0
"""How much later the end of rank 0 may show in the socket than in a collective."""


class Following:
    """Carries out orders, one after the other."""

    def __init__(self, rank: ReadyRank) -> None:
        self._forward = rank.forward
        self._cache = rank.cache
        self._adapters = rank.adapters
        self._read: dict[str, Any] = {}
        """Adapters that wait to be held."""
        self._pages: dict[int, tuple[int, ...]] = {}
        """Of each slot, as they were last told."""

    def carry_out(self, order: Order) -> Done | None:
        """Returns the answer where one is awaited.

        Raises:
            Exception: of any kind; the ranks are in different places from then on.
        """
        match order:
            case Step():
                self._compute(order)
            case ReadAdapter(version):
                return self._read_adapter(version)
            case HoldAdapter(version):
                self._adapters.put(version, self._read.pop(version))
            case ForgetAdapter(version):
                self._read.pop(version, None)
            case DropAdapter(version):
                self._adapters.drop(version)
            case Join():
                raise ValueError("A rank joins once.")
        return None

    def _compute(self, step: Step) -> None:
        stretches: list[Stretch] = []
        for told in step.stretches:
            if told.pages is not None:
                self._pages[told.slot] = told.pages
            pages = self._pages.get(told.slot, ())
            stretches.append(Stretch(told.slot, told.start, told.count, pages, told.adapter))
        with torch.inference_mode():
            for change in step.changes:
                self._change(change)
            self._forward(step.tokens, stretches, step.rows)

    def _change(self, change: Copied | Scrubbed) -> None:
        if self._cache is None:
            return
        if isinstance(change, Copied):
            self._cache.copy(change.from_slot, change.to_slot, change.num_tokens)
        else:
            self._cache.scrub(change.slot, change.start, change.end)

    def _read_adapter(self, version: str) -> Done:
        try:
            self._read[version] = self._adapters.read(version)
        except Failure as failure:
            return Done(failure.message)
        return Done()


def main() -> int:
    """Follow until rank 0 is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains, and needs this process for that
    channel = Channel[Order](socket.socket(fileno=int(sys.argv[1])), Order)
    rank = 0
    try:
        joined = _joined(channel)
        rank, plan = joined.rank, joined.plan
        threading.Thread(target=_end_with_rank_0, args=(channel, plan), daemon=True).start()
        log_dir = None if plan.log_dir is None else Path(plan.log_dir)
        logs.configure("worker", new_process_name("follower"), log_dir=log_dir)
        _follow(channel, prepare_rank(plan, rank))
    except EOFError:
        return exit_codes.OK
    except Exception as error:
        if _has_ended(channel.socket, _NOTICE_LIMIT_S):
            return exit_codes.OK
        log.exception("follower.failed", rank=rank)
        logs.flush()
        sys.stderr.write(f"headrace worker: rank {rank}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(exit_codes.ENGINE_FAILED)  # other threads may hang in a collective
    return exit_codes.OK


def _joined(channel: Channel[Order]) -> Join:
    first = channel.receive()
    if not isinstance(first, Join):
        raise TypeError("The first order is to join.")
    return first


def _follow(channel: Channel[Order], rank: ReadyRank) -> None:
    """Raises: EOFError once rank 0 has ended; others as :meth:`Following.carry_out`."""
    following = Following(rank)
    logs.adopt("transformers")
    gc.freeze()  # as rank 0 does
    channel.send(encode(Done()))
    while True:
        answer = following.carry_out(channel.receive())
        if answer is not None:
            channel.send(encode(answer))


def _end_with_rank_0(channel: Channel[Order], plan: RankPlan) -> None:
    _has_ended(channel.socket, None)
    shutil.rmtree(Path(plan.store).parent, ignore_errors=True)
    os._exit(exit_codes.OK)


def _has_ended(end: socket.socket, timeout_s: float | None) -> bool:
    """Whether the other end is closed, or will be within ``timeout_s``; reads nothing."""
    poll = select.poll()
    poll.register(end, 0)  # errors and hang-ups are told in any case
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


if __name__ == "__main__":
    sys.exit(main())
