"""A whole server inside a process of Ray's: engine process, text, and the app that answers forwarded requests.

Ray starts it, asks for its health, ends its process once its requests are done, and starts another where it died. The
engine process ends with it (`supervisor`).
Invariant: it is ready once its engine serves, and unhealthy once its engine cannot be had any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message

from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import EngineDeadError
from jaxserve.logs import configure_logging
from jaxserve.replicas.forwarding import Forwarded, Head, head_of
from jaxserve.serving import Serving


class Replica:
    """One engine and its app. Mutable: owns the engine process."""

    async def __init__(self, config: ServeConfig) -> None:
        from jaxserve.server.app import create_app

        configure_logging(config.frontend.log_level)
        self._serving = Serving(config)
        self._app = create_app(self._serving.state)
        self._life = asyncio.create_task(self._serving.run(), name="engine")
        text = asyncio.create_task(self._serving.open_text(), name="text")
        await asyncio.wait([self._life, text], return_when=asyncio.FIRST_COMPLETED)
        if self._life.done():
            text.cancel()
            self._life.result()     # raises why there is no engine
        text.result()

    async def forward(self, request: Forwarded) -> AsyncIterator[Head | bytes]:
        """The reply's head, then its body in pieces; those that wait for the reader go as one."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        is_gone, given = asyncio.Event(), [False]

        async def receive() -> Message:
            if not given[0]:
                given[0] = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(request.scope(), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while True:
                some = [await messages.get()]
                while not messages.empty():
                    some.append(messages.get_nowait())
                body = bytearray()
                for message in some:
                    if message is not None and message["type"] == "http.response.start":
                        yield head_of(message)
                    elif message is not None:
                        body += message.get("body", b"")
                if body:
                    yield bytes(body)
                if some[-1] is None:
                    break
            await task
        finally:        # also when the client has left, which ends this generator
            is_gone.set()
            if not task.done():
                task.cancel()

    def metrics(self) -> tuple[str, str]:
        """This replica's name, and its page at /metrics."""
        from ray import serve

        return serve.get_replica_context().replica_id.unique_id, self._serving.state.metrics.page().decode()

    async def check_health(self) -> None:
        """Raises once the engine is gone for good: Ray then replaces this replica."""
        if self._life.done():
            error = None if self._life.cancelled() else self._life.exception()
            raise EngineDeadError(f"the engine is gone: {error}")

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router wants to know: tokens that the pages hold, and rows."""
        info = self._serving.engine.info
        return {"slots": info.page_count * info.page_size, "rows": info.row_count}
