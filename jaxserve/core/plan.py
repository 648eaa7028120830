"""The one meeting place of the two planes: `StepPlan` goes down to the runner, `StepResult` comes up.

Plain numpy with real counts: no padding, no bucket, no text, no device. Rows, pages and slots are numbers that the
control plane owns; the data plane only obeys.
Invariants, which `StepPlan.check` verifies and tests call on every plan:
- an entry is one sequence, and no row appears twice in a step;
- entries [0, decode_count) compute exactly one token each; the rest are drafts to verify and prefill chunks;
- `from_row_A` is set only where the token is the row's newest sample, still on the device;
- every page that a position of this step falls into is in the row's page table once admissions and updates are
  applied, in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxserve.core.sampling_params import SamplingParams

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAdmission:
    """A sequence takes a row (new, or resumed after preemption); applied before the step computes.

    Attributes:
      pages: for each KV group, the page ids held now, from page index 0 (prefix hits and first new pages).
      prompt_length: tokens of the prompt; later tokens are output (min_tokens, frequency and presence penalties).
      token_ids: everything known: prompt, then output so far; the runner reads it for penalties, bad words, and
        whether the sequence is past `RunnerShape.rope_switch`.
      slot: shaping slot, or -1 where `params.needs_shaping` is false.
      stop_token_ids: ids masked until min_tokens are out (eos included, unless ignored).
    """

    row: int
    params: SamplingParams
    seed: int
    choice: int
    prompt_length: int
    token_ids: I32
    pages: tuple[I32, ...]
    slot: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PageUpdates:
    """New page-table entries of one KV group: table[row_U, index_U] = page_U. At most one a planned token."""

    row_U: I32
    index_U: I32
    page_U: I32


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Everything one step computes, for each of A scheduled sequences.

    Attributes:
      step: number of the step, rising by one.
      row_A: device row.  start_A: position of the first token computed.  count_A: how many, >= 1.
      from_row_A: the (single) token is the row's last sample, on the device; its `token_T` is 0.
      samples_A: the chunk ends at the last known token, so the next one is sampled.
      scores_A: the chunk's prompt positions want logprobs of the token that follows each (prompt_logprobs);
        `score_target_T` holds that next token, -1 where there is none.
      token_T: the entries' tokens, packed in order; T = sum of count_A.
      decode_count: entries before this index are decodes.
      page_updates: one a KV group.
      draft_A: how many of the entry's last tokens are drafts: it samples after each of them, too. None: nobody drafts.
    """

    step: int
    row_A: I32
    start_A: I32
    count_A: I32
    from_row_A: Bool
    samples_A: Bool
    scores_A: Bool
    token_T: I32
    score_target_T: I32
    decode_count: int
    admissions: tuple[RowAdmission, ...] = ()
    page_updates: tuple[PageUpdates, ...] = ()
    draft_A: I32 | None = None

    @property
    def token_count(self) -> int:
        return int(self.token_T.shape[0])

    @property
    def is_all_decodes(self) -> bool:
        """Every entry is a decode: one token each, and nothing that is attended to as a prompt is."""
        return 0 < self.decode_count == self.row_A.shape[0]

    @property
    def sample_count(self) -> int:
        drafted = 0 if self.draft_A is None else int(self.draft_A.sum())
        return int(self.samples_A.sum()) + drafted

    @property
    def sample_counts(self) -> I32:
        """How many tokens each entry samples."""
        samples_A = self.samples_A.astype(np.int32)
        return samples_A if self.draft_A is None else samples_A + self.draft_A

    def check(self) -> None:
        """Asserts the invariants that need no state."""
        entries = self.row_A.shape[0]
        for name in ("start_A", "count_A", "from_row_A", "samples_A", "scores_A"):
            assert getattr(self, name).shape == (entries,), name
        assert (self.count_A >= 1).all(), "an entry computes at least one token"
        assert int(self.count_A.sum()) == self.token_count == self.score_target_T.shape[0]
        assert np.unique(self.row_A).shape[0] == entries, "a row appears twice"
        assert 0 <= self.decode_count <= entries and (self.count_A[: self.decode_count] == 1).all()
        assert (self.count_A[self.from_row_A] == 1).all(), "a fed-back token stands alone"
        assert (self.start_A >= 0).all()
        if self.draft_A is not None:
            assert self.draft_A.shape == (entries,) and (self.draft_A >= 0).all()
            assert (self.count_A > self.draft_A).all() and self.samples_A[self.draft_A > 0].all()
        for updates in self.page_updates:
            assert updates.row_U.shape == updates.index_U.shape == updates.page_U.shape
            assert updates.row_U.shape[0] <= self.token_count


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftPlan:
    """What a draft model is asked for: `count_N` tokens after `token_N`, the last known one, at position `start_N`.

    `pages` are the new pages of its rows; the step that verifies the draft brings them again.
    """

    row_N: I32
    start_N: I32
    token_N: I32
    count_N: I32
    pages: PageUpdates


