"""The fields that chat and plain completions share, and how strict every body is. Knows no engine.

Invariant: a number is finite and of its own type (no booleans, no strings, no 3.0 for 3); a field that nobody knows
is kept in `model_extra`, where `refused` looks for known ones that are not supported.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxserve.core.sampling_params import BIAS_ENTRIES_MAX

INT64_MAX = 2**63 - 1

Int64 = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)]
# fail_fast: a list of a million wrong items is one error, not a million.
Ids = Annotated[list[Int64], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _check_bias_size(value: object) -> object:
    if isinstance(value, dict) and len(value) > BIAS_ENTRIES_MAX:
        raise ValueError(f"at most {BIAS_ENTRIES_MAX} entries, got {len(value)}")
    return value


class Body(BaseModel):
    """A JSON object from a client."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """What a stream carries besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """How to sample and what to return; None is "not said", so that the model's own defaults apply."""

    model: str | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    n: Int64 | None = None
    stop: str | Texts | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Int64 | None = None
    echo: bool | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_bias_size)] = None
    allowed_token_ids: Ids | None = None
    bad_words: Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Int64 | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Int64 | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options.continuous_usage_stats)  # type: ignore[union-attr]
