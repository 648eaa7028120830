"""Replies key by key, and which option of a request changes what."""

import pytest

from tests.control.server_calls import MESSAGES, call, chat, complete, events
from tests.control.server_fakes import make_state


@pytest.fixture
def state():
    return make_state()


def test_chat_object_key_by_key(state):
    reply = chat(state, max_tokens=3).json()
    assert list(reply) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "service_tier",
        "system_fingerprint",
        "usage",
        "prompt_logprobs",
        "prompt_token_ids",
        "prompt_text",
        "kv_transfer_params",
        "ec_transfer_params",
        "metrics",
    ]
    assert reply["id"].startswith("chatcmpl-") and len(reply["id"]) == len("chatcmpl-") + 16
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny" and reply["created"] > 0
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Par",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        },
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
    }
    prompt = len("u:hi|a:")
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "total_tokens": prompt + 3,
        "completion_tokens": 3,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def test_completion_object_key_by_key(state):
    reply = complete(state, max_tokens=2).json()
    assert list(reply) == [
        "id",
        "object",
        "created",
        "model",
        "choices",
        "service_tier",
        "system_fingerprint",
        "usage",
        "kv_transfer_params",
        "ec_transfer_params",
        "metrics",
    ]
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion"
    assert reply["choices"] == [
        {
            "index": 0,
            "text": "Pa",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
    ]


def test_chat_stream_chunk_by_chunk(state):
    first, *middle, last = events(chat(state, max_tokens=3, stream=True))
    head = {key: first[key] for key in ("id", "object", "created", "model")}
    assert head["object"] == "chat.completion.chunk"
    assert first == head | {
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
        "prompt_token_ids": None,
    }
    assert middle == [
        head
        | {
            "choices": [
                {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, "token_ids": None}
            ]
        }
        for text in "Pa"
    ]
    assert last == head | {
        "choices": [
            {
                "index": 0,
                "delta": {"content": "r"},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "system_fingerprint": state.fingerprint,
    }


def test_completion_stream_chunk_by_chunk(state):
    first, last = events(complete(state, max_tokens=2, stream=True))
    head = {key: first[key] for key in ("id", "object", "created", "model")}
    choice = {
        "index": 0,
        "text": "P",
        "logprobs": None,
        "finish_reason": None,
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": None,
    }
    assert first == head | {"choices": [choice], "usage": None}
    assert last["choices"] == [choice | {"text": "a", "finish_reason": "length"}]


@pytest.mark.parametrize("ask", [chat, complete])
def test_stream_usage(state, ask):
    plain = ask(state, max_tokens=3, n=2).json()["usage"]
    *chunks, last = events(ask(state, max_tokens=3, n=2, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["system_fingerprint"] == state.fingerprint
    assert last["usage"] == {key: value for key, value in plain.items() if value is not None}
    assert plain["completion_tokens"] == 6
    assert all(chunk.get("usage") is None and "system_fingerprint" not in chunk for chunk in chunks)


@pytest.mark.parametrize("ask", [chat, complete])
def test_continuous_usage_counts_up(state, ask):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(ask(state, max_tokens=3, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([0, 1, 2, 3, 3] if ask is chat else [1, 2, 3, 3])
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


@pytest.mark.parametrize("ask", [chat, complete])
def test_choices_interleave_and_each_equals_its_unstreamed_twin(state, ask):
    plain = ask(state, max_tokens=4, n=3).json()["choices"]
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    order = []
    for chunk in events(ask(state, max_tokens=4, n=3, stream=True)):
        (choice,) = chunk["choices"]
        pieces[choice["index"]].append(choice["delta"]["content"] if ask is chat else choice["text"])
        order.append(choice["index"])
    texts = [choice["message"]["content"] if ask is chat else choice["text"] for choice in plain]
    assert ["".join(pieces[index]) for index in range(3)] == texts == ["Pari", "aris", "ris "]
    assert order == [0, 1, 2] * (5 if ask is chat else 4)


def test_several_prompts_are_numbered_prompt_by_prompt(state):
    reply = complete(state, prompt=["abc", "de"], n=2, max_tokens=2, echo=True).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == ["abcPa", "abcar", "dePa", "dear"]
    assert reply["usage"]["prompt_tokens"] == 5 and reply["usage"]["completion_tokens"] == 8
    texts = ["", "", "", ""]
    for chunk in events(complete(state, prompt=["abc", "de"], n=2, max_tokens=2, echo=True, stream=True)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["abcPa", "abcar", "dePa", "dear"]


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_every_form_of_a_prompt(state, prompt):
    choice = complete(state, prompt=prompt, max_tokens=1, echo=True, return_token_ids=True).json()["choices"][0]
    assert choice["text"] == "abP" and choice["prompt_token_ids"] == [97, 98] and choice["token_ids"] == [97, 98, 80]


def test_chat_logprobs(state):
    (choice,) = chat(state, max_tokens=1, logprobs=True, top_logprobs=2).json()["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "P",
                "logprob": -0.5,
                "bytes": [80],
                "top_logprobs": [
                    {"token": "P", "logprob": -0.5, "bytes": [80]},
                    {"token": "Q", "logprob": -9999.0, "bytes": [81]},
                ],
            }
        ]
    }
    (bare,) = chat(state, max_tokens=1, logprobs=True).json()["choices"]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []
    named = chat(state, max_tokens=1, logprobs=True, return_tokens_as_token_ids=True).json()["choices"][0]
    assert named["logprobs"]["content"][0]["token"] == "token_id:80"
    streamed = events(chat(state, max_tokens=1, logprobs=True, top_logprobs=2, stream=True))[-1]
    assert streamed["choices"][0]["logprobs"] == choice["logprobs"]


def test_echo_scores_the_prompt(state):
    (choice,) = complete(state, echo=True, logprobs=2, max_tokens=1).json()["choices"]
    assert choice["text"] == "abcP"
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2, 3],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "tokens": ["a", "b", "c", "P"],
        "top_logprobs": [None, {"b": -0.5, "c": -9999.0}, {"c": -0.5, "d": -9999.0}, {"P": -0.5, "Q": -9999.0}],
    }
    chunks = events(complete(state, echo=True, logprobs=2, max_tokens=2, stream=True))
    assert chunks[0]["choices"][0]["logprobs"] == choice["logprobs"]
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [4]
    assert chunks[0]["choices"][0]["text"] == "abcP"


def test_echo_without_tokens_scores_only_the_prompt(state):
    reply = complete(state, echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = reply["choices"]
    assert choice["text"] == "abc" and choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert reply["usage"]["completion_tokens"] == 1  # the engine had to sample one
    (chunk,) = events(complete(state, echo=True, logprobs=0, max_tokens=0, stream=True))
    assert chunk["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("ask", [chat, complete])
def test_prompt_logprobs_shape(state, ask):
    reply = ask(state, prompt_logprobs=1, max_tokens=1).json()
    scored = reply["prompt_logprobs"] if ask is chat else reply["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    ((token, entry),) = scored[1].items()
    assert token.isdigit() and list(entry) == ["logprob", "rank", "decoded_token"] and entry["rank"] == 1


def test_return_token_ids_in_chat(state):
    reply = chat(state, max_tokens=2, return_token_ids=True, return_prompt_text=True).json()
    assert reply["prompt_token_ids"] == list(b"u:hi|a:") and reply["prompt_text"] == "u:hi|a:"
    assert reply["choices"][0]["token_ids"] == list(b"Pa")
    first, *rest = events(chat(state, max_tokens=2, return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == list(b"u:hi|a:")
    assert [chunk["choices"][0]["token_ids"] for chunk in rest] == [[80], [97]]


def test_stop_string_and_its_reason(state):
    (choice,) = chat(state, stop=["s"]).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("Pari", "stop", "s")
    (choice,) = complete(state, stop="s", include_stop_str_in_output=True).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Paris", "stop", "s")
    last = events(chat(state, stop="s", stream=True))[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"], last["stop_reason"]) == ({"content": ""}, "stop", "s")


def test_what_the_client_says_reaches_the_engine(state):
    said = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 3,
        "min_tokens": 1,
        "stop_token_ids": [5],
        "bad_words": ["x"],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "allowed_token_ids": [1, 2],
    }
    complete(
        state,
        **said,
        logit_bias={"9": -3},
        max_tokens=4,
        priority=2,
        cache_salt="s",
        add_special_tokens=False,
        truncate_prompt_tokens=2,
    )
    (request,) = state.text_engine.seen
    for name, value in said.items():
        assert getattr(request.params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert request.params.logit_bias == ((9, -3.0),) and request.params.max_tokens == 4
    assert (request.priority, request.cache_salt, request.add_special_tokens) == (2, "s", False)
    assert request.truncate_prompt_tokens == 2 and request.arrival_s > 0


def test_defaults_request_over_model_over_openai(state):
    complete(state)
    chat(state)
    state.text_engine.default_params = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 8}
    complete(state, top_k=5)
    chat(state)
    chat(state, max_tokens=30)
    bare, bare_chat, tuned, capped, over = (request.params for request in state.text_engine.seen)
    assert (bare.temperature, bare.top_k, bare.max_tokens) == (1.0, 0, 16) and bare_chat.max_tokens is None
    assert (tuned.temperature, tuned.top_k, tuned.max_tokens) == (0.6, 5, 8)
    assert capped.max_tokens == 8 and over.max_tokens == 8


def test_max_completion_tokens_wins_over_its_old_name(state):
    assert chat(state, max_tokens=9, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_messages_reach_the_template_as_text(state):
    parts = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"}]
    messages = [
        {"role": "system", "content": "S", "name": "boss", "vendor": 1},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    chat(state, messages=messages, chat_template_kwargs={"a": 1}, reasoning_effort="none", max_tokens=1)
    (seen,) = state.text_engine.rendered
    assert seen["messages"] == [
        {"role": "system", "content": "S", "name": "boss"},
        {"role": "user", "content": "one\ntwo\nthree"},
        {"role": "assistant", "content": ""},
    ]
    assert seen["kwargs"] == {"a": 1, "reasoning_effort": "none", "enable_thinking": False}
    assert seen["add"] is True and seen["continue"] is False
    assert state.text_engine.seen[0].add_special_tokens is False  # the template has them already


def test_continue_final_message_and_echo(state):
    messages = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    reply = chat(
        state, messages=messages, continue_final_message=True, add_generation_prompt=False, echo=True, max_tokens=5
    )
    assert reply.json()["choices"][0]["message"]["content"] == "It is Paris"
    assert (state.text_engine.rendered[0]["add"], state.text_engine.rendered[0]["continue"]) == (False, True)
    chunks = events(chat(state, messages=messages, continue_final_message=True, echo=True, max_tokens=5, stream=True))
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "It is Paris"


def test_ids_come_from_the_client_where_given(state):
    named = call(
        state, "POST", "/v1/completions", json={"prompt": "a", "request_id": "body"}, headers={"X-Request-Id": "head"}
    )
    assert named.json()["id"] == "cmpl-head"
    assert chat(state, request_id="body", max_tokens=1).json()["id"] == "chatcmpl-body"
    assert state.live_ids == set()


def test_cached_tokens_are_shown_only_where_enabled(state):
    assert complete(state).json()["usage"]["prompt_tokens_details"] is None
    open_state = make_state(enable_prompt_tokens_details=True)
    assert complete(open_state).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    last = events(complete(open_state, stream=True, stream_options={"include_usage": True}))[-1]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
