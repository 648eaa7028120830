"""Sequences that outgrow the length at which keys turn another way (LongRoPE) are admitted anew, once, and no step
computes a position past it for a row that was admitted short."""

from __future__ import annotations

import pytest

from tests.engine_harness import Harness, make_harness, make_request

SWITCH = 16


def admissions(harness: Harness) -> dict[int, list[int]]:
    """Tokens known at each admission, by row; checks every entry against the admission before it."""
    known: dict[int, list[int]] = {}
    for plan in harness.runner.plans:
        for admission in plan.admissions:
            known.setdefault(admission.row, []).append(len(admission.token_ids))
        for row, start, count in zip(plan.row_A.tolist(), plan.start_A.tolist(), plan.count_A.tolist(), strict=True):
            assert known[row][-1] > SWITCH or start + count <= SWITCH, "a position past the switch in a short row"
    return known


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_it_is_computed_anew_from_what_is_known(overlap: bool, prefix: bool) -> None:
    harness = make_harness(rope_switch=SWITCH, overlap=overlap, prefix=prefix)
    harness.add(make_request("a", 10, max_tokens=20))
    harness.run().assert_alone()
    assert admissions(harness) == {0: [10, SWITCH + 1]}
    plans = (plan for plan in harness.runner.plans if plan.admissions)
    again = next(plan for plan in plans if len(plan.admissions[0].token_ids) > SWITCH)
    assert again.start_A.tolist() == [0], "cached pages whose keys turned the short way are no use to the long"


def test_lengths_at_the_edge() -> None:
    for prompt, expected in ((SWITCH - 1, [15, 17]), (SWITCH, [16, 17]), (SWITCH + 1, [17]), (40, [40])):
        harness = make_harness(rope_switch=SWITCH)
        harness.add(make_request("a", prompt, max_tokens=6))
        harness.run().assert_alone()
        assert admissions(harness) == {0: expected}, prompt


def test_many_outgrow_it_together() -> None:
    harness = make_harness(rope_switch=SWITCH, pages=24, rows=4)
    harness.add(*(make_request(f"r{i}", 4 + 3 * i, max_tokens=25, seed=i) for i in range(6)))
    harness.run().assert_alone()
    admissions(harness)
    assert harness.loop.stats.page_used_count == 0
