"""From messages to a prompt: which options go to the chat template. Shared by chat completions and /tokenize."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.core.errors import RequestError
from jaxserve.server.protocol.chat import ChatRendering
from jaxserve.server.protocol.tokens import TokenizeRequest

if TYPE_CHECKING:
    from jaxserve.text_engine import TextEngine

# What the API sets itself; a template variable of that name would go around its checks.
_OWN_NAMES = {"messages", "chat_template", "add_generation_prompt", "continue_final_message", "tools", "tokenize"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """What a client may say about the template."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, body: ChatRendering | TokenizeRequest) -> Rendering:
        """Raises RequestError where the two ways to end a prompt are both asked for.

        `continue_final_message` alone is enough: it switches off the default generation prompt.
        """
        continues = bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        kwargs = dict(body.chat_template_kwargs or {})
        if isinstance(body, ChatRendering):
            if body.reasoning_effort is not None:
                kwargs.setdefault("reasoning_effort", body.reasoning_effort)
                kwargs.setdefault("enable_thinking", body.reasoning_effort != "none")
            if body.documents is not None:
                kwargs["documents"] = body.documents
        for name in _OWN_NAMES & kwargs.keys():
            raise RequestError(f"chat_template_kwargs may not set {name!r}.", param="chat_template_kwargs")
        adds = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        return cls(add_generation_prompt=adds, continue_final_message=continues, template_kwargs=kwargs)


async def render(engine: TextEngine, messages: list[dict[str, object]], rendering: Rendering) -> str:
    """The prompt's text. Raises RequestError when the model has no template or the template refuses."""
    if not engine.has_chat_template:
        raise RequestError(
            "The served model has no chat template, so messages cannot become a prompt: use /v1/completions, or "
            "ask the operator to set --chat-template.",
            param="messages",
        )
    return await engine.render_chat(
        messages,
        chat_template=None,
        add_generation_prompt=rendering.add_generation_prompt,
        continue_final_message=rendering.continue_final_message,
        template_kwargs=rendering.template_kwargs,
    )
