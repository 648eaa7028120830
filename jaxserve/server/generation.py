"""Runs the prompts of one HTTP request on the text engine, side by side, and counts them. No JSON, no HTTP.

Invariant: closing the stream aborts whatever of it still runs; ids are given back however it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from jaxserve.core.errors import EngineBusyError, EngineError
from jaxserve.core.request import FinishReason
from jaxserve.core.text_request import PositionLogprobs, TextDelta, TextRequest
from jaxserve.server.request_log import log_request
from jaxserve.server.request_metrics import RequestWatch
from jaxserve.server.state import ServerState

PENDING_BATCHES_MAX = 256   # between the prompts of one request and its writer

Batch = tuple[int, list[TextDelta]]   # which prompt, what is new for its choices


async def generate(state: ServerState, requests: Sequence[TextRequest]) -> AsyncGenerator[Batch]:
    """Batches of all prompts as they come. Raises RequestError or EngineError subclasses; one failure ends them all."""
    state.live_count += 1
    try:
        streams = [_watched(state, request) for request in requests]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for deltas in stream:
                    yield 0, deltas
        else:
            async with aclosing(_merged(streams)) as merged:
                async for batch in merged:
                    yield batch
    finally:
        state.live_count -= 1


async def _watched(state: ServerState, request: TextRequest) -> AsyncGenerator[list[TextDelta]]:
    """One prompt's deltas, counted on the way; a choice that failed is an error of the whole request."""
    engine = state.serving()
    request = replace(request, request_id=state.claim_id(request.request_id))
    watch = RequestWatch(state.request_metrics, request)
    try:
        log_request(state, request)
        async with aclosing(engine.stream(request, watch.taken_by)) as stream:
            async for deltas in stream:
                watch.note(deltas)
                watch.note_step(state.engine.engines)
                failed = next((delta for delta in deltas if delta.finish_reason == "error"), None)
                if failed is not None:
                    raise EngineError(failed.error or "the engine could not finish this request")
                yield deltas
    except EngineBusyError:
        state.metrics.rejections.labels(state.model_name, "max_num_queued_reqs").inc()
        raise
    except (asyncio.CancelledError, GeneratorExit):
        watch.abort()
        raise
    finally:
        watch.close()
        state.live_ids.discard(request.request_id)


async def _merged(streams: Sequence[AsyncGenerator[list[TextDelta]]]) -> AsyncGenerator[Batch]:
    """Whatever comes first, from whichever stream. The first error ends all."""
    queue: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(PENDING_BATCHES_MAX)

    async def pump(index: int, stream: AsyncGenerator[list[TextDelta]]) -> None:
        try:
            async with aclosing(stream):
                async for deltas in stream:
                    await queue.put((index, deltas))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    open_count = len(pumps)
    try:
        while open_count:
            item = await queue.get()
            if item is None:
                open_count -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass(slots=True)
class ChoiceResult:
    """One finished choice. Mutable while it is collected."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class PromptResult:
    """One prompt and its finished choices. Mutable while it is collected."""

    choices: list[ChoiceResult]
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    cached_token_count: int = 0


async def collect(batches: AsyncIterator[Batch], prompt_count: int, choice_count: int) -> list[PromptResult]:
    """Everything, once it is finished; for replies that do not stream."""
    results = [PromptResult([ChoiceResult() for _ in range(choice_count)]) for _ in range(prompt_count)]
    texts: dict[tuple[int, int], list[str]] = {}
    async for index, deltas in batches:
        result = results[index]
        for delta in deltas:
            choice = result.choices[delta.choice]
            texts.setdefault((index, delta.choice), []).append(delta.text)
            choice.token_ids += delta.token_ids
            choice.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.choice == 0 and delta.prompt_token_ids is not None:
                result.prompt_token_ids = delta.prompt_token_ids
                result.prompt_logprobs = delta.prompt_logprobs
                result.cached_token_count = delta.cached_token_count
    for (index, at), parts in texts.items():
        results[index].choices[at].text = "".join(parts)
    return results
