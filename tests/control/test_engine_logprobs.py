"""Logprobs of sampled tokens and of the prompt: right token, right position, whatever the chunks."""

import pytest

from tests.engine_harness import make_harness, make_request
from tests.fakes import alone


@pytest.mark.parametrize("tokens_max", [3, 7, 64])
@pytest.mark.parametrize("wanted", [0, 2])
def test_prompt_logprobs_are_collected_over_chunks(tokens_max: int, wanted: int) -> None:
    harness = make_harness(tokens_max=tokens_max)
    harness.add(make_request("warm", 21))
    harness.run()
    harness.add(make_request("a", 21, prompt_logprobs=wanted, max_tokens=3), make_request("b", 9, seed=2))
    harness.run().assert_alone()
    first, *others = harness.outputs["a"]
    assert first.cached_token_count == 0          # cached pages hold no logits: nothing is read from them
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 21 and first.prompt_logprobs[0] is None
    scored = [entry for entry in first.prompt_logprobs if entry is not None]
    assert [entry.token_id for entry in scored] == list(range(2, 22))
    assert tuple(entry.logprob for entry in scored) == alone(harness.requests["a"], harness.runner.shape).prompt_scores
    assert all(len(entry.top_ids) == len(entry.top_logprobs) == wanted for entry in scored)
    assert all(output.prompt_logprobs is None for output in others + harness.outputs["b"])


def test_a_prompt_of_one_token_has_no_scored_position() -> None:
    harness = make_harness()
    harness.add(make_request("a", 1, prompt_logprobs=1))
    assert harness.run().outputs["a"][0].prompt_logprobs == (None,)


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    harness = make_harness(pages=12, rows=2, tokens_max=4, length_max=44)
    harness.add(make_request("old", 4, max_tokens=None))
    harness.add(make_request("new", 32, seed=1, prompt_logprobs=1, max_tokens=2))
    harness.run().assert_alone()
    assert harness.outputs["new"][-1].preemption_count
    scores = harness.outputs["new"][0].prompt_logprobs
    assert scores is not None
    expected = alone(harness.requests["new"], harness.runner.shape).prompt_scores
    assert tuple(entry.logprob for entry in scores if entry is not None) == expected


def test_logprobs_come_with_each_token_that_asked() -> None:
    harness = make_harness()
    harness.add(make_request("a", 5, logprobs=3), make_request("b", 5, seed=1))
    harness.add(make_request("c", 5, seed=2, logprobs=0))
    harness.run().assert_alone()
    for name, wanted in (("a", 3), ("c", 0)):
        for output in harness.outputs[name]:
            (entry,) = output.logprobs
            assert entry.token_id == output.token_ids[0] and len(entry.top_ids) == wanted and entry.rank >= 1
    assert all(output.logprobs == () for output in harness.outputs["b"])
