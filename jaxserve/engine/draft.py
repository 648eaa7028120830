"""The plan of one step while it is being made, and its final form as arrays. Mutable until `finish`.

It knows what fits into a step (tokens, sampling rows) and how entries become a `StepPlan`; who is chosen is the
scheduler's. Invariant: budgets never go below zero; no sequence is in it twice.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from jaxserve.core.plan import I32, PageUpdates, RowAdmission, StepLimits, StepPlan
from jaxserve.engine.sequence import Sequence

_NONE: I32 = np.zeros(0, np.int32)


class Draft:
    """Entries chosen so far and what is left of the step's budgets.

    Attributes:
      decodes: sequences that compute one token.  drafts: the ones with tokens to verify behind it.
      chunks: (sequence, tokens) of prefills.
      grown: table index of the first new page of sequences that were in a row before and took pages.
      is_short: pages did not suffice for a running sequence, so nobody new may come.
    """

    __slots__ = (
        "admitted", "chunks", "decodes", "drafts", "entries", "grown", "is_short", "samples", "tokens", "tokens_max",
    )

    def __init__(self, limits: StepLimits, *, entries_max: int) -> None:
        self.tokens_max = self.tokens = limits.tokens_max
        self.samples = limits.samples_max
        self.entries = entries_max
        self.decodes: list[Sequence] = []
        self.drafts: dict[Sequence, I32] = {}
        self.chunks: dict[Sequence, int] = {}
        self.admitted: list[Sequence] = []
        self.grown: dict[Sequence, int] = {}
        self.is_short = False

    @property
    def is_full(self) -> bool:
        return self.tokens == 0 or self.entries == 0

    def add_chunk(self, sequence: Sequence, count: int) -> None:
        assert 0 < count <= self.tokens and self.entries > 0 and sequence not in self.chunks
        self.chunks[sequence] = count
        self.tokens -= count
        self.entries -= 1
        if sequence.planned + count == sequence.prefill_end:
            assert self.samples > 0
            self.samples -= 1

    def add_drafts(self, drafts: dict[Sequence, I32]) -> None:
        """Some of the decodes get tokens to verify."""
        self.drafts = drafts
        self.decodes = [sequence for sequence in self.decodes if sequence not in drafts]

    def drop(self, sequence: Sequence) -> None:
        """Takes a running sequence out again, if it is in."""
        count = self.chunks.pop(sequence, 0)
        if count:
            self.samples += sequence.planned + count == sequence.prefill_end
        elif sequence in self.drafts:
            count = 1 + len(self.drafts.pop(sequence))
            self.samples += count
        elif sequence in self.decodes:
            self.decodes.remove(sequence)
            count = 1
            self.samples += 1
        self.tokens += count
        self.entries += count > 0
        self.grown.pop(sequence, None)

    def finish(self, step: int) -> tuple[StepPlan, list[Sequence]]:
        """The plan and its sequences in entry order; marks what is now planned and in flight."""
        sequences = [*self.decodes, *self.drafts, *self.chunks]
        decode_count, drafting = len(self.decodes), len(self.drafts)
        drafted = [len(draft) for draft in self.drafts.values()]
        start_A = np.array([s.planned for s in sequences], np.int32)
        known_A = np.array([s.known for s in sequences], np.int32)
        count_A = np.array(
            [1] * decode_count + [1 + count for count in drafted] + list(self.chunks.values()), np.int32
        )
        end_A = start_A + count_A
        samples_A = end_A >= known_A
        scores_A = np.zeros(len(sequences), np.bool_)
        pieces: list[I32] = [
            np.array([0 if s.planned >= s.known else s.token_ids[s.planned] for s in self.decodes], np.int32)
        ]
        for sequence, draft in self.drafts.items():
            pieces += [sequence.token_ids[sequence.planned : sequence.known], draft]
        pieces += [s.token_ids[s.planned : s.planned + count] for s, count in self.chunks.items()]
        token_T = np.concatenate(pieces, dtype=np.int32)
        score_target_T = np.full(token_T.shape[0], -1, np.int32)
        offset = decode_count + drafting + sum(drafted)
        for entry, (sequence, count) in enumerate(self.chunks.items(), decode_count + drafting):
            if sequence.is_scoring:
                scores_A[entry] = True
                targets = sequence.token_ids[sequence.planned + 1 : min(sequence.planned + count + 1, sequence.known)]
                score_target_T[offset : offset + targets.shape[0]] = targets
            offset += count
        plan = StepPlan(
            step=step,
            row_A=np.array([s.row for s in sequences], np.int32),
            start_A=start_A,
            count_A=count_A,
            from_row_A=start_A >= known_A,
            samples_A=samples_A,
            scores_A=scores_A,
            token_T=token_T,
            score_target_T=score_target_T,
            decode_count=decode_count,
            admissions=tuple(_admission(s) for s in self.admitted),
            page_updates=self.page_updates(sequences),
            draft_A=np.array([0] * decode_count + drafted + [0] * len(self.chunks), np.int32) if drafting else None,
        )
        for sequence, draft in self.drafts.items():
            sequence.drafted = len(draft)
        for sequence, end, samples in zip(sequences, end_A.tolist(), samples_A.tolist(), strict=True):
            sequence.planned = end
            sequence.pending += samples
            sequence.in_flight += 1
        return plan, sequences

    def page_updates(self, sequences: Collection[Sequence]) -> tuple[PageUpdates, ...]:
        """New pages of those of `sequences` that had a row already, for each KV group."""
        updates = []
        grown = {sequence: first for sequence, first in self.grown.items() if sequence in sequences}
        for group in range(len(next(iter(sequences)).tables) if sequences else 1):
            if not grown:
                updates.append(PageUpdates(row_U=_NONE, index_U=_NONE, page_U=_NONE))
                continue
            rows: list[int] = []
            indices: list[int] = []
            pages: list[int] = []
            for sequence, first in grown.items():
                new = sequence.tables[group][first:]
                rows += [sequence.row] * len(new)
                indices += range(first, first + len(new))
                pages += new
            updates.append(
                PageUpdates(
                    row_U=np.array(rows, np.int32),
                    index_U=np.array(indices, np.int32),
                    page_U=np.array(pages, np.int32),
                )
            )
        return tuple(updates)


def _admission(sequence: Sequence) -> RowAdmission:
    params = sequence.params
    return RowAdmission(
        row=sequence.row,
        params=params,
        seed=sequence.request.seed,
        choice=sequence.request.choice,
        prompt_length=sequence.prompt_length,
        token_ids=sequence.token_ids[: sequence.known].copy(),
        pages=tuple(np.array(table, np.int32) for table in sequence.tables),
        slot=sequence.slot,
        stop_token_ids=sequence.stop.ids if params.min_tokens > 0 else (),
    )
