"""Which sequences the next step computes, and how many tokens of each. Mutable.

Every step mixes, in this order: decodes of running sequences, chunks of running prefills, then waiting sequences,
each best rank first, under the step's budgets of tokens and sampling rows and the pages there are. When pages run
out for a running sequence, the one of worst rank is preempted: it waits again and is recomputed, mostly from its own
cached pages. Nobody is preempted for a newcomer. Under static batching those who wait when nothing runs are a batch, as
many as there are rows, and nobody else is admitted until all of it have ended.
It knows no device and no result: `Committer` takes those.
Invariants: the plan made while a step is in flight assumes nothing of its tokens; a waiting sequence that lacks
pages or tokens holds back all behind it, so under fcfs nobody is overtaken for ever.
"""

from __future__ import annotations

import sys
from enum import Enum, auto

from jaxserve.core.plan import StepLimits, StepPlan
from jaxserve.engine.chunk_budget import ChunkBudget
from jaxserve.engine.draft import Draft
from jaxserve.engine.roster import Roster
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.speculation import ModelSpeculation, Speculation
from jaxserve.engine.stats import Counters

SKIPS_MAX = 64   # waiting sequences passed over in one plan (they wait for a prefix or a slot); bounds its cost
SOLO_STEPS_MAX = 4096


class _Verdict(Enum):
    """What became of a waiting sequence in this plan."""

    ADMITTED = auto()
    PASSED_OVER = auto()   # waits for something that its followers do not need
    BLOCKS = auto()        # waits for what its followers would take away


