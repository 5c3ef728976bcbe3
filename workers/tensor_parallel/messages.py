"""What the ranks of one worker say to one another, and the channel that carries it: msgpack only.

Rank 0 leads. Between two steps it says what comes next, and all compute it together.
"""

import socket
import threading
from typing import Any, Generic, TypeVar

import msgspec

_LENGTH_BYTES = 4


class RankPlan(msgspec.Struct, frozen=True):
    """All that the ranks must agree on to load one model and to compute its steps."""

    path: str
    """The model's folder."""
    data_dir: str
    model: str
    """Name in the store of ``data_dir``, beside which its adapters lie."""
    log_dir: str | None
    store: str
    """File by which the ranks meet."""
    num_ranks: int
    device: str
    """``cpu`` or ``cuda``; on CUDA every rank takes the device of its number."""
    dtype: str
    way: str
    """``paged``, or one of :data:`workers.model.ways.WAYS`."""
    num_threads: int
    max_sequences: int
    max_tokens: int
    """Longest sequence; the model's own limit holds, too."""
    step_tokens: int
    cache_tokens: int | None
    """Room for so many tokens in pages; None: as many as the memory holds."""
    memory_share: float


class Join(msgspec.Struct, tag=True, frozen=True):
    """The first message to a follower: who it is, and what to load."""

    rank: int
    plan: RankPlan


class Copied(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The first positions of one cache slot go to another one."""

    from_slot: int
    to_slot: int
    num_tokens: int


class Scrubbed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Positions of a cache slot become zeros."""

    slot: int
    start: int
    end: int


class StepStretch(msgspec.Struct, frozen=True, array_like=True):
    """A :class:`workers.model.attention.Stretch`; pages None: those this slot had last."""

    slot: int
    start: int
    count: int
    adapter: str
    pages: tuple[int, ...] | None


class Step(msgspec.Struct, tag=True, frozen=True):
    """Change the cache, then compute; the fields are those of a forward pass."""

    changes: list[Copied | Scrubbed]
    tokens: list[int]
    stretches: list[StepStretch]
    rows: list[int]


class ReadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Read an adapter from the store. The only message that is answered."""

    version: str


class ForgetAdapter(msgspec.Struct, tag=True, frozen=True):
    """One that was read is not going to be held."""

    version: str


class HoldAdapter(msgspec.Struct, tag=True, frozen=True):
    """One that was read computes from the next step on."""

    version: str


class DropAdapter(msgspec.Struct, tag=True, frozen=True):
    """One that is held is not needed any more; it may have been read anew meanwhile."""

    version: str


Order = Join | Step | ReadAdapter | ForgetAdapter | HoldAdapter | DropAdapter
"""What rank 0 says."""


class Done(msgspec.Struct, frozen=True):
    """What a follower answers once it is ready for steps, and to :class:`ReadAdapter`."""

    error: str = ""
    """Why there is no such adapter."""


encode = msgspec.msgpack.encode

T = TypeVar("T")


class Channel(Generic[T]):
    """Messages over one end of a socket pair: any may be sent, those of ``kind`` are received."""

    def __init__(self, end: socket.socket, kind: Any) -> None:
        self.socket = end
        self._decoder = msgspec.msgpack.Decoder[T](kind)
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """What :func:`encode` made, from any thread.

        Raises:
            OSError: the other end is gone.
        """
        with self._sending:
            self.socket.sendall(len(message).to_bytes(_LENGTH_BYTES, "little") + message)

    def receive(self) -> T:
        """The next message; waits for it, in one thread.

        Raises:
            EOFError: the other end is gone.
        """
        length = int.from_bytes(self._read(_LENGTH_BYTES), "little")
        return self._decoder.decode(self._read(length))

    def _read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            try:
                count = self.socket.recv_into(view)
            except ConnectionResetError:
                count = 0
            if count == 0:
                raise EOFError
            view = view[count:]
        return data
