"""What a landed step means for its sequences: tokens, stops, prefix keys, pages given back, outputs.

It knows no plan in the making and no device; it changes sequences through the roster.
Of a draft it keeps the samples up to the first that differs from what was drafted: those the sequence would have had.
Invariants: nothing that a step computed is trusted before this; an ended sequence's discarded token leaves no trace;
pages that a non-finite sequence held are tainted before anybody can find or take them.
"""

from __future__ import annotations

import numpy as np

from jaxserve.core.plan import LogprobArrays, StepPlan, StepResult
from jaxserve.core.request import SequenceOutput, TokenLogprob
from jaxserve.engine.roster import Roster
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.speculation import Speculation
from jaxserve.engine.stats import Counters

NON_FINITE = (
    "The model produced NaN or infinite logits for this request, so its output cannot be trusted; other requests are "
    "not affected. A wider --dtype (bfloat16 or float32 instead of float16) usually helps."
)


class Committer:
    """Takes results, in launch order."""

    def __init__(self, roster: Roster, counters: Counters, speculation: Speculation | None = None) -> None:
        self._speculation = speculation
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
        runs = self._runs(plan, result)
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
                    sequence.drafted = 0
                    outputs.append(self._fail(sequence, now_s))
                elif entry in runs:
                    outputs.append(self._verify(sequence, entry, *runs[entry], result, now_s))
                else:
                    self._settle(sequence)
                    if samples[entry]:
                        outputs.append(self._append(sequence, (tokens[entry],), entry, result, now_s))
            if sequence.is_leaving and not sequence.in_flight:
                self._roster.land(sequence)
        self._counters.steps += 1
        self._counters.step_tokens = plan.token_count
        return outputs

    def _settle(self, sequence: Sequence) -> None:
        """What is computed now is of known tokens: full pages may be found, pages out of sight go back."""
        if sequence.computed // self._page_size > sequence.published:
            self._roster.cache.publish(sequence)
        if self._kv.is_windowed:
            self._kv.slide(sequence)

    @staticmethod
    def _runs(plan: StepPlan, result: StepResult) -> dict[int, tuple[int, int, list[int]]]:
        """For each entry of a step in which somebody drafts: its first sample, its drafts, and the samples that hold.

        A sample holds if all drafts before it were what was sampled.
        """
        if plan.draft_A is None:
            return {}
        assert result.token_N is not None
        of_A = plan.sample_counts
        first_A, last_A = np.cumsum(of_A) - of_A, np.cumsum(plan.count_A)
        runs = {}
        for entry in np.flatnonzero(plan.samples_A).tolist():
            first, drafted, last = int(first_A[entry]), int(plan.draft_A[entry]), int(last_A[entry])
            sampled_D = result.token_N[first : first + drafted]
            is_wrong_D = sampled_D != plan.token_T[last - drafted : last]
            accepted = int(is_wrong_D.argmax()) if is_wrong_D.any() else drafted
            runs[entry] = (first, drafted, result.token_N[first : first + accepted + 1].tolist())
        return runs

    def _verify(
        self, sequence: Sequence, entry: int, first: int, drafted: int, tokens: list[int], result: StepResult,
        now_s: float,
    ) -> SequenceOutput:
        """Like `_append`, of a sequence in a step with drafts: its computed positions end where its tokens do."""
        if not drafted:
            self._settle(sequence)
            return self._append(sequence, tuple(tokens), first, result, now_s)
        accepted = len(tokens) - 1
        sequence.drafted = 0
        sequence.computed -= drafted - accepted
        if sequence.row >= 0:
            sequence.planned = sequence.computed
        self._counters.drafts += 1
        self._counters.draft_tokens += drafted
        for place in range(accepted):
            self._counters.accepted_at[place] += 1
        output = self._append(sequence, tuple(tokens), first, result, now_s, settles=True)
        assert self._speculation is not None
        self._speculation.learn(sequence, drafted=drafted, accepted=accepted)
        return output

    def _append(
        self, sequence: Sequence, tokens: tuple[int, ...], sample: int, result: StepResult, now_s: float, *,
        settles: bool = False,
    ) -> SequenceOutput:
        """The sequence has more tokens, and may end with one of them: the rest of them never was.

        Args:
          sample: where the result has the first token's logprobs.  settles: positions of new tokens are computed.
        """
        is_first = sequence.known == sequence.prompt_length
        prompt_logprobs = None
        if is_first:
            sequence.first_token_s = now_s
            self._counters.prompt_tokens += sequence.prompt_length
            prompt_logprobs = None if sequence.scores is None else tuple(sequence.scores)
        stop = None
        known = sequence.known
        for token in tokens:
            sequence.append(token)
            stop = sequence.stop.judge(token, sequence.known)
            if stop is not None:
                break
        kept = tokens[: sequence.known - known]
        self._counters.generation_tokens += len(kept)
        logprobs: tuple[TokenLogprob, ...] = ()
        wanted = sequence.params.logprobs
        if wanted is not None:
            found = result.logprobs
            assert found is not None
            logprobs = tuple(_logprob(found, index, token, wanted) for index, token in enumerate(kept, sample))
        if settles:
            sequence.computed = min(sequence.computed, sequence.known - 1)
            self._settle(sequence)
        if stop is not None:
            self._roster.end(sequence)
        return SequenceOutput(
            request_id=sequence.request.request_id,
            token_ids=kept,
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
