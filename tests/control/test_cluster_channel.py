"""The channel between the processes of a cluster: who is let in, what travels, what is noticed. No jax, no device."""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jaxserve.cluster import handshake, link, members
from jaxserve.cluster.frames import FrameError, Frames
from jaxserve.cluster.handshake import RefusedError, greet, join
from jaxserve.cluster.link import SILENCE_S_MAX, Link, Pulse
from jaxserve.cluster.members import Follower, Leader, check_same, follow, lead
from jaxserve.cluster.messages import Agree, Beat, ClearPages, Draft, Hello, Launch, Message, Stop, decode, encode
from jaxserve.core.errors import ConfigError, EngineError
from jaxserve.core.plan import DraftPlan, PageUpdates, RowAdmission, StepPlan
from jaxserve.core.sampling_params import SamplingParams
from tests.conftest import free_port

SECRET = b"a secret of the tests"
pytestmark = pytest.mark.timeout(30)


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def plan() -> StepPlan:
    """A plan with something in every field."""
    admission = RowAdmission(
        row=1, params=SamplingParams(temperature=0.5, logit_bias={7: 2.0}, logprobs=2), seed=-(2**63), choice=1,
        prompt_length=2, token_ids=ints(4, 5), pages=(ints(3, 9), ints()), slot=2, stop_token_ids=(1, 2),
    )
    return StepPlan(
        step=3, row_A=ints(0, 1), start_A=ints(8, 0), count_A=ints(1, 2), from_row_A=np.array([True, False]),
        samples_A=np.array([True, True]), scores_A=np.array([False, True]), token_T=ints(0, 4, 5),
        score_target_T=ints(-1, 5, -1), decode_count=1, admissions=(admission,),
        page_updates=(PageUpdates(row_U=ints(1), index_U=ints(0), page_U=ints(3)),), draft_A=ints(0, 1),
    )


def draft_plan() -> DraftPlan:
    return DraftPlan(
        row_N=ints(1, 3), start_N=ints(8, 2), token_N=ints(4, 5), count_N=ints(2, 1),
        pages=PageUpdates(row_U=ints(1), index_U=ints(0), page_U=ints(3)),
    )


