"""The engine's loop, one turn a call: plan and launch step n+1, then commit the landed step n. Mutable.

It joins scheduler, committer and runner and owns the step in flight; who turns it owns the thread. It knows no text,
no channel and no device beyond `RunnerPort`.
Invariants: at most one step is in flight between two turns (none with `async_scheduling` off); every sequence that
`add` took gets exactly one last output; an allocation failure costs time, never a wrong token.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from jaxserve.core.clock import ClockPort
from jaxserve.core.config import CacheConfig, SchedulerConfig
from jaxserve.core.errors import EngineBusyError, RequestError, StepAllocationError
from jaxserve.core.plan import PendingStep, RunnerPort, StepPlan
from jaxserve.core.request import EngineRequest, EngineStats, SequenceOutput
from jaxserve.engine.acceptance import check_config, check_request
from jaxserve.engine.chunk_budget import ChunkBudget
from jaxserve.engine.commit import Committer, ended_output
from jaxserve.engine.landing import LandingForecast
from jaxserve.engine.policy import POLICIES
from jaxserve.engine.roster import Roster
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.speculation import NgramSpeculation, Speculation
from jaxserve.engine.stats import Counters, StepTiming, snapshot

logger = logging.getLogger("jaxserve.engine")

FAILURES_ALONE_MAX = 3      # a sequence whose own steps ran out of memory so often ends with an error
CALM_STEPS_MIN = 256        # landed steps after which earlier allocation failures no longer count


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight with its sequences in entry order."""

    plan: StepPlan
    sequences: list[Sequence]
    pending: PendingStep
    launched_s: float

    @property
    def has_prompts(self) -> bool:
        return self.plan.token_count > self.plan.decode_count


