"""POST /tokenize and /detokenize: the served model's tokenizer."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.core.errors import RequestError
from jaxserve.server.convert import check_token_ids, template_messages
from jaxserve.server.protocol.refused import check_supported
from jaxserve.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from jaxserve.server.rendering import Rendering, render
from jaxserve.server.routes.json_route import JsonRoute, json_response
from jaxserve.server.state import ServerState

router = APIRouter(route_class=JsonRoute, tags=["tokens"])
_NO_TOKENIZER = "this model is served without a tokenizer (--skip-tokenizer-init)."


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Text, or messages through the chat template, to token ids."""
    state: ServerState = request.app.state.server
    engine = state.serving()
    state.check_model(body.model)
    check_supported(body.model_extra)
    if not engine.has_tokenizer:
        raise RequestError(_NO_TOKENIZER, param="prompt")
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give exactly one of prompt and messages.", param="prompt")
    if body.messages is not None:
        text = await render(engine, template_messages(body.messages), Rendering.of(body))
    else:
        text = body.prompt or ""
    adds_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    ids = await engine.encode(text, add_special_tokens=adds_special)
    names = [engine.token_text(token) for token in ids] if body.return_token_strs else None
    return json_response(
        {"count": len(ids), "max_model_len": engine.info.max_model_len, "tokens": list(ids), "token_strs": names}
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Token ids to text."""
    state: ServerState = request.app.state.server
    engine = state.serving()
    state.check_model(body.model)
    if not engine.has_tokenizer:
        raise RequestError(_NO_TOKENIZER, param="tokens")
    check_token_ids(body.tokens, engine.info.vocab_size, param="tokens")
    return json_response({"prompt": engine.decode(body.tokens)})
