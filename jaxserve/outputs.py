"""What the offline `LLM` returns: vLLM's result objects, built from text deltas. Plain data; knows no engine.

Invariant: one RequestOutput a prompt, one CompletionOutput a choice, both in the order asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.core.request import FinishReason, SequenceTimes
from jaxserve.core.text_request import PositionLogprobs, TextDelta


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate token; `rank` counts from 1, the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionDict = dict[int, Logprob]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One choice. `logprobs` holds a dict of candidates by token id for each token, the sampled one first."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionDict] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestMetrics:
    """Monotonic seconds, of the choice that ended last."""

    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """One prompt and its choices. `prompt` is None where only token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionDict | None] | None = None
    finished: bool = True
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class ChoiceCollector:
    """Joins the deltas of one choice. Mutable."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    first: TextDelta | None = None
    last: TextDelta | None = None

    def add(self, delta: TextDelta) -> None:
        self.first = self.first or delta
        self.last = delta
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)

    def output(self, *, with_logprobs: bool) -> CompletionOutput:
        assert self.last is not None, "a choice without a delta"
        return CompletionOutput(
            index=self.last.choice,
            text="".join(self.texts),
            token_ids=self.token_ids,
            cumulative_logprob=sum(entry.token.logprob for entry in self.logprobs) if with_logprobs else None,
            logprobs=[_position(entry) for entry in self.logprobs] if with_logprobs else None,
            finish_reason=self.last.finish_reason,
            stop_reason=self.last.stop_reason,
        )


def request_output(
    request_id: str, prompt: str | None, choices: Sequence[ChoiceCollector], *, with_logprobs: bool
) -> RequestOutput:
    """The result of a request whose choices have all ended."""
    first = choices[0].first
    assert first is not None and first.prompt_token_ids is not None
    scored = first.prompt_logprobs
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=list(first.prompt_token_ids),
        outputs=[choice.output(with_logprobs=with_logprobs) for choice in choices],
        prompt_logprobs=None if scored is None else [None if entry is None else _position(entry) for entry in scored],
        metrics=_metrics([choice.last.times for choice in choices if choice.last is not None]),
        num_cached_tokens=first.cached_token_count,
    )


def _position(entry: PositionLogprobs) -> PositionDict:
    candidates = {entry.token.token_id: entry.token}
    for token in entry.top:
        candidates.setdefault(token.token_id, token)
    return {i: Logprob(logprob=t.logprob, rank=t.rank, decoded_token=t.text) for i, t in candidates.items()}


def _metrics(times: Sequence[SequenceTimes]) -> RequestMetrics:
    last = max(times, key=lambda one: one.last_token_s)
    return RequestMetrics(
        arrival_time=last.arrival_s, first_scheduled_time=last.scheduled_s,
        first_token_time=last.first_token_s, last_token_time=last.last_token_s,
    )
