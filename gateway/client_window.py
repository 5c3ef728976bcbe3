"""Whether a client takes what it is sent, as its connection's TCP counts it.

What a client does not read fills the receive buffer at its side, then the send buffer at ours, and
only then holds up this process: a short answer never does. TCP itself knows sooner. It counts the
time in which it had something to send while the window of the other side was closed.
"""

import socket
import struct
import sys
from asyncio import Transport

_TCP_INFO_BYTES = 192
_NOTSENT = struct.Struct("=I")
_NOTSENT_AT = 144
_RWND_LIMITED = struct.Struct("=Q")
_RWND_LIMITED_AT = 176
"""Fields of ``struct tcp_info`` (linux/tcp.h, since Linux 4.10): ``tcpi_notsent_bytes``, and
``tcpi_rwnd_limited`` in microseconds since the connection began."""


class ClientWindow:
    """Of one connection, from now on. Anywhere but over TCP on Linux both figures stay 0.

    A look costs some 2 µs. There must be none after the connection's end: what the system calls its
    socket may be another one by then.
    """

    __slots__ = ("_began_us", "_socket", "_transport", "blocked_s", "unsent_bytes")

    def __init__(self, transport: Transport) -> None:
        self._transport: Transport | None = transport
        self._socket = transport.get_extra_info("socket")
        self.blocked_s = 0.0
        """How long the client's window was closed while there was something to send."""
        self.unsent_bytes = 0
        """What has not gone out to it."""
        info = self._read()
        self._began_us = _RWND_LIMITED.unpack_from(info, _RWND_LIMITED_AT)[0] if info else 0

    def look(self) -> None:
        """Take both figures as they are now."""
        info = self._read()
        if info and self._transport is not None:
            blocked_us = _RWND_LIMITED.unpack_from(info, _RWND_LIMITED_AT)[0] - self._began_us
            self.blocked_s = blocked_us / 1e6
            in_kernel = _NOTSENT.unpack_from(info, _NOTSENT_AT)[0]
            self.unsent_bytes = in_kernel + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """The connection ends: look once more, and never again."""
        self.look()
        self._transport = None

    def _read(self) -> bytes:
        """Empty where there is no such thing."""
        if self._transport is None or self._socket is None or sys.platform != "linux":
            return b""
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return b""
        return info if len(info) == _TCP_INFO_BYTES else b""
