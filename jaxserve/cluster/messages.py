"""What the leader and its followers tell each other, and how it becomes bytes: msgpack with typed fields.

A numpy array travels as its type, its shape and its buffer; only the types that plans are made of are taken. Nothing is
ever unpickled: bytes decode into one of the classes below or are an error. `handshake.VERSION` is their version.
Invariant: `decode(encode(message))` is the message; arrays that come out are read-only.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from jaxserve.cluster.frames import FrameError
from jaxserve.core.plan import DraftPlan, StepPlan

DTYPES = {name: np.dtype(name) for name in ("int32", "float32", "bool")}


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Nothing but a sign of life."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A follower's first: what it was started with, name by name, to be compared with the leader's."""

    settings: dict[str, str]


class Agree(msgspec.Struct, tag="agree", frozen=True):
    """Up: this process's values. Down: the least of all processes', place by place."""

    topic: str
    values: tuple[int, ...]


class Launch(msgspec.Struct, tag="launch", frozen=True):
    """The step that the leader is about to dispatch."""

    plan: StepPlan


class Draft(msgspec.Struct, tag="draft", frozen=True):
    """What the leader is about to ask of the model that drafts."""

    plan: DraftPlan


class ClearPages(msgspec.Struct, tag="clear", frozen=True):
    """Zero these pages of a KV group."""

    group: int
    pages: tuple[int, ...]


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Last frame, either way: this process ends. `reason` is empty where it was asked to."""

    reason: str = ""


Message = Beat | Hello | Agree | Launch | Draft | ClearPages | Stop


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """The message of some bytes. Raises FrameError."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise FrameError(f"a message does not decode: {error}") from error


def _to_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        return (value.dtype.name, value.shape, np.ascontiguousarray(value).data)
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_bytes(wanted: Any, value: Any) -> Any:
    name, shape, buffer = value
    dtype = DTYPES.get(name)
    if dtype is None or math.prod(shape) * dtype.itemsize != len(buffer) or any(size < 0 for size in shape):
        raise ValueError(f"an array of type {name!r} and shape {shape!r} has {len(buffer)} bytes")
    return np.frombuffer(buffer, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_bytes)
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message, dec_hook=_from_bytes)
