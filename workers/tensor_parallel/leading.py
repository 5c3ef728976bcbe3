"""Rank 0's side of a step: what it is about to do, all followers are told to do as well.

Whatever fails once they have been told leaves the ranks in different places of a step, so it ends
the group: there is no computing in parts, and no single rank to replace.
"""

from collections.abc import Sequence
from typing import Any

import torch

from common.failures import Failure
from workers.engine.port import Adapters, DeviceLostError
from workers.model.adapters import AdapterHost
from workers.model.attention import Stretch
from workers.model.runner import Cache, Forward
from workers.tensor_parallel.followers import Followers
from workers.tensor_parallel.messages import (
    Copied,
    DropAdapter,
    ForgetAdapter,
    HoldAdapter,
    ReadAdapter,
    Scrubbed,
    Step,
    StepStretch,
)


class LeadingForward:
    """Implements :class:`workers.model.runner.Forward` and :class:`workers.model.runner.Cache`.

    Changes of the cache happen here at once, and there before the next step. ``cache`` is None
    where pages need none.
    """

    def __init__(self, forward: Forward, cache: Cache | None, followers: Followers) -> None:
        self.name = forward.name
        self._forward = forward
        self._cache = cache
        self._followers = followers
        self._changes: list[Copied | Scrubbed] = []
        self._pages: dict[int, tuple[int, ...]] = {}
        """Of each slot, as the followers know them."""

    @property
    def adapters(self) -> AdapterHost:
        return self._forward.adapters

    def __call__(
        self, tokens: list[int], stretches: Sequence[Stretch], rows: list[int]
    ) -> torch.Tensor:
        """See the protocol.

        Raises:
            DeviceLostError: for whatever goes wrong.
        """
        changes, self._changes = self._changes, []
        self._followers.tell(Step(changes, tokens, [self._told(s) for s in stretches], rows))
        try:
            return self._forward(tokens, stretches, rows)
        except Exception as error:
            raise DeviceLostError("A step failed on rank 0.") from error

    def copy(self, from_slot: int, to_slot: int, num_tokens: int) -> None:
        if self._cache is not None:
            self._cache.copy(from_slot, to_slot, num_tokens)
            self._changes.append(Copied(from_slot, to_slot, num_tokens))

    def scrub(self, slot: int, start: int, end: int) -> None:
        if self._cache is not None:
            self._cache.scrub(slot, start, end)
            self._changes.append(Scrubbed(slot, start, end))

    def _told(self, stretch: Stretch) -> StepStretch:
        """Pages only when they have changed: of long sequences they are most of a message."""
        pages = None
        if self._pages.get(stretch.slot, ()) is not stretch.pages:
            self._pages[stretch.slot] = pages = stretch.pages
        return StepStretch(stretch.slot, stretch.start, stretch.count, stretch.adapter, pages)


class LeadingAdapters:
    """Implements :class:`workers.engine.port.Adapters`: all ranks read, hold and drop the same."""

    def __init__(self, adapters: Adapters, followers: Followers) -> None:
        self._adapters = adapters
        self._followers = followers

    def read(self, version: str) -> Any:
        self._followers.tell(ReadAdapter(version))
        adapter, failure = None, None
        try:
            adapter = self._adapters.read(version)
        except Failure as error:
            failure = error
        for answer in self._followers.answers():
            if answer.error and failure is None:
                failure = Failure("ADAPTER_LOAD_FAILED", answer.error)
        if failure is not None:
            self._followers.tell(ForgetAdapter(version))
            raise failure
        return adapter

    def put(self, version: str, adapter: Any) -> None:
        self._followers.tell(HoldAdapter(version))
        self._adapters.put(version, adapter)

    def drop(self, version: str) -> None:
        self._followers.tell(DropAdapter(version))
        self._adapters.drop(version)
