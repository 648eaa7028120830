"""What goes to the engine and what comes back, as plain data: token ids only, no text, no device, no queue.

One `EngineRequest` is one sequence: `n` choices are `n` requests that differ in `choice` (the prefix cache makes
their common prompt cost one prefill). Instances cross the process boundary as msgpack, so fields are plain types.
Invariant: for one request the concatenated `token_ids` of its outputs are its completion, the last output and only
it has a `finish_reason`, and nothing follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from jaxserve.core.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One sequence to complete.

    Attributes:
      request_id: unique among live requests.
      choice: index among the `n` choices of the client's request; part of the sampling key.
      seed: int64 in effect (drawn by the text layer when the client gave none).
      eos_token_ids: ids that end the output with reason "stop" and no stop_reason; empty under `ignore_eos`.
      priority: lower runs first, under `--scheduling-policy priority` only.
      cache_salt: part of the prefix hash: only requests of equal salt share pages.
      arrival_s: monotonic seconds at which the server took the request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choice: int = 0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    arrival_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token and of its best alternatives at that position.

    `rank` counts from 1: how many are at least as likely. `top_ids`/`top_logprobs` are sorted, most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceTimes:
    """Monotonic seconds of one sequence's life; 0.0 is "not yet"."""

    arrival_s: float = 0.0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """What one step gave one sequence.

    Attributes:
      token_ids: new tokens, in order; may be empty on the last output (abort, error).
      logprobs: one entry a new token where the request asked for logprobs, else empty.
      prompt_logprobs: on the first output of a request that asked for them: one entry a prompt token, None for the
        first; else None.
      finish_reason: set on the last output.  stop_reason: the stop token id that ended it, None for eos.
      cached_token_count: prompt tokens that came from the prefix cache, on the first output.
      error: a message for the client where finish_reason is "error".
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    cached_token_count: int = 0
    preemption_count: int = 0
    times: SequenceTimes = field(default_factory=SequenceTimes)
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Gauges now and counters since start; `server.metrics` and the ten-second log line read them."""

    running_count: int = 0
    waiting_count: int = 0
    page_count: int = 0
    page_used_count: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemption_count: int = 0
    step_count: int = 0
    step_tokens: int = 0              # tokens computed by the newest step
    compiled_count: int = 0           # programs compiled or loaded so far
    compiled_after_ready_count: int = 0  # must stay 0
    corrupted_count: int = 0          # sequences ended for non-finite logits
    draft_count: int = 0              # drafts verified
    draft_tokens: int = 0             # their tokens
    draft_accepted_at: tuple[int, ...] = ()  # accepted ones by place in the draft; empty without speculation


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What the other side must know of a served engine to check and label requests."""

    model: str
    vocab_size: int                  # width of the logits
    max_model_len: int
    page_size: int
    page_count: int
    dtype: str
    row_count: int = 0               # sequences that run at once
    cache_config: dict[str, str] = field(default_factory=dict)   # labels of vllm:cache_config_info


class EnginePort(Protocol):
    """How the text layer drives an engine, wherever that engine runs. Called from one thread or event loop.

    `submit` never blocks on the device and raises EngineError subclasses when the engine cannot take work.
    Outputs come in order for each request through the sink given to the implementation.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, requests: Sequence[EngineRequest]) -> None: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...
