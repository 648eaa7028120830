"""How two processes find out that both know the cluster's secret, and agree on keys, before a frame is believed.

    leader    -> follower   greeting: magic, version, nonce L
    follower  -> leader     magic, version, rank, nonce F, HMAC(secret, "follower" · version · rank · L · F)
    leader    -> follower   verdict, HMAC(secret, "leader" · version · rank · L · F)

The secret itself is never sent. Fixed sizes and a short timeout: a stranger costs a few bytes and seconds.
Invariant: `greet` and `join` return only where the other side holds the secret, and with keys that no other
connection has.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct

from jaxserve.cluster.frames import CODE_BYTES, Frames, code, read_exactly
from jaxserve.core.errors import ConfigError

VERSION = 2         # of handshake and messages: raise it with any change to either
MAGIC = b"jaxserve"
NONCE_BYTES = 32
ANSWER_S_MAX = 5.0

SECRET = "JAXSERVE_CLUSTER_SECRET"
SECRET_LENGTH_MIN = 16

_GREETING = struct.Struct(f"<8sH{NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<8sHH{NONCE_BYTES}s{CODE_BYTES}s")
_VERDICT = struct.Struct(f"<B{CODE_BYTES}s")
_SAID = struct.Struct("<HH")

_WELCOME, _WRONG_VERSION, _WRONG_SECRET, _WRONG_RANK = range(4)
_NO_CODE = bytes(CODE_BYTES)


class RefusedError(ConfigError):
    """Who called is not let in; the message says why."""


def cluster_secret() -> bytes:
    """The secret from the environment. Raises ConfigError where there is none."""
    secret = os.environ.get(SECRET, "")
    if len(secret) < SECRET_LENGTH_MIN:
        what = f"has {len(secret)} characters" if secret else "is not set"
        raise ConfigError(
            f"nnodes above 1 needs a secret that all machines share, and {SECRET} {what}; set it everywhere to the "
            f"same {SECRET_LENGTH_MIN} characters or more, such as the output of `openssl rand -hex 32`"
        )
    return secret.encode()


def greet(sock: socket.socket, secret: bytes, free_ranks: set[int]) -> tuple[int, Frames]:
    """The leader's side, for one caller: its rank, and frames to it. Raises RefusedError."""
    sock.settimeout(ANSWER_S_MAX)
    ours = os.urandom(NONCE_BYTES)
    try:
        sock.sendall(_GREETING.pack(MAGIC, VERSION, ours))
        answer = read_exactly(sock, _ANSWER.size)
        if answer is None:
            raise RefusedError(f"it did not answer within {ANSWER_S_MAX:.0f} s")
        magic, version, rank, theirs, proof = _ANSWER.unpack(answer)
        said = _SAID.pack(version, rank) + ours + theirs
        if magic != MAGIC or version != VERSION:
            _refuse(sock, _WRONG_VERSION, f"it speaks version {version} of the protocol, this is {VERSION}")
        if not hmac.compare_digest(proof, code(secret, b"follower", said)):
            _refuse(sock, _WRONG_SECRET, f"it does not know the secret of {SECRET}")
        if rank not in free_ranks:
            _refuse(sock, _WRONG_RANK, f"node-rank {rank} is taken, or not below nnodes")
        sock.sendall(_VERDICT.pack(_WELCOME, code(secret, b"leader", said)))
    except OSError as error:
        raise RefusedError(f"the connection broke: {error}") from error
    return rank, Frames(sock, key_out=code(secret, b"down", said), key_in=code(secret, b"up", said))


def join(sock: socket.socket, secret: bytes, rank: int) -> Frames:
    """A follower's side. Raises RefusedError, or ConnectionError where whoever listens is no leader (any more)."""
    sock.settimeout(ANSWER_S_MAX)
    greeting = read_exactly(sock, _GREETING.size)
    if greeting is None:
        raise ConnectionError("no greeting came")
    magic, version, theirs = _GREETING.unpack(greeting)
    if magic != MAGIC:
        raise RefusedError("what listens there is no jaxserve; check master-addr and master-port")
    if version != VERSION:
        raise RefusedError(
            f"the leader speaks version {version} of the protocol, this is {VERSION}: install one version of jaxserve "
            "on all machines"
        )
    ours = os.urandom(NONCE_BYTES)
    said = _SAID.pack(VERSION, rank) + theirs + ours
    sock.sendall(_ANSWER.pack(MAGIC, VERSION, rank, ours, code(secret, b"follower", said)))
    answer = read_exactly(sock, _VERDICT.size)
    if answer is None:
        raise ConnectionError("the leader hung up in the handshake")
    verdict, proof = _VERDICT.unpack(answer)
    reasons = {
        _WRONG_VERSION: "another version of the protocol is spoken there: install one version of jaxserve everywhere",
        _WRONG_SECRET: f"{SECRET} is not the same here and on the leader",
        _WRONG_RANK: f"node-rank {rank} is taken by another process, or not below the leader's nnodes",
    }
    if verdict != _WELCOME:
        raise RefusedError(f"the leader refuses this process: {reasons.get(verdict, 'for an unknown reason')}")
    if not hmac.compare_digest(proof, code(secret, b"leader", said)):
        raise RefusedError(f"what listens there does not know the secret of {SECRET}")
    return Frames(sock, key_out=code(secret, b"up", said), key_in=code(secret, b"down", said))


def _refuse(sock: socket.socket, verdict: int, reason: str) -> None:
    sock.sendall(_VERDICT.pack(verdict, _NO_CODE))
    raise RefusedError(reason)
