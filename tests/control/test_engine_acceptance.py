"""What can never run is refused at once, and the message names the value, the bound and the fix."""

import pytest

from jaxserve.core.errors import ConfigError, RequestError
from tests.engine_harness import make_harness, make_request


@pytest.mark.parametrize(
    ("setup", "request_", "words"),
    [
        ({}, {"prompt": []}, ["no token"]),
        ({}, {"prompt": [5, 101]}, ["101", "[0, 100]"]),
        ({}, {"prompt": [5, -1]}, ["-1", "[0, 100]"]),
        ({"length_max": 32}, {"prompt": 32}, ["32 tokens", "max-model-len", "at most 31"]),
        ({}, {"logprobs": 9}, ["logprobs asks for 9", "at most 8"]),
        ({}, {"prompt_logprobs": -1}, ["prompt_logprobs asks for 101", "at most 8"]),
        ({"slots": 0}, {"presence_penalty": 1.0}, ["without room for penalties"]),
        ({"pages": 5}, {"prompt": 10, "max_tokens": 20}, ["30 tokens", "need 8 KV pages", "at most 11 output"]),
        ({"pages": 5}, {"prompt": 30}, ["shorten the prompt to at most 20", "--kv-cache-memory-bytes"]),
        ({"windows": (6,), "pages": 2}, {"prompt": 30}, ["need 3 KV pages", "has 2"]),
        ({"chunked": False, "tokens_max": 16}, {"prompt": 17}, ["17 tokens", "step of 16", "--enable-chunked-prefill"]),
        ({}, {"min_tokens": 1, "stop_token_ids": tuple(range(64)), "eos_token_ids": (70,)}, ["at most 64", "got 65"]),
    ],
)
def test_refused_with_the_bound_and_the_fix(setup: dict, request_: dict, words: list[str]) -> None:
    harness = make_harness(**setup)
    with pytest.raises(RequestError) as caught:
        harness.add(make_request("a", **request_))
    for word in words:
        assert word in str(caught.value)
    assert not harness.loop.has_work


@pytest.mark.parametrize(
    ("setup", "request_"),
    [
        ({"length_max": 32}, {"prompt": 31, "max_tokens": None}),
        ({"pages": 5}, {"prompt": 10, "max_tokens": 11}),
        ({"pages": 5}, {"prompt": 20, "max_tokens": 1}),
        ({"windows": (6,), "pages": 3}, {"prompt": 30, "max_tokens": 60}),
        ({"windows": (6,), "pages": 8, "chunked": False, "tokens_max": 32}, {"prompt": 30, "max_tokens": 60}),
        ({"chunked": False, "tokens_max": 16}, {"prompt": 16}),
    ],
)
def test_the_largest_that_is_accepted_runs(setup: dict, request_: dict) -> None:
    harness = make_harness(**setup)
    harness.add(make_request("a", **request_))
    harness.run().assert_alone()


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_window_runs_in_exactly_the_pages_that_are_asked_for(page_size: int, window: int, overlap: bool) -> None:
    pages = (window - 1) // page_size + 2
    harness = make_harness(windows=(window,), pages=pages, page_size=page_size, overlap=overlap)
    harness.add(make_request("a", 37, max_tokens=30), make_request("b", 21, max_tokens=30, seed=1))
    harness.run().assert_alone()
    with pytest.raises(RequestError, match=f"need {pages} KV pages"):
        make_harness(windows=(window,), pages=pages - 1, page_size=page_size).add(make_request("a", 37, max_tokens=30))


def test_without_chunked_prefill_the_step_size_must_be_known() -> None:
    with pytest.raises(ConfigError, match="max-num-batched-tokens must be set"):
        make_harness(chunked=False, tokens_max=None)  # type: ignore[arg-type]
