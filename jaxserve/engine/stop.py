"""When a sequence ends: eos, stop ids, lengths. Knows token ids only; stop strings are the text layer's.

Invariant: a sequence ends at the first token that meets a rule, and a stop rule wins over a length reached by the
same token, as in vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.core.request import EngineRequest, FinishReason


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a sequence ended; `token_id` is the stop id that did it, None for eos and length."""

    reason: FinishReason
    token_id: int | None = None


_EOS = Stop("stop")
_LENGTH = Stop("length")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """The stop rules of one sequence, in tokens of prompt and output together.

    Attributes:
      length_min: no eos or stop id counts before that many tokens are there (min_tokens).
      length_max: the sequence ends with that many (max_tokens, max_model_len).
    """

    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    length_min: int
    length_max: int

    @classmethod
    def of(cls, request: EngineRequest, *, length_max: int) -> StopRule:
        params, prompt_length = request.params, len(request.prompt_token_ids)
        if params.max_tokens is not None:
            length_max = min(length_max, prompt_length + params.max_tokens)
        return cls(
            eos_ids=frozenset() if params.ignore_eos else frozenset(request.eos_token_ids),
            stop_ids=frozenset(params.stop_token_ids),
            length_min=prompt_length + params.min_tokens,
            length_max=length_max,
        )

    @property
    def ids(self) -> tuple[int, ...]:
        """Every id that may end the sequence, ascending."""
        return tuple(sorted(self.eos_ids | self.stop_ids))

    def judge(self, token: int, length: int) -> Stop | None:
        """What the newest token, which made the sequence `length` long, means."""
        if length >= self.length_min:
            if token in self.eos_ids:
                return _EOS
            if token in self.stop_ids:
                return Stop("stop", token)
        return _LENGTH if length >= self.length_max else None
