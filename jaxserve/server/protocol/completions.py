"""The body of /v1/completions: one prompt or many, as text or token ids."""

from __future__ import annotations

from typing import Annotated

from pydantic import PlainValidator

from jaxserve.server.protocol.body import Int64, SamplingBody

PROMPTS_MAX = 1024

Prompt = str | list[int]


def _check_prompt(value: object) -> str | list[str] | list[int] | list[list[int]]:
    """One error in words instead of pydantic's one for each branch of the union."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or _are_ids(value):
            return value
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError("a prompt is a string, a list of strings, a list of token ids or a list of such lists, none empty")


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)   # a boolean is an int, but no id


class CompletionRequest(SamplingBody):
    """Prompts to continue."""

    prompt: Annotated[
        object,
        PlainValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: Int64 | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """Always a list, of texts and of lists of token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):  # type: ignore[index]
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]