def flat(value: object) -> object:
    """With arrays as lists, so that `==` compares."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tolist()
    if dataclasses.is_dataclass(value):
        return tuple(flat(getattr(value, field.name)) for field in dataclasses.fields(value))
    return [flat(item) for item in value] if isinstance(value, tuple) else value


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def frames(sockets: tuple[socket.socket, socket.socket]) -> tuple[Frames, Frames]:
    ours, theirs = sockets
    return Frames(ours, key_out=b"down", key_in=b"up"), Frames(theirs, key_out=b"up", key_in=b"down")


def meeting(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[Any, Any]:
    """What both sides of a meeting gave: a value, or the error they raised."""
    found: dict[int, Any] = {}

    def run(side: int, act: Callable[[], Any]) -> None:
        try:
            found[side] = act()
        except Exception as error:
            found[side] = error

    other = threading.Thread(target=run, args=(1, theirs))
    other.start()
    run(0, ours)
    other.join(20)
    return found[0], found[1]


@pytest.mark.parametrize("message", [
    Beat(), Hello({"max-num-seqs": "4"}), Agree("memory", (1, -2, 2**40)), Launch(plan()), Draft(draft_plan()),
    ClearPages(1, (4, 5)), Stop("why"),
], ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message: Message) -> None:
    found = decode(encode(message))
    assert type(found) is type(message)
    for name in message.__struct_fields__:
        assert flat(getattr(found, name)) == flat(getattr(message, name)), name


@pytest.mark.parametrize("body", [
    b"", b"\x00", b"\x80", encode(Launch(plan()))[:-1], encode(Launch(plan())).replace(b"int32", b"int64"),
    encode(Launch(plan())).replace(b"int32", b"O8   "), encode(Stop("x")).replace(b"stop", b"halt"),
], ids=range(7))
def test_bytes_that_no_message_has_are_an_error(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode(body)


def test_frames_arrive_in_order_and_end_with_the_connection(frames: tuple[Frames, Frames]) -> None:
    ours, theirs = frames
    for body in (b"one", b"", b"x" * 50_000):
        ours.send(body)
    ours.close()
    assert [theirs.receive() for _ in range(4)] == [b"one", b"", b"x" * 50_000, None]


@pytest.mark.parametrize("meddle", ["alter", "repeat", "omit", "reflect"])
def test_a_frame_that_was_meddled_with_is_noticed(meddle: str) -> None:
    ours, wire = socket.socketpair()
    far, theirs = socket.socketpair()
    sender, receiver = Frames(ours, key_out=b"down", key_in=b"up"), Frames(theirs, key_out=b"up", key_in=b"down")
    for body in (b"first", b"other"):
        sender.send(body)
    size = 4 + 32 + 5
    first, second = wire.recv(size, socket.MSG_WAITALL), wire.recv(size, socket.MSG_WAITALL)
    if meddle == "reflect":
        wire.sendall(first)
        with pytest.raises(FrameError, match="code is wrong"):
            sender.receive()
    else:
        far.sendall({"alter": first[:-1] + b"x", "repeat": first + first, "omit": second}[meddle])
        if meddle == "repeat":
            assert receiver.receive() == b"first"
        with pytest.raises(FrameError, match="code is wrong"):
            receiver.receive()
    for sock in (ours, wire, far, theirs):
        sock.close()


def test_a_frame_that_announces_too_much_is_not_waited_for(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    ours.sendall(b"\xff\xff\xff\xff" + bytes(32))
    with pytest.raises(FrameError, match="announces"):
        Frames(theirs, key_out=b"up", key_in=b"down").receive()


def test_who_knows_the_secret_is_let_in_and_shares_keys(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    (rank, leading), following = meeting(lambda: greet(ours, SECRET, {1, 2}), lambda: join(theirs, SECRET, 2))
    assert rank == 2
    leading.send(b"down")
    following.send(b"up")
    assert (following.receive(), leading.receive()) == (b"down", b"up")


@pytest.mark.parametrize(("secret", "rank", "at_leader", "at_follower"), [
    (b"another secret", 1, "does not know the secret", "is not the same here"),
    (SECRET, 3, "node-rank 3 is taken", "node-rank 3 is taken"),
])
def test_who_does_not_belong_is_refused_on_both_sides(sockets, secret, rank, at_leader, at_follower) -> None:
    ours, theirs = sockets
    leading, following = meeting(lambda: greet(ours, SECRET, {1, 2}), lambda: join(theirs, secret, rank))
    assert isinstance(leading, RefusedError) and at_leader in str(leading)
    assert isinstance(following, RefusedError) and at_follower in str(following)


def test_another_version_is_refused_by_name(sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = sockets
    theirs.sendall(b"jaxserve" + (handshake.VERSION + 1).to_bytes(2, "little") + bytes(32))
    with pytest.raises(RefusedError, match=f"version {handshake.VERSION + 1}.*one version of jaxserve"):
        join(ours, SECRET, 1)


def test_a_false_leader_is_not_followed(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    theirs.sendall(b"jaxserve" + handshake.VERSION.to_bytes(2, "little") + bytes(32))
    theirs.sendall(bytes(33))     # "welcome", without the proof
    with pytest.raises(RefusedError, match="does not know the secret"):
        join(ours, SECRET, 1)


def test_a_stranger_who_says_nothing_costs_a_moment(sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "ANSWER_S_MAX", 0.05)
    with pytest.raises(RefusedError, match="did not answer"):
        greet(sockets[0], SECRET, {1})


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_without_a_secret_nothing_starts(secret: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(handshake.SECRET, raising=False)
    if secret is not None:
        monkeypatch.setenv(handshake.SECRET, secret)
    with pytest.raises(ConfigError, match="openssl rand"):
        handshake.cluster_secret()


class Held:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s


def test_silence_is_counted_from_the_last_sign_of_life() -> None:
    clock = Held()
    pulse = Pulse(clock)
    clock.now_s += SILENCE_S_MAX - 1
    assert not pulse.is_lost
    pulse.heard()
    clock.now_s += SILENCE_S_MAX
    assert not pulse.is_lost
    clock.now_s += 0.1
    assert pulse.is_lost and pulse.silent_s == pytest.approx(SILENCE_S_MAX + 0.1)
    assert SILENCE_S_MAX + link.WATCH_EVERY_S + link.BEAT_S < 10


def linked(frames: tuple[Frames, Frames], clock: Held | None = None) -> tuple[Link, Link, queue.SimpleQueue[str]]:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    ours = Link(frames[0], name="process 1", on_lost=lost.put, clock=clock)
    return ours, Link(frames[1], name="the leader", on_lost=lambda reason: None), lost


def test_a_process_that_stalls_is_lost(frames: tuple[Frames, Frames], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open, as under SIGSTOP: nothing comes."""
    monkeypatch.setattr(link, "WATCH_EVERY_S", 0.01)
    clock, lost = Held(), queue.SimpleQueue[str]()
    Link(frames[0], name="process 1", on_lost=lost.put, clock=clock)
    clock.now_s += SILENCE_S_MAX + 1
    assert lost.get(timeout=10) == "process 1 is lost: it has been silent for 9 s"


