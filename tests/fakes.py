"""Stand-ins at the engine's seams, shipped for all tests: a runner without a device, a clock that stands still.

`FakeRunner` keeps simulated pages and page tables. Each computed position stores a value that mixes its token, its
position and *everything its layers may look at, as read through the page table* — so a wrong, lost, stale or wrongly
shared page, a missing admission or a stale fed-back token changes every later token. `alone` computes what a request
must give from its tokens only. Work happens when `result()` is called, in launch order, as on a device.
A slot with a non-finite value poisons whoever reads any slot of its page, masked or not (0 * NaN is NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.core.errors import StepAllocationError
from jaxserve.core.plan import (
    I32,
    KvGroupShape,
    LogprobArrays,
    RowAdmission,
    RunnerShape,
    RunnerStats,
    StepLimits,
    StepPlan,
    StepResult,
)
from jaxserve.core.request import EngineRequest

_MASK = 2**64 - 1
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, size=1 << 15, dtype=np.uint64) | np.uint64(1)


class FakeClock:
    """Time moves only when told to."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def now(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


def make_shape(
    *,
    pages: int | Sequence[int] = 64,
    windows: Sequence[int | None] = (None,),
    page_size: int = 4,
    rows: int = 8,
    length_max: int = 128,
    slots: int = 2,
    vocab_size: int = 101,
    alternatives_max: int = 8,
    rope_switch: int | None = None,
) -> RunnerShape:
    """A small device; `pages` is for each group or for all alike."""
    counts = [pages] * len(windows) if isinstance(pages, int) else pages
    return RunnerShape(
        row_count=rows,
        page_size=page_size,
        groups=tuple(KvGroupShape(page_count=n, window=w) for n, w in zip(counts, windows, strict=True)),
        length_max=length_max,
        slot_count=slots,
        vocab_size=vocab_size,
        alternatives_max=alternatives_max,
        rope_switch=rope_switch,
    )


def mix(*numbers: int) -> int:
    """A well-spread 64-bit hash of small integers (splitmix64 rounds)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 29) * 0x94D049BB133111EB & _MASK
        state ^= state >> 32
    return state


def choose(value: int, seed: int, choice: int, vocab_size: int, banned: Sequence[int] = ()) -> int:
    """The token sampled after a position of this value."""
    token = mix(value, seed, choice) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def score(value: int, token: int) -> float:
    """A made-up logprob of `token` after a position of this value, exact in float32."""
    return -(mix(value, token) % 1000) / 8


class History:
    """Values of one sequence's positions by KV group, extended token by token."""

    def __init__(self, windows: Sequence[int | None], length: int) -> None:
        self._windows = windows
        self.values = [np.zeros(length, np.uint64) for _ in windows]

    def first(self, group: int, position: int) -> int:
        """The first position that `position` looks at."""
        window = self._windows[group]
        return 0 if window is None else max(0, position - window + 1)

    def extend(self, position: int, token: int) -> int:
        context = 0
        for group, values in enumerate(self.values):
            first = self.first(group, position)
            context += int((values[first:position] * _WEIGHTS[first:position]).sum(dtype=np.uint64))
        value = mix(token, position, context)
        for values in self.values:
            values[position] = value
        return value


@dataclass(frozen=True, slots=True)
class Alone:
    """What a request gives when nothing else runs."""

    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | None
    prompt_scores: tuple[float, ...]


def alone(request: EngineRequest, shape: RunnerShape) -> Alone:
    """The specification: tokens and end of a request, from its own fields only."""
    params, prompt = request.params, request.prompt_token_ids
    history = History([group.window for group in shape.groups], shape.length_max)
    values = [history.extend(position, token) for position, token in enumerate(prompt)]
    scores = tuple(score(values[p], prompt[p + 1]) for p in range(len(prompt) - 1))
    eos = () if params.ignore_eos else request.eos_token_ids
    value, out = values[-1], []
    while True:
        banned = sorted({*eos, *params.stop_token_ids}) if len(out) < params.min_tokens else ()
        token = choose(value, request.seed, request.choice, shape.vocab_size, banned)
        out.append(token)
        if token in eos and len(out) >= params.min_tokens:
            return Alone(tuple(out), "stop", None, scores)
        if token in params.stop_token_ids and len(out) >= params.min_tokens:
            return Alone(tuple(out), "stop", token, scores)
        if len(prompt) + len(out) >= shape.length_max or len(out) == params.max_tokens:
            return Alone(tuple(out), "length", None, scores)
        value = history.extend(len(prompt) + len(out) - 1, token)


@dataclass(slots=True)
class _Row:
    admission: RowAdmission
    last_token: int = -1


@dataclass(slots=True)
class _Step:
    plan: StepPlan
    result: StepResult | None = None


@dataclass(slots=True)
class FakePending:
    """A step in flight; its outcome does not exist before `result`."""

    runner: FakeRunner
    step: _Step

    @property
    def has_landed(self) -> bool:
        return self.runner.has_landed

    def result(self) -> StepResult:
        return self.runner.finish(self.step)


