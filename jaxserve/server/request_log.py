"""`--enable-log-requests`: one line for each prompt, with what was asked but not the prompt's text beyond its start."""

from __future__ import annotations

import logging

from jaxserve.core.text_request import TextRequest
from jaxserve.server.state import ServerState

logger = logging.getLogger("jaxserve.requests")

PROMPT_CHARS_MAX = 200


def log_request(state: ServerState, request: TextRequest) -> None:
    if not state.config.frontend.enable_log_requests:
        return
    if request.prompt is not None:
        shown = repr(request.prompt[:PROMPT_CHARS_MAX]) + ("..." if len(request.prompt) > PROMPT_CHARS_MAX else "")
    else:
        shown = f"<{len(request.prompt_token_ids or ())} token ids>"
    logger.info("Received request %s: prompt: %s, params: %s", request.request_id, shown, request.params)
