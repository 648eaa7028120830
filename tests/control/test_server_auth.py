"""With keys set every path is closed but five; no spelling of a path opens another."""

import asyncio

import pytest

from jaxserve.server.app import create_app
from tests.control.server_calls import MESSAGES, call, chat, error_of
from tests.control.server_fakes import make_state

KEYS = ("first-key", "zweiter-schlüssel")
OFF = {"/nope", "/start_profile", "/stop_profile"}     # no such page, or off without their flag
OPEN = {"/", "/health", "/ping", "/version", "/metrics"}
BODIES = {"prompt": "a", "messages": MESSAGES, "tokens": [97]}


@pytest.fixture
def state():
    return make_state(api_key=KEYS)


def routes(state) -> list[tuple[str, str]]:
    """Every path and method there is, the documentation's included."""
    schema = create_app(state).openapi()["paths"]
    pairs = [(method.upper(), path.replace("{name}", "tiny")) for path, methods in schema.items() for method in methods]
    return [*pairs, ("GET", "/"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/nope")]


def test_every_route_but_five_needs_a_key(state):
    pairs = routes(state)
    assert len(pairs) >= 15
    for method, path in pairs:
        options = {
            "json": {key: BODIES[key] for key in (("prompt",) if path in ("/tokenize", "/v1/completions") else BODIES)}
        }
        options = options if method == "POST" else {}
        without = call(state, method, path, **options)
        if path in OPEN:
            assert without.status_code == 200, path
            continue
        assert error_of(without)[:3] == (401, "AuthenticationError", None), path
        assert without.headers["www-authenticate"] == "Bearer"
        for key in KEYS:
            headers = {"Authorization": b"Bearer " + key.encode()}
            reply = call(state, method, path, headers=headers, **options)
            assert reply.status_code == (404 if path in OFF else 200), (path, reply.text)
    assert {path for _, path in pairs} >= OPEN


@pytest.mark.parametrize(
    "value",
    [
        "",
        "first-key",
        "Basic first-key",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer FIRST-KEY",
        "Bearer first-key,first-key",
        "Token first-key",
        "Bearerfirst-key",
    ],
)
def test_wrong_keys(state, value):
    assert call(state, "GET", "/v1/models", headers={"Authorization": value}).status_code == 401


@pytest.mark.parametrize("value", ["Bearer first-key", "bearer first-key", "BEARER   first-key "])
def test_right_keys(state, value):
    assert call(state, "GET", "/v1/models", headers={"Authorization": value}).status_code == 200


def test_two_authorization_headers_are_none(state):
    headers = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer first-key")]
    assert call(state, "GET", "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/./v1/models",
        "/health/../v1/models",
        "/%76%31/models",
        "/health/",
        "/health%2f",
        "//health",
        "/HEALTH",
        "/metrics/x",
        "/%68ealth",
        "/health;x",
        "/v1/models?/health",
        "/v1/models#/health",
        "/docs/oauth2-redirect",
    ],
)
def test_no_spelling_opens_a_path(state, path):
    sent = []

    async def ask():
        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        from urllib.parse import unquote

        raw = path.encode().split(b"?")[0]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": unquote(raw.decode()),
            "raw_path": raw,
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("1.1.1.1", 1),
            "server": ("server", 80),
        }
        await create_app(state)(scope, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 401


def test_a_query_does_not_close_an_open_path(state):
    assert call(state, "GET", "/health?verbose=1").status_code == 200


@pytest.mark.parametrize("root", ["", "/prefix"])
def test_a_prefix_changes_nothing(state, root):
    """uvicorn puts --root-path before the path it was asked for, and tells the app so."""
    sent = []

    async def ask(path):
        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        full = root + path
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": full,
            "raw_path": full.encode(),
            "query_string": b"",
            "root_path": root,
            "headers": [],
            "client": ("1.1.1.1", 1),
            "server": ("server", 80),
        }
        await create_app(state)(scope, receive, send)

    asyncio.run(ask("/health"))
    asyncio.run(ask("/v1/models"))
    assert [message["status"] for message in sent if "status" in message] == [200, 401]


def test_without_keys_any_key_is_fine():
    state = make_state()
    assert call(state, "GET", "/v1/models", headers={"Authorization": "Bearer EMPTY"}).status_code == 200


def test_cors_answers_preflights_and_marks_even_errors():
    state = make_state(api_key=KEYS, allowed_origins=("https://ui.example",))
    asked = {
        "Origin": "https://ui.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = call(state, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://ui.example"
    refused = call(state, "GET", "/v1/models", headers={"Origin": "https://ui.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://ui.example"
    other = call(state, "GET", "/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in chat(make_state(), max_tokens=1).headers
