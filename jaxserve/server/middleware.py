"""What happens around every request: the size of its body is bounded, and the HTTP metrics are counted.

Plain ASGI: no task and no buffer is put between a stream and its client.
"""

from __future__ import annotations

import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.errors import error_response
from jaxserve.server.metrics import HttpMetrics

BODY_BYTES_MAX = 8 << 20   # a million token ids or two million words


class BodyLimit:
    """Refuses bodies over `bytes_max`, whether their length is declared or they come in chunks."""

    def __init__(self, app: ASGIApp, *, bytes_max: int = BODY_BYTES_MAX) -> None:
        self._app = app
        self._bytes_max = bytes_max
        self._message = f"The request body is larger than {bytes_max} bytes, the most that is accepted."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _declared_length(scope) > self._bytes_max:
            headers = {"Connection": "close"}   # the rest of the body is not read
            await error_response(self._message, "Bad Request", 413, None, **headers)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._bytes_max:
                raise HTTPException(413, self._message, headers={"Connection": "close"})
            return message

        await self._app(scope, counted, send)


class HttpCounting:
    """Feeds `HttpMetrics`; the handler's label is the route's template, so that labels stay few."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s = time.perf_counter()
        status, sent = 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.note(
                handler=handler, method=scope["method"], status=status, seconds=time.perf_counter() - begin_s,
                received=_declared_length(scope), sent=sent,
            )


def _declared_length(scope: Scope) -> int:
    """0 where the body comes in chunks, or what is declared is no number (servers refuse that themselves)."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    return int(declared) if declared.isdigit() else 0
