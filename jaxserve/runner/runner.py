"""The data plane behind `RunnerPort`: owns the device state, dispatches steps, hands results back in plan order.

Knows rows, pages and token ids; no text, no policy, no queue. `launch`, `clear_pages` and `rebuild` belong to one
thread (the engine's); buckets may go on being compiled in others meanwhile.
Invariant: the device state is donated from program to program in launch order, so of pages and rows one copy exists
and step n + 1 sees all of step n; results are buffers of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxserve.core.errors import EngineError, StepAllocationError
from jaxserve.core.plan import (
    I32,
    DraftPlan,
    LogprobArrays,
    RunnerShape,
    RunnerStats,
    StepLimits,
    StepPlan,
    StepResult,
)
from jaxserve.core.progress import ProgressPort
from jaxserve.layers.context import LayerKv
from jaxserve.runner import rows
from jaxserve.runner.buckets import Buckets, holder
from jaxserve.runner.build import ProgramBuilder
from jaxserve.runner.compile import CompileStats, Executable
from jaxserve.runner.draft_model import DraftModel
from jaxserve.runner.forward import ForwardResult
from jaxserve.runner.inputs import pack
from jaxserve.runner.kv_cache import page_index_max
from jaxserve.runner.programs import CLEAR_PAGES, ProgramSet
from jaxserve.runner.row_state import RowState
from jaxserve.runner.sample import head_params
from jaxserve.runner.sampling import Logprobs, Sampled
from jaxserve.runner.segments import Leaves, leaves_of
from jaxserve.runner.setup import RunnerSetup

logger = logging.getLogger("jaxserve.runner")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchTiming:
    """Host seconds of one launch."""

    check_s: float = 0.0
    admit_s: float = 0.0
    pack_s: float = 0.0
    dispatch_s: float = 0.0


@dataclass(slots=True)
class DeviceState:
    """What every step takes and gives back. Mutable: its buffers are donated, so only the newest are alive."""

    kv: tuple[LayerKv, ...]
    page_RM: tuple[Array, ...]
    rows: RowState


class Runner:
    """`RunnerPort` on jax devices. Mutable: device state, which rows want logprobs, compiled programs."""

    def __init__(self, setup: RunnerSetup, params: Any, draft_params: Any = None) -> None:
        self._setup = setup
        self._programs = ProgramSet(setup, params)
        self._leaves = leaves_of(params, self._programs.segments)
        self._head_leaves = tuple(jax.tree.leaves(head_params(params, setup.spec)))
        self._draft = None
        if setup.draft is not None:
            self._draft = DraftModel(setup, setup.draft.spec, draft_params, setup.draft.tokens_max)
        self._builder = ProgramBuilder(setup, self._programs, self._draft)
        self._wants_logprobs_R = np.zeros(setup.shape.row_count, bool)
        self._state: DeviceState | None = None
        self.last_launch = LaunchTiming()

    @classmethod
    def create(cls, *, setup: RunnerSetup, params: Any, draft_params: Any = None) -> Runner:
        """A runner with nothing compiled yet; parameters are the models', placed on the mesh of `setup`."""
        return cls(setup, params, draft_params)

    # Start-up.

    def compile_serving_set(self, progress: ProgressPort, meet: Callable[[], object] | None = None) -> None:
        """Blocks until the smallest set of programs that can serve any request has run once.

        Args:
          meet: several processes choose a step's bucket and program alike only where all have all; it waits for the
            others then.
        """
        self._builder.build_serving_set(progress)
        if meet is not None:
            self.compile_rest(progress)
            self.wait_ready()
            meet()
        self.rebuild()
        self._run_once()

    def compile_rest(self, progress: ProgressPort, on_ready: Callable[[], None] | None = None) -> None:
        """Compiles every other bucket in background threads; `on_ready` is called from one of them at the end."""
        self._builder.build_rest(progress, on_ready)

    @property
    def buckets(self) -> Buckets:
        """Every bucket, compiled or not yet."""
        return self._setup.buckets

    @property
    def temporary_bytes(self) -> int:
        """The most memory that any program so far takes while it runs, besides its arguments."""
        return self._builder.temporary_bytes

    @property
    def compile_stats(self) -> CompileStats:
        return self._builder.compiler.stats

    def executables(self) -> list[Executable]:
        """Every program so far."""
        return self._builder.executables()

    @property
    def is_ready(self) -> bool:
        return self._builder.is_ready

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Waits until every bucket is compiled; raises what compiling raised."""
        return self._builder.wait(timeout_s)

    # RunnerPort.

    @property
    def shape(self) -> RunnerShape:
        return self._setup.shape

    @property
    def stats(self) -> RunnerStats:
        stats = self._builder.compiler.stats
        return RunnerStats(
            compiled_count=int(stats.compiled_count + stats.loaded_count),
            compiled_after_ready_count=int(stats.after_seal_count),
        )

    def limits(self) -> StepLimits:
        programs = self._builder
        return StepLimits(
            tokens_max=programs.token_buckets[-1],
            samples_max=min(programs.row_buckets[-1], self._setup.samples_max or self.shape.row_count),
        )

    def launch(self, plan: StepPlan) -> PendingDeviceStep:
        start_s = perf_counter()
        self._check(plan)
        checked_s = perf_counter()
        with translated_errors():
            self._admit(plan)
            admitted_s = perf_counter()
            state, built = self._live(), self._builder
            tokens = holder(built.token_buckets, plan.token_count)
            wants_logprobs = bool(self._wants_logprobs_R[plan.row_A[plan.samples_A]].any())
            packed = pack(plan, self._programs.layout(tokens))
            packed_s = perf_counter()
            forward = self._forward(tokens, packed, plan)
            sampled = scored = None
            if plan.sample_count:
                bucket = holder(built.row_buckets, plan.sample_count)
                state.rows, sampled = built.sample[bucket](self._head_leaves, forward.sampling, state.rows)
                _start_copy(sampled if wants_logprobs else sampled[:2])
            if plan.scores_A.any():
                scored = self._score(tokens, forward, plan)
                _start_copy(scored)
        self.last_launch = LaunchTiming(
            check_s=checked_s - start_s, admit_s=admitted_s - checked_s, pack_s=packed_s - admitted_s,
            dispatch_s=perf_counter() - packed_s,
        )
        return PendingDeviceStep(plan, forward.sampling.row_B, sampled, scored, wants_logprobs)

    def clear_pages(self, group: int, pages: I32) -> None:
        page_count = self.shape.groups[group].page_count
        pages = np.asarray(pages, np.int32)
        _check_bounds("page", pages, page_count)
        for start in range(0, len(pages), CLEAR_PAGES):
            page_U = np.full(CLEAR_PAGES, page_count, np.int32)
            batch = pages[start : start + CLEAR_PAGES]
            page_U[: len(batch)] = batch
            with translated_errors():
                state = self._live()
                state.kv = self._builder.clear[group](state.kv, page_U)
                if self._draft is not None:
                    self._draft.clear_pages(page_U)

    def rebuild(self) -> None:
        self._state = None      # the pool must be gone before its successor is allocated: two do not fit
        self._wants_logprobs_R[:] = False
        with translated_errors():
            self._state = DeviceState(*self._builder.reset())
            if self._draft is not None:
                self._draft.reset()

    def draft(self, plan: DraftPlan) -> I32:
        """See `DraftPort`; for a setup with a draft model."""
        assert self._draft is not None
        _check_bounds("row", plan.row_N, self.shape.row_count)
        _check_bounds("position", plan.start_N + plan.count_N, self.shape.length_max)
        with translated_errors():
            return self._draft.draft(plan, self._live().page_RM, tuple(sorted(self._draft.write)))

    def close(self) -> None:
        """Stops compiling and lets go of the device's memory."""
        self._builder.close()
        self._state = None
        self._leaves, self._head_leaves = Leaves(), ()
        if self._draft is not None:
            self._draft.close()

    def _run_once(self) -> None:
        """A step of nothing but padding: a program that cannot run must fail the start, not the first request."""
        none_A, no_A = np.zeros(0, np.int32), np.zeros(0, bool)
        empty = StepPlan(
            step=0, row_A=none_A, start_A=none_A, count_A=none_A, from_row_A=no_A, samples_A=no_A, scores_A=no_A,
            token_T=none_A, score_target_T=none_A, decode_count=0,
        )
        tokens, count = self._builder.token_buckets[0], self._builder.row_buckets[0]
        with translated_errors():
            state, layout = self._live(), self._programs.layout(tokens)
            forward = self._forward(tokens, pack(empty, layout), empty)
            state.rows, sampled = self._builder.sample[count](self._head_leaves, forward.sampling, state.rows)
            jax.block_until_ready((sampled, self._score(tokens, forward, empty)))

    def _forward(self, tokens: int, packed: I32, plan: StepPlan) -> ForwardResult:
        state = self._live()
        if self._draft is not None:
            self._draft.follow_plan(
                plan, tokens, packed, state.page_RM, state.rows.last_token_R, state.rows.settings.is_long_R
            )
        built = self._builder
        without_prefill = built.decode_forward.get(tokens) if plan.is_all_decodes else None
        # A numpy argument is transferred by the call itself, in a third of the time that device_put takes.
        forward = (without_prefill or built.forward[tokens])(
            self._leaves, state.kv, state.page_RM, state.rows.last_token_R, state.rows.settings.is_long_R, packed
        )
        state.kv, state.page_RM = forward.kv, forward.page_RM
        return forward

    def _score(self, tokens: int, forward: ForwardResult, plan: StepPlan) -> Logprobs:
        target_T = np.full(tokens, -1, np.int32)
        target_T[: plan.token_count] = plan.score_target_T
        return self._builder.score[tokens](self._head_leaves, forward.hidden_TD, target_T)

    def _admit(self, plan: StepPlan) -> None:
        for start in range(0, len(plan.admissions), rows.ADMIT_ROWS):
            batch = plan.admissions[start : start + rows.ADMIT_ROWS]
            state = self._live()
            state.rows, state.page_RM = self._builder.admit(
                state.rows, state.page_RM, rows.pack(batch, self.shape)
            )
            for admission in batch:
                if admission.slot >= 0:
                    slot = rows.pack_slot(admission, self.shape)
                    state.rows = self._builder.admit_slot(state.rows, slot)
                self._wants_logprobs_R[admission.row] = admission.params.logprobs is not None

    def _live(self) -> DeviceState:
        self._builder.raise_failure()
        if self._state is None:
            raise EngineError("the runner has no device state: it was closed, or its last rebuild failed.")
        return self._state

    def _check(self, plan: StepPlan) -> None:
        """jax never faults on an index out of bounds, it clamps: a wrong plan must stop here."""
        shape, limits = self.shape, self.limits()
        _check_bounds("row", plan.row_A, shape.row_count)
        _check_bounds("position", plan.start_A + plan.count_A - 1, shape.length_max)
        _check_bounds("token", plan.token_T, shape.vocab_size)
        if not 0 < plan.token_count <= limits.tokens_max or plan.sample_count > limits.samples_max:
            raise ValueError(
                f"a step of {plan.token_count} tokens and {plan.sample_count} samples is beyond {limits}"
            )
        for group, updates in zip(shape.groups, plan.page_updates, strict=False):
            _check_bounds("row", updates.row_U, shape.row_count)
            _check_bounds("page", updates.page_U, group.page_count)
            _check_bounds("page index", updates.index_U, page_index_max(shape))


