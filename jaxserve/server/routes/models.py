"""GET /v1/models and /v1/models/{id}: one card a served name."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.server.routes.json_route import json_response
from jaxserve.server.state import ServerState

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """What is served."""
    state: ServerState = request.app.state.server
    return json_response({"object": "list", "data": [_card(state, name) for name in state.served_names]})


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> Response:
    """One served name."""
    state: ServerState = request.app.state.server
    state.serving()
    state.check_model(name or "(no name)")
    return json_response(_card(state, name))


def _card(state: ServerState, name: str) -> dict[str, object]:
    permission = {
        "id": f"modelperm-{state.fingerprint[-8:]}", "object": "model_permission", "created": state.created_s,
        "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False,
        "allow_view": True, "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": state.created_s,
        "owned_by": "vllm",   # what gateways compare to tell this API's dialect
        "root": state.config.engine.model.model,
        "parent": None,
        "max_model_len": state.serving().info.max_model_len,
        "permission": [permission],
    }
