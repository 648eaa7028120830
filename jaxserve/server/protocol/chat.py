"""The body of /v1/chat/completions. Text only: other content parts are refused when the prompt is rendered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jaxserve.server.protocol.body import Body, SamplingBody


class ChatMessage(Body):
    """One turn; templates may know roles of their own. Extra keys are ignored."""

    role: str
    content: str | Annotated[list[str | dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]


class ChatRendering(Body):
    """How messages become a prompt; chat completions and /tokenize share it."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ChatCompletionRequest(SamplingBody, ChatRendering):
    """A conversation to continue."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_prompt_text: bool | None = None
