"""Drafts that are right, wrong or half right change nothing but time: every sequence gets what it would get alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.plan import I32, RunnerShape
from jaxserve.engine.sequence import Sequence
from tests.engine_harness import make_harness, make_request
from tests.fakes import alone, make_shape


class Oracle:
    """Knows what will come, and lies in a share of the tokens. Mutable."""

    tokens_max = 4

    def __init__(self, shape: RunnerShape, *, seed: int, truth: float) -> None:
        self._shape, self._random, self._truth = shape, random.Random(seed), truth
        self.accepted = 0

    def propose(self, sequence: Sequence) -> I32:
        future = alone(sequence.request, self._shape).token_ids[sequence.known - sequence.prompt_length :]
        count = self._random.randint(0, self.tokens_max)
        drafts = [*future[:count], *range(count)][:count]
        return np.array([t if self._random.random() < self._truth else (t + 1) % 101 for t in drafts], np.int32)

    def learn(self, sequence: Sequence, *, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        self.accepted += accepted


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16), truth=st.sampled_from([0.0, 0.5, 0.9, 1.0]), overlap=st.booleans(),
    windows=st.sampled_from([(None,), (None, 6), (5,)]), pages=st.sampled_from([14, 24, 64]),
    prefix=st.booleans(), samples=st.sampled_from([2, 8, 20]), rope_switch=st.sampled_from([None, 16]),
)
def test_tokens_are_those_without_drafts(
    seed: int, truth: float, overlap: bool, windows: tuple[int | None, ...], pages: int, prefix: bool, samples: int,
    rope_switch: int | None,
) -> None:
    shape = make_shape(windows=windows, pages=pages, length_max=48, rope_switch=rope_switch)
    oracle = Oracle(shape, seed=seed, truth=truth)
    harness = make_harness(
        speculation=oracle, overlap=overlap, prefix=prefix, tokens_max=24, samples_max=samples, windows=windows,
        pages=pages, length_max=48, rope_switch=rope_switch,
    )
    chance = random.Random(seed)
    for number in range(6):
        prompt = [chance.randint(1, 3) for _ in range(chance.randint(1, 12))]
        fields = {"logprobs": 2} if number % 3 == 0 else {}
        if number % 3 == 1:
            fields = {"presence_penalty": 0.5}
        harness.add(make_request(
            f"r{number}", prompt, max_tokens=chance.randint(4, 30), seed=number, stop_token_ids=(7, 11, 13, 17),
            min_tokens=chance.choice([0, 0, 4]), **fields,
        ))
        harness.step(chance.randint(0, 3))
    harness.run().assert_alone()
    for name, request in harness.requests.items():
        if request.params.logprobs is not None:
            found = [logprob.token_id for output in harness.outputs[name] for logprob in output.logprobs]
            assert tuple(found) == harness.tokens(name)


@pytest.mark.parametrize("overlap", [False, True])
def test_right_drafts_save_steps_and_are_counted(overlap: bool) -> None:
    oracle = Oracle(make_shape(), seed=1, truth=1.0)
    harness = make_harness(speculation=oracle, overlap=overlap)
    harness.add(make_request("a", max_tokens=60))
    harness.run().assert_alone()
    stats = harness.loop.stats
    assert stats.step_count < 40
    assert sum(stats.draft_accepted_at) == stats.draft_tokens == oracle.accepted > 20
