"""Which known fields this server does not support, and the values of them that ask for nothing.

A field of OpenAI's or vLLM's API that is neither honoured nor here is a hint without effect (`user`, `metadata`, ...)
or unknown; both are accepted. Invariant: no field that would change an answer is ever dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxserve.core.errors import UnsupportedFieldError

_TOOLS = "tool calls are not supported yet"
_STRUCTURE = "structured output is not supported yet"
_TRANSFER = "moving KV pages between servers is not supported"
_MEDIA = "this server reads and writes text only"

# field -> (why it is refused, values that ask for nothing). None never asks for anything.
_REFUSED: dict[str, tuple[str, tuple[object, ...]]] = {
    "tools": (_TOOLS, ()),
    "tool_choice": (_TOOLS, ("none",)),
    "functions": (_TOOLS, ()),
    "function_call": (_TOOLS, ("none",)),
    "response_format": (_STRUCTURE, ({"type": "text"},)),
    "structured_outputs": (_STRUCTURE, ()),
    "guided_json": (_STRUCTURE, ()),
    "guided_regex": (_STRUCTURE, ()),
    "guided_choice": (_STRUCTURE, ()),
    "guided_grammar": (_STRUCTURE, ()),
    "guided_decoding_backend": (_STRUCTURE, ()),
    "guided_whitespace_pattern": (_STRUCTURE, ()),
    "structural_tag": (_STRUCTURE, ()),
    "use_beam_search": ("beam search is not supported", (False,)),
    "length_penalty": ("it belongs to beam search, which is not supported", (1, 1.0)),
    "early_stopping": ("it belongs to beam search, which is not supported", (False,)),
    "suffix": ("the served model has no fill-in-the-middle format", ("",)),
    "logprob_token_ids": ("scoring chosen labels is not supported yet; ask for logprobs instead", ()),
    "prompt_embeds": ("prompts are text or token ids", ()),
    "repetition_detection": ("ending on repetition is not supported yet", ()),
    "thinking_token_budget": ("budgets for reasoning are not supported yet", ()),
    "include_reasoning": ("reasoning is not separated from the answer yet", (True,)),
    "chat_template": ("a template from a request is not trusted; the operator sets one with --chat-template", ()),
    "truncation_side": ("prompts are truncated at their beginning", ("left",)),
    "stream_interval": ("every token is streamed as soon as it is there", (1,)),
    "audio": (_MEDIA, ()),
    "modalities": (_MEDIA, (["text"],)),
    "mm_processor_kwargs": (_MEDIA, ()),
    "media_io_kwargs": (_MEDIA, ()),
    "prediction": ("predicted outputs are not supported", ()),
    "web_search_options": ("this server does not search", ()),
    "verbosity": ("the served model has no such setting; say it in the prompt", ("medium",)),
    "kv_transfer_params": (_TRANSFER, ()),
    "ec_transfer_params": (_TRANSFER, ()),
    "watermarking": ("watermarks are not supported", (False,)),
    "return_weight_versions": ("weights have no versions here", (False,)),
    "return_prompt_text": ("it belongs to chat completions; a plain completion has `echo`", (False,)),
    "top_logprobs": ("it belongs to chat completions; here `logprobs` is a number", (0,)),
    "lora_request": ("LoRA adapters are not supported yet", ()),
}


def check_supported(extra: Mapping[str, object] | None, *, choices: int = 1) -> None:
    """Raises UnsupportedFieldError for the first field that asks for what this server cannot do.

    Args:
      extra: the fields of a body that its model does not have.
      choices: `n`; the old `best_of` is accepted where it is equal.
    """
    for name, value in (extra or {}).items():
        if value is None:
            continue
        if name == "best_of" and (value != choices or isinstance(value, bool)):
            raise UnsupportedFieldError(f"best_of must equal n={choices} where it is given, got {value!r}.", param=name)
        if name not in _REFUSED:
            continue
        reason, neutral = _REFUSED[name]
        if not any(type(value) is type(nothing) and value == nothing for nothing in neutral):
            raise UnsupportedFieldError(f"{name} is not supported: {reason}. Leave it out.", param=name)
