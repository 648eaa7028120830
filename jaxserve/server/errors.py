"""Exceptions to the error object that OpenAI's clients read. The only place that knows status codes.

Invariant: every reply that is not 2xx has `{"error": {"message", "type", "param", "code"}}` with code = HTTP status.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve.core.errors import (
    EngineBusyError,
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    JaxserveError,
    RequestError,
    UnknownModelError,
)

logger = logging.getLogger("jaxserve.server")

VALIDATION_ERRORS_MAX = 10
_INPUT_CHARS_MAX = 80
_INTERNAL = "Internal server error: the server's log has the details."
_HTTP_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError"}


class NoChatError(JaxserveError):
    """The served model cannot chat at all."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody will read the reply."""


def error_object(message: str, kind: str, code: int, param: str | None = None) -> dict[str, dict[str, object]]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(message: str, kind: str, code: int, param: str | None = None, **headers: str) -> Response:
    body = orjson.dumps(error_object(message, kind, code, param))
    return Response(body, code, headers, media_type="application/json")


def describe(error: Exception) -> tuple[str, str, int, str | None]:
    """Message, type, status and param. Whatever was not raised on purpose stays unspecific for the client."""
    if isinstance(error, UnknownModelError):
        return str(error), "NotFoundError", 404, error.param
    if isinstance(error, RequestError):
        return str(error), "BadRequestError", 400, error.param
    if isinstance(error, (EngineBusyError, EngineNotReadyError, EngineDeadError)):
        return str(error), "Service Unavailable", 503, None
    if isinstance(error, NoChatError):
        return str(error), "NotImplementedError", 501, None
    if isinstance(error, EngineError):
        return str(error), "InternalServerError", 500, None
    return _INTERNAL, "InternalServerError", 500, None


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(JaxserveError, _on_own)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientGoneError, _on_gone)
    app.add_exception_handler(Exception, _on_bug)


async def _on_own(request: Request, error: Exception) -> Response:
    message, kind, code, param = describe(error)
    if code == 500:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    return error_response(message, kind, code, param)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = invalid_message(error.errors())
    return error_response(message, "Bad Request", 400, param)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _HTTP_TYPES.get(error.status_code, "Bad Request")
    message = error.detail
    if error.status_code in (404, 405):
        message = f"{error.detail}: {request.method} {request.url.path}"
    return error_response(message, kind, error.status_code, None, **(error.headers or {}))


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)   # for the log and metrics; nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    message, kind, code, param = describe(error)
    return error_response(message, kind, code, param)


def invalid_message(errors: Sequence[object]) -> tuple[str, str | None]:
    """The text and the first field's path for what pydantic found."""
    lines = [f"{len(errors)} validation error{'s' if len(errors) != 1 else ''}:"]
    param = None
    for error in errors[:VALIDATION_ERRORS_MAX]:
        if not isinstance(error, dict):
            lines.append(f"  {error}")
            continue
        where = ".".join(str(part) for part in error["loc"])
        param = param or where
        shown = {"type": error["type"], "loc": where, "msg": error["msg"], "input": _summary(error.get("input"))}
        lines.append(f"  {shown}")
    if len(errors) > VALIDATION_ERRORS_MAX:
        lines.append(f"  ... and {len(errors) - VALIDATION_ERRORS_MAX} more")
    return "\n".join(lines), param


def _summary(value: object) -> object:
    """Enough of a value to recognise it: a client's whole prompt does not belong in an error."""
    if isinstance(value, (dict, list)):
        return f"<{type(value).__name__} of {len(value)} items>"
    if isinstance(value, str) and len(value) > _INPUT_CHARS_MAX:
        return f"{value[:_INPUT_CHARS_MAX]}... <{len(value)} characters>"
    return value
