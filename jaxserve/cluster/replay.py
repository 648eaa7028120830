"""One order of device calls in all processes: the leader's runner tells each before it makes it, followers repeat it.

Both sides wrap any `RunnerPort`, and what drafts beside it. A step is a collective of all processes, so what can happen
to one alone, such as a failed allocation, cannot be mended by one alone: it ends the engine.
Invariant: the n-th call after the start-up is the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from jaxserve.cluster.messages import ClearPages, Draft, Launch, Message, Stop
from jaxserve.core.errors import EngineError, StepAllocationError
from jaxserve.core.plan import (
    I32,
    DraftPlan,
    DraftPort,
    PendingStep,
    RunnerPort,
    RunnerShape,
    RunnerStats,
    StepLimits,
    StepPlan,
    StepResult,
)


class DraftingRunnerPort(RunnerPort, DraftPort, Protocol):
    """A runner that can also have a model that drafts."""


class LeaderRunner:
    """`DraftingRunnerPort` of process 0."""

    def __init__(self, runner: DraftingRunnerPort, tell: Callable[[Message], None]) -> None:
        self._runner, self._tell = runner, tell

    @property
    def shape(self) -> RunnerShape:
        return self._runner.shape

    @property
    def stats(self) -> RunnerStats:
        return self._runner.stats

    def limits(self) -> StepLimits:
        return self._runner.limits()

    def launch(self, plan: StepPlan) -> PendingStep:
        self._tell(Launch(plan))
        with _for_all():
            return _Pending(self._runner.launch(plan))

    def draft(self, plan: DraftPlan) -> I32:
        self._tell(Draft(plan))
        with _for_all():
            return self._runner.draft(plan)

    def clear_pages(self, group: int, pages: I32) -> None:
        self._tell(ClearPages(group, tuple(pages.tolist())))
        with _for_all():
            self._runner.clear_pages(group, pages)

    def rebuild(self) -> None:
        raise EngineError("several processes cannot rebuild their pages; start all of them again")

    def close(self) -> None:
        self._runner.close()


class _Pending:
    """A step in flight whose failure is everybody's."""

    def __init__(self, pending: PendingStep) -> None:
        self._pending = pending

    @property
    def has_landed(self) -> bool:
        return self._pending.has_landed

    def result(self) -> StepResult:
        with _for_all():
            return self._pending.result()


def replay(runner: DraftingRunnerPort, next_message: Callable[[], Message]) -> None:
    """Repeats the leader's calls until it stops. Raises EngineError where it stops for a reason."""
    in_flight: PendingStep | None = None
    while True:
        message = next_message()
        if isinstance(message, Launch):
            launched = runner.launch(message.plan)
            if in_flight is not None:
                in_flight.result()      # as the leader does: two steps in flight at most, and a failed one says so
            in_flight = launched
        elif isinstance(message, Draft):
            runner.draft(message.plan)
        elif isinstance(message, ClearPages):
            runner.clear_pages(message.group, np.array(message.pages, np.int32))
        elif isinstance(message, Stop):
            if message.reason:
                raise EngineError(f"the leader ends: {message.reason}")
            return
        else:
            raise EngineError(f"the leader is out of step: {type(message).__name__} came where a step was due")


@contextmanager
def _for_all() -> Iterator[None]:
    try:
        yield
    except StepAllocationError as error:
        raise EngineError(
            f"{error}; with several processes a step cannot be repeated: lower --gpu-memory-utilization or "
            "--max-num-batched-tokens"
        ) from error
