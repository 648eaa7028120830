"""Who may call: default-deny before routing. Knows no route but the open ones.

Invariant: with keys set, a request passes only if it carries one of them or its raw path is, byte for byte, an open
one; so nothing that a router, a mount or a percent-decoder does later can open a path. Keys are compared as hashes,
all of them, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import error_response

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/metrics"})


class Authentication:
    """ASGI middleware: 401 unless `Authorization: Bearer <one of keys>`."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._hashes = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        message = "This server needs an API key: send `Authorization: Bearer <key>` with one of its keys."
        headers = {"WWW-Authenticate": "Bearer"}
        await error_response(message, "AuthenticationError", 401, None, **headers)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        hashed = _hash(key.strip())
        matches = [hmac.compare_digest(hashed, known) for known in self._hashes]
        return any(matches)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_open(scope: Scope) -> bool:
    """Decided on the raw path; the decoded one must agree. A prefix set by `--root-path` is taken off both."""
    if scope["type"] != "http":
        return False
    path = get_route_path(scope)
    raw = scope.get("raw_path") or scope["path"].encode()
    return path in OPEN_PATHS and raw.split(b"?")[0] in (path.encode(), scope["path"].encode())
