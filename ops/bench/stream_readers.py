"""Readers of very many streams in one process that costs little: counts events, measures their age.

``python -m ops.bench.stream_readers HOST PORT API NUM_STREAMS`` opens the streams and then reads
them by one ``epoll`` loop over raw sockets. Nothing is parsed: events are counted by the blank line
that ends each, and the age of the first token of each piece that arrives is taken from its text
(see :mod:`ops.bench.token_source`). ``begin`` on standard input starts a count, ``tell`` asks
for it.
"""

import os
import select
import socket
import sys
import time
from collections import Counter
from typing import Literal

import msgspec

from common.clock import monotonic_s
from ops.bench.token_source import STAMP_BYTES, STAMPS_PER_S, age

Api = Literal["tgi", "chat"]
BEGIN, TELL = b"begin\n", b"tell\n"
_MAX_TOKENS = 30_000
_PIECE_BYTES = 1 << 18
_REST_S = 0.002
"""Between two looks, as a network card gathers what comes: readers that slept until the next byte
would have to be woken by nearly every write of the gateway, at its expense."""
_BODIES: dict[str, tuple[str, dict[str, object], bytes]] = {
    "tgi": (
        "/generate_stream",
        {"inputs": "A river is", "parameters": {"max_new_tokens": _MAX_TOKENS}},
        b'"text":"',
    ),
    "chat": (
        "/v1/chat/completions",
        {
            "model": "simulated",
            "messages": [{"role": "user", "content": "A river is"}],
            "stream": True,
            "max_tokens": _MAX_TOKENS,
        },
        b'"content":"',
    ),
}
"""Route, body, and what stands before a token's text."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Since the count began. ``age_ms`` is of the first token of each piece: p50, p99, max."""

    events: int
    pieces: int
    cpu_s: float
    age_ms: tuple[float, float, float]


class Readers:
    def __init__(self, api: Api) -> None:
        self._path, self._body, self._before_text = _BODIES[api]
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._ends_open: set[int] = set()
        """Connections whose last piece ended between the two bytes that end an event."""
        self._forget()

    def open(self, host: str, port: int) -> None:
        """Ask for one more stream. Raises: OSError; RuntimeError when it is refused."""
        body = msgspec.json.encode(self._body)
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection((host, port))
        connection.sendall(head.encode() + body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = connection.recv(_PIECE_BYTES)
            answer += piece
            if not piece:
                break
        if b" 200 " not in answer.splitlines()[0]:
            raise RuntimeError(f"a stream was refused: {answer[:500].decode(errors='replace')}")
        connection.setblocking(False)
        self._sockets[connection.fileno()] = connection
        self._poll.register(connection, select.EPOLLIN)

    def serve(self) -> None:
        """Read until standard input ends, answering each of its lines."""
        asked = sys.stdin.fileno()
        self._poll.register(asked, select.EPOLLIN)
        while True:
            time.sleep(_REST_S)
            for number, _ in self._poll.poll():
                if number != asked:
                    self._read(number)
                    continue
                order = os.read(asked, 100)
                if not order:
                    return
                if order == BEGIN:
                    self._forget()
                self.tell()

    def _read(self, number: int) -> None:
        piece = self._sockets[number].recv(_PIECE_BYTES)
        now_s = monotonic_s()
        if not piece:
            self._poll.unregister(number)
            return
        self._num_pieces += 1
        self._num_events += piece.count(b"\n\n")
        if number in self._ends_open:
            self._ends_open.discard(number)
            self._num_events += piece[0] == 10
        if piece[-1] == 10 and piece[-2:] not in (b"\n\n", b"\r\n"):
            self._ends_open.add(number)
        at = piece.find(self._before_text)
        if at >= 0:
            at += len(self._before_text)
            self._ages[age(piece[at : at + STAMP_BYTES], now_s)] += 1

    def tell(self) -> None:
        figures = Figures(
            events=self._num_events,
            pieces=self._num_pieces,
            cpu_s=time.process_time() - self._cpu_s,
            age_ms=(self._age_ms(50), self._age_ms(99), self._age_ms(100)),
        )
        sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
        sys.stdout.flush()

    def _age_ms(self, percent: int) -> float:
        """The smallest age that at least ``percent`` of a hundred do not exceed."""
        left = -(-self._ages.total() * percent // 100)
        for stamps, count in sorted(self._ages.items()):
            left -= count
            if left <= 0:
                return stamps * 1000 / STAMPS_PER_S
        return 0.0

    def _forget(self) -> None:
        self._num_events = self._num_pieces = 0
        self._ages: Counter[int] = Counter()
        self._cpu_s = time.process_time()


def main() -> None:
    host, port, api, num_streams = sys.argv[1:]
    readers = Readers("tgi" if api == "tgi" else "chat")
    for _ in range(int(num_streams)):
        readers.open(host, int(port))
    readers.tell()
    readers.serve()


if __name__ == "__main__":
    main()
