"""What all replies share: the head, the usage counts. Plain dictionaries, key by key as vLLM sends them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.server.generation import PromptResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Who answers: the same for the whole reply and all its chunks."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def as_kind(self, kind: str) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def full_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None) -> dict[str, object]:
    """`cached_tokens` is None unless `--enable-prompt-tokens-details` shows them."""
    details = None if cached_tokens is None else {"cached_tokens": cached_tokens}
    counts: dict[str, object] = dict(usage(prompt_tokens, completion_tokens))
    return counts | {"prompt_tokens_details": details, "completion_tokens_details": None}


def usage_of(results: Sequence[PromptResult], *, shows_cached: bool) -> dict[str, object]:
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    completion_tokens = sum(len(choice.token_ids) for result in results for choice in result.choices)
    cached = sum(result.cached_token_count for result in results)
    return full_usage(prompt_tokens, completion_tokens, cached if shows_cached else None)


@dataclass(slots=True)
class UsageCount:
    """Counts a stream's tokens: prompts once, completions by choice. Mutable."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    completions: dict[int, int] = field(default_factory=dict)

    def note_prompt(self, prompt: int, length: int, cached: int) -> None:
        self.prompts.setdefault(prompt, length)
        self.cached.setdefault(prompt, cached)

    def note_tokens(self, index: int, count: int) -> None:
        self.completions[index] = self.completions.get(index, 0) + count

    def so_far(self, prompt: int, index: int) -> dict[str, int]:
        return usage(self.prompts.get(prompt, 0), self.completions.get(index, 0))

    def total(self, *, shows_cached: bool) -> dict[str, object]:
        cached = sum(self.cached.values()) if shows_cached else None
        total = full_usage(sum(self.prompts.values()), sum(self.completions.values()), cached)
        return {key: value for key, value in total.items() if value is not None}
