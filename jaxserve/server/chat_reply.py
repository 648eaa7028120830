"""A chat completion as one object or as chunks. Knows deltas and JSON shapes; not where either comes from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from jaxserve.core.text_request import TextDelta
from jaxserve.server.generation import Batch, ChoiceResult, PromptResult
from jaxserve.server.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.reply import Head, UsageCount, usage_of
from jaxserve.server.sse import event


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatShape:
    """What this reply looks like.

    Attributes:
      prefix: text of the message that is continued, put before each choice under `echo`.
      prompt_text: the rendered prompt, where the client asked for it.
    """

    head: Head
    body: ChatCompletionRequest
    role: str = "assistant"
    prefix: str = ""
    prompt_text: str | None = None
    shows_cached: bool = False

    def logprobs(self, positions: list | tuple) -> dict[str, object] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(
            positions, top=self.body.top_logprobs or 0, as_ids=bool(self.body.return_tokens_as_token_ids)
        )


def chat_object(shape: ChatShape, result: PromptResult) -> dict[str, object]:
    """The reply of a request that does not stream."""
    with_ids = shape.body.return_token_ids
    return shape.head.as_kind("chat.completion") | {
        "choices": [_choice(shape, index, choice) for index, choice in enumerate(result.choices)],
        "service_tier": None,
        "system_fingerprint": shape.head.fingerprint,
        "usage": usage_of([result], shows_cached=shape.shows_cached),
        "prompt_logprobs": prompt_logprobs(result.prompt_logprobs) if shape.body.prompt_logprobs is not None else None,
        "prompt_token_ids": list(result.prompt_token_ids) if with_ids else None,
        "prompt_text": shape.prompt_text,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _choice(shape: ChatShape, index: int, choice: ChoiceResult) -> dict[str, object]:
    message = {
        "role": shape.role, "content": shape.prefix + choice.text, "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "reasoning": None,
    }
    return {
        "index": index,
        "message": message,
        "logprobs": shape.logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if shape.body.return_token_ids else None,
        "routed_experts": None,
    }


async def chat_chunks(shape: ChatShape, batches: AsyncGenerator[Batch]) -> AsyncGenerator[bytes]:
    """Encoded events: first every choice's role, then a chunk a delta, then the usage where asked for."""
    count = UsageCount()
    has_begun = False
    async with aclosing(batches):
        async for _, deltas in batches:
            events = []
            for delta in deltas:
                if delta.prompt_token_ids is not None:
                    count.note_prompt(0, len(delta.prompt_token_ids), delta.cached_token_count)
            if not has_begun:
                has_begun = True
                events += _first_chunks(shape, deltas, count)
            for delta in deltas:
                count.note_tokens(delta.choice, len(delta.token_ids))
                if delta.text or delta.token_ids or delta.finish_reason is not None:
                    events.append(_delta_chunk(shape, delta, count))
            if events:
                yield b"".join(events)
    if shape.body.includes_usage:
        total = {"usage": count.total(shows_cached=shape.shows_cached), "system_fingerprint": shape.head.fingerprint}
        yield event(shape.head.as_kind("chat.completion.chunk") | {"choices": []} | total)


def _first_chunks(shape: ChatShape, deltas: list[TextDelta], count: UsageCount) -> list[bytes]:
    events = []
    prompt_ids = next((delta.prompt_token_ids for delta in deltas if delta.prompt_token_ids is not None), None)
    for index in range(shape.body.n or 1):
        begin = {"role": shape.role, "content": ""}
        choice = {"index": index, "delta": begin, "logprobs": None, "finish_reason": None}
        extra: dict[str, object] = {
            "prompt_token_ids": list(prompt_ids) if shape.body.return_token_ids and prompt_ids else None
        }
        if shape.prompt_text is not None:
            extra["prompt_text"] = shape.prompt_text
        events.append(_chunk(shape, choice, index, count, extra))
        if shape.prefix:
            repeated = {"index": index, "delta": {"content": shape.prefix}, "logprobs": None, "finish_reason": None}
            events.append(_chunk(shape, repeated, index, count, {}))
    return events


def _delta_chunk(shape: ChatShape, delta: TextDelta, count: UsageCount) -> bytes:
    choice: dict[str, object] = {
        "index": delta.choice,
        "delta": {"content": delta.text},
        "logprobs": shape.logprobs(delta.logprobs) if delta.token_ids else None,
        "finish_reason": delta.finish_reason,
    }
    extra: dict[str, object] = {}
    if delta.finish_reason is not None:
        choice["stop_reason"] = delta.stop_reason
        if not shape.body.includes_usage:
            extra["system_fingerprint"] = shape.head.fingerprint
    choice["token_ids"] = list(delta.token_ids) if shape.body.return_token_ids else None
    return _chunk(shape, choice, delta.choice, count, extra)


def _chunk(
    shape: ChatShape, choice: dict[str, object], index: int, count: UsageCount, extra: dict[str, object]
) -> bytes:
    if shape.body.continuous_usage:
        extra = extra | {"usage": count.so_far(0, index)}
    return event(shape.head.as_kind("chat.completion.chunk") | {"choices": [choice]} | extra)
