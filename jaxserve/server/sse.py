"""Server-sent events: one write a batch, errors after the first write as events, an end that is always said.

Invariant: nothing is sent before the first batch is there, so whatever goes wrong up to then is a plain HTTP error;
a stream that began ends with `data: [DONE]` unless the client left.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import orjson
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.core.errors import JaxserveError
from jaxserve.server.connection import while_connected
from jaxserve.server.errors import ClientGoneError, describe, error_object

logger = logging.getLogger("jaxserve.server")

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def event_stream(request: Request, batches: AsyncGenerator[bytes]) -> Response:
    """A response that has its first batch already. Raises what `batches` raises before that."""
    try:
        first = await while_connected(request.receive, _next(batches))
    except BaseException:
        await batches.aclose()
        raise
    return EventStream(first, batches)


class EventStream(Response):
    """Writes batches as they come and closes their source when the client goes."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}   # proxies must not hold tokens back
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except (ClientGoneError, OSError):
            pass   # nobody is left to tell; the source is closed, which aborts the request

    async def _write(self, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for batch in _said_errors(self._rest):
                await send({"type": "http.response.body", "body": batch, "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _said_errors(batches: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The batches, and the error that ends them, if one does, as an event: the status line is long gone."""
    try:
        async for batch in batches:
            yield batch
    except Exception as error:
        if isinstance(error, JaxserveError):
            logger.error("a stream ended early: %s", error)
        else:
            logger.exception("a stream ended early")
        yield event(error_object(*describe(error)))


async def _next(batches: AsyncGenerator[bytes]) -> bytes:
    return await anext(batches)
