"""Work for a client goes on only while the client is there. Knows ASGI's `receive` and nothing of what the work is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

from jaxserve.server.errors import ClientGoneError

T = TypeVar("T")


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client closes its connection.

    The body must have been read already: what `receive` still says is only the end of the connection.
    Raises ClientGoneError when that came first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)   # cleaned up before anyone goes on


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
