"""Calls to the app: under ASGI without a socket, or served by uvicorn; and what comes back, decoded."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from jaxserve.server.app import ServerState, create_app

MESSAGES = [{"role": "user", "content": "hi"}]


def connect(state: ServerState) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def call(state: ServerState, method: str, path: str, **options: object) -> httpx.Response:
    async def once() -> httpx.Response:
        async with connect(state) as client:
            return await client.request(method, path, **options)  # type: ignore[arg-type]

    return asyncio.run(once())


def chat(state: ServerState, **fields: object) -> httpx.Response:
    return call(state, "POST", "/v1/chat/completions", json={"messages": MESSAGES, **fields})


def complete(state: ServerState, **fields: object) -> httpx.Response:
    return call(state, "POST", "/v1/completions", json={"prompt": "abc", **fields})


def events(reply: httpx.Response) -> list[dict]:
    """The objects of a stream, which must end as streams do."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    parts = reply.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part[6:]) for part in parts[:-2]]


def error_of(reply: httpx.Response) -> tuple[int, str, str | None, str]:
    """Status, type, param and message, after a look at the shape."""
    body = reply.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"], reply.text
    error = body["error"]
    assert error["code"] == reply.status_code and error["message"]
    return reply.status_code, error["type"], error["param"], error["message"]


@contextmanager
def served(state: ServerState) -> Iterator[str]:
    """The app in a thread with its own event loop, until the block ends."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(state), log_level="error", lifespan="on", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
    assert not thread.is_alive()


def wait_for(is_true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
