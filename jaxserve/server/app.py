"""Joins routes, middleware and error shapes into one ASGI app. Knows where things go, not what they do.

Order from the outside: CORS (its replies, errors included, must be readable in a browser), HTTP metrics,
authentication, the body limit, routes. Invariant: nothing that computes is reached without passing authentication.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from jaxserve.server.auth import Authentication
from jaxserve.server.errors import install_error_handlers
from jaxserve.server.middleware import BodyLimit, HttpCounting
from jaxserve.server.routes import chat, completions, life, models, profile, tokens
from jaxserve.server.state import ServerState
from jaxserve.server.stats_log import log_stats

__all__ = ["ServerState", "create_app"]


def create_app(state: ServerState) -> FastAPI:
    """The whole API of one server; answers from its first moment, with 503 where an engine is needed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(log_stats(state.engine), name="stats log")
        yield
        task.cancel()

    frontend = state.config.frontend
    layers = [Middleware(HttpCounting, metrics=state.metrics.http)]
    if frontend.allowed_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(frontend.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
        layers.insert(0, cors)
    if frontend.api_key:
        layers.append(Middleware(Authentication, keys=frontend.api_key))
    layers.append(Middleware(BodyLimit))
    app = FastAPI(
        title="jaxserve", version=state.version, middleware=layers, lifespan=lifespan, redirect_slashes=False
    )
    app.state.server = state
    install_error_handlers(app)
    for part in (life, chat, completions, models, tokens, profile):
        app.include_router(part.router)
    return app
