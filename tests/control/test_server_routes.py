"""The small routes: model cards, tokenize and back, versions, health, the page, the schema."""

import pytest

from tests.control.server_calls import MESSAGES, call, complete
from tests.control.server_fakes import make_state


@pytest.fixture
def state():
    return make_state()


def test_model_cards():
    state = make_state(names=("tiny", "org/alias"))
    cards = call(state, "GET", "/v1/models").json()
    assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == ["tiny", "org/alias"]
    card = call(state, "GET", "/v1/models/org/alias").json()
    assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"]
    assert card["root"] == "/models/fake" and card["max_model_len"] == 64 and len(card["permission"]) == 1
    assert complete(state, model="org/alias").json()["model"] == "tiny"


def test_tokenize_and_back(state):
    reply = call(state, "POST", "/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert reply == {"count": 3, "max_model_len": 64, "tokens": [1, 97, 98], "token_strs": ["\x01", "a", "b"]}
    bare = call(state, "POST", "/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()
    assert bare["tokens"] == [97, 98] and bare["token_strs"] is None
    messages = call(state, "POST", "/tokenize", json={"messages": MESSAGES}).json()
    assert messages["tokens"] == list(b"u:hi|a:")
    assert call(state, "POST", "/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}


def test_small_routes(state):
    assert call(state, "GET", "/version").json() == {"version": state.version}
    assert call(state, "GET", "/load").json() == {"server_load": 0}
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        reply = call(state, method, path)
        assert (reply.status_code, reply.content) == (200, b"")
    page = call(state, "GET", "/")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"] and "jaxserve" in page.text
    assert "//cdn" not in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    schema = call(state, "GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "stream_options", "continue_final_message"} <= set(fields)