class PendingDeviceStep:
    """A step in flight; `result` may be called once the next step has been launched, and more than once."""

    __slots__ = ("_forwarded", "_plan", "_sampled", "_scored", "_wants_logprobs")

    def __init__(
        self, plan: StepPlan, forwarded: Array, sampled: Sampled | None, scored: Logprobs | None,
        wants_logprobs: bool,
    ) -> None:
        self._plan, self._forwarded, self._sampled, self._scored = plan, forwarded, sampled, scored
        self._wants_logprobs = wants_logprobs

    @property
    def has_landed(self) -> bool:
        return (self._forwarded if self._sampled is None else self._sampled.token_B).is_ready()

    def result(self) -> StepResult:
        plan, sampled = self._plan, self._sampled
        token_N = None
        token_A = np.full(plan.row_A.shape[0], -1, np.int32)
        is_finite_A = np.ones(plan.row_A.shape[0], bool)
        logprobs = scores = None
        with translated_errors():
            if sampled is None:
                self._forwarded.block_until_ready()   # nothing to read, yet a failed step must say so
            else:
                count = plan.sample_count
                found_N, is_finite_N = np.asarray(sampled.token_B)[:count], np.asarray(sampled.is_finite_B)[:count]
                samples_N = plan.samples_A
                if plan.draft_A is not None:
                    of_A = plan.sample_counts[plan.samples_A]
                    first_A = np.cumsum(of_A) - of_A
                    token_N, samples_N = found_N, np.ones(count, bool)
                    found_N, is_finite_N = found_N[first_A], np.logical_and.reduceat(is_finite_N, first_A)
                token_A[plan.samples_A], is_finite_A[plan.samples_A] = found_N, is_finite_N
                if self._wants_logprobs:
                    logprobs = _spread(sampled.logprobs, samples_N, count)
            if self._scored is not None:
                is_scored_T = np.repeat(plan.scores_A, plan.count_A) & (plan.score_target_T >= 0)
                in_order = jax.tree.map(lambda x_ZB: np.asarray(x_ZB).reshape(-1, *x_ZB.shape[2:]), self._scored)
                scores = _spread(in_order, is_scored_T, plan.token_count, packed=True)
        return StepResult(
            step=plan.step, token_A=token_A, is_finite_A=is_finite_A, logprobs=logprobs, scores=scores,
            token_N=token_N,
        )


