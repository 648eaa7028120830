"""Takes requests from Ray Serve's proxy and forwards each to a replica. No engine, no text, no jax.

Invariant: what happens to a replica shows as OpenAI's error object: 503 before a reply begins, an event in a stream
that has begun. Both may be tried again; only what that replica was answering is hit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.replicas.forwarding import Forwarded, Head, received, send_reply
from jaxserve.replicas.metrics import joined
from jaxserve.server.errors import error_object, error_response
from jaxserve.server.middleware import BodyLimit
from jaxserve.server.sse import event

logger = logging.getLogger("jaxserve.replicas")

LOST = "The replica that was answering is gone; the request can be sent again."
BUSY = "All replicas are busy; try again in a moment."
KIND = "Service Unavailable"
RETRY_S = "1"
METRICS_S_MAX = 5.0


class Front:
    """Forwards to `replicas`."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._streaming = replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return BodyLimit(self._answer)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = await received(scope, receive)
        if request.path == "/metrics" and request.method == "GET":
            await (await self._metrics())(scope, receive, send)
            return
        pieces = aiter(self._streaming.forward.remote(request))
        try:
            head = await anext(pieces)
        except (RayError, RayServeException, StopAsyncIteration) as error:
            logger.warning("%s %s: %s", request.method, request.path, _reason(error))
            message = BUSY if isinstance(error, BackPressureError) else LOST
            await error_response(message, KIND, 503, None, **{"Retry-After": RETRY_S})(scope, receive, send)
            return
        assert isinstance(head, Head)
        await send_reply(send, head, _said(pieces, head, request))

    async def _metrics(self) -> Response:
        """Of all replicas, each under its own label; of those that do not answer in time, nothing."""
        asked = self._replicas.broadcast("metrics")
        found = await asyncio.to_thread(asked.results, timeout_s=METRICS_S_MAX, return_exceptions=True)
        pages = dict(one for one in found if not isinstance(one, BaseException))
        return Response(joined(pages), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _said(pieces: AsyncIterator[Any], head: Head, request: Forwarded) -> AsyncIterator[bytes]:
    """The pieces, and in a stream the replica's end as an event; another reply is broken off, which clients see."""
    try:
        async for piece in pieces:
            yield piece
    except (RayError, RayServeException) as error:
        logger.warning("%s %s, after it had begun: %s", request.method, request.path, _reason(error))
        if not head.is_stream:
            raise
        yield event(error_object(LOST, KIND, 503))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
