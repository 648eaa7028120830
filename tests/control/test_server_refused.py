"""Fields that are known: refused by name where they ask for what is not built, accepted where they ask for nothing."""

import pytest

from tests.control.server_calls import chat, complete, error_of
from tests.control.server_fakes import make_state


@pytest.fixture
def state():
    return make_state()


REFUSED = {
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "auto",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "a",
    "guided_decoding_backend": "x",
    "guided_whitespace_pattern": "x",
    "structural_tag": "x",
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": True,
    "suffix": "end",
    "logprob_token_ids": [1],
    "prompt_embeds": "x",
    "repetition_detection": {},
    "thinking_token_budget": 5,
    "include_reasoning": False,
    "truncation_side": "right",
    "stream_interval": 4,
    "audio": {"voice": "x"},
    "chat_template": "{{ messages }}",
    "modalities": ["text", "audio"],
    "mm_processor_kwargs": {},
    "media_io_kwargs": {},
    "prediction": {"type": "content"},
    "web_search_options": {},
    "verbosity": "low",
    "kv_transfer_params": {},
    "ec_transfer_params": {},
    "watermarking": True,
    "return_weight_versions": True,
    "lora_request": {},
    "best_of": 3,
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("ask", [chat, complete])
def test_known_fields_without_support_are_refused_by_name(state, ask, field):
    status, kind, param, message = error_of(ask(state, **{field: REFUSED[field]}))
    assert (status, kind, param) == (400, "BadRequestError", field) and field in message
    assert ask(state, **{field: None}).status_code == 200
    assert len(state.text_engine.seen) == 1


NEUTRAL = {
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "use_beam_search": False,
    "length_penalty": 1.0,
    "suffix": "",
    "include_reasoning": True,
    "truncation_side": "left",
    "modalities": ["text"],
    "best_of": 1,
    "user": "u",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "session_id": "s",
    "vllm_xargs": {"a": 1},
    "priority": 5,
    "vendor": [1],
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize("field", NEUTRAL)
@pytest.mark.parametrize("ask", [chat, complete])
def test_fields_that_ask_for_nothing_are_accepted(state, ask, field):
    assert ask(state, **{field: NEUTRAL[field]}).status_code == 200
