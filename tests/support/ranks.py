"""Two ranks for tests: this process leads, and one other follows through any number of models.

Run as ``python -m tests.support.ranks FD``, this is the follower: the product's own, but that it
joins as often as it is told, so that a test of many models starts one process.
"""

import os
import socket
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

from tests.support.processes import ROOT
from workers.tensor_parallel.followers import Followers
from workers.tensor_parallel.following import Following
from workers.tensor_parallel.leading import LeadingAdapters, LeadingForward
from workers.tensor_parallel.messages import Channel, Done, Join, Order, RankPlan, encode
from workers.tensor_parallel.rank import ReadyRank, prepare_rank


@dataclass(frozen=True)
class LedModel:
    """A model on all ranks, led from here."""

    forward: LeadingForward
    adapters: LeadingAdapters
    rank: ReadyRank


class Ranks:
    """Loads one model after the other on all ranks."""

    def __init__(self, followers: Followers, num_ranks: int) -> None:
        self._followers = followers
        self._num_ranks = num_ranks
        self._num_loaded = 0

    def load(self, path: Path, **changes: Any) -> LedModel:
        """In float32 with packed weights, unless ``changes`` say otherwise."""
        leave()
        self._num_loaded += 1
        values: dict[str, Any] = {
            "path": str(path),
            "data_dir": str(path.parent),
            "model": "model",
            "log_dir": None,
            "store": f"{self._followers.store}-{self._num_loaded}",
            "num_ranks": self._num_ranks,
            "device": "cpu",
            "dtype": "float32",
            "way": "modules",
            "num_threads": 1,
            "max_sequences": 8,
            "max_tokens": 256,
            "step_tokens": 256,
            "cache_tokens": 4096,
            "memory_share": 0.5,
        }
        plan = RankPlan(**(values | changes))
        self._followers.join(plan)
        rank = prepare_rank(plan, 0)
        self._followers.answers()
        return LedModel(
            LeadingForward(rank.forward, rank.cache, self._followers),
            LeadingAdapters(rank.adapters, self._followers),
            rank,
        )


@contextmanager
def started_ranks(num_ranks: int) -> Generator[Ranks]:
    """At the end there are no other ranks, and this process is none any more."""
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = str(ROOT)  # the tests are not installed
    lost: list[Exception] = []
    followers = Followers(num_ranks, lost.append, module="tests.support.ranks")
    try:
        yield Ranks(followers, num_ranks)
        assert not lost
    finally:
        followers.close()
        leave()
        os.environ.clear()
        os.environ.update(environment)


def leave() -> None:
    """Be no rank any more."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def follow() -> None:
    channel = Channel[Order](socket.socket(fileno=int(sys.argv[1])), Order)
    following = None
    while True:
        try:
            order = channel.receive()
        except EOFError:
            os._exit(0)
        if isinstance(order, Join):
            following = None
            leave()
            following = Following(prepare_rank(order.plan, order.rank))
            channel.send(encode(Done()))
            continue
        assert following is not None
        answer = following.carry_out(order)
        if answer is not None:
            channel.send(encode(answer))


if __name__ == "__main__":
    try:
        follow()
    finally:
        traceback.print_exc()
        os._exit(1)  # whoever waits for this rank must not wait for its threads
