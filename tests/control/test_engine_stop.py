"""Ends: eos, stop ids, lengths, minimum; each rule and who wins."""

import pytest

from jaxserve.engine.stop import Stop, StopRule
from tests.engine_harness import make_harness, make_request
from tests.fakes import alone


@pytest.mark.parametrize(
    ("fields", "token", "length", "expected"),
    [
        ({}, 1, 6, None),
        ({"eos_token_ids": (1, 2)}, 2, 6, Stop("stop")),
        ({"eos_token_ids": (1,), "ignore_eos": True}, 1, 6, None),
        ({"stop_token_ids": (1,)}, 1, 6, Stop("stop", 1)),
        ({"stop_token_ids": (1,), "eos_token_ids": (1,)}, 1, 6, Stop("stop")),
        ({"stop_token_ids": (1,), "eos_token_ids": (1,), "ignore_eos": True}, 1, 6, Stop("stop", 1)),
        ({"eos_token_ids": (1,), "min_tokens": 2}, 1, 6, None),
        ({"eos_token_ids": (1,), "min_tokens": 2}, 1, 7, Stop("stop")),
        ({"max_tokens": 3}, 1, 7, None),
        ({"max_tokens": 3}, 1, 8, Stop("length")),
        ({"max_tokens": 3, "eos_token_ids": (1,)}, 1, 8, Stop("stop")),
        ({"max_tokens": None}, 1, 19, None),
        ({"max_tokens": None}, 1, 20, Stop("length")),
        ({"max_tokens": 100, "min_tokens": 100, "eos_token_ids": (1,)}, 1, 20, Stop("length")),
    ],
)
def test_rules(fields: dict, token: int, length: int, expected: Stop | None) -> None:
    assert StopRule.of(make_request("a", 5, **fields), length_max=20).judge(token, length) == expected


def test_ids_masked_below_min_tokens_reach_the_runner_only_where_they_matter() -> None:
    harness = make_harness()
    harness.add(
        make_request("a", 5, min_tokens=3, max_tokens=9, stop_token_ids=(9, 4), eos_token_ids=(7,)),
        make_request("b", 5, stop_token_ids=(9, 4), eos_token_ids=(7,), seed=1),
    )
    harness.run().assert_alone()
    admissions = [admission for plan in harness.runner.plans for admission in plan.admissions]
    masked = {admission.seed: admission.stop_token_ids for admission in admissions}
    assert masked == {0: (4, 7, 9), 1: ()}


def test_min_tokens_holds_after_a_preemption() -> None:
    harness = make_harness(pages=10, rows=2, length_max=40, prefix=False)
    every = tuple(range(50))
    harness.add(
        make_request("old", 4, max_tokens=None, min_tokens=30),
        make_request("new", [7] * 4, seed=1, max_tokens=None, min_tokens=28, stop_token_ids=every),
    )
    harness.run().assert_alone()
    assert harness.outputs["new"][-1].preemption_count
    assert len(alone(harness.requests["new"], harness.runner.shape).token_ids) >= 28
