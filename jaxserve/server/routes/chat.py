"""POST /v1/chat/completions."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.core.errors import RequestError
from jaxserve.core.text_request import TextRequest
from jaxserve.server.chat_reply import ChatShape, chat_chunks, chat_object
from jaxserve.server.connection import while_connected
from jaxserve.server.convert import base_request_id, check_shared, sampling_params, template_messages
from jaxserve.server.errors import NoChatError
from jaxserve.server.generation import collect, generate
from jaxserve.server.protocol.chat import ChatCompletionRequest
from jaxserve.server.protocol.refused import check_supported
from jaxserve.server.rendering import Rendering, render
from jaxserve.server.reply import Head
from jaxserve.server.routes.json_route import JsonRoute, json_response
from jaxserve.server.sse import event_stream
from jaxserve.server.state import ServerState

router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Continues a conversation."""
    arrival_s = time.monotonic()
    state: ServerState = request.app.state.server
    engine = state.serving()
    state.check_model(body.model)
    if not engine.has_tokenizer:
        raise NoChatError("The model does not support Chat Completions API: it is served without a tokenizer.")
    check_supported(body.model_extra, choices=body.n or 1)
    check_shared(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = sampling_params(
        body, engine.default_params, max_tokens=max_tokens, max_model_len=engine.info.max_model_len,
        logprobs=_logprobs(body), prompt_logprobs=body.prompt_logprobs, detokenize=True,
    )
    messages = template_messages(body.messages)
    prompt = await render(engine, messages, Rendering.of(body))
    response_id = f"chatcmpl-{base_request_id(body, request)}"
    text_request = TextRequest(
        request_id=response_id, prompt=prompt, params=params,
        add_special_tokens=bool(body.add_special_tokens), truncate_prompt_tokens=body.truncate_prompt_tokens,
        priority=body.priority or 0, cache_salt=body.cache_salt, arrival_s=arrival_s,
    )
    shape = _shape(state, body, response_id, messages, prompt)
    batches = generate(state, [text_request])
    if body.streams:
        return await event_stream(request, chat_chunks(shape, batches))
    results = await while_connected(request.receive, collect(batches, 1, params.n))
    return json_response(chat_object(shape, results[0]))


def _logprobs(body: ChatCompletionRequest) -> int | None:
    """How many alternatives the engine is asked for."""
    top = body.top_logprobs or 0
    if top < -1:
        raise RequestError(f"top_logprobs must be at least 0, or -1 for all, got {top}.", param="top_logprobs")
    if top and not body.logprobs:
        raise RequestError("when using top_logprobs, logprobs must be set to true.", param="top_logprobs")
    return top if body.logprobs else None


def _shape(
    state: ServerState, body: ChatCompletionRequest, response_id: str, messages: list[dict[str, object]], prompt: str
) -> ChatShape:
    continues = bool(body.continue_final_message) or body.add_generation_prompt is False
    role = str(messages[-1]["role"]) if continues else "assistant"
    return ChatShape(
        head=Head(id=response_id, model=state.model_name, fingerprint=state.fingerprint),
        body=body,
        role=role,
        prefix=str(messages[-1]["content"]) if body.echo and continues else "",
        prompt_text=prompt if body.return_prompt_text else None,
        shows_cached=state.config.frontend.enable_prompt_tokens_details,
    )