@dataclass
class FakeRunner:
    """A RunnerPort over simulated pages.

    Attributes:
      limits_now: what `limits` answers; tests let it grow.
      fail_launch, fail_result: plans whose launch or result runs out of memory.
      corrupts: whether a sequence (its admission) turns non-finite at a position; only sampled positions make sense.
      plans: every plan launched, in order.  rebuild_count, cleared: calls of those methods.
      has_landed: what steps in flight answer.
    """

    shape: RunnerShape = field(default_factory=make_shape)
    limits_now: StepLimits = field(default_factory=lambda: StepLimits(tokens_max=64, samples_max=8))
    fail_launch: Callable[[StepPlan], bool] = lambda plan: False
    fail_result: Callable[[StepPlan], bool] = lambda plan: False
    corrupts: Callable[[RowAdmission, int], bool] = lambda admission, position: False
    plans: list[StepPlan] = field(default_factory=list)
    cleared: list[tuple[int, int]] = field(default_factory=list)
    rebuild_count: int = 0
    is_closed: bool = False
    has_landed: bool = False
    stats: RunnerStats = field(default_factory=RunnerStats)

    def __post_init__(self) -> None:
        self._make_state()

    def limits(self) -> StepLimits:
        return self.limits_now

    def launch(self, plan: StepPlan) -> FakePending:
        assert not self._is_broken, "launch after an allocation failure needs rebuild first"
        plan.check()
        assert not self.plans or plan.step > self.plans[-1].step
        limits = self.limits_now
        assert plan.row_A.size and plan.token_count <= limits.tokens_max and plan.sample_count <= limits.samples_max
        assert (plan.row_A < self.shape.row_count).all() and (plan.token_T < self.shape.vocab_size).all()
        assert (plan.start_A + plan.count_A <= self.shape.length_max).all()
        assert len(plan.page_updates) in (0, len(self.shape.groups))
        self.plans.append(plan)
        if self.fail_launch(plan):
            self._is_broken = True
            raise StepAllocationError("scripted: out of memory at launch")
        step = _Step(plan)
        self._queue.append(lambda: self._execute(step))
        return FakePending(self, step)

    def clear_pages(self, group: int, pages: I32) -> None:
        self.cleared += [(group, page) for page in pages.tolist()]

        def clear() -> None:
            self._value_gPS[group][pages] = 0
            self._is_nan_gPS[group][pages] = False

        self._queue.append(clear)

    def rebuild(self) -> None:
        self.rebuild_count += 1
        self._make_state()

    def close(self) -> None:
        self.is_closed = True

    def finish(self, step: _Step) -> StepResult:
        """Runs what was launched up to `step`, in order."""
        assert not self._is_broken
        if self.fail_result(step.plan):
            self._is_broken = True
            raise StepAllocationError("scripted: out of memory in a step")
        while step.result is None:
            self._queue.pop(0)()
        return step.result

    def _make_state(self) -> None:
        shape = self.shape
        self._is_broken = False
        self._queue: list[Callable[[], None]] = []
        self._rows: dict[int, _Row] = {}
        self._slot_owner: dict[int, RowAdmission] = {}
        self._value_gPS = [np.zeros((g.page_count, shape.page_size), np.uint64) for g in shape.groups]
        self._is_nan_gPS = [np.zeros((g.page_count, shape.page_size), np.bool_) for g in shape.groups]
        width = -(-shape.length_max // shape.page_size)
        self._page_gRM = [np.full((shape.row_count, width), -1, np.int32) for _ in shape.groups]

    def _admit(self, admission: RowAdmission) -> None:
        assert (admission.slot >= 0) == admission.params.needs_shaping
        self._rows[admission.row] = _Row(admission)
        if admission.slot >= 0:
            assert admission.slot < self.shape.slot_count
            self._slot_owner[admission.slot] = admission
        for page_RM, pages in zip(self._page_gRM, admission.pages, strict=True):
            page_RM[admission.row] = -1
            page_RM[admission.row, : pages.shape[0]] = pages

    def _execute(self, step: _Step) -> None:
        plan = step.plan
        for admission in plan.admissions:
            self._admit(admission)
        for page_RM, updates in zip(self._page_gRM, plan.page_updates, strict=True):
            assert (page_RM[updates.row_U, updates.index_U] == -1).all(), "an update replaces a page"
            assert (updates.page_U >= 0).all() and np.isin(updates.row_U, plan.row_A).all()
            page_RM[updates.row_U, updates.index_U] = updates.page_U
        self._check_writes(plan)
        entries = plan.row_A.shape[0]
        token_A, is_finite_A = np.full(entries, -1, np.int32), np.ones(entries, np.bool_)
        sampled_N = _Logprobs(plan.sample_count, self.shape)
        token_N: list[int] = []
        sampled, scored = _Logprobs(entries, self.shape), _Logprobs(plan.token_count, self.shape)
        offset = 0
        for entry in range(entries):
            row = self._rows[int(plan.row_A[entry])]
            start, count = int(plan.start_A[entry]), int(plan.count_A[entry])
            tokens = plan.token_T[offset : offset + count].tolist()
            if plan.from_row_A[entry]:
                assert tokens == [0] and row.last_token >= 0, "no sample of this row is on the device"
                tokens = [row.last_token]
            values, is_finite = self._compute(row, start, tokens)
            if plan.scores_A[entry]:
                for index, value in enumerate(values, offset):
                    scored.put(index, value, int(plan.score_target_T[index]), row.admission.params.prompt_logprobs)
            if plan.samples_A[entry]:
                drafted = 0 if plan.draft_A is None else int(plan.draft_A[entry])
                for back in range(drafted, -1, -1):
                    value = values[count - 1 - back]
                    row.last_token = self._sample(row, start + count - back, value)
                    sampled_N.put(len(token_N), value, row.last_token, row.admission.params.logprobs)
                    token_N.append(row.last_token)
                token_A[entry] = token_N[-1 - drafted]
                if drafted:
                    row.last_token = -1     # nobody may feed it back: who knows which sample holds
                is_finite_A[entry] = is_finite
                sampled.put(entry, values[-1], int(token_A[entry]), row.admission.params.logprobs)
            offset += count
        step.result = StepResult(
            step=plan.step, token_A=token_A, is_finite_A=is_finite_A,
            logprobs=(sampled if plan.draft_A is None else sampled_N).arrays(), scores=scored.arrays(),
            token_N=None if plan.draft_A is None else np.array(token_N, np.int32),
        )

    def _compute(self, row: _Row, start: int, tokens: list[int]) -> tuple[list[int], bool]:
        """Reads the row's history through its page tables, writes the new positions; their values."""
        shape, end = self.shape, start + len(tokens)
        history = History([group.window for group in shape.groups], end)
        for group in range(len(shape.groups)):
            position = np.arange(history.first(group, start), start)
            history.values[group][position] = self._value_gPS[group][self._places(row, group, position)]
        values, bad = [], []
        for position, token in enumerate(tokens, start):
            values.append(history.extend(position, token))
            bad.append(self.corrupts(row.admission, position))
        is_finite = True
        for group in range(len(shape.groups)):
            place = self._places(row, group, np.arange(start, end))
            self._value_gPS[group][place] = values
            self._is_nan_gPS[group][place] = bad
            pages, _ = self._places(row, group, np.arange(history.first(group, start), end))
            is_finite &= not self._is_nan_gPS[group][pages].any()
        return values, is_finite

    def _places(self, row: _Row, group: int, position: I32) -> tuple[I32, I32]:
        size = self.shape.page_size
        pages = self._page_gRM[group][row.admission.row, position // size]
        assert (pages >= 0).all(), "a position has no page"
        return pages, position % size

    def _sample(self, row: _Row, length: int, value: int) -> int:
        admission = row.admission
        if admission.slot >= 0:
            assert self._slot_owner[admission.slot] is admission, "the shaping slot belongs to another row"
        is_short = length - admission.prompt_length < admission.params.min_tokens
        banned = admission.stop_token_ids if is_short else ()
        return choose(value, admission.seed, admission.choice, self.shape.vocab_size, banned)

    def _check_writes(self, plan: StepPlan) -> None:
        """No two entries of a step write into the same page."""
        size = self.shape.page_size
        for page_RM in self._page_gRM:
            written: set[int] = set()
            for row, start, count in zip(plan.row_A, plan.start_A, plan.count_A, strict=True):
                pages = set(page_RM[row, start // size : (start + count - 1) // size + 1].tolist())
                assert -1 not in pages and not pages & written, "two rows write into one page, or into none"
                written |= pages


class _Logprobs:
    """Collects LogprobArrays; None when nobody asked."""

    def __init__(self, count: int, shape: RunnerShape) -> None:
        self._shape, self._is_wanted = shape, False
        self._logprob = np.zeros(count, np.float32)
        self._rank = np.zeros(count, np.int32)
        self._top_id = np.zeros((count, shape.alternatives_max), np.int32)
        self._top = np.zeros((count, shape.alternatives_max), np.float32)

    def put(self, index: int, value: int, token: int, wanted: int | None) -> None:
        if wanted is None or token < 0:
            return
        self._is_wanted = True
        self._logprob[index] = score(value, token)
        self._rank[index] = 1 + mix(value) % 5
        ids = (token + np.arange(self._shape.alternatives_max)) % self._shape.vocab_size
        self._top_id[index] = ids
        self._top[index] = [score(value, int(other)) for other in ids]

    def arrays(self) -> LogprobArrays | None:
        if not self._is_wanted:
            return None
        return LogprobArrays(
            logprob_A=self._logprob, rank_A=self._rank, top_id_AX=self._top_id, top_logprob_AX=self._top
        )