class Scheduler:
    """Makes plans over the roster's sequences."""

    def __init__(
        self, roster: Roster, counters: Counters, *, rope_switch: int | None = None, is_static: bool = False,
        chunk_budget: ChunkBudget | None = None, speculation: Speculation | None = None,
    ) -> None:
        self._roster = roster
        self._chunk_budget = chunk_budget
        self._speculation = speculation
        self._sitting_out: set[Sequence] = set()    # in this plan: they draft once their last token is known
        self._is_static = is_static
        self._batch: frozenset[Sequence] = frozenset()   # under static batching, who may be admitted
        self._rope_switch = rope_switch or sys.maxsize
        self._counters = counters
        self._kv = roster.kv
        self._step = 0
        self._solo_steps = 0

    def plan(self, limits: StepLimits, now_s: float) -> tuple[StepPlan, list[Sequence]] | None:
        """The next step and its sequences in entry order; None where nothing can run now."""
        roster = self._roster
        if not roster.running and not roster.waiting:
            return None
        if self._speculation is not None and self._awaits_tokens(self._speculation):
            return None
        draft = Draft(limits, entries_max=1 if self._solo_steps else limits.tokens_max)
        prefills = self._choose_decodes(draft)
        if self._speculation is not None and not self._solo_steps:
            self._choose_drafts(draft, self._speculation)
        if (draft.decodes or draft.drafts) and self._chunk_budget is not None:
            draft.tokens = min(draft.tokens, self._chunk_budget.tokens)
        self._choose_chunks(draft, prefills)
        if roster.waiting and not draft.is_short:
            self._admit(draft, prefills, now_s)
        if not draft.decodes and not draft.drafts and not draft.chunks:
            return None
        self._solo_steps = max(0, self._solo_steps - 1)
        self._step += 1
        return draft.finish(self._step)

    def go_solo(self, failure_count: int) -> None:
        """After the n-th allocation failure in a row the next 4^n steps compute one sequence each."""
        self._solo_steps = min(4**failure_count, SOLO_STEPS_MAX)

    def _awaits_tokens(self, speculation: Speculation) -> bool:
        """Finds who sits out this plan; whether they are so many that everybody better waits for the landing."""
        decoding = [s for s in self._roster.running if s.planned >= s.prefill_end and s.in_flight]
        self._sitting_out = {
            s for s in decoding
            if s.drafted or (not s.is_ending and not s.params.needs_shaping and speculation.propose(s).shape[0])
        }
        return bool(self._sitting_out) and 2 * len(self._sitting_out) >= len(decoding)

    def _choose_drafts(self, draft: Draft, speculation: Speculation) -> None:
        """Gives decodes tokens to verify, from what the decodes leave of the budgets and pages nobody misses."""
        drafts = {}
        for sequence in draft.decodes:
            if sequence.in_flight or sequence.params.needs_shaping:
                continue
            spare = min(pool.available_count for pool in self._kv.pools) - len(self._roster.running)
            end = min(sequence.capacity + max(0, spare) * self._kv.page_size, sequence.stop.length_max - 1)
            if not sequence.is_long:
                end = min(end, self._rope_switch)
            room = min(draft.tokens, draft.samples, end - sequence.planned - 1)
            tokens = speculation.propose(sequence)[: max(0, room)]
            count = tokens.shape[0]
            if count:
                self._grow(sequence, 1 + count, draft)
                draft.tokens -= count
                draft.samples -= count
                drafts[sequence] = tokens
        if isinstance(speculation, ModelSpeculation):
            drafts = speculation.write(drafts, draft.page_updates(drafts)[0])
        draft.add_drafts(drafts)

    def _choose_decodes(self, draft: Draft) -> list[Sequence]:
        """Adds decodes; returns the running sequences that are still in prefill."""
        prefills, outgrown = [], []
        chosen = draft.decodes
        for sequence in self._roster.running:   # preemption only shortens the list at its end
            planned = sequence.planned
            if planned < sequence.prefill_end:
                prefills.append(sequence)
                continue
            if sequence in self._sitting_out:
                continue
            if draft.tokens == 0 or draft.samples == 0 or draft.entries == 0 or sequence.is_ending:
                continue
            if planned >= self._rope_switch and not sequence.is_long:
                outgrown.append(sequence)
                continue
            if planned >= sequence.capacity:
                if not self._make_room(sequence, draft):
                    continue
                self._grow(sequence, 1, draft)
            chosen.append(sequence)
            draft.tokens -= 1
            draft.samples -= 1
            draft.entries -= 1
        for sequence in outgrown:
            # Its next key turns another way, and so must all before it: it is computed anew, once nothing is in flight.
            if sequence.row >= 0 and not sequence.in_flight:
                self._roster.unseat(sequence)
        return prefills

    def _choose_chunks(self, draft: Draft, prefills: list[Sequence]) -> None:
        for sequence in prefills:
            if draft.is_full:
                return
            if sequence.row < 0:
                continue   # preempted a moment ago
            if sequence.planned >= sequence.capacity and not self._make_room(sequence, draft):
                continue
            count = self._chunk(sequence, draft)
            if count:
                self._grow(sequence, count, draft)
                draft.add_chunk(sequence, count)

    def _chunk(self, sequence: Sequence, draft: Draft) -> int:
        """How many tokens of a prefill this step can take."""
        rest = sequence.prefill_end - sequence.planned
        count = min(rest, draft.tokens, self._kv.reach(sequence) - sequence.planned)
        if count == rest and draft.samples == 0:
            count -= 1   # all but the token that samples
        return count if sequence.may_split or count == rest else 0

    def _grow(self, sequence: Sequence, count: int, draft: Draft) -> None:
        first = sequence.capacity // self._kv.page_size
        self._kv.grow(sequence, sequence.planned + count)
        if sequence.capacity // self._kv.page_size > first:
            draft.grown.setdefault(sequence, first)

    def _make_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Whether one more page can be had, if need be by preempting sequences of worse rank."""
        roster = self._roster
        while self._kv.reach(sequence) == sequence.capacity:
            victim = roster.running[-1]
            if roster.leaving or victim is sequence or (victim.is_ending and victim.in_flight):
                draft.is_short = True   # pages come back when the step in flight lands, or from better ranks
                return False
            draft.drop(victim)
            victim.preemption_count += 1
            self._counters.preemptions += 1
            roster.unseat(victim)
            draft.is_short = True
        return True

    def _admit(self, draft: Draft, prefills: list[Sequence], now_s: float) -> None:
        roster = self._roster
        if self._is_static and not roster.running:
            self._batch = frozenset(roster.waiting[: roster.free_row_count])
        reserved = [0] * len(self._kv.pools)
        for sequence in prefills:
            self._reserve(reserved, sequence)
        index = 0
        while index < min(len(roster.waiting), SKIPS_MAX) and not draft.is_full and roster.free_row_count:
            sequence = roster.waiting[index]
            verdict = self._try_admit(sequence, draft, reserved)
            if verdict is _Verdict.BLOCKS:
                return
            if verdict is _Verdict.PASSED_OVER:
                index += 1
                continue
            sequence.scheduled_s = sequence.scheduled_s or now_s
            self._reserve(reserved, sequence)

    def _reserve(self, reserved: list[int], sequence: Sequence) -> None:
        """Counts the pages that an admitted prefill still has to take."""
        for group, count in enumerate(self._kv.still_needed(sequence, sequence.prefill_end)):
            reserved[group] += max(0, count)

    def _try_admit(self, sequence: Sequence, draft: Draft, reserved: list[int]) -> _Verdict:
        roster, kv = self._roster, self._kv
        assert not sequence.in_flight, "a plan that preempts admits nobody, and the next one is made after the landing"
        if not roster.has_place(sequence) or (self._is_static and sequence not in self._batch):
            return _Verdict.PASSED_OVER
        if not sequence.may_split and sequence.known > draft.tokens_max:
            return _Verdict.PASSED_OVER   # until larger buckets are compiled
        if sequence.is_long != (is_long := sequence.known > self._rope_switch):
            sequence.is_long = is_long
            sequence.page_keys.clear()
        pages = roster.cache.find(sequence)
        if pages is None:
            return _Verdict.PASSED_OVER
        kv.adopt(sequence, pages)
        sequence.planned = sequence.computed = sequence.capacity
        sequence.prefill_end = sequence.known
        count = self._chunk(sequence, draft)
        # A page for each running sequence is left over, lest the newcomer be preempted in the very next step.
        margin = len(roster.running)
        needed = kv.still_needed(sequence, sequence.known)
        has_pages = kv.has_available(a + b + margin for a, b in zip(needed, reserved, strict=True))
        if not count or not has_pages:
            kv.release(sequence)
            sequence.rewind()
            return _Verdict.BLOCKS
        if sequence.cached_token_count < 0:
            sequence.cached_token_count = sequence.planned
            if roster.cache.is_enabled and not sequence.is_scoring:
                self._counters.prefix_queries += sequence.known
                self._counters.prefix_hits += sequence.planned
        roster.cache.admit(sequence, sequence.planned // kv.page_size)
        kv.grow(sequence, sequence.planned + count)
        roster.seat(sequence)
        draft.admitted.append(sequence)
        draft.add_chunk(sequence, count)
        return _Verdict.ADMITTED
