"""The processes of a cluster as each other sees them: process 0 leads, the others follow. Agreement before serving.

Both sides answer the same questions at the same places of the start-up (`least`, `same`), so neither needs to know how
far the other is. It knows sockets and numbers; no model, no device.
Invariant: every process gets the same answer to the same question, or the link to it is lost.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jaxserve.cluster.frames import Frames
from jaxserve.cluster.handshake import RefusedError, greet, join
from jaxserve.cluster.link import Link
from jaxserve.cluster.messages import Agree, Hello, Message, Stop
from jaxserve.core.errors import ConfigError, EngineError

logger = logging.getLogger("jaxserve.cluster")

CONNECT_S_MAX = 300.0       # from the first process's start to the last one's
RETRY_S = 0.5
CALL_S_MAX = 5.0
NAME_S_MAX = 60.0
HANG_UP_S_MAX = 3.0         # what a follower may take to end once it is told to

Lost = Callable[[str], None]


class Member(Protocol):
    """This process among the others."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def least(self, topic: str, values: Sequence[int] = ()) -> tuple[int, ...]:
        """The least of all processes' values, place by place. Waits for everybody: without values, a barrier."""
        ...


def check_same(member: Member, topic: str, content: str) -> None:
    """Raises ConfigError, in every process, unless all have the same content."""
    number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:7], "big")
    low, high = member.least(topic, (number, -number))
    if low != -high:
        raise ConfigError(f"the machines do not have the same {topic}: give all of them the same files and flags")


class Leader:
    """Process 0: what it sends, all followers get, in order."""

    rank = 0

    def __init__(self, links: dict[int, Link]) -> None:
        self._links = links
        self.count = len(links) + 1

    def tell(self, message: Message) -> None:
        """Sends to every follower."""
        for link in self._links.values():
            link.send(message)

    def least(self, topic: str, values: Sequence[int] = ()) -> tuple[int, ...]:
        found = tuple(values)
        for link in self._links.values():
            found = tuple(map(min, found, _answer(link, topic, len(found))))
        self.tell(Agree(topic, found))
        return found

    def stop(self, reason: str = "") -> None:
        """Ends the followers, and waits a little until they have."""
        for link in self._links.values():
            link.part(reason)
        for link in self._links.values():
            link.close(wait_s=HANG_UP_S_MAX)


class Follower:
    """Any other process."""

    def __init__(self, link: Link, *, rank: int, count: int) -> None:
        self._link, self.rank, self.count = link, rank, count

    def least(self, topic: str, values: Sequence[int] = ()) -> tuple[int, ...]:
        self._link.send(Agree(topic, tuple(values)))
        return _answer(self._link, topic, len(values))

    def next(self) -> Message:
        """What the leader wants next; waits for it."""
        return self._link.inbox.get()

    def stop(self, reason: str) -> None:
        """Tells the leader why this process ends."""
        self._link.part(reason)
        self._link.close()


def lead(
    address: tuple[str, int], count: int, *, secret: bytes, settings: Mapping[str, str], on_lost: Lost,
    on_waiting: Callable[[str], None] = lambda ranks: None,
) -> Leader:
    """Waits for the followers at `address`; `on_waiting` is told which are missing.

    Raises ConfigError where it cannot listen or somebody does not come.
    """
    links: dict[int, Link] = {}
    listener = _listen(address)
    deadline_s = time.monotonic() + CONNECT_S_MAX
    with listener:
        while missing := set(range(1, count)) - links.keys():
            ranks = ", ".join(map(str, sorted(missing)))
            on_waiting(ranks)
            listener.settimeout(max(0.01, deadline_s - time.monotonic()))
            try:
                sock, caller = listener.accept()
            except TimeoutError:
                raise ConfigError(
                    f"node-rank {ranks} did not come to {_shown(address)} within "
                    f"{CONNECT_S_MAX:.0f} s; start all {count} processes, and let them reach each other"
                ) from None
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                rank, frames = greet(sock, secret, missing)
            except RefusedError as error:
                logger.warning("a process at %s is not let in: %s", caller[0], error)
                sock.close()
                continue
            links[rank] = Link(frames, name=f"process {rank} ({caller[0]})", on_lost=on_lost)
            logger.info("process %d of %d is here, at %s", rank, count, caller[0])
    leader = Leader(links)
    for link in links.values():
        _compare(leader, link, settings)
    leader.least("start")
    return leader


def follow(
    address: tuple[str, int], rank: int, count: int, *, secret: bytes, settings: Mapping[str, str], on_lost: Lost
) -> Follower:
    """Joins the leader at `address`, which may start later. Raises ConfigError where that cannot be."""
    deadline_s = time.monotonic() + CONNECT_S_MAX
    why: object = ""
    while True:
        try:
            frames = _call(address, secret, rank)
            break
        except OSError as error:     # nobody listens yet, the name is not known yet, or the leader just ended
            if str(error) != str(why):
                logger.info("no leader at %s yet: %s", _shown(address), error)
            why = error
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"no leader at {_shown(address)} within {CONNECT_S_MAX:.0f} s ({why}); start node-rank 0 with the same "
                "--master-addr and --master-port"
            )
        time.sleep(RETRY_S)
    link = Link(frames, name=f"the leader ({_shown(address)})", on_lost=on_lost)
    link.send(Hello(dict(settings)))
    follower = Follower(link, rank=rank, count=count)
    follower.least("start")
    return follower


def _call(address: tuple[str, int], secret: bytes, rank: int) -> Frames:
    sock = socket.create_connection(address, timeout=CALL_S_MAX)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return join(sock, secret, rank)
    except BaseException:
        sock.close()
        raise


def _compare(leader: Leader, link: Link, settings: Mapping[str, str]) -> None:
    hello = link.inbox.get()
    if not isinstance(hello, Hello):
        raise EngineError(f"{link.name} did not introduce itself")
    for name in sorted(settings.keys() | hello.settings.keys()):
        ours, theirs = settings.get(name), hello.settings.get(name)
        if ours != theirs:
            reason = f"{name} is {theirs} at {link.name}, {ours} at the leader; give all processes the same"
            leader.stop(reason)
            raise ConfigError(reason)


def _answer(link: Link, topic: str, count: int) -> tuple[int, ...]:
    message = link.inbox.get()
    if isinstance(message, Stop):
        raise EngineError(f"{link.name} ends: {message.reason or 'it was told to'}")
    if not isinstance(message, Agree) or message.topic != topic or len(message.values) != count:
        raise EngineError(f"{link.name} is out of step: {type(message).__name__} came where {topic!r} was due")
    return message.values


def _listen(address: tuple[str, int]) -> socket.socket:
    try:
        family, kind, protocol, where = _resolve(address)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(16)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {_shown(address)}: {error}; master-addr must be an address of node-rank 0's own "
            "interface, and master-port and the port after it must be free"
        ) from error
    return listener


def _resolve(address: tuple[str, int]) -> tuple[int, int, int, tuple[str, int]]:
    """What to listen on. A name may become known only after the process starts, as that of a Kubernetes pod."""
    deadline_s = time.monotonic() + NAME_S_MAX
    while True:
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)
    host, port = str(where[0]), address[1]
    if host.startswith("127.") and not address[0].startswith("127.") and address[0] != "localhost":
        raise ConfigError(
            f"master-addr {address[0]} is {host} on this machine, where no other one can reach it; give the address of "
            "the private interface"
        )
    return family, kind, protocol, (host, port)


def _shown(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