def test_signs_of_life_keep_an_idle_link(frames: tuple[Frames, Frames], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WATCH_EVERY_S", 0.01), ("BEAT_S", 0.01), ("SILENCE_S_MAX", 0.5)):
        monkeypatch.setattr(link, name, value)
    ours, theirs, lost = linked(frames)
    with pytest.raises(queue.Empty):
        lost.get(timeout=1.5)
    ours.close()
    theirs.close()


def test_a_process_that_is_killed_is_lost_at_once(frames: tuple[Frames, Frames]) -> None:
    _, theirs, lost = linked(frames)
    theirs._frames.close()
    assert "closed the connection" in lost.get(timeout=10)


def test_a_process_that_says_why_it_ends_is_quoted(frames: tuple[Frames, Frames]) -> None:
    _, theirs, lost = linked(frames)
    theirs.send(Stop("the disk is full"))
    assert lost.get(timeout=10) == "process 1 is lost: the disk is full"


def test_a_stop_that_was_asked_for_is_no_loss(frames: tuple[Frames, Frames]) -> None:
    ours, theirs, lost = linked(frames)
    theirs.send(Stop())
    assert ours.inbox.get(timeout=10) == Stop()
    theirs.close()
    ours.close(wait_s=5)
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.2)


def test_who_parts_takes_the_other_sides_end_for_granted(frames: tuple[Frames, Frames]) -> None:
    """A follower may hang up before the leader's next line runs."""
    ours, theirs, lost = linked(frames)
    ours.part("")
    assert theirs.inbox.get(timeout=10) == Stop()
    theirs.close()
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.2)
    ours.close(wait_s=5)


def test_a_leader_that_stops_parts_from_all_before_it_waits_for_any() -> None:
    done: list[str] = []

    class Noted:
        def part(self, reason: str) -> None:
            done.append(f"part {reason}")

        def close(self, *, wait_s: float) -> None:
            assert wait_s > 0
            done.append("close")

    Leader({1: Noted(), 2: Noted()}).stop("why")  # type: ignore[dict-item]
    assert done == ["part why", "part why", "close", "close"]


def cluster(theirs: dict[str, str], *, secret: bytes = SECRET) -> tuple[Any, Any]:
    address = ("127.0.0.1", free_port())

    def none(reason: str) -> None:
        pass

    return meeting(
        lambda: lead(address, 2, secret=SECRET, settings={"max-num-seqs": "4"}, on_lost=none),
        lambda: follow(address, 1, 2, secret=secret, settings=theirs, on_lost=none),
    )


def test_two_processes_agree_on_the_least() -> None:
    leader, follower = cluster({"max-num-seqs": "4"})
    assert isinstance(leader, Leader) and isinstance(follower, Follower)
    assert (leader.rank, leader.count, follower.rank, follower.count) == (0, 2, 1, 2)
    both = meeting(lambda: leader.least("memory", (5, -7)), lambda: follower.least("memory", (3, -1)))
    assert both == ((3, -7), (3, -7))
    same = meeting(lambda: check_same(leader, "model", "a"), lambda: check_same(follower, "model", "a"))
    assert same == (None, None)
    different = meeting(lambda: check_same(leader, "model", "a"), lambda: check_same(follower, "model", "b"))
    assert all(isinstance(error, ConfigError) and "same model" in str(error) for error in different)
    follower._link.send(Agree("pages", (1,)))
    with pytest.raises(EngineError, match="out of step: Agree came where 'memory' was due"):
        leader.least("memory", (1,))
    follower.stop("")
    leader.stop()


def test_a_setting_that_differs_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "HANG_UP_S_MAX", 0.1)
    leader, follower = cluster({"max-num-seqs": "8"})
    assert isinstance(leader, ConfigError) and "max-num-seqs is 8 at process 1" in str(leader)
    assert isinstance(follower, EngineError) and "max-num-seqs is 8" in str(follower)


def test_a_leader_that_nobody_could_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: int, **kwargs: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(ConfigError, match="gpu03 is 127.0.1.1 on this machine"):
        lead(("gpu03", 4000), 2, secret=SECRET, settings={}, on_lost=lambda reason: None)


def test_a_name_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "NAME_S_MAX", 0.0)
    with pytest.raises(ConfigError, match=r"cannot listen on no-such-host\.invalid:4000"):
        lead(("no-such-host.invalid", 4000), 2, secret=SECRET, settings={}, on_lost=lambda reason: None)


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "CONNECT_S_MAX", 0.1)
    address = ("127.0.0.1", free_port())
    missing: list[str] = []
    with pytest.raises(ConfigError, match="node-rank 1, 2 did not come"):
        lead(address, 3, secret=SECRET, settings={}, on_lost=lambda reason: None, on_waiting=missing.append)
    assert missing == ["1, 2"], "for /health"
    with pytest.raises(ConfigError, match="no leader at"):
        follow(address, 1, 3, secret=SECRET, settings={}, on_lost=lambda reason: None)