class DraftPort(Protocol):
    """Who drafts on the device."""

    def draft(self, plan: DraftPlan) -> I32:
        """Tokens [N, most tokens of a draft], zeros past an entry's count. Waits. Raises StepAllocationError."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobArrays:
    """Logprobs of n tokens with up to X alternatives, sorted, most likely first."""

    logprob_A: F32
    rank_A: I32
    top_id_AX: I32
    top_logprob_AX: F32


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step gave, in the plan's entry order, real counts only.

    Attributes:
      token_A: the sampled token, of several the first; -1 where the entry does not sample.
      is_finite_A: False where the entry's logits held NaN or infinity of the wrong sign: its token is meaningless
        (True where it does not sample).
      logprobs: per entry (zeros where it does not sample), None where no row of the step wants logprobs.
      token_N: where somebody drafts, all sampled tokens in entry order (`sample_counts`), and `logprobs` are of them.
      scores: per packed token, for the chunks with scores_A (zeros elsewhere), None where there is none.
    """

    step: int
    token_A: I32
    is_finite_A: Bool
    logprobs: LogprobArrays | None = None
    scores: LogprobArrays | None = None
    token_N: I32 | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KvGroupShape:
    """Pages of one KV group as the control plane sees them: layers of equal geometry and window.

    `window` is None for full attention, else the number of newest positions that the layers look at.
    """

    page_count: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerShape:
    """The fixed sizes of the device state."""

    row_count: int                    # R
    page_size: int                    # S
    groups: tuple[KvGroupShape, ...]
    length_max: int                   # max_model_len: positions a sequence may reach
    slot_count: int                   # Y, shaping slots
    vocab_size: int                   # V, width of the logits
    alternatives_max: int             # X: most alternatives a logprob can carry
    rope_switch: int | None = None    # a sequence that grows past this length must be admitted anew


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What a step may hold now: grows while buckets are still being compiled."""

    tokens_max: int
    samples_max: int


class PendingStep(Protocol):
    """A step in flight."""

    @property
    def has_landed(self) -> bool:
        """Whether `result` would not wait. Never raises: a failed step has landed, too."""
        ...

    def result(self) -> StepResult:
        """Waits for the step. Raises StepAllocationError, or EngineError for a fault that ends the engine."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerStats:
    """Counters of the data plane."""

    compiled_count: int = 0
    compiled_after_ready_count: int = 0


class RunnerPort(Protocol):
    """The data plane as the control plane sees it; `tests/fakes.py` has one without a device."""

    @property
    def shape(self) -> RunnerShape: ...

    @property
    def stats(self) -> RunnerStats: ...

    def limits(self) -> StepLimits:
        """Never shrinks; equals the configured maxima once all buckets are compiled."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Dispatches a step and returns at once. Steps run in launch order. Raises StepAllocationError."""
        ...

    def clear_pages(self, group: int, pages: I32) -> None:
        """Zeroes pages that may hold non-finite values, before their next use."""
        ...

    def rebuild(self) -> None:
        """New, zeroed pages and row state after a failed step; every sequence must be admitted again."""
        ...

    def close(self) -> None: ...
