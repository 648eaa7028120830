"""Who goes first. A policy ranks sequences once, when they arrive; the rest of the engine only compares ranks.

A rank is (class, arrival number): lower runs first, is admitted first and is preempted last. The first part is equal
among sequences between which only arrival counts. Invariant: ranks are distinct and never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxserve.core.request import EngineRequest

Rank = tuple[int, int]
Policy = Callable[[EngineRequest, int], Rank]


def first_come(request: EngineRequest, arrival: int) -> Rank:
    """`fcfs`: `priority` is ignored."""
    return (0, arrival)


def by_priority(request: EngineRequest, arrival: int) -> Rank:
    """`priority`: a lower number goes first, equal ones by arrival; others may starve, as was asked for."""
    return (request.priority, arrival)


POLICIES: Mapping[str, Policy] = {"fcfs": first_come, "priority": by_priority}
