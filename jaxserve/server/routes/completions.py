"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.core.errors import RequestError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.text_request import TextRequest
from jaxserve.server.completion_reply import CompletionShape, completion_chunks, completion_object
from jaxserve.server.connection import while_connected
from jaxserve.server.convert import base_request_id, check_shared, check_token_ids, sampling_params
from jaxserve.server.generation import collect, generate
from jaxserve.server.protocol.completions import PROMPTS_MAX, CompletionRequest
from jaxserve.server.protocol.refused import check_supported
from jaxserve.server.reply import Head
from jaxserve.server.routes.json_route import JsonRoute, json_response
from jaxserve.server.sse import event_stream
from jaxserve.server.state import ServerState

if TYPE_CHECKING:
    from jaxserve.text_engine import TextEngine

MAX_TOKENS_DEFAULT = 16   # OpenAI's
router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues one prompt or many."""
    arrival_s = time.monotonic()
    state: ServerState = request.app.state.server
    engine = state.serving()
    state.check_model(body.model)
    check_supported(body.model_extra, choices=body.n or 1)
    check_shared(body)
    _check_prompts(body, engine)
    params = _params(body, engine)
    response_id = f"cmpl-{base_request_id(body, request)}"
    requests = [
        TextRequest(
            request_id=f"{response_id}-{index}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else tuple(prompt),
            params=params,
            add_special_tokens=body.add_special_tokens is not False,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            arrival_s=arrival_s,
        )
        for index, prompt in enumerate(body.prompts)
    ]
    shape = CompletionShape(
        head=Head(id=response_id, model=state.model_name, fingerprint=state.fingerprint),
        body=body,
        choice_count=params.n,
        echo_text=_echo_text(body, engine),
        token_text=engine.token_text,
        hides_completion=bool(body.echo) and body.max_tokens == 0,
        shows_cached=state.config.frontend.enable_prompt_tokens_details,
    )
    batches = generate(state, requests)
    if body.streams:
        return await event_stream(request, completion_chunks(shape, batches))
    results = await while_connected(request.receive, collect(batches, len(requests), params.n))
    return json_response(completion_object(shape, results))


def _check_prompts(body: CompletionRequest, engine: TextEngine) -> None:
    prompts = body.prompts
    if len(prompts) > PROMPTS_MAX:
        raise RequestError(f"prompt may hold at most {PROMPTS_MAX} prompts, got {len(prompts)}.", param="prompt")
    if any(not prompt for prompt in prompts):
        raise RequestError("prompt must not be empty.", param="prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        check_token_ids(prompt, engine.info.vocab_size, param="prompt")
    if not engine.has_tokenizer and (body.echo or any(isinstance(prompt, str) for prompt in prompts)):
        raise RequestError("this model is served without a tokenizer: prompts are ids, without echo.", param="prompt")


def _params(body: CompletionRequest, engine: TextEngine) -> SamplingParams:
    """`echo` with logprobs scores the prompt too; with max_tokens=0 it does only that."""
    max_tokens = MAX_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    if body.echo and max_tokens == 0:
        max_tokens = 1   # the engine always samples once; the reply hides it
    scores = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        asked = (body.logprobs, body.logprobs if scores is None else scores)
        scores = -1 if -1 in asked else max(asked)
    return sampling_params(
        body, engine.default_params, max_tokens=max_tokens, max_model_len=engine.info.max_model_len,
        logprobs=body.logprobs, prompt_logprobs=scores, detokenize=engine.has_tokenizer,
    )


def _echo_text(body: CompletionRequest, engine: TextEngine):
    prompts = body.prompts

    def echo_text(index: int, token_ids: Sequence[int]) -> str:
        """The prompt as it was sent; where only ids were, or a part of it was dropped, the text of the ids taken."""
        prompt = prompts[index]
        if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
            return prompt
        return engine.decode(list(token_ids))

    return echo_text
