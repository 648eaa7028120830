"""Every way to be refused: status, type, param and words; nothing known is dropped in silence."""

import asyncio

import pytest

from jaxserve.core.errors import EngineBusyError, EngineDeadError, EngineError
from jaxserve.server.middleware import BODY_BYTES_MAX
from tests.control.server_calls import MESSAGES, call, chat, complete, connect, error_of, events
from tests.control.server_fakes import LEN_MAX, make_state

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def state():
    return make_state()


def test_wrong_model(state):
    message = "The model `nope` does not exist. Valid aliases: tiny."
    for reply in (chat(state, model="nope"), complete(state, model="nope"), call(state, "GET", "/v1/models/nope")):
        assert error_of(reply) == (404, "NotFoundError", "model", message)
    assert chat(state, model="").status_code == chat(state, model=None).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3.0),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("n", 0),
        ("n", 129),
        ("min_tokens", 99),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", LEN_MAX + 1),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop_token_ids", [256]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", [""]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"999": 1}),
        ("logit_bias", {"1": 1, "01": 2}),
        ("truncate_prompt_tokens", 0),
        ("cache_salt", "a/b"),
        ("cache_salt", ""),
        ("cache_salt", "x" * 129),
        ("request_id", "a\nb"),
        ("prompt_logprobs", 21),
    ],
)
@pytest.mark.parametrize("ask", [chat, complete])
def test_range_errors(state, ask, field, value):
    extra = {"max_tokens": 5} if field == "min_tokens" else {}
    status, kind, param, message = error_of(ask(state, **{field: value}, **extra))
    assert (status, kind, param) == (400, "BadRequestError", field)
    assert field in message or field == "request_id"
    assert state.live_ids == set()


def test_verbatim_messages(state):
    assert (
        error_of(chat(state, temperature=3.0))[3]
        == "temperature must be in [0, 2], got 3.0. (parameter=temperature, value=3.0)"
    )
    assert error_of(chat(state, max_tokens=5000))[3] == (
        "max_tokens=5000 cannot be greater than max_model_len=64. Please request fewer output tokens. "
        "(parameter=max_tokens, value=5000)"
    )
    status, kind, param, message = error_of(complete(state, prompt="x" * 65))
    assert (status, kind, param) == (400, "BadRequestError", "input_tokens")
    assert message.startswith(
        "This model's maximum context length is 64 tokens. However, your prompt contains 65 input"
    )


