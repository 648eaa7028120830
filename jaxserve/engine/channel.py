"""The one wire between the API process and the engine process: length-prefixed msgpack frames on a socket pair.

It knows message types and framing only: no scheduler, no HTTP, no jax. Nothing is ever unpickled: a frame decodes
into one of the frozen dataclasses below or the connection is closed. The socket pair has no name in the file system,
so only the two processes hold it.
Invariant: frames arrive whole and in order; `None` from `receive` means the other side is gone.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import EngineError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput

FRAME_BYTES_MAX = 256 * 2**20
_LENGTH = struct.Struct("<I")

Phase = Literal["starting", "downloading", "loading", "compiling", "serving", "ready", "draining", "dead"]


class Start(msgspec.Struct, tag="start", frozen=True):
    """First frame down: what to serve. `log_level` is the engine process's."""

    config: EngineConfig
    log_level: str = "info"


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """New sequences, in the order they arrived."""

    requests: tuple[EngineRequest, ...]


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Nobody waits for these any more; unknown ids are ignored."""

    request_ids: tuple[str, ...]


class Profile(msgspec.Struct, tag="profile", frozen=True):
    """Trace steps into the folder; None ends the trace."""

    folder: str | None


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Stop now, free the device, exit 0."""


class Status(msgspec.Struct, tag="status", frozen=True):
    """Where the start-up stands; `detail` is for people."""

    phase: Phase
    detail: str = ""


class Serving(msgspec.Struct, tag="serving", frozen=True):
    """The engine takes requests: what it serves, and the folder its tokenizer is in."""

    info: EngineInfo
    folder: str


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """What a step gave, with the gauges after it; without outputs it is the idle heartbeat."""

    outputs: tuple[SequenceOutput, ...]
    stats: EngineStats


class Profiled(msgspec.Struct, tag="profiled", frozen=True):
    """The answer to one `Profile`; `error` is empty where it was done."""

    error: str = ""


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """The process runs, whatever its loop waits for; each second, both ways, where other machines wait for it."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Last frame up: why the engine stops. `is_users` marks errors that no restart mends (flags, model, memory)."""

    reason: str
    is_users: bool = False


Down = Start | Submit | Abort | Profile | Alive | Shutdown
Up = Status | Serving | Outputs | Profiled | Alive | Failed

_encoder = msgspec.msgpack.Encoder()
_down = msgspec.msgpack.Decoder(Down)
_up = msgspec.msgpack.Decoder(Up)


class ChannelError(EngineError):
    """A frame that no peer of this version sends; the connection cannot be trusted any more."""


def encode(message: Down | Up) -> bytes:
    """One frame, length first. Raises ChannelError for a message over FRAME_BYTES_MAX."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ChannelError(f"a frame of {len(body)} bytes is over the channel's bound of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


def _decode(decoder: msgspec.msgpack.Decoder, body: bytes) -> Down | Up:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ChannelError(f"a frame does not decode: {error}") from error


def _checked_length(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise ChannelError(f"a frame announces {length} bytes; the channel's bound is {FRAME_BYTES_MAX}")
    return length


class EngineEnd:
    """The engine process's end: blocking. One thread may receive while another sends."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock

    def receive(self) -> Down | None:
        """The next message; None when the API process is gone."""
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        body = self._exactly(_checked_length(head))
        return None if body is None else _decode(_down, body)  # type: ignore[return-value]

    def send(self, message: Up) -> None:
        """Raises OSError when the API process is gone."""
        self._socket.sendall(encode(message))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        parts: list[bytes] = []
        while count:
            try:
                part = self._socket.recv(min(count, 2**20))
            except OSError:
                return None
            if not part:
                return None
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


@dataclass(slots=True)
class ApiEnd:
    """The API process's end: asyncio streams on the event loop's thread. Mutable: owns its streams."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_open: bool = field(default=True)

    @classmethod
    async def on(cls, sock: socket.socket) -> ApiEnd:
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**20)
        return cls(reader, writer)

    async def receive(self) -> Up | None:
        """The next message; None when the engine process is gone."""
        try:
            head = await self.reader.readexactly(_LENGTH.size)
            body = await self.reader.readexactly(_checked_length(head))
        except (asyncio.IncompleteReadError, OSError):
            self.is_open = False
            return None
        return _decode(_up, body)  # type: ignore[return-value]

    def send(self, message: Down) -> None:
        """Queues a frame without blocking; a frame to a dead engine is dropped, its death is reported by `receive`."""
        if self.is_open and not self.writer.is_closing():
            self.writer.write(encode(message))

    async def close(self) -> None:
        self.is_open = False
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass
