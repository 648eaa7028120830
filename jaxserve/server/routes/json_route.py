"""How a body is read: only JSON, decoded by orjson, which refuses NaN, infinities and lone surrogates."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

_MEDIA = "Unsupported Media Type: Only 'application/json' is allowed"


class JsonRoute(APIRoute):
    """A route whose POST bodies are `application/json`, by name."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise RequestValidationError([_MEDIA])
            return await handle(_OrjsonRequest(request.scope, request.receive))

        return handle_json


class _OrjsonRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())   # its JSONDecodeError is a json.JSONDecodeError


def json_response(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
