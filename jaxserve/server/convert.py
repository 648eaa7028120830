"""Bodies of requests to `SamplingParams` and `TextRequest`. Knows what the client said and the model's defaults.

Order of precedence: the request, then the model's generation defaults, then OpenAI's. Ranges are `SamplingParams`'
business; what is checked here needs more than one field or the context length.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence

from fastapi import Request

from jaxserve.core.errors import RequestError, UnsupportedFieldError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.server.protocol.body import SamplingBody
from jaxserve.server.protocol.chat import ChatMessage

REQUEST_ID_CHARS_MAX = 256
SALT_CHARS_MAX = 128
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_PLAIN = (
    "min_tokens", "seed", "n", "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "allowed_token_ids",
)


def sampling_params(
    body: SamplingBody,
    defaults: Mapping[str, object],
    *,
    max_tokens: int | None,
    max_model_len: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    detokenize: bool,
) -> SamplingParams:
    """What `SamplingParams` says to one body. Raises RequestError."""
    said = {name: getattr(body, name) for name in (*_DEFAULTED, *_PLAIN) if getattr(body, name) is not None}
    defaulted = {name: defaults[name] for name in _DEFAULTED if name not in said and defaults.get(name) is not None}
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if value is not None and value < -1:
            raise RequestError(f"{name} must be at least 0, or -1 for the whole vocabulary, got {value}.", param=name)
    return SamplingParams(
        **defaulted | said,  # type: ignore[arg-type]
        stop=stop,
        logit_bias=_logit_bias(body.logit_bias),
        max_tokens=_max_tokens(max_tokens, defaults, max_model_len),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        detokenize=detokenize,
    )


def check_shared(body: SamplingBody) -> None:
    """Raises RequestError for combinations of fields that make no sense, whatever the model."""
    if body.stream_options is not None and not body.streams:
        raise RequestError("stream_options can only be given together with stream=true.", param="stream_options")
    if body.prompt_logprobs is not None and body.streams:
        raise RequestError("prompt_logprobs are not available when stream=true.", param="prompt_logprobs")
    salt = body.cache_salt
    if salt is not None and (not salt or len(salt) > SALT_CHARS_MAX or re.search(r"[@/\\\0]", salt)):
        raise RequestError(
            f"cache_salt must be 1 to {SALT_CHARS_MAX} characters, none of them @, /, \\ or NUL.", param="cache_salt"
        )
    keep = body.truncate_prompt_tokens
    if keep is not None and (keep < -1 or keep == 0):
        raise RequestError(
            f"truncate_prompt_tokens must be at least 1, or -1 for as many as fit, got {keep}.",
            param="truncate_prompt_tokens", value=keep,
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises RequestError for an id that the model does not have: a device would clamp it in silence."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"Token id {wrong} is out of vocabulary: ids are in [0, {vocab_size - 1}].", param=param, value=wrong
        )


def base_request_id(body: SamplingBody, request: Request) -> str:
    """The client's own id from the header or the body, else a random one."""
    given = request.headers.get("x-request-id") or body.request_id
    if given is None:
        return uuid.uuid4().hex[:16]
    if len(given) > REQUEST_ID_CHARS_MAX or not given.isprintable():
        raise RequestError(
            f"a request id must be at most {REQUEST_ID_CHARS_MAX} printable characters.", param="request_id"
        )
    return given


def template_messages(messages: list[ChatMessage]) -> list[dict[str, object]]:
    """Messages as templates read them: text content as one string. Raises RequestError for media and tool calls."""
    if not messages:
        raise RequestError("Cannot apply chat template to an empty conversation: messages is [].", param="messages")
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, object]:
    for name in ("tool_calls", "function_call", "audio"):
        if (message.model_extra or {}).get(name):
            raise UnsupportedFieldError(f"{name} in a message is not supported yet.", param="messages")
    said: dict[str, object] = {"role": message.role, "content": _text_of(message.content)}
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            said[name] = value
    return said


def _text_of(content: str | list[str | dict[str, object]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise UnsupportedFieldError(
                f"content parts of type {kind!r} are not supported: this server reads text only.", param="messages"
            )
        if not isinstance(text, str):
            raise RequestError(f"a content part of type {kind!r} must carry its text as a string.", param="messages")
        texts.append(text)
    return "\n".join(texts)


def _max_tokens(asked: int | None, defaults: Mapping[str, object], max_model_len: int) -> int | None:
    """What the client asked, under the model's own cap where there is one."""
    if asked is not None and asked < 1:
        raise RequestError(f"max_tokens must be at least 1, got {asked}.", param="max_tokens", value=asked)
    if asked is not None and asked > max_model_len:
        raise RequestError(
            f"max_tokens={asked} cannot be greater than max_model_len={max_model_len}. "
            "Please request fewer output tokens.",
            param="max_tokens", value=asked,
        )
    cap = defaults.get("max_new_tokens")
    if not isinstance(cap, int):
        return asked
    return cap if asked is None else min(asked, cap)


def _logit_bias(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (given or {}).items():
        if not re.fullmatch(r"\d{1,10}", key, re.ASCII):
            raise RequestError(f"keys of logit_bias must be token ids, got {key!r}.", param="logit_bias", value=key)
        pairs.append((int(key), bias))
    if len({token for token, _ in pairs}) < len(pairs):
        raise RequestError("logit_bias names a token id twice.", param="logit_bias")
    return tuple(pairs)
