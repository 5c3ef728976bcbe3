"""Processes that compute with a worker: what they are told arrives whole, and none ends unseen."""

import queue
import socket
import threading

import pytest

from workers.engine.port import DeviceLostError
from workers.tensor_parallel.followers import Followers
from workers.tensor_parallel.messages import (
    Channel,
    Copied,
    DropAdapter,
    Order,
    Scrubbed,
    Step,
    StepStretch,
    encode,
)

LONG = Step(
    [Copied(0, 1, 32), Scrubbed(2, 5, 9)],
    list(range(500_000)),
    [
        StepStretch(0, 7, 1, "a@1", None),
        StepStretch(1, 0, 3, "", tuple(range(100_000))),
        StepStretch(2, 0, 1, "", ()),
    ],
    [0, 3],
)
"""Far more than a socket holds at once."""


def test_orders_arrive_whole_and_in_order() -> None:
    """Pages that have not changed are not the same as none at all."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        told: list[Order] = [LONG, DropAdapter("a@1"), LONG]
        sender = Channel[Order](ours, Order)
        sending = threading.Thread(target=lambda: [sender.send(encode(order)) for order in told])
        sending.start()
        receiver = Channel[Order](theirs, Order)
        assert [receiver.receive() for _ in told] == told
        sending.join()


@pytest.mark.parametrize("rest", [b"", b"\x05", b"\x05\x00\x00\x00ab"])
def test_an_end_is_seen_in_the_middle_of_a_message_too(rest: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(rest)
        with pytest.raises(EOFError):
            Channel[Order](theirs, Order).receive()


def test_one_that_ends_is_told_of_at_once_and_for_ever() -> None:
    """Whoever waits for it, or speaks to it later, learns why; and nothing is left on disk."""
    lost: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    followers = Followers(3, lost.put, module="platform")  # which does not follow
    try:
        error = lost.get(timeout=20)
        assert "has ended with exit code 0" in str(error)
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="has ended with exit code 0"):
                followers.answers()
        with pytest.raises(DeviceLostError):
            followers.tell(LONG)
        assert not followers.store.parent.exists()
    finally:
        followers.close()
    assert lost.empty()