@pytest.mark.parametrize(
    ("ask", "fields", "param"),
    [
        (chat, {"messages": []}, "messages"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        (chat, {"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
        (complete, {"logprobs": 21}, "logprobs"),
        (complete, {"logprobs": -2}, "logprobs"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
        (complete, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (chat, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (chat, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        (chat, {"temperature": 0, "n": 2}, "n"),
        (complete, {"prompt": ""}, "prompt"),
        (complete, {"prompt": ["a", ""]}, "prompt"),
        (complete, {"prompt": ["a"] * 1025}, "prompt"),
        (complete, {"prompt": [1, 256]}, "prompt"),
        (complete, {"prompt": [-1]}, "prompt"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        (chat, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages"),
        (chat, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
    ],
)
def test_combinations_that_make_no_sense(state, ask, fields, param):
    status, kind, found, _ = error_of(ask(state, **fields))
    assert (status, kind, found) == (400, "BadRequestError", param)


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "n",
        "seed",
        "max_tokens",
        "logprobs",
        "stream",
        "top_k",
        "stop",
        "logit_bias",
        "priority",
    ],
)
@pytest.mark.parametrize("value", ["1", [[]], {"a": {}}])
def test_types_are_strict(state, field, value):
    if field == "stop" and value == "1":
        value = 1
    status, kind, param, message = error_of(chat(state, **{field: value}))
    assert (status, kind) == (400, "Bad Request")
    assert param.startswith(f"body.{field}") and "validation error" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("temperature", True),
        ("max_tokens", 3.0),
        ("stream", 1),
        ("seed", 2**63),
        ("stop_token_ids", [True]),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("min_tokens", 1e3),
    ],
)
def test_booleans_and_fractions_are_not_integers(state, field, value):
    status, kind, param, _ = error_of(chat(state, **{field: value}))
    assert (status, kind) == (400, "Bad Request") and param.startswith(f"body.{field}")


@pytest.mark.parametrize(
    "text",
    [
        b'{"prompt":"a","temperature":NaN}',
        b'{"prompt":"a","temperature":Infinity}',
        b'{"prompt":"\\ud800"}',
        b'{"prompt":"a"',
        b"",
        b"\xff",
        b"[" * 5000,
    ],
)
def test_json_that_is_none(state, text):
    status, kind, param, _ = error_of(call(state, "POST", "/v1/completions", content=text, headers=JSON))
    assert (status, kind) == (400, "Bad Request") and param.startswith("body")


@pytest.mark.parametrize("text", [b"[]", b"null", b'"prompt"', b"5"])
def test_json_that_is_no_object(state, text):
    assert error_of(call(state, "POST", "/v1/completions", content=text, headers=JSON))[:2] == (400, "Bad Request")


def test_missing_field_in_words(state):
    reply = call(state, "POST", "/v1/chat/completions", json={"model": "tiny"})
    assert error_of(reply) == (
        400,
        "Bad Request",
        "body.messages",
        "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', "
        "'input': '<dict of 1 items>'}",
    )


def test_many_wrong_items_are_a_short_answer_at_once(state):
    status, kind, param, message = error_of(complete(state, stop_token_ids=["x"] * 300_000))
    assert (status, kind) == (400, "Bad Request") and param.startswith("body.stop_token_ids") and len(message) < 500
    message = error_of(
        chat(
            state,
            **dict.fromkeys(
                (
                    "temperature",
                    "top_p",
                    "n",
                    "seed",
                    "max_tokens",
                    "top_k",
                    "min_p",
                    "stream",
                    "priority",
                    "echo",
                    "min_tokens",
                ),
                "x",
            ),
        )
    )[3]
    assert message.startswith("11 validation errors") and message.count("{'type'") == 10


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/vnd.api+json", None])
def test_only_json_is_read(state, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        reply = call(state, "POST", path, content=b'{"prompt":"a"}', headers=headers)
        assert error_of(reply) == (
            400,
            "Bad Request",
            None,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
        )
    assert (
        call(
            state,
            "POST",
            "/v1/completions",
            content=b'{"prompt":"a"}',
            headers={"Content-Type": "Application/JSON; charset=utf-8"},
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nope", 404, "NotFoundError"),
        ("POST", "/nope", 404, "NotFoundError"),
        ("GET", "/v1/models/", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("DELETE", "/health", 405, "MethodNotAllowedError"),
        ("GET", "/v1/completions/", 404, "NotFoundError"),
    ],
)
def test_unknown_paths_and_methods(state, method, path, status, kind):
    assert error_of(call(state, method, path))[:2] == (status, kind)


def test_a_body_that_is_too_large_declared_or_in_chunks(state):
    async def chunks():
        for _ in range(BODY_BYTES_MAX // 2**20 + 1):
            yield b" " * 2**20

    for content in (b" " * (BODY_BYTES_MAX + 1), chunks()):
        status, _, _, message = error_of(call(state, "POST", "/v1/completions", content=content, headers=JSON))
        assert status == 413 and str(BODY_BYTES_MAX) in message
    fits = b'{"prompt":"a"' + b" " * (BODY_BYTES_MAX - 14) + b"}"
    assert call(state, "POST", "/v1/completions", content=fits, headers=JSON).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineBusyError("The engine is currently busy."), 503, "Service Unavailable"),
        (EngineDeadError("the engine is dead: x"), 503, "Service Unavailable"),
        (EngineError("the engine failed"), 500, "InternalServerError"),
        (ValueError("a secret of the host"), 500, "InternalServerError"),
    ],
)
def test_engine_errors_before_the_first_token(state, stream, error, status, kind):
    state.text_engine.fail_before = error
    for ask in (chat, complete):
        found = error_of(ask(state, stream=stream))
        assert found[:2] == (status, kind)
        assert ("secret" not in found[3]) and (status == 500 or found[3] == str(error))
    assert state.live_ids == set() and state.live_count == 0


@pytest.mark.parametrize("ask", [chat, complete])
def test_engine_errors_after_the_first_token(state, ask):
    for failure, message in (
        (EngineError("gone"), "gone"),
        ("non-finite logits", "non-finite logits"),
        (KeyError("secret"), None),
    ):
        state.text_engine.fail_after = (2, failure)
        last = events(ask(state, stream=True))[-1]
        assert last["error"]["type"] == "InternalServerError" and last["error"]["code"] == 500
        assert last["error"]["message"] == message or (message is None and "secret" not in last["error"]["message"])
        assert error_of(ask(state))[:2] == (500, "InternalServerError")
    assert state.live_ids == set() and state.live_count == 0


@pytest.mark.parametrize(
    ("phase", "detail", "words"),
    [
        ("starting", "", "starting"),
        ("compiling", "3 of 12", "compiling"),
        ("draining", "the server is shutting down", "no new"),
        ("dead", "out of memory", "out of memory"),
    ],
)
def test_before_and_after_serving_everything_that_computes_is_503(state, phase, detail, words):
    state.engine.status.phase, state.engine.status.detail = phase, detail
    posts = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
    bodies = {"messages": MESSAGES, "tokens": [1]}
    replies = [
        call(state, "POST", path, json=bodies | ({} if "chat" in path or "token" in path else {"prompt": "a"}))
        for path in posts
    ]
    replies += [call(state, "GET", path) for path in ("/v1/models", "/v1/models/tiny", "/health", "/ping")]
    for reply in replies:
        status, kind, _, message = error_of(reply)
        assert (status, kind) == (503, "Service Unavailable") and words in message and detail in message
    for path in ("/version", "/metrics", "/load", "/", "/openapi.json"):
        assert call(state, "GET", path).status_code == 200


def test_serving_without_a_tokenizer_yet_is_not_healthy(state):
    state.text_engine = None
    assert error_of(call(state, "GET", "/health"))[0] == 503 and error_of(complete(state))[0] == 503


def test_a_model_without_tokenizer_takes_and_gives_token_ids(state):
    state.text_engine.has_tokenizer = False
    assert error_of(chat(state))[:2] == (501, "NotImplementedError")
    assert error_of(complete(state, prompt="text"))[2] == "prompt"
    assert complete(state, prompt=[1, 2], return_token_ids=True).status_code == 200
    assert state.text_engine.seen[0].params.detokenize is False
    assert error_of(call(state, "POST", "/tokenize", json={"prompt": "a"}))[0] == 400


def test_a_model_without_chat_template_says_so(state):
    state.text_engine.has_chat_template = False
    status, _, param, message = error_of(chat(state))
    assert (status, param) == (400, "messages") and "--chat-template" in message


def test_one_bad_prompt_among_many_ends_the_others(state):
    state.text_engine.pause_s = 0.01
    assert error_of(complete(state, prompt=["a", "x" * 65, "b"]))[2] == "input_tokens"
    assert state.text_engine.live == set() and state.live_ids == set()


def test_equal_ids_of_two_live_requests_do_not_meet_in_the_engine(state):
    async def both():
        async with connect(state) as client:
            body = {"messages": MESSAGES, "request_id": "same", "max_tokens": 5}
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(3)))

    state.text_engine.pause_s = 0.005
    replies = asyncio.run(both())
    assert [reply.json()["id"] for reply in replies] == ["chatcmpl-same"] * 3
    assert len({request.request_id for request in state.text_engine.seen}) == 3
