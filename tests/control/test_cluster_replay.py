"""The leader's device calls in every process, in one order; and what fails in one ends all. No jax, no socket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.cluster.messages import Agree, ClearPages, Draft, Launch, Message, Stop, decode, encode
from jaxserve.cluster.replay import LeaderRunner, replay
from jaxserve.core.errors import EngineError, StepAllocationError
from tests.control.test_cluster_channel import draft_plan, flat, plan


class Recorder:
    """A runner that notes its calls."""

    def __init__(self, log: list[Any], failing: str = "") -> None:
        self.log, self._failing = log, failing

    def launch(self, plan: Any) -> Recorder:
        self._note("launch", flat(plan))
        return self

    def result(self) -> None:
        self._note("result")

    def draft(self, plan: Any) -> None:
        self._note("draft", flat(plan))

    def clear_pages(self, group: int, pages: Any) -> None:
        self._note("clear", group, pages.tolist())

    def _note(self, name: str, *values: object) -> None:
        self.log.append((name, *values))
        if name == self._failing:
            raise StepAllocationError("no memory is left")


def test_followers_repeat_what_the_leader_does_in_its_order() -> None:
    sent: list[Message] = []
    leader = LeaderRunner(Recorder([]), lambda message: sent.append(decode(encode(message))))  # type: ignore[arg-type]
    for _ in range(2):
        leader.launch(plan())
    leader.clear_pages(1, np.array([4, 5], np.int32))
    leader.draft(draft_plan())
    leader.launch(plan())
    log: list[Any] = []
    messages = iter([*sent, Stop()])
    replay(Recorder(log), lambda: next(messages))  # type: ignore[arg-type]
    step = ("launch", flat(plan()))
    assert log == [step, step, ("result",), ("clear", 1, [4, 5]), ("draft", flat(draft_plan())), step, ("result",)]


def test_the_leader_tells_before_it_does() -> None:
    order: list[Any] = []
    leader = LeaderRunner(Recorder(order), lambda message: order.append(type(message)))  # type: ignore[arg-type]
    leader.launch(plan())
    leader.draft(draft_plan())
    leader.clear_pages(0, np.array([1], np.int32))
    found = [entry if isinstance(entry, type) else entry[0] for entry in order]
    assert found == [Launch, "launch", Draft, "draft", ClearPages, "clear"]


@pytest.mark.parametrize("failing", ["launch", "result", "draft", "clear"])
def test_memory_that_runs_out_in_one_process_ends_all(failing: str) -> None:
    leader = LeaderRunner(Recorder([], failing), lambda message: None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="with several processes a step cannot be repeated") as caught:
        leader.launch(plan()).result()
        leader.draft(draft_plan())
        leader.clear_pages(0, np.array([1], np.int32))
    assert not isinstance(caught.value, StepAllocationError), "the loop would recompute alone"
    with pytest.raises(EngineError, match="cannot rebuild"):
        leader.rebuild()


@pytest.mark.parametrize(("message", "reason"), [(Stop("a machine is lost"), "a machine is lost"),
                                                 (Agree("memory", ()), "out of step")])
def test_a_follower_says_why_it_ends(message: Message, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        replay(Recorder([]), lambda: message)  # type: ignore[arg-type]