@contextmanager
def translated_errors() -> Iterator[None]:
    """XLA's errors as this package's: out of memory is survivable, anything else is not."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message or "Out of memory" in message:
            raise StepAllocationError(f"a step ran out of device memory: {message}") from error
        raise EngineError(f"the device failed: {message}") from error


def _start_copy(results: Any) -> None:
    for leaf in jax.tree.leaves(results):
        leaf.copy_to_host_async()


def _spread(found: Logprobs, where: NDArray[np.bool_], count: int, *, packed: bool = False) -> LogprobArrays:
    """Logprobs in the plan's order, zeros where `where` is false.

    Args:
      packed: `found` already lies in the plan's order; else it holds the true places only, in order.
    """
    spread = []
    for array in found:
        values = np.asarray(array)[:count]
        full = np.zeros((where.shape[0], *values.shape[1:]), values.dtype)
        full[where] = values[where] if packed else values
        spread.append(full)
    logprob, rank, top_id, top_logprob = spread
    return LogprobArrays(logprob_A=logprob, rank_A=rank, top_id_AX=top_id, top_logprob_AX=top_logprob)


def _check_bounds(name: str, values: NDArray[np.integer[Any]], bound: int) -> None:
    if values.size and not (values.min() >= 0 and values.max() < bound):
        raise ValueError(f"{name} {values.min()}..{values.max()} is out of [0, {bound})")
