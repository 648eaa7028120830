"""What the engine counts since its start, and the snapshot that others read. Mutable counters, frozen snapshots.

Invariant: counters only rise; tokens that were computed again after a preemption count once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.core.plan import RunnerStats
from jaxserve.core.request import EngineStats
from jaxserve.engine.roster import Roster


@dataclass(slots=True)
class Counters:
    """Written by scheduler, committer and loop."""

    prefix_queries: int = 0    # tokens of prompts looked up at their first admission
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0       # of the newest step
    corrupted: int = 0
    allocation_failures: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)    # accepted draft tokens by place; empty: no speculation


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Host seconds of the newest turn of the loop."""

    plan_s: float = 0.0
    dispatch_s: float = 0.0    # in runner.launch
    wait_s: float = 0.0        # for the landing step's result
    commit_s: float = 0.0


def snapshot(counters: Counters, roster: Roster, runner: RunnerStats) -> EngineStats:
    """The gauges of now beside the counters."""
    return EngineStats(
        running_count=len(roster.running),
        waiting_count=len(roster.waiting),
        page_count=roster.kv.page_count,
        page_used_count=roster.kv.used_count,
        prefix_query_tokens=counters.prefix_queries,
        prefix_hit_tokens=counters.prefix_hits,
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        preemption_count=counters.preemptions,
        step_count=counters.steps,
        step_tokens=counters.step_tokens,
        compiled_count=runner.compiled_count,
        compiled_after_ready_count=runner.compiled_after_ready_count,
        corrupted_count=counters.corrupted,
        draft_count=counters.drafts,
        draft_tokens=counters.draft_tokens,
        draft_accepted_at=tuple(counters.accepted_at),
    )
