"""What goes from a front to a replica and back: a request whole, its reply as a head and pieces. Knows no Ray.

Invariant: keys are of the beginning of what the model will read, so that equal keys mean equal prompts up to there;
of how it was written, not of its tokens, which only a replica's tokenizer knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
from starlette.types import Message, Receive, Scope, Send

KEY_BYTES = 256         # of a prompt's text for each key: some 60 tokens of English
KEYS_MAX = 4096         # of a prompt: what comes after a million bytes chooses nothing


@dataclass(frozen=True, slots=True)
class Forwarded:
    """An HTTP request. `keys` are of its prompt's beginning, see `prompt_keys`."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    client: tuple[str, int] | None
    keys: tuple[bytes, ...]

    def scope(self) -> Scope:
        """As an ASGI server would give it."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "query_string": self.query,
            "root_path": "", "headers": list(self.headers), "client": self.client, "server": None, "state": {},
        }


@dataclass(frozen=True, slots=True)
class Head:
    """How a reply begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    @property
    def is_stream(self) -> bool:
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self.headers)


async def received(scope: Scope, receive: Receive) -> Forwarded:
    """The whole request."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    client = scope.get("client")
    return Forwarded(
        method=scope["method"], path=scope["path"].removeprefix(scope.get("root_path", "")) or "/",
        query=scope.get("query_string", b""), headers=tuple((bytes(k), bytes(v)) for k, v in scope["headers"]),
        body=bytes(body), client=tuple(client) if client else None, keys=prompt_keys(bytes(body)),
    )


def prompt_keys(body: bytes) -> tuple[bytes, ...]:
    """A key for each full KEY_BYTES of a request's prompt, which stands for all before it; none where there is none."""
    try:
        asked = orjson.loads(body)
        prompt = asked.get("messages") or asked.get("prompt") or asked.get("input")
        if prompt is None:
            return ()
        text = orjson.dumps(prompt).removesuffix(b"]")
        previous = orjson.dumps([asked.get(name) for name in ("model", "cache_salt", "tools")])
    except (ValueError, AttributeError, TypeError):
        return ()
    keys: list[bytes] = []
    for start in range(0, min(len(text), KEYS_MAX * KEY_BYTES) - KEY_BYTES + 1, KEY_BYTES):
        previous = hashlib.blake2b(previous + text[start : start + KEY_BYTES], digest_size=16).digest()
        keys.append(previous)
    return tuple(keys)


async def send_reply(send: Send, head: Head, pieces: AsyncIterator[bytes]) -> None:
    """A reply to whoever asked."""
    await send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def head_of(message: Message) -> Head:
    return Head(message["status"], tuple((bytes(k), bytes(v)) for k, v in message.get("headers", ())))
