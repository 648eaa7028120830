"""What a landed step means for its sequences: tokens, stops, prefix keys, pages given back, outputs.

It knows no plan in the making and no device; it changes sequences through the roster.
Invariants: nothing that a step computed is trusted before this; an ended sequence's discarded token leaves no trace;
pages that a non-finite sequence held are tainted before anybody can find or take them.
"""

from __future__ import annotations

import numpy as np

from jaxserve.core.plan import LogprobArrays, StepPlan, StepResult
from jaxserve.core.request import SequenceOutput, TokenLogprob
from jaxserve.engine.roster import Roster
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.stats import Counters

NON_FINITE = (
    "The model produced NaN or infinite logits for this request, so its output cannot be trusted; other requests are "
    "not affected. A wider --dtype (bfloat16 or float32 instead of float16) usually helps."
)


class Committer:
    """Takes results, in launch order."""

    def __init__(self, roster: Roster, counters: Counters) -> None:
        self._roster = roster
        self._counters = counters
        self._kv = roster.kv
        self._page_size = roster.kv.page_size

    def commit(
        self, plan: StepPlan, sequences: list[Sequence], result: StepResult, now_s: float
    ) -> list[SequenceOutput]:
        """Applies one step's result; returns what it gave each sequence that sampled or ended."""
        assert result.step == plan.step
        outputs: list[SequenceOutput] = []
        finite = result.is_finite_A.tolist()
        tokens = result.token_A.tolist()
        samples = plan.samples_A.tolist()
        ends = (plan.start_A + plan.count_A).tolist()
        if result.scores is not None:
            self._collect_scores(plan, sequences, result.scores)
        for entry, sequence in enumerate(sequences):
            sequence.in_flight -= 1
            if not finite[entry]:
                self._kv.taint(sequence)
            if not sequence.has_ended:
                sequence.pending -= samples[entry]
                sequence.computed = ends[entry]
                if not finite[entry]:
                    outputs.append(self._fail(sequence, now_s))
                else:
                    if sequence.computed // self._page_size > sequence.published:
                        self._roster.cache.publish(sequence)
                    if self._kv.is_windowed:
                        self._kv.slide(sequence)
                    if samples[entry]:
                        outputs.append(self._append(sequence, tokens[entry], entry, result, now_s))
            if sequence.is_leaving and not sequence.in_flight:
                self._roster.land(sequence)
        self._counters.steps += 1
        self._counters.step_tokens = plan.token_count
        return outputs

    def _append(
        self, sequence: Sequence, token: int, entry: int, result: StepResult, now_s: float
    ) -> SequenceOutput:
        """The sequence has one more token, and may end with it."""
        is_first = sequence.known == sequence.prompt_length
        prompt_logprobs = None
        if is_first:
            sequence.first_token_s = now_s
            self._counters.prompt_tokens += sequence.prompt_length
            prompt_logprobs = None if sequence.scores is None else tuple(sequence.scores)
        sequence.append(token)
        self._counters.generation_tokens += 1
        logprobs: tuple[TokenLogprob, ...] = ()
        wanted = sequence.params.logprobs
        if wanted is not None:
            assert result.logprobs is not None
            logprobs = (_logprob(result.logprobs, entry, token, wanted),)
        stop = sequence.stop.judge(token, sequence.known)
        if stop is not None:
            self._roster.end(sequence)
        return SequenceOutput(
            request_id=sequence.request.request_id,
            token_ids=(token,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=None if stop is None else stop.reason,
            stop_reason=None if stop is None else stop.token_id,
            cached_token_count=sequence.cached_token_count if is_first else 0,
            preemption_count=sequence.preemption_count,
            times=sequence.times(now_s),
        )

    def _fail(self, sequence: Sequence, now_s: float) -> SequenceOutput:
        self._counters.corrupted += 1
        self._roster.end(sequence)
        return ended_output(sequence, "error", NON_FINITE, now_s)

    def _collect_scores(self, plan: StepPlan, sequences: list[Sequence], scores: LogprobArrays) -> None:
        """Prompt logprobs: the packed token at position p scores the prompt's token p + 1."""
        first_A = np.cumsum(plan.count_A) - plan.count_A
        for entry in np.flatnonzero(plan.scores_A).tolist():
            sequence = sequences[entry]
            collected, wanted = sequence.scores, sequence.params.prompt_logprobs
            assert collected is not None and wanted is not None
            start, count, first = int(plan.start_A[entry]), int(plan.count_A[entry]), int(first_A[entry])
            for offset in range(max(0, len(collected) - 1 - start), count):   # skips what an earlier life collected
                target = int(plan.score_target_T[first + offset])
                if target >= 0:
                    collected.append(_logprob(scores, first + offset, target, wanted))


def ended_output(sequence: Sequence, reason: str, error: str | None, now_s: float) -> SequenceOutput:
    """The last output of a sequence that ends without a token: abort or error."""
    return SequenceOutput(
        request_id=sequence.request.request_id,
        finish_reason="abort" if reason == "abort" else "error",
        cached_token_count=max(0, sequence.cached_token_count),
        preemption_count=sequence.preemption_count,
        times=sequence.times(now_s if sequence.first_token_s else 0.0),
        error=error,
    )


def _logprob(arrays: LogprobArrays, index: int, token: int, wanted: int) -> TokenLogprob:
    """One token's logprob with `wanted` alternatives, -1 for all that there are."""
    top_ids, top_logprobs = arrays.top_id_AX[index], arrays.top_logprob_AX[index]
    count = top_ids.shape[0] if wanted < 0 else wanted
    return TokenLogprob(
        token_id=token,
        logprob=float(arrays.logprob_A[index]),
        rank=int(arrays.rank_A[index]),
        top_ids=tuple(top_ids[:count].tolist()),
        top_logprobs=tuple(top_logprobs[:count].tolist()),
    )
