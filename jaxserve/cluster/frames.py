"""Frames between the processes of a cluster: a length, a code that only a holder of the key can make, the bytes.

It knows bytes, no messages. The key is of one connection and one direction (`handshake` makes it), and the code covers
the frame's number, so a frame that was altered, repeated, left out or sent back is noticed. Nothing is hidden: who can
listen on the network reads everything.
Invariant: `receive` gives exactly what the other side gave to `send`, in order, or raises.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
import threading

from jaxserve.core.errors import EngineError

FRAME_BYTES_MAX = 256 * 2**20
CODE_BYTES = 32
_HEAD = struct.Struct(f"<I{CODE_BYTES}s")
_NUMBER = struct.Struct("<QI")


class FrameError(EngineError):
    """Bytes that no holder of the key has sent; the connection cannot be trusted any more."""


def code(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of the parts."""
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        made.update(part)
    return made.digest()


class Frames:
    """One connection. Any thread may send, one may receive. Mutable: counts frames."""

    def __init__(self, sock: socket.socket, *, key_out: bytes, key_in: bytes) -> None:
        sock.settimeout(None)
        self._socket, self._key_out, self._key_in = sock, key_out, key_in
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def send(self, body: bytes) -> None:
        """Raises OSError when the other side is gone."""
        if len(body) > FRAME_BYTES_MAX:
            raise FrameError(f"a frame of {len(body)} bytes is over the bound of {FRAME_BYTES_MAX}")
        with self._lock:
            seal = code(self._key_out, _NUMBER.pack(self._sent, len(body)), body)
            self._sent += 1
            self._socket.sendall(_HEAD.pack(len(body), seal) + body)

    def receive(self) -> bytes | None:
        """The next frame; None when the other side is gone."""
        head = read_exactly(self._socket, _HEAD.size)
        if head is None:
            return None
        length, seal = _HEAD.unpack(head)
        if length > FRAME_BYTES_MAX:
            raise FrameError(f"a frame announces {length} bytes; the bound is {FRAME_BYTES_MAX}")
        body = read_exactly(self._socket, length)
        if body is None:
            return None
        if not hmac.compare_digest(seal, code(self._key_in, _NUMBER.pack(self._received, length), body)):
            raise FrameError("a frame's code is wrong: it was altered on its way, or sent by somebody else")
        self._received += 1
        return body

    def close(self) -> None:
        """Ends the connection for both sides, and wakes whoever receives."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass    # the other side was quicker
        self._socket.close()


def read_exactly(sock: socket.socket, count: int) -> bytes | None:
    """So many bytes; None when the other side is gone, or too slow for the socket's timeout."""
    parts: list[bytes] = []
    while count:
        try:
            part = sock.recv(min(count, 2**20))
        except OSError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
