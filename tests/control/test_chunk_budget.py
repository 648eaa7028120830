"""`--itl-target-ms`: prompt chunks beside streams follow the measured step times; without streams nothing is cut."""

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.engine.chunk_budget import TOKENS_MIN, TOKENS_START, ChunkBudget
from jaxserve.flags import parse_serve_args
from tests.engine_harness import make_harness, make_request


@pytest.mark.parametrize(("target_ms", "tokens"), [(50, 35), (100, 85), (1000, 985), (16, TOKENS_MIN), (1, TOKENS_MIN)])
def test_it_settles_where_a_step_takes_the_target(target_ms, tokens):
    """A machine of 15 ms a step and 1 ms a token."""
    budget = ChunkBudget(target_ms / 1000)
    for _ in range(40):
        budget.observe(tokens=budget.tokens, seconds=0.015 + budget.tokens / 1000)
    assert budget.tokens == pytest.approx(tokens, rel=0.05)


def test_a_slow_step_halves_it_at_most_and_a_short_chunk_says_nothing():
    budget = ChunkBudget(0.05)
    budget.observe(tokens=64, seconds=10)
    assert budget.tokens == TOKENS_START // 2
    budget.observe(tokens=3, seconds=0.001)
    assert budget.tokens == TOKENS_START // 2
    budget.observe(tokens=32, seconds=0.01)
    assert budget.tokens == 40


@pytest.mark.parametrize("overlap", [True, False])
def test_a_long_prompt_runs_in_small_chunks_beside_a_stream_only(overlap):
    harness = make_harness(tokens_max=256, itl_target_ms=60_000, length_max=512, pages=256, overlap=overlap)
    harness.add(make_request("stream", prompt=5, max_tokens=30))
    harness.step(3)
    harness.add(make_request("long", prompt=[index % 100 for index in range(400)]))
    harness.run().assert_alone()
    beside = [plan.token_count - plan.decode_count for plan in harness.runner.plans if plan.decode_count]
    chunks = [tokens for tokens in beside if tokens]
    assert chunks[0] == TOKENS_START < chunks[2] <= TOKENS_START * 1.25**2 and sum(chunks) == 400

    alone = make_harness(tokens_max=256, itl_target_ms=1, length_max=512, pages=256, overlap=overlap)
    alone.add(make_request("long", prompt=[index % 100 for index in range(400)]))
    alone.run().assert_alone()
    assert alone.runner.plans[0].token_count == 256


def test_a_target_without_chunks_is_refused():
    with pytest.raises(ConfigError, match="itl-target-ms needs chunks"):
        parse_serve_args(["m", "--itl-target-ms", "50", "--no-enable-chunked-prefill"])
