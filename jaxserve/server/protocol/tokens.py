"""The bodies of /tokenize (a prompt, or messages) and /detokenize."""

from __future__ import annotations

from typing import Any

from jaxserve.server.protocol.body import Body, Ids
from jaxserve.server.protocol.chat import Messages


class TokenizeRequest(Body):
    """Exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """Token ids to text."""

    model: str | None = None
    tokens: Ids
