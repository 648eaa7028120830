"""A plain completion as one object or as chunks; with `echo` the prompt comes before each choice."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from jaxserve.core.text_request import PositionLogprobs, TextDelta
from jaxserve.server.generation import Batch, ChoiceResult, PromptResult
from jaxserve.server.logprobs import completion_logprobs, prompt_logprobs
from jaxserve.server.protocol.completions import CompletionRequest
from jaxserve.server.reply import Head, UsageCount, usage_of
from jaxserve.server.sse import event


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionShape:
    """What this reply looks like.

    Attributes:
      echo_text: the text of a prompt, by its index and the token ids that the engine took.
      token_text: one token decoded alone.
      hides_completion: `echo` with max_tokens=0: the engine had to generate one token that nobody asked for.
    """

    head: Head
    body: CompletionRequest
    choice_count: int
    echo_text: Callable[[int, Sequence[int]], str]
    token_text: Callable[[int], str]
    hides_completion: bool = False
    shows_cached: bool = False

    @property
    def echoes(self) -> bool:
        return bool(self.body.echo)

    def logprobs(
        self,
        prompt_ids: Sequence[int],
        prompt: Sequence[PositionLogprobs | None],
        completion: Sequence[PositionLogprobs],
        offset: int = 0,
    ) -> tuple[dict[str, object] | None, int]:
        """Of the echoed prompt and the completion together, and the text offset after them."""
        if self.body.logprobs is None:
            return None, offset
        as_ids = bool(self.body.return_tokens_as_token_ids)
        first = "" if not prompt_ids else f"token_id:{prompt_ids[0]}" if as_ids else self.token_text(prompt_ids[0])
        return completion_logprobs((*prompt, *completion), first_text=first, as_ids=as_ids, offset=offset)


def completion_object(shape: CompletionShape, results: Sequence[PromptResult]) -> dict[str, object]:
    """The reply of a request that does not stream."""
    choices = [
        _choice(shape, prompt, index, result, choice)
        for prompt, result in enumerate(results)
        for index, choice in enumerate(result.choices)
    ]
    return shape.head.as_kind("text_completion") | {
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": shape.head.fingerprint,
        "usage": usage_of(results, shows_cached=shape.shows_cached),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _choice(
    shape: CompletionShape, prompt: int, index: int, result: PromptResult, choice: ChoiceResult
) -> dict[str, object]:
    ids, with_ids = result.prompt_token_ids, shape.body.return_token_ids
    shown = ChoiceResult(finish_reason=choice.finish_reason) if shape.hides_completion else choice
    scored = (result.prompt_logprobs or ()) if shape.echoes else ()
    logprobs, _ = shape.logprobs(ids, scored, shown.logprobs)
    return {
        "index": prompt * shape.choice_count + index,
        "text": (shape.echo_text(prompt, ids) if shape.echoes else "") + shown.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": ([*ids] * shape.echoes + shown.token_ids) if with_ids else None,
        "prompt_logprobs": prompt_logprobs(result.prompt_logprobs) if shape.body.prompt_logprobs is not None else None,
        "prompt_token_ids": list(ids) if with_ids else None,
        "routed_experts": None,
    }


async def completion_chunks(shape: CompletionShape, batches: AsyncGenerator[Batch]) -> AsyncGenerator[bytes]:
    """Encoded events: a chunk a delta, then the usage where asked for."""
    count = UsageCount()
    offsets: dict[int, int] = {}
    async with aclosing(batches):
        async for prompt, deltas in batches:
            events = []
            for delta in deltas:
                index = prompt * shape.choice_count + delta.choice
                if delta.prompt_token_ids is not None:
                    count.note_prompt(prompt, len(delta.prompt_token_ids), delta.cached_token_count)
                count.note_tokens(index, len(delta.token_ids))
                is_first = delta.prompt_token_ids is not None
                if delta.text or delta.token_ids or delta.finish_reason is not None or (is_first and shape.echoes):
                    events.append(_chunk(shape, prompt, delta, count, offsets))
            if events:
                yield b"".join(events)
    if shape.body.includes_usage:
        total = {"usage": count.total(shows_cached=shape.shows_cached), "system_fingerprint": shape.head.fingerprint}
        yield event(shape.head.as_kind("text_completion") | {"choices": []} | total)


def _chunk(shape: CompletionShape, prompt: int, delta: TextDelta, count: UsageCount, offsets: dict[int, int]) -> bytes:
    index = prompt * shape.choice_count + delta.choice
    first_ids = delta.prompt_token_ids
    repeats = shape.echoes and first_ids is not None
    text, token_ids, logprobs = delta.text, list(delta.token_ids), delta.logprobs
    if shape.hides_completion:
        text, token_ids, logprobs = "", [], ()
    scored: Sequence[PositionLogprobs | None] = ()
    if repeats and first_ids is not None:
        text = shape.echo_text(prompt, first_ids) + text
        token_ids = [*first_ids, *token_ids]
        scored = delta.prompt_logprobs or ()
    encoded, offsets[index] = shape.logprobs(first_ids or (), scored, logprobs, offsets.get(index, 0))
    with_ids = shape.body.return_token_ids
    choice = {
        "index": index,
        "text": text,
        "logprobs": encoded if encoded is not None and encoded["tokens"] else None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
        "prompt_token_ids": list(first_ids) if with_ids and first_ids is not None else None,
        "token_ids": token_ids if with_ids else None,
    }
    chunk = shape.head.as_kind("text_completion") | {"choices": [choice]}
    if delta.finish_reason is not None and not shape.body.includes_usage:
        chunk["system_fingerprint"] = shape.head.fingerprint
    chunk["usage"] = count.so_far(prompt, index) if shape.body.continuous_usage else None
    return event(chunk)
