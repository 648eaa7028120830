"""POST /start_profile and /stop_profile: a trace of the engine's steps. 404 unless the server has `--profile`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve.server.state import ServerState

router = APIRouter(tags=["profile"])


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    """200 and nothing once steps are traced."""
    state, folder = _enabled(request)
    await state.engine.profile(folder)
    return Response()


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """200 and nothing once the trace is written."""
    state, _ = _enabled(request)
    await state.engine.profile(None)
    return Response()


def _enabled(request: Request) -> tuple[ServerState, str]:
    state: ServerState = request.app.state.server
    folder = state.config.frontend.profile
    if folder is None:
        raise HTTPException(404, "Profiling is off, start the server with --profile FOLDER")
    return state, folder