class EngineLoop:
    """Turns requests into outputs, step by step. Single-threaded: one caller at a time."""

    def __init__(
        self, runner: RunnerPort, *, config: SchedulerConfig, cache: CacheConfig, clock: ClockPort,
        speculation: Speculation | None = None,
    ) -> None:
        """Args:
        speculation: who drafts; None is by `config`.
        """
        check_config(config)
        shape = runner.shape
        self._runner, self._shape, self._config, self._clock = runner, shape, config, clock
        self._counters = Counters()
        self._roster = Roster(
            shape,
            row_count=min(shape.row_count, config.max_num_seqs or shape.row_count),
            enable_prefix_caching=cache.enable_prefix_caching,
        )
        self._chunk_budget = None if config.itl_target_ms is None else ChunkBudget(config.itl_target_ms / 1000)
        if speculation is None and config.speculative_config is not None:
            speculation = NgramSpeculation(config.speculative_config)
        if speculation is not None:
            self._counters.accepted_at = [0] * speculation.tokens_max
        self._scheduler = Scheduler(
            self._roster, self._counters, rope_switch=runner.shape.rope_switch, is_static=config.batching == "static",
            chunk_budget=self._chunk_budget, speculation=speculation,
        )
        self._committer = Committer(self._roster, self._counters, speculation)
        self._rank = POLICIES[config.scheduling_policy]
        self._arrivals = 0
        self._in_flight: _Launched | None = None
        self._outputs: list[SequenceOutput] = []   # of sequences that ended between two turns
        self._failures = 0
        self._calm_steps = 0
        self._timing = (0.0,) * 5
        self._landed_s = 0.0
        self._forecast = LandingForecast()
        self.is_stalled = False   # the newest step could do nothing: work waits for buckets still being compiled

    @property
    def has_work(self) -> bool:
        """Whether another `step` can give anything."""
        return self._in_flight is not None or bool(self._roster.live) or bool(self._outputs)

    @property
    def stats(self) -> EngineStats:
        return snapshot(self._counters, self._roster, self._runner.stats)

    @property
    def hold_s(self) -> float:
        """Seconds by which the next `step` is better put off, for those who may come; 0 once it is due."""
        flying = self._in_flight
        if flying is None or not flying.has_prompts or flying.pending.has_landed or not self._has_room():
            return 0.0
        begin_s = max(flying.launched_s, self._landed_s)
        return max(0.0, begin_s + self._forecast.launch_by(tokens=flying.plan.token_count) - perf_counter())

    @property
    def last_timing(self) -> StepTiming:
        """Where the newest turn's host time went."""
        start, planned, launched, landed, done = self._timing
        return StepTiming(planned - start, launched - planned, landed - launched, done - landed)

    def add(self, request: EngineRequest) -> None:
        """Queues a sequence. Raises RequestError where it can never run, EngineBusyError where the queue is full."""
        if request.request_id in self._roster.live:
            raise RequestError(f"A request with id {request.request_id!r} is running already; ids must be distinct.")
        queue_max, roster = self._config.max_num_queued_reqs, self._roster
        if queue_max is not None and len(roster.waiting) >= queue_max + roster.free_row_count:
            raise EngineBusyError(
                f"{len(roster.waiting)} requests are waiting already, at most {queue_max} may "
                "(--max-num-queued-reqs): try again later."
            )
        check_request(request, shape=self._shape, kv=roster.kv, config=self._config)
        roster.enter(
            Sequence(
                request,
                rank=self._rank(request, self._arrivals),
                length_max=self._shape.length_max,
                group_count=len(self._shape.groups),
                may_split=self._config.enable_chunked_prefill,
            )
        )
        self._arrivals += 1

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends these sequences; their pages are free after the next `step`, which gives their last output."""
        for request_id in request_ids:
            sequence = self._roster.live.get(request_id)
            if sequence is not None:
                self._roster.end(sequence)
                self._outputs.append(ended_output(sequence, "abort", None, self._clock.now()))

    def step(self) -> list[SequenceOutput]:
        """One turn: plans and launches the next step, then commits the one that was in flight."""
        outputs, self._outputs = self._outputs, []
        start = perf_counter()
        planned_at = launched_at = landed_at = start
        touched: list[Sequence] = []
        try:
            planned = self._scheduler.plan(self._runner.limits(), self._clock.now())    # a draft model computes here
            planned_at = launched_at = landed_at = perf_counter()
            touched = planned[1] if planned else []
            launched = None if planned is None else _Launched(*planned, self._runner.launch(planned[0]), planned_at)
            launched_at = perf_counter()
            if self._config.async_scheduling:
                landing, self._in_flight = self._in_flight, launched
            else:
                landing = launched
            landed_at = perf_counter()
            if landing is not None:
                touched = landing.sequences
                result = landing.pending.result()
                landed_at = perf_counter()
                self._observe(landing, landed_at)
                outputs += self._committer.commit(landing.plan, landing.sequences, result, self._clock.now())
                self._note_calm()
            self._clear_tainted()
        except StepAllocationError as error:
            outputs += self._recover(touched, error)
        self.is_stalled = not touched and bool(self._roster.live)
        self._timing = (start, planned_at, launched_at, landed_at, perf_counter())
        return outputs

    def _has_room(self) -> bool:
        """Whether those who are here leave some of the next step to a newcomer."""
        roster, room = self._roster, self._runner.limits().tokens_max
        if not roster.free_row_count:
            return False
        for sequence in itertools.chain(roster.running, roster.waiting):
            room -= max(1, (sequence.prefill_end or sequence.known) - sequence.planned)
            if room <= 0:
                return False
        return True

    def flush_prefix_cache(self) -> None:
        """Forgets cached content; running sequences keep their pages."""
        self._roster.cache.flush()

    def close(self) -> None:
        """Drops all work and closes the runner."""
        self._in_flight = None
        self._roster.restart()
        self._roster.live.clear()
        self._roster.waiting.clear()
        self._runner.close()

    def check(self) -> None:
        """Asserts the invariants of everything the loop holds; for tests and debugging."""
        self._roster.check()
        if not self._roster.live and self._in_flight is None:
            assert self._roster.kv.used_count == 0 and not self._roster.leaving, "an idle engine holds pages"

    def _clear_tainted(self) -> None:
        for group, pool in enumerate(self._roster.kv.pools):
            if pool.has_uncleared:
                self._runner.clear_pages(group, np.array(pool.uncleared(), np.int32))
                pool.cleared()

    def _observe(self, landed: _Launched, landed_s: float) -> None:
        """A step took from its launch, or from the landing of the one before it, to its own landing."""
        plan, begin_s = landed.plan, max(landed.launched_s, self._landed_s)
        self._landed_s = landed_s
        if landed.has_prompts:
            host_s = self.last_timing.plan_s + self.last_timing.dispatch_s
            self._forecast.observe(tokens=plan.token_count, seconds=landed_s - begin_s, host_s=host_s)
        tokens = plan.token_count - plan.decode_count
        if plan.draft_A is not None:
            tokens -= int(plan.draft_A.sum()) + int((plan.draft_A > 0).sum())
        if self._chunk_budget is not None and plan.decode_count and tokens:
            self._chunk_budget.observe(tokens=tokens, seconds=landed_s - begin_s)

    def _note_calm(self) -> None:
        if self._failures:
            self._calm_steps += 1
            if self._calm_steps >= CALM_STEPS_MIN:
                self._failures = 0

    def _recover(self, touched: list[Sequence], error: StepAllocationError) -> list[SequenceOutput]:
        """A step ran out of device memory: new pages, everybody is recomputed, and for a while one at a time."""
        self._in_flight = None
        self._failures += 1
        self._calm_steps = 0
        self._counters.allocation_failures += 1
        logger.error("a step ran out of device memory (%s); recomputing %d sequences", error, len(self._roster.live))
        self._runner.rebuild()
        self._roster.restart()
        self._scheduler.go_solo(self._failures)
        alone = touched[0] if len(touched) == 1 and not touched[0].has_ended else None
        if alone is None:
            return []
        alone.failure_count += 1
        if alone.failure_count < FAILURES_ALONE_MAX:
            return []
        self._roster.end(alone)
        message = (
            f"The device ran out of memory {alone.failure_count} times computing this request alone "
            f"({alone.known} tokens): lower --gpu-memory-utilization or --max-num-batched-tokens."
        )
        return [ended_output(alone, "error", message, self._clock.now())]
