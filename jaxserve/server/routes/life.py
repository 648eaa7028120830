"""How the server is: /health, /ping, /version, /load, /metrics, and the playground page. All but /load are open."""

from __future__ import annotations

from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, Response

from jaxserve.server.errors import error_response
from jaxserve.server.routes.json_route import json_response
from jaxserve.server.state import ServerState

router = APIRouter(tags=["life"])

# The page may talk to its own server only, and nothing else may put it in a frame.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    """200 and nothing while requests are served, else 503 and why."""
    reason = request.app.state.server.why_not_serving
    return Response() if reason is None else error_response(reason, "Service Unavailable", 503)


@router.get("/version")
async def version(request: Request) -> Response:
    """The package's version."""
    return json_response({"version": request.app.state.server.version})


@router.get("/load")
async def load(request: Request) -> Response:
    """HTTP requests that compute right now."""
    return json_response({"server_load": request.app.state.server.live_count})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    state: ServerState = request.app.state.server
    return Response(state.metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """A chat page for people."""
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"})


@cache
def _page() -> str:
    return resources.files("jaxserve.server").joinpath("playground.html").read_text(encoding="utf-8")
