"""What HTTP and the offline API ask of the text engine and get back: plain data above token ids, below JSON.

Invariant: for one choice the concatenated `text` of its deltas is its completion; the last delta and only it has a
`finish_reason`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.core.request import FinishReason, SequenceTimes
from jaxserve.core.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One prompt and how to continue it; exactly one of `prompt` and `prompt_token_ids` is set.

    Attributes:
      request_id: unique among live requests; its choices go to the engine as `<request_id>/<choice>`.
      add_special_tokens: whether encoding `prompt` adds bos and the like (chat templates already did).
      truncate_prompt_tokens: keep only that many of the prompt's last tokens; None keeps all; -1 keeps as many as
        the context allows.
      arrival_s: monotonic seconds.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    params: SamplingParams
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    arrival_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLogprob:
    """One candidate token at one position, with its text.

    `text` is the token decoded alone (U+FFFD where it is a part of a character), `utf8` its exact bytes, empty
    where they are not known. `rank` counts from 1, None where it was not computed.
    """

    token_id: int
    text: str
    utf8: bytes
    logprob: float
    rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLogprobs:
    """The token at one position and the alternatives asked for, most likely first."""

    token: TextLogprob
    top: tuple[TextLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDelta:
    """What is new for one choice.

    Attributes:
      logprobs: one entry a token of `token_ids`, where asked for, else empty.
      stop_reason: the stop string or stop token id that ended the choice; None for eos and length.
      prompt_token_ids, prompt_logprobs, cached_token_count: on the first delta of each choice.
      error: a message for the client where finish_reason is "error".
    """

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    cached_token_count: int = 0
    preemption_count: int = 0
    times: SequenceTimes = SequenceTimes()   # noqa: RUF009 - frozen
    error: str | None = None
